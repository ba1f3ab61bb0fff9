"""Attention over packed sequences: who sees whom is said by segments, never by a dense mask.

Tokens of all views of all scenes lie in one sequence without padding. A :class:`Segments` cuts it: query segment *i*
sees key range *i* and nothing else. Every attention of the method is one call of :func:`packed_attention` with other
segments. Lengths are Python integers, so nothing is ever read back from the device.

The back end is the model's ``config._attn_implementation``, looked up in transformers' ``AttentionInterface``:

=====================  ================================================================================================
``xformers``           the default where xformers is installed. On CUDA tensors one call of xformers' memory-efficient
                       attention (a ``BlockDiagonalMask`` for ragged segments); on other devices the ``sdpa`` path
``sdpa``               PyTorch's scaled-dot-product attention: equal segments in one batched call, unequal ones grouped
                       by length
``eager``              plain matrix products, grouped in the same way; the definition that the others must match
``flash_attention_2``  one variable-length call; CUDA only, needs the flash-attn package; has no float32, for which (the
                       camera head) the ``sdpa`` path is taken
=====================  ================================================================================================

Any other name registered in ``AttentionInterface`` runs grouped, as ``sdpa`` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from spa3r.models.packing import to_device

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Segments:
    """A partition of a packed query sequence, and the keys that each part sees.

    Query segments follow one another and cover the whole query sequence. Key ranges are (start, length) pairs into the
    packed key sequence; they may overlap, which is how target views see the same context keys as context views do.
    Build one with :meth:`within`, :meth:`across` or from ranges.
    """

    query_lengths: tuple[int, ...]
    key_ranges: tuple[tuple[int, int], ...]

    @classmethod
    def within(cls, lengths: Sequence[int]) -> Segments:
        """Self-attention: each segment sees itself."""
        return cls.across(lengths, lengths)

    @classmethod
    def across(cls, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Segments:
        """Cross-attention: query segment i sees the i-th segment of the keys, which follow one another too."""
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
        """Whether the key ranges follow one another from 0, so that the keys need no gathering."""
        starts = accumulate(self.key_lengths, initial=0)
        return all(start == expected for (start, _), expected in zip(self.key_ranges, starts))

    @property
    def is_uniform(self) -> bool:
        """Whether all segments have one shape and lie one after the other: then a reshape makes the batch."""
        return self.keys_are_packed and len(set(zip(self.query_lengths, self.key_lengths))) == 1

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the segments that have the same (query, key) lengths, group by group."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, shape in enumerate(zip(self.query_lengths, self.key_lengths)):
            groups.setdefault(shape, []).append(index)
        return tuple(tuple(indices) for indices in groups.values())

    def gather_keys(self, keys: Tensor) -> Tensor:  # (Sk, ...) -> (sum of key lengths, ...)
        """The keys of all segments one after the other; a copy only where ranges overlap or skip."""
        if self.keys_are_packed:
            return keys
        return torch.cat([keys[start : start + length] for start, length in self.key_ranges])


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None = None
) -> Tensor:
    """Softmax attention inside segments, by the back end that ``module.config`` names.

    Args:
        module: The calling layer; its ``config._attn_implementation`` names the back end.
        query: (Sq, heads, head_dim), with Sq the sum of ``segments.query_lengths``.
        key: (Sk, heads, head_dim).
        value: (Sk, heads, head_dim).
        segments: Who sees whom.
        scaling: Factor on the scores; head_dim ** -0.5 when None.

    Returns:
        (Sq, heads, head_dim).

    Raises:
        KeyError: The back end's name is not registered.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    name = module.config._attn_implementation
    if name == "xformers" and query.is_cuda:
        return _xformers_attention(query, segments.gather_keys(key), segments.gather_keys(value), segments, scaling)
    if "flash" in name and query.dtype == torch.float32:
        name = "sdpa"  # flash attention has no float32; the camera head, always float32, takes PyTorch's
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if "flash" in name:
        return _varlen_flash_attention(
            attend, module, query, segments.gather_keys(key), segments.gather_keys(value), segments, scaling
        )
    return _grouped_attention(attend, module, query, key, value, segments, scaling)


def _grouped_attention(
    attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float
) -> Tensor:
    """One batched call for each shape of segment: for back ends without variable-length kernels."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each (batch, length, heads, head_dim)
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(module, *heads_first, None, scaling=scaling, dropout=0.0, is_causal=False)[0]

    if segments.is_uniform:
        batch = len(segments.query_lengths)
        return call(*(tensor.unflatten(0, (batch, -1)) for tensor in (query, key, value))).flatten(0, 1)

    queries = query.split(segments.query_lengths)
    outputs: list[Tensor] = [query] * len(queries)
    for indices in segments.groups:
        ranges = [segments.key_ranges[i] for i in indices]
        group = call(
            torch.stack([queries[i] for i in indices]),
            *(torch.stack([kv[start : start + length] for start, length in ranges]) for kv in (key, value)),
        )
        for i, output in zip(indices, group):
            outputs[i] = output
    return torch.cat(outputs)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, heads, Sq, head_dim)
    key: Tensor,  # (B, heads, Sk, head_dim)
    value: Tensor,  # (B, heads, Sk, head_dim)
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention as it is defined, the softmax in float32. Returns (B, Sq, heads, head_dim) and the weights."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@lru_cache(maxsize=128)
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(segments + 1,) int32 offsets on the device, cached, so that all layers share one copy."""
    with torch.inference_mode(False):  # the cache may outlive it, and what is made in it can't be trained with
        return to_device([0, *accumulate(lengths)], torch.int32, device)


def _varlen_flash_attention(
    attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float
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
def _block_diagonal_mask(segments: Segments, device: torch.device):
    """xformers' ragged mask (offsets only, nothing dense), made once for all layers."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):  # as above
        return BlockDiagonalMask.from_seqlens(segments.query_lengths, segments.key_lengths, device=device)


def _xformers_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """The one function that knows xformers' packed call; query (Sq, heads, d), key and value gathered."""
    from xformers.ops import memory_efficient_attention

    if segments.is_uniform:
        batch = len(segments.query_lengths)
        query, key, value = (tensor.unflatten(0, (batch, -1)) for tensor in (query, key, value))
        return memory_efficient_attention(query, key, value, scale=scaling).flatten(0, 1)
    mask = _block_diagonal_mask(segments, query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask, scale=scaling)[0]


def xformers_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """What ``attn_implementation="xformers"`` means for a model of transformers, such as the language model of a VLM.

    Causal and padding masks of such models come as tensors, for which SDPA is the better kernel; xformers' own kernels
    serve the packed attention of this library (:func:`packed_attention`), which has no mask tensor.
    """
    if not query.is_cuda and not torch.compiler.is_compiling():  # a log call would break the graph
        logger.warning_once(
            f"attn_implementation='xformers': xformers' kernels run on CUDA only; on {query.device.type} tensors "
            "PyTorch's scaled-dot-product attention computes the same."
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@lru_cache(maxsize=1)
def _xformers_fault() -> str | None:
    """What keeps xformers from running where there is a CUDA device; None where nothing is known to.

    Builds exist that import and yet bring no kernels. Nothing is put on the device to find out: a model may be built
    before the device is chosen.
    """
    if not torch.cuda.is_available():
        return None  # on other devices its path is PyTorch's own
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except (ImportError, OSError) as error:
        return str(error).strip().partition("\n")[0]
    if torch.version.hip is None and not _cpp_lib._built_with_cuda:  # then it refuses PyTorch's own kernels, too
        return "its compiled part was built for other versions of PyTorch or CUDA and can't be loaded"
    has_kernel = any(kernel.is_available() for kernel in (fmha.cutlass.FwOp, fmha.flash.FwOp))
    return None if has_kernel else "the installed build brings no attention kernel"


def why_unusable(name: str) -> str | None:
    """Why the back end can't be used here, with the cure; None where it can."""
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
    """The back end to use for a request, ``None`` meaning the default.

    Raises:
        ValueError: The name is unknown.
        ImportError: The back end is known and can't be used here.
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
