"""Quantization by transformers of a model that consists of parts: what is left out, and what is saved.

transformers quantizes a model while it loads it, and records how in the model's configuration. Here the VLM is a part
of a larger model, and may have been quantized before the parts were combined.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
"""Names that quantization configurations use for the list of excluded modules."""

STATE = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes that transformers sets on a quantized model, and that it, PEFT and Trainer read."""


def without_quantizing(
    quantization_config: Any, skipped: Sequence[str], model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> Any:
    """A copy of a quantization configuration that excludes some modules.

    Args:
        quantization_config: A configuration of transformers, or its fields.
        skipped: Regular expressions, matched from the start of a module's path.
        model_class: The model class; modules that transformers itself would skip stay skipped.
        config: The model's configuration.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    changed = copy.deepcopy(quantization_config)
    field = _skip_field(changed)
    if field is None:
        raise ValueError(
            f"`quantization_config` must be one that can leave modules out ({', '.join(SKIP_FIELDS)}), got "
            f"{type(changed).__name__}, and {', '.join(map(repr, skipped))} must not be quantized. Use "
            "BitsAndBytesConfig, for example."
        )
    chosen = getattr(changed, field)
    if chosen is None:  # otherwise our list would replace transformers' default, such as the LM head
        with torch.device("meta"):
            chosen = get_keys_to_not_convert(model_class(copy.deepcopy(config)))
    setattr(changed, field, [*chosen, *(name for name in skipped if name not in chosen)])
    return changed


def adopt_quantization(model: PreTrainedModel) -> None:
    """Record in a model that some of its direct parts are quantized, as if transformers had quantized the model itself.

    Saving, loading, PEFT and Trainer then work as for any quantized model. Nothing happens if no part is quantized.

    Args:
        model: The model.

    Raises:
        ValueError: The parts are quantized in different ways, or in one that has no list of excluded modules: the model
            couldn't be loaded again.
    """
    parts: dict[str, Any] = dict(model.named_children())
    quantizers = {path: part.hf_quantizer for path, part in parts.items() if getattr(part, "hf_quantizer", None)}
    if not quantizers:
        return
    names, ways = [], []
    for path, quantizer in quantizers.items():
        config = copy.deepcopy(quantizer.quantization_config)
        if (field := _skip_field(config)) is None:
            raise ValueError(
                f"`{path}` must be quantized in a way that can leave modules out ({', '.join(SKIP_FIELDS)}), got "
                f"{type(config).__name__}, with which the combined model couldn't be loaded again. Use "
                "BitsAndBytesConfig, for example."
            )
        # transformers excludes a module if a name matches the start of its path, or is the end of it.
        own = sorted(getattr(quantizer, "modules_to_not_convert", None) or getattr(config, field) or ())
        names += [*own, *(f"{path}.(?:{name})" for name in own)]
        setattr(config, field, None)
        ways.append(config)
    if any(way.to_dict() != ways[0].to_dict() for way in ways):
        raise ValueError(
            f"{' and '.join(f'`{path}`' for path in quantizers)} must be quantized in the same way, got "
            f"{' and '.join(type(way).__name__ for way in ways)} with other fields. transformers records one way for "
            "the whole model: quantize one part only, or both alike."
        )
    config, (first, quantizer) = ways[0], next(iter(quantizers.items()))
    quantizer = copy.copy(quantizer)
    excluded = list(dict.fromkeys([*names, *(path for path in parts if path not in quantizers)]))
    setattr(config, field, excluded)
    quantizer.quantization_config, quantizer.modules_to_not_convert = config, excluded
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    for name in STATE:
        if hasattr(parts[first], name):
            setattr(model, name, getattr(parts[first], name))


def plain_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, where a tensor that consists of others, such as torchao's, is replaced by them."""
    for name, tensor in named:
        # Sharded tensors (DTensor) have values of their own.
        if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor"):
            parts, _ = tensor.__tensor_flatten__()
            yield from plain_tensors((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield name, tensor


def saved_keys(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None = None) -> list[str]:
    """Keys of a model's tensors in its checkpoint; some ways of quantization save several tensors for a weight.

    Args:
        model: The model.
        state_dict: The tensors to save, if they were given; None: the model's.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    made = None if quantizer is None else quantizer.get_state_dict_and_metadata(model)[0]
    return list(next((state for state in (made, state_dict) if state is not None), None) or model.state_dict())


def _skip_field(quantization_config: Any) -> str | None:
    return next((name for name in SKIP_FIELDS if hasattr(quantization_config, name)), None)
