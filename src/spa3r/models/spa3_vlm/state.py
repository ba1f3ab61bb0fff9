"""State that models of transformers keep between calls, and how results are made independent of it.

- Families whose pictures have multidimensional positions store the last prompt's offset (``rope_deltas``) and use it
  when a prompt continues from a cache. The offset belongs to the cache: :func:`remember_offset` stores it there, and
  :func:`positions_behind` computes positions from it.
- RoPE with ``"dynamic"`` or ``"longrope"`` frequencies keeps those of the longest or the last prompt, and offloaded
  weights are loaded and released: :func:`turn` runs calls of such models one at a time, each from the same state.
- Every module stores whether dropout is active: :func:`in_eval_mode`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spa3r.models.placement import is_offloaded

# Multidimensional positions


OFFSETS = "spa3r_rope_deltas"
"""Attribute of a cache: the offsets of the prompts whose keys it holds, (batch, 1)."""


def cache_name(vlm: PreTrainedModel) -> str:
    """``cache``, or ``past_key_values`` in earlier versions of transformers."""
    return "cache" if "cache" in inspect.signature(vlm.forward).parameters else "past_key_values"


def keeps_offset(vlm: PreTrainedModel) -> bool:
    """Whether the family stores the offset of the last prompt's positions. EXAONE 4.5 has the field, and no use for
    it."""
    return hasattr(vlm.base_model, "rope_deltas") and hasattr(vlm.base_model, "get_rope_index")


def position_offsets(
    vlm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]
) -> Tensor | None:
    """Offset from a token's index to its position after the pictures.

    Args:
        vlm: Any VLM.
        input_ids: (batch, sequence).
        attention_mask: (batch, sequence) or None.
        inputs: The other inputs that the processor made for the VLM.

    Returns:
        (batch, 1); None in families whose positions are token indices.
    """
    if not keeps_offset(vlm):
        return None
    base: Any = vlm.base_model
    compute = base.get_rope_index
    known = inspect.signature(compute).parameters
    if "mm_token_type_ids" in known:
        types = inputs.get("mm_token_type_ids")
        has_pictures = types is not None and bool(types.any())
    else:  # (Qwen-Omni) pictures are found by their tokens
        has_pictures = inputs.get("image_grid_thw") is not None
    if not has_pictures:
        return torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device)
    arguments = {name: value for name, value in inputs.items() if name in known and value is not None}
    return compute(input_ids=input_ids, **arguments | {"attention_mask": attention_mask})[1]


def place_positions(vlm: PreTrainedModel, places: Tensor, offsets: Tensor) -> Tensor:
    """(batch, n) indices and (batch or fewer, 1) offsets -> (dimensions, batch, n) positions of text tokens."""
    offsets = offsets.to(places.device).repeat_interleave(len(places) // len(offsets), 0)
    rope = getattr(vlm.config.get_text_config(), "rope_parameters", None) or {}
    return (places + offsets).expand(len(rope.get("mrope_section", (0, 0, 0))), -1, -1)


def remember_offset(cache: Any, offsets: Tensor | None) -> None:
    """Store a prompt's offset on the cache that holds its keys; copies of the cache keep it."""
    if cache is not None and offsets is not None:
        setattr(cache, OFFSETS, offsets)


def positions_behind(
    vlm: PreTrainedModel, cache: Any, offsets: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Positions of all tokens of prompts that continue from a cache; the family itself would use its last offset.

    Args:
        vlm: A VLM of a family that stores an offset.
        cache: A cache with at least one token.
        offsets: From :func:`position_offsets`; None: the cache's.
        attention_mask: (batch, sequence), of cached and new tokens; or None.
        shape: (batch, sequence), of cached and new tokens.

    Returns:
        (dimensions, batch, sequence).

    Raises:
        ValueError: The cache has no offset.
    """
    if offsets is None and (offsets := getattr(cache, OFFSETS, None)) is None:
        raise ValueError(
            f"A cache of the VLM family {vlm.config.model_type!r} must come from a call of this Spa3-VLM in eval mode "
            "and without labels, got one that doesn't say where its pictures end. Pass `position_ids`, or the whole "
            "prompt without a cache."
        )
    if attention_mask is not None and attention_mask.shape == shape:
        places = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
    else:
        places = torch.arange(shape[1], device=offsets.device).expand(shape)
    return place_positions(vlm, places, offsets)


# RoPE frequencies


def changing_frequencies(model: nn.Module) -> list[nn.Module]:
    """Modules that compute RoPE frequencies from prompt lengths and keep them."""
    return [module for module in model.modules() if _changing_types(module)]


def _changing_types(module: nn.Module) -> dict[str, str]:
    """Buffer prefix and type of each RoPE whose frequencies change."""
    kinds = getattr(module, "rope_type", None)
    kinds = {f"{layer_type}_": kind for layer_type, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    return {
        prefix: kind
        for prefix, kind in kinds.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


def _reset_frequencies(module: nn.Module) -> None:
    for prefix, kind in _changing_types(module).items():
        if "dynamic" in kind:  # "longrope" recomputes its frequencies in each forward pass
            original, used = getattr(module, f"{prefix}original_inv_freq"), getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(used.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def longest_shared_length(vlm: PreTrainedModel) -> int | None:
    """Maximum length of a prompt whose beginning doesn't depend on its length; None: unlimited."""
    modules = [module for module in changing_frequencies(vlm) if hasattr(module, "original_max_seq_len")]
    lengths: list[Any] = [module.original_max_seq_len for module in modules]
    lengths += [
        rope["original_max_position_embeddings"]
        for rope in (getattr(module.config, "rope_parameters", None) or {} for module in modules)
        if isinstance(rope.get("original_max_position_embeddings"), int)
    ]
    return min(lengths, default=None)


_TURN = threading.RLock()


@contextmanager
def turn(model: nn.Module) -> Generator[None]:
    """Run calls of models with such state one at a time, each as if it were the first; other models are not locked."""
    if torch.compiler.is_compiling():  # graphs support neither locks nor hooks
        yield
        return
    changing = changing_frequencies(model)
    if not changing and not is_offloaded(model):
        yield
        return
    with _TURN:
        for module in changing:
            _reset_frequencies(module)
        yield


# Dropout

_EVAL_LOCK = threading.Lock()
_EVALUATED: dict[nn.Module, tuple[int, dict[nn.Module, bool]]] = {}
"""Models temporarily in eval mode: number of callers, and the modes that the last caller restores."""


@contextmanager
def in_eval_mode(model: nn.Module) -> Generator[None]:
    """Context manager without dropout; the last of several callers restores the mode that every module had before."""
    with _EVAL_LOCK:
        calls, modes = _EVALUATED.get(model) or (0, {module: module.training for module in model.modules()})
        if any(module.training for module in modes):
            model.eval()
        _EVALUATED[model] = calls + 1, modes
    try:
        yield
    finally:
        with _EVAL_LOCK:
            calls, modes = _EVALUATED.pop(model)
            if calls > 1:
                _EVALUATED[model] = calls - 1, modes
            else:
                for module, mode in modes.items():
                    module.training = mode
