"""The prefix that all questions about a scene share: its keys and values, for any VLM of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from spa3r.models.spa3_vlm.state import longest_shared_length
from spa3r.models.spa3_vlm.vlm import unsupported

UNSHARED_PREFIXES = {"paligemma": "its pictures look at the question"}
"""Families whose prefix depends on the question, with the reason."""

PADDABLE_LAYERS = {"DynamicLayer", "DummyLayer"}
"""Cache layers that handle padding with a mask. Sliding windows count padding, and recurrent states absorb it."""

CACHE_LAYERS = PADDABLE_LAYERS | {
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Cache layers that can be expanded to many rows: they hold only tensors with a row dimension, and counters."""

GROWTH = 64
"""Number of tokens that a layer can grow by before it is copied again."""


class PrefixLayer(DynamicLayer):
    """Keys and values of a prefix shared by many rows: copied once, into a buffer that has room to grow.

    A :class:`DynamicLayer` with as many rows would copy all of the prefixes again with each new token.

    Args:
        prefix: A layer with one row; it is not changed.
    """

    keys: Any
    values: Any

    def __init__(self, prefix: DynamicLayer):
        super().__init__()
        keys: Any = prefix.keys
        self.keys, self.values, self.dtype, self.device = keys, prefix.values, keys.dtype, keys.device
        self.is_initialized = True
        self._key_store: Tensor | None = None
        self._value_store: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(rows, heads, new tokens, d) each -> (rows, heads, all tokens, d)."""
        self._key_store, self.keys = _append(self._key_store, self.keys, key_states)
        self._value_store, self.values = _append(self._value_store, self.values, value_states)
        return self.keys, self.values


def _append(store: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer with `new` appended after `held`, and the part of it that is in use."""
    start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
    # There is no buffer yet, it is too small, or it is stale because beams were reordered.
    if store is None or end > store.shape[-2] or held.data_ptr() != store.data_ptr():
        store = new.new_empty(*new.shape[:2], end + GROWTH, new.shape[-1])
        store[:, :, :start] = held
    store[:, :, start:end] = new
    return store, store[:, :, :end]


def empty_cache(vlm: PreTrainedModel) -> Cache:
    """An empty cache as ``generate`` makes it."""
    cache = DynamicCache(config=vlm.config.get_text_config(decoder=True))
    unknown = sorted({type(layer).__name__ for layer in cache.layers} - CACHE_LAYERS)
    if unknown:
        raise ValueError(
            f"The cache of the VLM family {vlm.config.model_type!r} has layers that questions can't share: "
            f"{', '.join(unknown)}. Ask with `model.generate` on whole prompts."
        )
    return cache


def check_shares_prefix(vlm: PreTrainedModel) -> None:
    """Raise for a VLM whose picture tokens depend on the question.

    Args:
        vlm: A VLM of transformers.

    Raises:
        ValueError: The prefix can't be shared; the message gives the reason.
    """
    family = vlm.config.model_type
    reason = UNSHARED_PREFIXES.get(family) or unsupported(family, type(vlm))
    if vlm.config.is_encoder_decoder:
        reason = "its encoder reads pictures and question together"
    elif getattr(vlm.config, "image_token_id", None) is None:
        reason = "its configuration names no token that stands for a picture (`image_token_id`)"
    if reason:
        raise ValueError(
            f"A scene can't be encoded once for many questions with the VLM family {family!r}: {reason}. Ask with "
            "`model.generate` on whole prompts, or use a causal family such as qwen2_5_vl, qwen3_vl or internvl."
        )


def check_length(vlm: PreTrainedModel, length: int) -> None:
    """A prefix has the keys of a whole prompt only as long as RoPE's frequencies don't depend on the length."""
    limit = longest_shared_length(vlm)
    if limit is not None and length > limit:
        raise ValueError(
            f"A scene with its question and answer must have at most {limit} tokens with this VLM, whose RoPE changes "
            f"its frequencies beyond, got {length}. Give fewer or smaller pictures, or ask with `model.generate` on "
            "whole prompts."
        )


def _state(layer: Any) -> dict[str, Any]:
    """A layer's state as a flat dictionary of tensors, numbers and booleans."""
    state = {}
    for name, value in vars(layer).items():
        items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        state |= {key: item for key, item in items.items() if isinstance(item, Tensor | int | bool)}
    return state


def states(cache: Cache) -> list[dict[str, Any]]:
    """The state of each layer: its tensors, numbers and booleans by name."""
    return [_state(layer) for layer in cache.layers]


def set_state(layer: Any, state: dict[str, Any]) -> None:
    """Set a layer's state, as :func:`states` returns it."""
    for key, value in state.items():
        name, _, index = key.partition(".")
        if index:
            getattr(layer, name)[int(index)] = value
        else:
            setattr(layer, name, value)
        if isinstance(value, Tensor) and value.ndim > 1:
            layer.dtype, layer.device = value.dtype, value.device


def changed(cache: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A copy of the cache with changed tensors; the given one is not changed."""
    copied = copy.copy(cache)
    copied.layers = [_changed_layer(layer, change) for layer in cache.layers]
    return copied


def _changed_layer(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    copied = copy.copy(layer)
    vars(copied).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    set_state(copied, {key: change(value) for key, value in _state(layer).items() if isinstance(value, Tensor)})
    return copied


def repeated(cache: Cache, rows: int) -> Cache:
    """A cache of `rows` rows that all start from the given one's single row."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(rows, 0) if tensor.ndim > 1 else tensor

    copies = copy.copy(cache)
    copies.layers = [
        PrefixLayer(layer) if type(layer) is DynamicLayer else _changed_layer(layer, repeat) for layer in cache.layers
    ]
    return copies


def joined(parts: Sequence[tuple[Cache, Sequence[int], Sequence[int]]]) -> Cache:
    """Chosen rows and columns of several caches as the rows of one cache, with room to grow.

    Shorter rows are padded with zeros at the end, which the caller's mask has to exclude. The given caches are not
    changed, and their tensors are not referenced.

    Args:
        parts: Caches of :data:`PADDABLE_LAYERS` of the same model, each with the indices of its rows and columns.
    """
    length = max(len(columns) for _, _, columns in parts)
    result = copy.copy(parts[0][0])
    result.layers = list(result.layers)
    for index, layer in enumerate(result.layers):
        if isinstance(layer, DynamicLayer):
            result.layers[index] = joined_layer = PrefixLayer(layer)
            for name in ("key", "value"):
                held = [(getattr(c.layers[index], f"{name}s"), rows, columns) for c, rows, columns in parts]
                first = held[0][0]
                count = sum(len(rows) for _, rows, _ in held)
                store = first.new_zeros(count, first.shape[1], length + GROWTH, first.shape[-1])
                start = 0
                for tensor, rows, columns in held:
                    at = [torch.tensor(indices, device=tensor.device) for indices in (rows, columns)]
                    store[start : start + len(rows), :, : len(columns)] = tensor[at[0]][:, :, at[1]]
                    start += len(rows)
                setattr(joined_layer, f"{name}s", store[:, :, :length])
                setattr(joined_layer, f"_{name}_store", store)
    return result


def chosen_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """A cache with some of the rows of another, of any :data:`CACHE_LAYERS`; the given one is not changed."""
    return changed(cache, lambda t: t[torch.tensor(rows, device=t.device)] if t.ndim > 1 else t)
