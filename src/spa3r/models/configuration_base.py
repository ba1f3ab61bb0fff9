"""Shared code of our configurations: fields with ranges, and errors that name the field. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from spa3r.checks import is_count, is_number, is_of_type, range_words, shorten, type_words

Config = TypeVar("Config", bound=PreTrainedConfig)

MAX_WIDTH = 16384
"""Maximum layer width. Like all limits here, far above real models, and low enough to fail fast."""

MAX_LAYERS = 512
"""Maximum number of layers in a stack."""

MAX_PARAMETERS = 20_000_000_000
"""Maximum number of parameters of one of our models, estimated from its sizes."""

FOREIGN_LIMITS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim"), 2**20),
    **dict.fromkeys(("num_hidden_layers", "depth"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 2**16),
    **dict.fromkeys(("in_channels", "num_channels"), 2**12),
    **dict.fromkeys(("patch_size", "temporal_patch_size"), 2**10),
    "vocab_size": 2**26,
}
"""Limits of sizes in the configurations of transformers' models; each size must be at least 1."""

MAX_FOREIGN_PARAMETERS = 200_000_000_000
"""Maximum parameters of embeddings, projections and dense layers in a stack of such a model, without experts."""


def count(default: int | None, lowest: int = 1, highest: int = MAX_WIDTH) -> Any:
    """A configuration field: a whole number in a range; None is allowed if it is the default."""
    return _field(default, lambda value: is_count(value, lowest, highest), range_words(lowest, highest))


def number(default: float, lowest: float, highest: float, above: bool = False) -> Any:
    """A configuration field: a finite number in a range; `above` excludes the lowest value itself."""
    words = range_words(lowest, highest, "a number", above)
    return _field(default, lambda value: is_number(value, lowest, highest, above), words)


def submodel() -> Any:
    """A configuration field: a submodel's configuration, or its fields, of which ``__post_init__`` makes one."""
    allowed = dict[str, Any] | PreTrainedConfig
    return _field(None, lambda value: is_of_type(value, allowed), type_words(allowed))


def _field(default: Any, is_right: Callable[[Any], bool], wanted: str) -> Any:
    if default is None:
        wanted = f"{wanted}, or None"

    def check(value: Any) -> None:
        if not is_right(value) and not (value is None and default is None):
            raise ValueError(wanted)  # `checked` adds the field's name and the value

    return validated_field(check, default=default, metadata={"wanted": wanted})


def checked(cls: type[Config]) -> type[Config]:
    """Like huggingface_hub's ``strict``, but raises a ValueError with the field's name, expected and actual value.

    Args:
        cls: A configuration class.
    """
    cls = strict(cls)
    assign, construct = cls.__setattr__, cls.__init__

    def __setattr__(self, name: str, value: Any) -> None:
        if name in INHERITED and not INHERITED[name][0](value):
            raise ValueError(f"`{name}` of {cls.__name__} must be {INHERITED[name][1]}, got {shorten(value)}.")
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError as error:
            field = cls.__dataclass_fields__[name]
            wanted = field.metadata.get("wanted") or type_words(field.type)
            raise ValueError(f"`{name}` of {cls.__name__} must be {wanted}, got {shorten(value)}.") from error

    @wraps(construct)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Other unknown names are kept, as in transformers; a near match of a field's name is a typo.
        known = list(cls.__dataclass_fields__)
        for name in kwargs.keys() - known:
            if near := difflib.get_close_matches(name, known, 1, cutoff=0.9):
                raise ValueError(f"`{name}` is not a field of {cls.__name__}: did you mean `{near[0]}`?")
        try:
            construct(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"The fields of {cls.__name__} contradict one another: {_one_line(error)}") from error

    cls.__setattr__, cls.__init__ = __setattr__, __init__  # ty: ignore[invalid-assignment]  # a decorator's work
    return cls


DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")

INHERITED = {
    "dtype": (
        lambda value: value is None or type(value).__name__ == "dtype" or (isinstance(value, str) and value in DTYPES),
        f"a torch.dtype, {', '.join(map(repr, DTYPES))} or None",
    ),
    **dict.fromkeys(
        ("id2label", "label2id"), (lambda value: value is None or isinstance(value, dict), "a dictionary or None")
    ),
    **dict.fromkeys(
        ("output_hidden_states", "return_dict", "is_encoder_decoder"),
        (lambda value: value is None or isinstance(value, bool), "True, False or None"),
    ),
    **dict.fromkeys(
        ("problem_type", "transformers_version"),
        (lambda value: value is None or isinstance(value, str), "a text or None"),
    ),
    "chunk_size_feed_forward": (lambda value: is_count(value, 0), "a whole number of at least 0"),
    "architectures": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of texts or None",
    ),
}
"""Inherited fields whose types transformers doesn't check: allowed types, and the description for errors."""


def make_part(name: str, given: dict[str, Any] | PreTrainedConfig | None, part: type[Config]) -> Config:
    """The configuration of a submodel of ours; None: its defaults.

    Args:
        name: Name of our field, for errors.
        given: The submodel's fields, or its configuration.
        part: The configuration class.

    Raises:
        ValueError: The configuration belongs to another model, or a field is invalid.
    """
    if isinstance(given, part):
        return given
    fields = given if isinstance(given, dict) else {}
    kind = given.model_type if isinstance(given, PreTrainedConfig) else fields.get("model_type", part.model_type)
    if isinstance(given, PreTrainedConfig) or kind != part.model_type:
        raise ValueError(
            f"`{name}` must be a {part.__name__} or its fields, got those of a model of type {shorten(kind)}."
        )
    try:
        return part(**fields)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error


def make_foreign(name: str, fields: dict[str, Any], default_type: str | None = None) -> PreTrainedConfig:
    """Build the configuration of a transformers model from its fields.

    Args:
        name: Name of our field, for errors.
        fields: The fields, with ``model_type``.
        default_type: The ``model_type`` if it is missing.

    Raises:
        ValueError: The family is missing or unknown, or a field is invalid.
    """
    fields = dict(fields)
    family = fields.pop("model_type", default_type)
    if family is None:
        raise ValueError(f"`{name}` must name its family, as in {{'model_type': 'qwen2_5_vl', ...}}.")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ValueError(
            f"`{name}` must name a family that this version of transformers knows in `model_type`, got "
            f"{shorten(family)}. Correct the name, or install a newer transformers."
        )
    try:
        return AutoConfig.for_model(family, **fields)
    except (StrictDataclassError, AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` has a field that the family {family!r} doesn't accept: {_one_line(error)}"
        ) from error


def check_foreign_sizes(name: str, config: PreTrainedConfig) -> None:
    """Raise for sizes of a transformers model that can't be built: zero, negative, or too large alone or together.

    Args:
        name: Name of our field, for errors.
        config: The model's configuration; its sub-configurations are checked too.

    Raises:
        ValueError: A size is invalid; the message names the field.
    """
    for field, highest in FOREIGN_LIMITS.items():
        value = getattr(config, field, None)
        if isinstance(value, int | float | str) and not is_count(value, 1, highest):
            raise ValueError(f"`{name}.{field}` must be {range_words(1, highest)}, got {shorten(value)}.")
    width, inner, layers, words = (
        value if isinstance(value := getattr(config, field, None), int) else 0
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    if (estimate := width * (layers * (width + inner) + words)) > MAX_FOREIGN_PARAMETERS:
        raise ValueError(
            f"The sizes in `{name}` must make a stack of at most {MAX_FOREIGN_PARAMETERS / 1e9:.0f} billion "
            f"parameters, got more than {estimate / 1e9:.0f} billion: {layers} layers of width {width} ({inner} "
            f"inside), {words} words. Correct them, or take the configuration that belongs to the weights."
        )
    for part in config.sub_configs:
        if isinstance(sub := getattr(config, part, None), PreTrainedConfig):
            check_foreign_sizes(f"{name}.{part}", sub)


def check_parameters(config: PreTrainedConfig, estimate: float) -> None:
    """Raise for a configuration whose sizes are valid individually but make a model that is too large.

    Args:
        config: One of our configurations.
        estimate: Approximate number of parameters.

    Raises:
        ValueError: The estimate exceeds :data:`MAX_PARAMETERS`.
    """
    if estimate > MAX_PARAMETERS:
        raise ValueError(
            f"The sizes of {type(config).__name__} must make a model of at most {MAX_PARAMETERS / 1e9:.0f} billion "
            f"parameters, got about {estimate / 1e9:.0f} billion. Lower its widths or its numbers of layers."
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
