"""Checkpoints in the layouts of the research code: finding them, reading them, renaming their tensors.

A layout is recognized by its files and keys. Tensors are read as memory maps, and renamed and split as views, so a
checkpoint is converted during loading without a copy. Pickles are read with ``weights_only=True``: only tensors and
plain values are ever unpickled. Every key of a source is either translated, known to be unused, or reported as an
error. The tables of keys are in the models' own ``released_*.py``.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files, resolve_revision

from spa3r.checkpoints import EMBEDDED

Kind = Literal["vggt", "depth-anything-3", "spa3r", "spa3-vlm"]

OUR_TYPES = ("vggt", "depth_anything_3", "spa3r", "spa3_vlm")
"""``model_type`` of checkpoints in our own layout."""

DESCRIPTIONS: dict[Kind, str] = {
    "vggt": "a VGGT",
    "depth-anything-3": "a Depth Anything 3",
    "spa3r": "a Spa3R",
    "spa3-vlm": "a Spa3-VLM",
}
LOADERS: dict[Kind, str] = {
    "vggt": "VggtModel",
    "depth-anything-3": "DepthAnything3Model",
    "spa3r": "Spa3RModel",
    "spa3-vlm": "Spa3VLM",
}

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
"""Arguments of ``from_pretrained`` that also apply to parts that a checkpoint only refers to."""

WHERE = (*HUB_KWARGS, "revision", "subfolder")
"""Arguments of ``from_pretrained`` that locate the files of the checkpoint itself."""

INDEX = "model.safetensors.index.json"
CANDIDATES: dict[Kind, tuple[str, ...]] = {
    "vggt": ("model.safetensors", INDEX, "model.pt"),
    "depth-anything-3": ("model.safetensors", INDEX),
    "spa3r": ("spa3r.ckpt", "spa3r.safetensors"),
    "spa3-vlm": ("model.safetensors", INDEX),
}
"""Names of the weight files, as they were released."""

VLM_SUBFOLDER = "spa3_vlm"
VLM_TYPE = "qwen2_5_vl"
SPA3R_PREFIX = "geometry_encoder.spa3r."
PICKLES = (".pt", ".pth", ".ckpt", ".bin")

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError)
"""Errors of reading a pickle: a file that is not a pickle can raise any of them."""


# Renaming


@dataclass(frozen=True)
class Rule:
    """One row of a table: keys that match `pattern` become `key`; None drops them.

    Args:
        pattern: A regular expression for whole keys.
        key: The replacement, as in ``re.sub``, or a function of the match; or one for each tensor that `tensor` splits
            into.
        tensor: The transformation of the tensor.
    """

    pattern: str
    key: str | Callable[[re.Match], str] | tuple[str | None, ...] | None
    tensor: Callable[[Tensor], Any] = field(default=lambda tensor: tensor)

    def apply(self, match: re.Match, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The new keys of one match, with their tensors."""
        if self.key is None:
            return
        keys = self.key if isinstance(self.key, tuple) else (self.key,)
        tensors = self.tensor(tensor) if isinstance(self.key, tuple) else (self.tensor(tensor),)
        for key, part in zip(keys, tensors, strict=True):
            if key is not None:
                yield match.expand(key) if isinstance(key, str) else key(match), part


def layer_rules(source: str, target: str) -> list[Rule]:
    """The rules for a stack of transformer layers."""
    return [
        Rule(rf"{source}\.(\d+)\.norm(1|2)\.(weight|bias)", rf"{target}.\1.norm\2.\3"),
        Rule(rf"{source}\.(\d+)\.attn\.(qkv|proj|q_norm|k_norm)\.(weight|bias)", rf"{target}.\1.attention.\2.\3"),
        Rule(rf"{source}\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)", rf"{target}.\1.mlp.\2.\3"),
        Rule(rf"{source}\.(\d+)\.ls(1|2)\.gamma", rf"{target}.\1.layer_scale\2"),
    ]


def dense_head_rules(source: str, target: str) -> list[Rule]:
    """The rules for a dense head."""
    scratch = rf"{source}\.scratch"
    return [
        Rule(rf"{source}\.norm\.(weight|bias)", rf"{target}.norm.\1"),
        Rule(rf"{source}\.projects\.(\d)\.(weight|bias)", rf"{target}.projections.\1.\2"),
        Rule(rf"{source}\.resize_layers\.(\d)\.(weight|bias)", rf"{target}.resizers.\1.\2"),
        Rule(rf"{scratch}\.layer([1-4])_rn\.weight", lambda m: f"{target}.laterals.{int(m[1]) - 1}.weight"),
        Rule(
            rf"{scratch}\.refinenet([1-4])\.resConfUnit(1|2)\.(conv1|conv2)\.(weight|bias)",
            lambda m: f"{target}.fusions.{int(m[1]) - 1}.{'skip_unit' if m[2] == '1' else 'unit'}.{m[3]}.{m[4]}",
        ),
        Rule(
            rf"{scratch}\.refinenet([1-4])\.out_conv\.(weight|bias)",
            lambda m: f"{target}.fusions.{int(m[1]) - 1}.projection.{m[2]}",
        ),
        Rule(rf"{scratch}\.output_conv1\.(weight|bias)", rf"{target}.output_conv1.\1"),
        Rule(
            rf"{scratch}\.output_conv2\.(0|2)\.(weight|bias)",
            lambda m: f"{target}.output_conv{2 if m[1] == '0' else 3}.{m[2]}",
        ),
    ]


def translate(tensors: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Rename (and reshape) every tensor by the first rule whose pattern matches its whole key.

    Raises:
        ValueError: No rule matches some keys; the message names all of them.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    translated, unknown = {}, []
    for key, tensor in tensors.items():
        for pattern, rule in compiled:
            if match := pattern.fullmatch(key):
                translated.update(rule.apply(match, tensor))
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"The checkpoint has keys that the converter doesn't know: {quote_keys(unknown)}. It converts the released "
            "VGGT-1B, Depth Anything 3, spa3r.ckpt and spa3_vlm files; check that `kind` names the right one."
        )
    return translated


def require(weights: Mapping[str, Tensor], *keys: str) -> None:
    """Raise if weights lack keys."""
    if missing := [key for key in keys if key not in weights]:
        raise ValueError(
            f"The checkpoint lacks keys (in our names): {quote_keys(missing)}. It is incomplete, or `kind` is wrong."
        )


STEMS = (
    (r"aggregator\.patch_embed\.patch_embed\.proj\.weight", r"aggregator\.patch_embed\.pos_embed"),
    (r"backbone\.pretrained\.patch_embed\.proj\.weight", r"backbone\.pretrained\.pos_embed"),
)
"""The released backbones' keys of the patches' projection and of the position embedding."""


def view_size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Side in pixels of the views, and of their patches, that a released checkpoint with a backbone was trained on."""
    for stem in STEMS:
        found = [next((key for key in tensors if re.search(rf"(^|\.){pattern}$", key)), None) for pattern in stem]
        if found[0] is not None and found[1] is not None:
            patch = tensors[found[0]].shape[-1]
            return math.isqrt(tensors[found[1]].shape[1] - 1) * patch, patch
    raise ValueError(
        "The checkpoint lacks the patch embedding of a backbone, which gives the size of its views. It is incomplete: "
        "download it again."
    )


def count_layers(weights: Mapping[str, Tensor], stack: str) -> int:
    """Number of layers of a stack."""
    indices = [int(match[1]) for key in weights if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", key))]
    return max(indices, default=-1) + 1


def own_fields(fields: Mapping[str, Any] | PreTrainedConfig) -> dict[str, Any]:
    """Fields of a configuration, without the metadata of its serialized form."""
    fields = fields.to_diff_dict() if isinstance(fields, PreTrainedConfig) else fields
    bookkeeping = ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype")
    return {key: value for key, value in fields.items() if key not in bookkeeping}


def quote_keys(keys: Iterable[str], limit: int = 8) -> str:
    """A readable list of checkpoint keys for an error message."""
    keys = sorted(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


# Reading


def read_checkpoint(source: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder, from safetensors (sharded or not) or a pickle of tensors, as memory maps.

    Raises:
        FileNotFoundError: The file doesn't exist, or the folder contains no weights.
        ValueError: A file is truncated or damaged, or a pickle contains anything but tensors and plain values.
    """
    if not source.exists():
        raise FileNotFoundError(f"`source` must be a checkpoint file or folder, and {source} doesn't exist.")
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(p for p in source.iterdir() if p.suffix in PICKLES)
        if not files:
            raise FileNotFoundError(
                f"`source` must hold weights (*.safetensors, *.pt, *.pth, *.ckpt or *.bin), and {source} holds none."
            )
    return read_files(files)


def read_files(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files by name, as memory maps."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{file} can't be read as safetensors ({error}). It is truncated or damaged: download it again."
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UNREADABLE as error:
        raise ValueError(
            f"{file} can't be read: only pickles of tensors and plain values are loaded, and they must be complete "
            f"({type(error).__name__}). If you trust it, save its state dict as safetensors and convert that."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors by name, got {type(content).__name__}.")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


# Finding


@dataclass(frozen=True)
class Location:
    """A local folder, or a hub repository from which single files are downloaded."""

    name: str
    subfolder: str = ""
    hub: Mapping[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        """A file of the folder, or None."""
        found = cached_file(
            self.name,
            name,
            subfolder=self.subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self.hub,
        )
        return None if found is None else Path(found)

    def shards(self, index: Path) -> list[Path]:
        """The files that an index lists."""
        files, _ = get_checkpoint_shard_files(self.name, str(index), subfolder=self.subfolder, **self.hub)
        if missing := sorted(Path(file).name for file in files if not Path(file).is_file()):
            raise FileNotFoundError(
                f"{index} names {len(files)} files of weights, and {quote_keys(missing)} are missing. Download the "
                "checkpoint again."
            )
        return [Path(file) for file in files]

    def folder(self, patterns: Sequence[str]) -> Path:
        """The local folder, with the files that match these patterns."""
        if Path(self.name).is_dir():
            return Path(self.name) / self.subfolder
        hub = {key: value for key, value in self.hub.items() if key != "proxies" and value is not None}
        patterns = [f"{self.subfolder}/{pattern}" if self.subfolder else pattern for pattern in patterns]
        return Path(snapshot_download(self.name, allow_patterns=patterns, **hub)) / self.subfolder

    def below(self, subfolder: str) -> Location:
        return replace(self, subfolder=f"{self.subfolder}/{subfolder}" if self.subfolder else subfolder)

    def model_type(self) -> str | None:
        """The ``model_type`` in ``config.json``; None if it or the file is missing."""
        file = self.file("config.json")
        try:
            fields = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        except ValueError:  # the loader reports it
            return None
        return fields.get("model_type") if isinstance(fields, dict) else None


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint in a released layout.

    Attributes:
        name: Folder, file or hub id, as requested.
        kind: The kind of model.
        weights: The weight files, or their index.
        location: The folder of the weights, local or on the hub.
    """

    name: str
    kind: Kind
    weights: tuple[Path, ...]
    location: Location

    def tensors(self) -> dict[str, Tensor]:
        """All tensors with their released names, as memory maps.

        Raises:
            FileNotFoundError: A shard is missing.
            ValueError: A file is truncated or damaged.
        """
        (first, *_) = self.weights
        return read_files(self.location.shards(first) if first.name == INDEX else self.weights)

    def file(self, name: str) -> Path | None:
        """A file in the same folder as the weights, or None."""
        return self.location.file(name)


_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Pattern of repository names on the hub."""


@dataclass(frozen=True)
class AdapterBase:
    """The location of the base model of a PEFT adapter checkpoint.

    Attributes:
        base: Folder or hub id; None if the adapter names none.
        revision: Revision of the base model's repository.
    """

    base: str | None
    revision: str | None

    @property
    def where(self) -> dict[str, Any]:
        """Arguments for ``from_pretrained`` of the base model."""
        return {} if self.revision is None or Path(str(self.base)).exists() else {"revision": self.revision}


def find_adapter(name_or_path: str | Path | None, subfolder: str | None = None, **hub: Any) -> AdapterBase | None:
    """Find the base model of a PEFT adapter checkpoint in a folder or on the hub.

    Args:
        name_or_path: Folder or hub id.
        subfolder: Subfolder, as in ``from_pretrained``.
        **hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``, ``proxies``.

    Returns:
        None if there is a whole model or no adapter.

    Raises:
        ValueError: ``adapter_config.json`` is damaged.
    """
    name = str(name_or_path)
    if name_or_path is None or name == EMBEDDED:
        return None
    if not (Path(name).is_dir() or (_REPOSITORY.fullmatch(name) and not Path(name).exists())):
        return None
    location = Location(name, subfolder or "", hub)
    if location.file("config.json") is not None or (file := location.file("adapter_config.json")) is None:
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return AdapterBase(fields.get("base_model_name_or_path") or None, fields.get("revision"))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{name} holds an adapter_config.json that can't be read ({error}). It is damaged: save it again."
        ) from error


def find_released(
    name_or_path: str | Path | None,
    wanted: Sequence[Kind],
    wanted_by: str,
    subfolder: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> ReleasedCheckpoint | None:
    """Find the checkpoint in a released layout that a name refers to.

    Args:
        name_or_path: Folder, file or hub id.
        wanted: Accepted kinds, in order of preference.
        wanted_by: The caller's name for error messages.
        subfolder: Subfolder, as in ``from_pretrained``.
        revision: Branch, tag or commit on the hub; all files come from the same commit.
        **hub: ``cache_dir``, ``token``, ``local_files_only``, ``force_download``, ``proxies``.

    Returns:
        None if the name refers to something else: a checkpoint of ours, another model, nothing at all.

    Raises:
        ValueError: It is a released checkpoint of another kind, a file that is no checkpoint, or damaged.
    """
    if name_or_path is None or name_or_path == EMBEDDED or not wanted:
        return None
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_file():
        kind = kind_of(_keys([path]))
        if kind is None:
            raise ValueError(
                f"{path} is a file in an unknown layout, not a released one (VGGT-1B, Depth Anything 3, "
                "spa3r.ckpt, spa3_vlm): its "
                "keys are unknown. A checkpoint of this library is loaded by its folder."
            )
        found = iter([ReleasedCheckpoint(name, kind, (path,), Location(str(path.parent)))])
    else:
        if not path.is_dir():
            if not _REPOSITORY.fullmatch(name):  # a folder that doesn't exist
                return None
            where = {key: hub[key] for key in ("token", "cache_dir") if key in hub}
            offline = bool(hub.get("local_files_only"))
            hub["revision"] = resolve_revision(name, revision, local_files_only=offline, **where)
        location = Location(name, subfolder or "", hub)
        model_type = location.model_type()
        if model_type in OUR_TYPES:
            return None
        # Other kinds are searched only if that downloads nothing.
        others = [kind for kind in CANDIDATES if kind not in wanted and path.is_dir()]
        found = _search(name, location, model_type, [*wanted, *others])
    other = None
    for checkpoint in found:
        if checkpoint.kind in wanted:
            return checkpoint
        other = other or checkpoint
    if other is not None:
        raise ValueError(
            f"{name} holds {DESCRIPTIONS[other.kind]} in its released layout, and {wanted_by} expects "
            f"{' or '.join(DESCRIPTIONS[kind] for kind in wanted)}. Load it with {LOADERS[other.kind]}."
        )
    return None


def _search(
    name: str, location: Location, model_type: str | None, kinds: Sequence[Kind]
) -> Iterator[ReleasedCheckpoint]:
    """Search a folder for the weight files of these kinds, in order."""
    for kind in kinds:
        if kind != "spa3-vlm":
            if model_type is None:
                yield from _look(name, kind, location)
            continue
        for place in (location, location.below(VLM_SUBFOLDER)):
            if place.model_type() == VLM_TYPE:
                yield from _look(name, kind, place)


def _look(name: str, kind: Kind, location: Location) -> Iterator[ReleasedCheckpoint]:
    """The checkpoint of any kind under the file names of one kind; in a local folder under any name."""
    files: list[list[Path]] = [
        [file] for candidate in CANDIDATES[kind] if (file := location.file(candidate)) is not None
    ]
    folder = Path(location.name) / location.subfolder
    if not files and folder.is_dir():
        shards = sorted(folder.glob("*.safetensors"))
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
        files = [shards] * bool(shards) + [[file] for file in pickles]
    for group in files:
        if (actual := kind_of(_keys(group))) is not None:
            yield ReleasedCheckpoint(name, actual, tuple(group), location)
            return


def _keys(files: Sequence[Path]) -> list[str]:
    """The keys of weight files, or of an index."""
    if files[0].name != INDEX:
        return list(read_files(files))
    try:
        return list(json.loads(files[0].read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{files[0]} can't be read as an index of weights. Download it again.") from error


def kind_of(keys: Sequence[str]) -> Kind | None:
    """The kind of released checkpoint with these keys; None if unknown."""
    names = {key.removeprefix("model.") for key in keys}
    if any(name.startswith(SPA3R_PREFIX) for name in names):
        return "spa3-vlm"
    if "query_embed.weight" in names or any(name.startswith("encoder.blocks.") for name in names):
        return "spa3r"
    if any(name.startswith("aggregator.") for name in names):
        return "vggt"
    if any(name.startswith("backbone.pretrained.") for name in names):
        return "depth-anything-3"
    return None
