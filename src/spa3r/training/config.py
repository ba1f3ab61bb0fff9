"""Configuration files: four sections, checked key by key; the configuration of pretraining."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from yaml.reader import ReaderError

from spa3r.checks import check_ranges, is_number, shorten
from spa3r.media.files import other_encoding, shortened, text_encoding
from spa3r.models.attention import check_attention_implementation
from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
from spa3r.secret import is_secret, keep_secret, without_secrets
from spa3r.training.arguments import MAX_SEED, PretrainingArguments, RunArguments, check_arguments

MAX_NUMBER = 2**63 - 1

ELSEWHERE = {
    "dataloader_num_workers": "data.num_workers",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "resume_from_checkpoint": "training.output_dir: a run in it is resumed",
}
"""Arguments of transformers that are set in another place."""

DTYPES = ("float32", "bfloat16", "float16")

DATA_RANGES = {"max_bad_share": (0, 1), "num_workers": (0, 1024), "seed": (0, MAX_SEED)}

FREE_TO_CHANGE = (
    *("evaluation", "data.num_workers", "data.max_bad_share", "model.attn_implementation"),
    *("training.max_steps", "training.output_dir", "training.max_nonfinite_steps", "training.use_cpu"),
    *("training.logging_steps", "training.logging_first_step", "training.save_steps", "training.save_total_limit"),
    *("training.report_to", "training.run_name", "training.log_level", "training.disable_tqdm"),
)
"""What may change when a run is resumed: keys that affect length and monitoring, not what is learned."""


@strict
@dataclass
class ModelSection:
    """The model to train.

    Args:
        backbone: Folder or hub id of the frozen geometry backbone, such as VGGT.
        semantic_teacher: Folder or hub id of the frozen DINOv3; not needed if ``targets`` excludes the semantic
            features.
        init_from: Folder or hub id of a pretrained :class:`~spa3r.Spa3RForPreTraining` to start from, instead of a
            new model; its parts are loaded too, and `backbone` and `semantic_teacher` give new locations if they moved.
        dtype: Data type of the frozen weights; the trained parts are float32.
        attn_implementation: Attention back end; None: the best one that is installed.
        fields: Any other fields of :class:`~spa3r.Spa3RConfig`; in the file they are keys of the same section.
    """

    backbone: str | None = None
    semantic_teacher: str | None = None
    init_from: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@strict
@dataclass
class DataSection:
    """The scenes to train on, and how they are batched.

    Args:
        sources: Source descriptions, see :func:`~spa3r.training.make_source`.
        views: Views per scene: one number, or the lowest and highest, from which one is drawn for each step.
        pictures_per_device: Maximum number of pictures per batch.
        cameras: Where cameras come from.
        weights: Shares of the sources in the scenes drawn; None: every scene once per epoch.
        scenes_per_epoch: Length of an epoch; None: all scenes.
        max_bad_share: Share of pictures that may be unreadable.
        image_size: Width of a processed view in pixels; None: that of the model's processor, or 518.
        image_mode: How views are resized; None: as the model's processor, or ``"pretraining"``.
        num_workers: Processes that read pictures, per device; 0: only the training process.
        seed: Seed of everything drawn.
    """

    sources: list[Any] = field(default_factory=list)
    views: int | list[int] | tuple[int, ...] = (4, 12)
    pictures_per_device: int = 24
    cameras: Literal["predicted", "given"] = "predicted"
    weights: list[float | int] | None = None
    scenes_per_epoch: int | None = None
    max_bad_share: float | int = 0.05
    image_size: int | None = None
    image_mode: Literal["crop", "pad", "pretraining"] | None = None
    num_workers: int = 4
    seed: int = 0


@strict
@dataclass
class EvaluationSection:
    """Held-out scenes for evaluation during training; without sources there is none.

    Args:
        sources: As in `data`.
        scenes: How many scenes are measured; None: all.
        views: Views per scene: one number, or the lowest and highest.
        every: Steps between two evaluations. There is also one at the end.
        seed: Seed of everything drawn; scenes, frames and target views are the same every time.
    """

    sources: list[Any] = field(default_factory=list)
    scenes: int | None = 64
    views: int | list[int] | tuple[int, ...] = 8
    every: int = 1000
    seed: int = 1


@dataclass
class RunConfig:
    """Base of the commands' configuration files: four sections, checked strictly, with overrides by key.

    A subclass annotates the first three with dataclasses; that of the model has ``fields`` for other fields of the
    model's configuration. The last section holds arguments of the trainer.
    """

    model: Any
    data: Any
    evaluation: Any
    training: dict[str, Any]

    ARGUMENTS: ClassVar[type[RunArguments]]
    """The class of the trainer's arguments."""
    RECIPE: ClassVar[tuple[str, ...]]
    """Arguments that the resolved configuration lists even if nobody set them."""
    FREE_TO_CHANGE: ClassVar[tuple[str, ...]]
    """What may change when a run is resumed: keys that affect length and monitoring, not what is learned."""
    ELSEWHERE: ClassVar[dict[str, str]]
    """Arguments of transformers that are set in another place."""
    MODEL: ClassVar[type]
    """The model's configuration class."""
    DERIVED: ClassVar[tuple[str, ...]]
    """Fields of the model's configuration that are derived from its parts."""
    RANGES: ClassVar[dict[str, dict[str, tuple[float, float | None]]]]
    """Lowest and highest values of numbers in the other sections."""

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Self:
        """Create the configuration from a dictionary and check every key.

        Args:
            sections: The file's content.

        Raises:
            ValueError: A key is unknown, or a required one is missing. The message lists the known keys.
        """
        types = get_type_hints(cls)
        known = [section.name for section in dataclasses.fields(cls)]
        sections = keep_secret(_plain(sections, ""))
        _check_keys(sections, known, "", "sections")
        parts: dict[str, dict[str, Any]] = {}
        for name in known:
            section = sections.get(name) or {}
            if not isinstance(section, Mapping):
                raise ValueError(f"`{name}` must be a section with keys of its own, got {shorten(section)}.")
            parts[name] = dict(section)
        training = parts.pop("training")
        for key in training:
            if key in cls.ELSEWHERE:
                raise ValueError(f"`training.{key}` is set in another place: {cls.ELSEWHERE[key]}.")
        if training.get("report_to", "none") is None:  # null in YAML
            training["report_to"] = "none"
        own = [name for name in _names(types["model"]) if name != "fields"]
        fields = [name for name in cls.MODEL.__annotations__ if name not in cls.DERIVED]
        _check_keys(parts["model"], [*own, *fields], "model.", "keys")
        fields = {name: parts["model"].pop(name) for name in fields if name in parts["model"]}
        parts["model"]["fields"] = fields
        config = cls(**{name: _make(types[name], name, part) for name, part in parts.items()}, training=training)
        _check_keys(training, _names(cls.ARGUMENTS), "training.", "keys")
        check_arguments(cls.ARGUMENTS, training, "training.")
        for section, ranges in cls.RANGES.items():
            check_ranges(vars(getattr(config, section)), ranges, f"{section}.")
        config._check_model()
        config._check()
        if not training.get("output_dir"):
            raise ValueError("`training.output_dir` must name the folder for checkpoints and logs, got none.")
        return config

    @classmethod
    def from_yaml(cls, file: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file and apply `overrides`.

        Args:
            file: The YAML file.
            overrides: ``--section.key value`` or ``--section.key=value``, as on the command line; values are YAML.

        Raises:
            ValueError: The file is not YAML with sections, an override is malformed, or as :meth:`from_dict`.
        """
        sections = _plain(read_yaml(file), "")
        for path, value in _parse_overrides(overrides).items():
            _set(sections, path, value)
        return cls.from_dict(sections)

    def to_dict(self) -> dict[str, Any]:
        """The sections with all defaults, ready for YAML. Secrets, such as ``hub_token``, are left out."""
        plain = dataclasses.asdict(self)
        plain["model"] |= plain["model"].pop("fields")
        defaults = {one.name: one.default for one in dataclasses.fields(self.ARGUMENTS) if one.init}
        recipe = {key: defaults[key] for key in self.RECIPE}
        plain["training"] = {"output_dir": None} | recipe | plain["training"]
        return without_secrets(plain)

    def lacking_in(self, earlier: Mapping[str, Any]) -> list[str]:
        """Keys that affect what is learned and that the resolved configuration of an earlier run lacks."""
        sections = ("model", "data", "evaluation")
        keys = {f"{section}.{name}" for section in sections for name in _names(type(getattr(self, section)))}
        keys |= {f"training.{name}" for name in self.RECIPE}
        now = _flat(self.to_dict())
        return sorted(
            key
            for key in keys & now.keys() - _flat(earlier).keys()
            if not (now[key] is None or _is_free(key, self.FREE_TO_CHANGE))
        )

    def to_yaml(self) -> str:
        """As :meth:`to_dict`, as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def _check(self) -> None:
        """Reject combinations of values that don't fit together."""

    def _check_model(self) -> None:
        """Reject wrong fields of the model before anything is loaded."""
        section, config = self.model, self.MODEL()
        for name, value in section.fields.items():
            try:
                setattr(config, name, value)
            except ValueError as error:
                raise ValueError(f"`model.{name}`: {error}") from error
        if section.dtype != "auto" and section.dtype not in DTYPES:
            raise ValueError(f"`model.dtype` must be one of auto, {', '.join(DTYPES)}, got {shorten(section.dtype)}.")
        if section.attn_implementation is not None:
            check_attention_implementation(section.attn_implementation)


@dataclass
class PretrainingConfig(RunConfig):
    """The configuration of ``spa3r pretrain``: a YAML file of four sections.

    Attributes:
        model: The model.
        data: The scenes to train on.
        evaluation: The held-out scenes.
        training: Fields of :class:`~spa3r.training.PretrainingArguments`.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    training: dict[str, Any] = field(default_factory=dict)

    ARGUMENTS = PretrainingArguments
    RECIPE = (
        *("max_steps", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("weight_decay", "max_grad_norm", "seed", "bf16", "save_steps", "save_total_limit", "logging_steps"),
        *("max_nonfinite_steps",),
    )
    FREE_TO_CHANGE = FREE_TO_CHANGE
    MODEL = Spa3RConfig
    DERIVED = (
        *("backbone_config", "backbone_name_or_path", "semantic_teacher_config", "semantic_teacher_name_or_path"),
        "semantic_hidden_size",
    )
    RANGES = {
        "data": DATA_RANGES
        | dict.fromkeys(("views", "pictures_per_device", "scenes_per_epoch", "image_size"), (1, None))
        | {"weights": (0, None)},
        "evaluation": dict.fromkeys(("scenes", "views", "every"), (1, None)) | {"seed": (0, MAX_SEED)},
    }
    ELSEWHERE = ELSEWHERE | {
        "per_device_train_batch_size": "data.pictures_per_device",
        "per_device_eval_batch_size": "data.pictures_per_device",
        "num_train_epochs": "training.max_steps",
    }

    def _check(self) -> None:
        if not self.data.sources:
            raise ValueError("`data.sources` must list at least one source of scenes, got none.")
        for section in (self.data, self.evaluation):
            if not isinstance(section.sources, list) or not all(isinstance(one, dict) for one in section.sources):
                raise ValueError(
                    "`sources` must be a list of sections such as {type: folder, root: photos}, got "
                    f"{section.sources!r}."
                )
        if self.model.init_from is None and self.model.backbone is None:
            raise ValueError(
                "`model.backbone` must say where the frozen backbone is (a folder or hub id), or `model.init_from` "
                "where a Spa3RForPreTraining is to start from; got neither."
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any], free_to_change: Sequence[str]) -> list[str]:
    """Differences between two resolved configurations that prevent resuming a run: ``key: before -> now``."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key, free_to_change)
    ]


def _is_free(key: str, free_to_change: Sequence[str]) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in free_to_change)


def _names(section: type[Any]) -> list[str]:
    """Names of the arguments of a dataclass."""
    return [one.name for one in dataclasses.fields(section) if one.init]


def _make(section: type[Any], name: str, values: dict[str, Any]) -> Any:
    """Create a section after checking its keys and the types of its values."""
    _check_keys(values, _names(section), f"{name}.", "keys")
    try:
        return section(**values)
    except StrictDataclassError as error:
        raise ValueError(f"`{name}`: {shortened(' '.join(str(error).split()), 400)}. Correct the value.") from error


def _check_keys(section: Mapping[str, Any], known: Sequence[str], prefix: str, kind: str) -> None:
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"`{prefix}{key}` is unknown{f': did you mean `{prefix}{near[0]}`?' if near else '.'} Known {kind}: "
                f"{', '.join(sorted(known))}."
            )


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    overrides, rest = {}, list(arguments)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or "." not in name:
            raise ValueError(
                "An override must read --section.key value, such as --training.max_steps 100, got "
                f"{shorten(option.partition('=')[0])}."
            )
        if not equals:
            if not rest:
                raise ValueError(f"`{option}` must be followed by a value, got nothing.")
            value = rest.pop(0)
        overrides[name] = _parse_yaml(value, f"The value of `--{name}`")
    return overrides


def _set(sections: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = sections
    for parent in parents:
        key = _key_in(place, parent, path)
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[key]
    place[_key_in(place, last, path)] = value


def _key_in(place: Any, part: str, path: str) -> str | int:
    """A part of a path, as a key of a section or an index of a list."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ValueError(f"`{path}` leads into {shorten(place)}, which has no keys.")
    if not part.isdecimal() or int(part) >= len(place):
        raise ValueError(f"`{path}`: wanted a number below {len(place)} to choose from a list, got {part!r}.")
    return int(part)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _plain(tree: Any, path: str) -> Any:
    """Copy the sections to a new tree in which no two branches are the same object.

    Raises:
        ValueError: A value is not a section, a list, a string, a finite number, True, False or None.
    """
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise ValueError(f"A key in `{path or 'the configuration'}` must be a text, got {shorten(key)}.")
        return {key: _plain(value, f"{path}.{key}" if path else key) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value, f"{path}.{index}") for index, value in enumerate(tree)]
    if isinstance(tree, os.PathLike):
        return os.fspath(tree)
    most = math.inf if isinstance(tree, float) else MAX_NUMBER
    if tree is None or isinstance(tree, bool | str) or is_number(tree, -most, most):
        return tree
    kind = "a number that is not finite or too large" if isinstance(tree, int | float) else f"a {type(tree).__name__}"
    raise ValueError(
        f"`{path}` must be a text, a finite number, True, False or a list or section of them, got {kind}"
        f"{'' if is_secret(path) else f' ({shorten(tree)})'}. Put a text into quotes."
    )


# YAML

MAX_CHARACTERS, MAX_VALUES = 1_000_000, 100_000
"""Limits of a configuration file; no sensible one exceeds them. Aliases count every time they are used."""


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The sections of a configuration file.

    Raises:
        ValueError: The file is not YAML, too large, or has no sections.
        OSError: The file doesn't exist or can't be opened.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no configuration file {file}. Check the path.")
    try:
        with open(file, encoding=text_encoding(file)) as content:
            text = content.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise other_encoding(file, error) from error
    sections = _parse_yaml(text, str(file))
    if not isinstance(sections, dict | None):
        raise ValueError(
            f"{file} must hold sections (model, data, evaluation, training), got a {type(sections).__name__}."
        )
    return sections or {}


def _parse_yaml(text: str, what: str) -> Any:
    """Parse YAML. Error messages never show the text, which may hold a token."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} must have at most {MAX_CHARACTERS} characters, got more. Is it the right file?")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{what} can't be read as YAML: {error.problem or error.context}{place}.") from error
    except RecursionError as error:
        raise ValueError(f"{what} can't be read as YAML: it is nested too deeply.") from error
    except ReaderError as error:
        raise ValueError(f"{what} can't be read as YAML: a character that is not allowed ({error.reason}).") from error
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:  # such as June 31
        raise ValueError(f"{what} can't be read as YAML: {error}.") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; this loader reads it as a number, as users expect."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _count_values(node: yaml.Node, counts: dict[int, int], above: set[int]) -> int:
    """Count the values of a node with aliases expanded; reject too many values, cycles and duplicate keys."""
    if id(node) in counts:
        return counts[id(node)]
    if id(node) in above:
        raise ValueError("an alias stands for something that holds it")
    above.add(id(node))
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the key {twice!r} stands twice in one section")
    count = 1 + sum(_count_values(child, counts, above) for child in children)
    if count > MAX_VALUES:
        raise ValueError(f"it stands for more than {MAX_VALUES} values")
    above.remove(id(node))
    counts[id(node)] = count
    return count


__all__ = ["DataSection", "EvaluationSection", "ModelSection", "PretrainingConfig"]
