"""How exactly and how fast a model computes on a CPU: its dtype, int8 layers, compiled layers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spa3r.models.layers import HALF_PRECISION, Float32Module, TransformerLayer

REAL_SIZE = 100_000_000
"""Parameters from which a model on a CPU runs in bfloat16 by default. Below, it is fast enough in float32."""

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Names of CPU capabilities with bfloat16 matrix products, on x86 and on Arm."""


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products. Without them, PyTorch emulates them very slowly."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in BFLOAT16_INSTRUCTIONS)
    info = Path("/proc/cpuinfo")  # older PyTorch
    words = info.read_text().split() if info.exists() else []
    return any(name in words for name in BFLOAT16_INSTRUCTIONS)


def set_cpu_dtype(model: PreTrainedModel) -> str | None:
    """Give a model on the CPU the dtype that this CPU is fast in, in place.

    A model of at least :data:`REAL_SIZE` parameters runs in bfloat16 if the CPU has instructions for it. Without them,
    a model that was saved in half precision runs in float32. All else stays as saved, and so do quantized models.

    Args:
        model: The model, as it was saved.

    Returns:
        The dtype and the reason, for the user; None if neither rule applies.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    count = sum(parameter.numel() for parameter in model.parameters())
    if cpu_has_bfloat16() and count >= REAL_SIZE:
        chosen, reason = torch.bfloat16, "this CPU has instructions for it, and the model is large"
    elif not cpu_has_bfloat16() and model.dtype in HALF_PRECISION:
        chosen, reason = torch.float32, f"this CPU has no instructions for {_name(model.dtype)}, as the model was saved"
    elif count >= REAL_SIZE:
        chosen, reason = model.dtype, "as it was saved; this CPU has no instructions for bfloat16"
    else:
        return None
    cast(model, chosen)
    return f"the model ({count / 1e9:.2f} billion parameters) runs in {_name(chosen)}: {reason}. `--dtype` overrides"


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's weights, in place, as ``from_pretrained(dtype=...)`` does.

    ``model.to(dtype)`` also casts tensors that are not saved, such as the frequencies of rotary positions, which are
    too coarse in half precision.
    """
    saved = set(model.state_dict())
    kept = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if f"{path}.{name}" not in saved
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    model.to(dtype=dtype)
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner)._buffers[own_name] = buffer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, for CPUs: PyTorch's kernel quantizes the input of each call as a whole.

    Weights have one scale for each output channel. The products are sums of int8 times uint8; CPUs without VNNI sum
    pairs in 16 bits, for which inputs are quantized to 7 bits.

    Args:
        linear: The layer to replace.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # The packed weights are no tensors: fingerprints of the model see these.
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if tokens.device.type != "cpu":
            raise ValueError(
                f"int8 layers run on the CPU only, and `tokens` are on {tokens.device}. Load the model again for other "
                "devices."
            )
        product = torch.ops.quantized.linear_dynamic(tokens.float(), self.packed, not cpu_has_vnni())
        return product.to(tokens.dtype)


@functools.cache
def cpu_has_vnni() -> bool:
    """Whether this CPU sums products of int8 in 32 bits."""
    return torch.cpu._is_vnni_supported()


def use_int8_layers(model: PreTrainedModel) -> int:
    """Replace the linear layers in a frozen model's transformer layers by :class:`Int8Linear`, in place.

    The camera head stays as it is, since poses lose the most accuracy. The model can't be trained or saved then.

    Args:
        model: The model, for example ``spa3r.backbone``.

    Returns:
        The number of layers replaced.

    Raises:
        ValueError: The model is not on the CPU, is offloaded or is quantized already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("int8 layers are made from unquantized ones, and the model is quantized. Load it unquantized.")
    exact = {layer for part in model.modules() if isinstance(part, Float32Module) for layer in part.modules()}
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer) and module not in exact]
    found = [
        (owner, name, module)
        for layer in layers
        for owner in layer.modules()
        for name, module in owner.named_children()
        if type(module) is nn.Linear
    ]
    if elsewhere := {str(module.weight.device) for _, _, module in found} - {"cpu"}:
        raise ValueError(
            f"int8 layers need the weights in the CPU's memory, and they are on {', '.join(sorted(elsewhere))}. Load "
            "the model without `device_map`."
        )
    for owner, name, module in found:
        setattr(owner, name, Int8Linear(module))
    return len(found)


def compile_layers(model: nn.Module, **kwargs: Any) -> int:
    """Compile what a model's transformer layers compute after attention, in place, for any number of tokens.

    Attention is left out: its shapes depend on the lengths of all views and scenes, and each would be compiled again.

    Args:
        model: The model.
        **kwargs: As in :func:`torch.compile`; ``dynamic`` is set.

    Returns:
        The number of layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        layer._add_branches = torch.compile(layer._add_branches, dynamic=True, **kwargs)
    return len(layers)
