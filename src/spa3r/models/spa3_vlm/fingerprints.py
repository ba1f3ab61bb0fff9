"""Fingerprints of models and processors: with equal fingerprints, a saved scene gives the same answers."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from spa3r.models.placement import full_state_dict
from spa3r.models.quantization import plain_tensors
from spa3r.models.spa3_vlm.processing_spa3_vlm import TOKENIZING

SAMPLES = 16
"""Number of values sampled from each tensor."""

PASSING = (
    "_attn_was_changed",  # of transformers 5.19
    *("transformers_version", "_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype"),
    *("backbone_name_or_path", "semantic_teacher_name_or_path"),
)
"""Configuration fields that record a model's origin and don't affect its results."""

WRAPPED = ("base_layer", "original_module", "token_adapter")
"""PEFT's names for a wrapped layer inside its wrapper."""

PROBE = "Where is it?"


def model_fingerprint(model: PreTrainedModel) -> str:
    """A fingerprint of a model's weights, configuration and active adapters.

    It includes names, shapes, types and some values of all weights, so a single training step changes it. It doesn't
    depend on the device, on offloading or on the attention back end. Of PEFT's adapters (LoRA and others), only active
    ones count: their names, weights and scales, and whether they are merged. A model whose adapters are all disabled
    has the fingerprint of the model without adapters, and a loaded but inactive adapter changes nothing.

    Args:
        model: Any module with parameters.
    """
    digest = hashlib.sha256(canonical_json(model.config.to_dict()))
    names, adapters = _acting(model)
    digest.update(canonical_json(adapters))
    acting: dict[str, Tensor] = {}
    for key, tensor in full_state_dict(model).items():
        if (name := names.get(key, key)) is not None:
            for part, values in plain_tensors([(name, tensor)]):
                acting.setdefault(part, values)
    samples: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in acting.items():
        if tensor.device.type != "meta" and tensor.numel():
            values = tensor.detach().reshape(-1)[:: max(tensor.numel() // SAMPLES, 1)][:SAMPLES]
            samples.setdefault((tensor.device, tensor.dtype), {})[name] = values
    read: dict[str, Tensor] = {}
    for parts in samples.values():
        values = torch.cat(list(parts.values())).cpu().double()  # a single synchronization
        read |= zip(parts, values.split([len(part) for part in parts.values()]))
    for name, tensor in sorted(acting.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if name in read:
            digest.update(read[name].numpy().tobytes())
    return digest.hexdigest()[:32]


def _acting(model: nn.Module) -> tuple[dict[str, str | None], list[Any]]:
    """Names of weights as in the model without adapters, None for inactive weights; and the active adapters.

    PEFT wraps a layer: its own weights are then under :data:`WRAPPED`, possibly nested twice, and each adapter has its
    part in containers next to them, one per kind of weight.
    """
    if "peft" not in sys.modules:
        return {}, []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = BaseTunerLayer | AuxiliaryTrainingWrapper
    layers = {path: module for path, module in model.named_modules() if isinstance(module, wrappers)}
    if not layers:
        return {}, []
    adapters, names = [], {}
    for path, layer in sorted(layers.items()):
        active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in _held(layer)]
        merged = list(layer.merged_adapters)
        if active or merged:
            values = {
                kind: {name: value[name] for name in active if isinstance(value.get(name), int | float | str | bool)}
                for kind in layer.other_param_names
                if isinstance(value := getattr(layer, kind, None), dict)
            }
            adapters.append([_bare(path), active, merged, layer.disable_adapters, values])
        for kind in _by_adapter(layer):
            part = f"{path}.{kind}."
            for name in _held(layer) - {*active, *merged}:
                names |= dict.fromkeys((part + name, f"{part}{name}."))  # a parameter, or a module with parameters
    skipped = tuple(names)
    return {
        key: None if key in names or key.startswith(tuple(n for n in skipped if n.endswith("."))) else _bare(key)
        for key in model.state_dict()
    }, adapters


def _by_adapter(layer: Any) -> dict[str, Any]:
    """The containers of a wrapped layer that have an entry per adapter."""
    named = {*layer.adapter_layer_names, *layer.other_param_names}
    named |= {name for name, part in layer.named_children() if isinstance(part, nn.ModuleDict | nn.ParameterDict)}
    found = {name: getattr(layer, name, None) for name in named}
    return {name: part for name, part in found.items() if hasattr(part, "keys")}


def _held(layer: Any) -> set[str]:
    """Adapters that have weights in the layer."""
    return {name for part in _by_adapter(layer).values() for name in part.keys()}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def processor_fingerprint(processor: ProcessorMixin) -> str:
    """A fingerprint of a processor's settings, chat template and tokenizer.

    Args:
        processor: The processor of the model.
    """
    tokenizer = processor.tokenizer
    with TOKENIZING:
        probe = tokenizer(PROBE)["input_ids"]
    parts = (
        processor.to_dict(),
        processor.image_processor.to_dict(),
        processor.chat_template,
        sorted(tokenizer.get_added_vocab().items()),
        len(tokenizer),
        probe,
    )
    return hashlib.sha256(b"\n".join(map(canonical_json, parts))).hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """As JSON, without fields that depend on the location."""

    def lasting(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): lasting(v) for k, v in value.items() if k not in PASSING and "attn_impl" not in str(k)}
        return [lasting(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(lasting(value), sort_keys=True, default=str).encode()
