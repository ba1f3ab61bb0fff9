"""Attention over packed sequences, described by segments instead of dense masks.

Tokens of all views of all scenes are packed into one sequence without padding. A :class:`Segments` partitions it: query
segment *i* attends to key range *i* and nothing else. All attention of the method goes through
:func:`packed_attention`, with different segments. Lengths are Python integers, so nothing is read back from the device.

The back end is the model's ``config._attn_implementation``, looked up in transformers' ``AttentionInterface``:

=====================  ================================================================================================
``xformers``           the default if xformers is installed. On CUDA tensors one call of xformers' memory-efficient
                       attention (a ``BlockDiagonalMask`` for ragged segments); on other devices the ``sdpa`` path
``sdpa``               PyTorch's scaled-dot-product attention: equal segments in one batched call, unequal ones grouped
                       by length
``eager``              plain matrix products, grouped in the same way; the reference that the others must match
``flash_attention_2``  one variable-length call; CUDA only, needs the flash-attn package; doesn't support float32, for
                       which (the camera head) the ``sdpa`` path is used
=====================  ================================================================================================

Any other name registered in ``AttentionInterface`` runs grouped, like ``sdpa``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from spa3r.models.packing import spans, to_device

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Segments:
    """A partition of a packed query sequence, with the keys that each segment attends to.

    Query segments are consecutive and cover the whole query sequence. Key ranges are (start, length) pairs into the
    packed key sequence. They may overlap, so that target views can attend to the same context keys as context views.
    Build one with :meth:`within`, :meth:`across` or from ranges.
    """

    query_lengths: tuple[int, ...]
    key_ranges: tuple[tuple[int, int], ...]

    @classmethod
    def within(cls, lengths: Sequence[int]) -> Segments:
        """Self-attention: each segment attends to itself."""
        return cls.across(lengths, lengths)

    @classmethod
    def across(cls, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Segments:
        """Cross-attention: query segment i attends to key segment i; key segments are consecutive too."""
        if len(query_lengths) != len(key_lengths):
            raise ValueError(
                f"`query_lengths` and `key_lengths` pair up, one key segment for each query segment; got "
                f"{len(query_lengths)} query and {len(key_lengths)} key segments."
            )
        starts = accumulate(key_lengths, initial=0)
        return cls(tuple(query_lengths), tuple(zip(starts, key_lengths)))

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return tuple(length for _, length in self.key_ranges)

    @property
    def keys_are_packed(self) -> bool:
        """Whether the key ranges follow each other, so that the keys need no copy."""
        starts = accumulate(self.key_lengths, initial=self.key_ranges[0][0])
        return all(start == expected for (start, _), expected in zip(self.key_ranges, starts))

    @property
    def is_uniform(self) -> bool:
        """Whether all segments have one shape and are consecutive, so that a reshape gives a batch."""
        return self.keys_are_packed and len(set(zip(self.query_lengths, self.key_lengths))) == 1

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the segments grouped by their (query, key) lengths."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, shape in enumerate(zip(self.query_lengths, self.key_lengths)):
            groups.setdefault(shape, []).append(index)
        return tuple(tuple(indices) for indices in groups.values())

    def gather_keys(self, keys: Tensor) -> Tensor:  # (Sk, ...) -> (sum of key lengths, ...)
        """The keys of all segments, concatenated; copied only if ranges overlap or skip keys."""
        if self.keys_are_packed:
            start, total = self.key_ranges[0][0], sum(self.key_lengths)
            return keys if total == len(keys) else keys[start : start + total]
        return torch.cat([keys[start : start + length] for start, length in self.key_ranges])

    def parts(self, rows: int) -> tuple[tuple[int, int, Segments], ...]:
        """Split self-attention into consecutive parts that attend only to themselves.

        Args:
            rows: Parts are joined up to this number of tokens; a longer part is one that can't be split.

        Returns:
            (start, stop, segments) of each part; key ranges count from the part's start.
        """
        return _parts(self, rows)

    def query_chunks(self, rows: int) -> tuple[tuple[int, int, Segments], ...]:
        """Split each segment's queries into chunks of at most `rows`, which attend to the same keys.

        Returns:
            (start, stop, segments) of each chunk.
        """
        starts = accumulate(self.query_lengths, initial=0)
        return tuple(
            (first + start, first + stop, Segments((stop - start,), (keys,)))
            for first, length, keys in zip(starts, self.query_lengths, self.key_ranges)
            for start, stop in spans(length, rows)
        )


@lru_cache(maxsize=128)
def _parts(segments: Segments, rows: int) -> tuple[tuple[int, int, Segments], ...]:
    bounds = [0, *accumulate(segments.query_lengths)]
    closed: list[tuple[int, int]] = []  # segments (first, last + 1) of the shortest parts
    first, reach = 0, 0
    for index, (start, length) in enumerate(segments.key_ranges):
        reach = max(reach, start + length)
        while closed and start < bounds[first]:  # it attends to earlier parts: join them
            first = closed.pop()[0]
        if reach <= bounds[index + 1]:
            closed.append((first, index + 1))
            first = index + 1
    joined: list[tuple[int, int]] = []
    for first, last in closed:
        if joined and bounds[last] - bounds[joined[-1][0]] <= rows:
            first = joined.pop()[0]
        joined.append((first, last))
    return tuple(
        (
            bounds[first],
            bounds[last],
            Segments(
                segments.query_lengths[first:last],
                tuple((start - bounds[first], length) for start, length in segments.key_ranges[first:last]),
            ),
        )
        for first, last in joined
    )


class AttentionModule(Protocol):
    """A layer whose configuration selects the back end."""

    config: PreTrainedConfig


def packed_attention(
    module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None = None
) -> Tensor:
    """Softmax attention within segments, with the back end that ``module.config`` selects.

    Args:
        module: The calling layer; its ``config._attn_implementation`` selects the back end.
        query: (Sq, heads, head_dim), with Sq the sum of ``segments.query_lengths``.
        key: (Sk, heads, head_dim).
        value: (Sk, heads, head_dim).
        segments: The segments, with the keys that each attends to.
        scaling: Factor on the scores; None: head_dim ** -0.5.

    Returns:
        (Sq, heads, head_dim).

    Raises:
        KeyError: The back end's name is not registered.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    name = module.config._attn_implementation or "sdpa"
    if name == "xformers" and query.is_cuda:
        return _xformers_attention(query, segments.gather_keys(key), segments.gather_keys(value), segments, scaling)
    if "flash" in name and query.dtype == torch.float32:
        name = "sdpa"  # flash attention doesn't support float32, which the camera head always uses
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if "flash" in name:
        return _varlen_flash_attention(
            attend, module, query, segments.gather_keys(key), segments.gather_keys(value), segments, scaling
        )
    return _grouped_attention(attend, module, query, key, value, segments, scaling)


def _grouped_attention(
    attend: Callable,
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
) -> Tensor:
    """One batched call per segment shape, for back ends without variable-length kernels."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each (batch, length, heads, head_dim)
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(module, *heads_first, None, scaling=scaling, dropout=0.0, is_causal=False)[0]

    if segments.is_uniform:
        batch = len(segments.query_lengths)
        tensors = (query, segments.gather_keys(key), segments.gather_keys(value))
        return call(*(tensor.unflatten(0, (batch, -1)) for tensor in tensors)).flatten(0, 1)

    queries = query.split(segments.query_lengths)
    outputs: list[Tensor] = [query] * len(queries)
    for indices in segments.groups:
        ranges = [segments.key_ranges[i] for i in indices]
        group = call(
            _stack([queries[i] for i in indices]),
            *(_stack([kv[start : start + length] for start, length in ranges]) for kv in (key, value)),
        )
        for i, output in zip(indices, group):
            outputs[i] = output
    return torch.cat(outputs)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` that doesn't copy a single tensor."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, heads, Sq, head_dim)
    key: Tensor,  # (B, heads, Sk, head_dim)
    value: Tensor,  # (B, heads, Sk, head_dim)
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Reference attention, with the softmax in float32. Returns (B, Sq, heads, head_dim) and the weights."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@lru_cache(maxsize=128)
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(segments + 1,) int32 offsets on the device, cached and shared by all layers."""
    with torch.inference_mode(False):  # the cache may outlive inference mode, whose tensors can't be used in training
        return to_device([0, *accumulate(lengths)], torch.int32, device)


def _varlen_flash_attention(
    attend: Callable,
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
) -> Tensor:
    output, _ = attend(
        module,
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        attention_mask=None,
        scaling=scaling,
        dropout=0.0,
        is_causal=False,
        cu_seq_lens_q=_cumulative_lengths(segments.query_lengths, query.device),
        cu_seq_lens_k=_cumulative_lengths(segments.key_lengths, query.device),
        max_length_q=max(segments.query_lengths),
        max_length_k=max(segments.key_lengths),
    )
    return output[0]


@lru_cache(maxsize=128)
def _block_diagonal_mask(segments: Segments, device: torch.device) -> Any:
    """xformers' ragged mask (offsets only, nothing dense), created once for all layers."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):  # as above
        return BlockDiagonalMask.from_seqlens(segments.query_lengths, segments.key_lengths, device=device)


def _xformers_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Call xformers on a packed sequence; query (Sq, heads, d), key and value gathered."""
    from xformers.ops import memory_efficient_attention

    if segments.is_uniform:
        batch = len(segments.query_lengths)
        query, key, value = (tensor.unflatten(0, (batch, -1)) for tensor in (query, key, value))
        return memory_efficient_attention(query, key, value, scale=scaling).flatten(0, 1)
    mask = _block_diagonal_mask(segments, query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask, scale=scaling)[0]


def xformers_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Implements ``attn_implementation="xformers"`` for models of transformers, such as the language model of a VLM.

    Causal and padding masks of such models are tensors, for which SDPA has the better kernel. xformers' own kernels are
    used in the packed attention of this library (:func:`packed_attention`), which has no mask tensor.
    """
    if not query.is_cuda and not torch.compiler.is_compiling():  # logging would break the graph
        logger.info_once(
            f"attn_implementation='xformers': xformers' kernels run on CUDA only; on {query.device.type} tensors "
            "PyTorch's scaled-dot-product attention computes the same."
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@lru_cache(maxsize=1)
def _xformers_fault() -> str | None:
    """The reason why xformers can't run on CUDA devices; None if none is known.

    Some builds can be imported but contain no kernels. The check uses no device, since a model may be built before the
    device is chosen.
    """
    if not torch.cuda.is_available():
        return None  # other devices use PyTorch's path
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except (ImportError, OSError) as error:
        return str(error).strip().partition("\n")[0]
    if torch.version.hip is None and not _cpp_lib._built_with_cuda:  # such a build rejects PyTorch's kernels, too
        return "its compiled part was built for other versions of PyTorch or CUDA and can't be loaded"
    has_kernel = any(kernel.is_available() for kernel in (fmha.cutlass.FwOp, fmha.flash.FwOp))
    return None if has_kernel else "the installed build has no attention kernel"


def why_unusable(name: str) -> str | None:
    """Why the back end can't be used in this environment, and how to fix it; None if it can."""
    if name == "xformers":
        if importlib.util.find_spec("xformers") is None:
            return "the package xformers is not installed: `pip install xformers`, or use attn_implementation='sdpa'"
        if fault := _xformers_fault():
            return f"xformers doesn't run on this device ({fault}): use attn_implementation='sdpa'"
    if name == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed: use attn_implementation='xformers' or 'sdpa'"
        if not torch.cuda.is_available():
            return "it runs on CUDA devices only: use attn_implementation='sdpa' here"
    return None


def check_attention_implementation(name: str | None) -> str:
    """The back end for a request; ``None`` selects the default.

    Raises:
        ValueError: The name is unknown.
        ImportError: The back end is known but can't be used here.
    """
    if name is None:
        return "sdpa" if why_unusable("xformers") else "xformers"
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))]
    if name not in known:
        raise ValueError(f"`attn_implementation` must be one of {sorted(set(known))}, got {name!r}.")
    if reason := why_unusable(name):
        raise ImportError(f"attn_implementation={name!r} can't be used here: {reason}.")
    return name


# `attn_implementation="xformers"` for the models of this package and of transformers.
AttentionInterface.register("xformers", xformers_attention_forward)
AttentionMaskInterface.register("xformers", sdpa_mask)
