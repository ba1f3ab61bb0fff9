"""Two approximations of the attention across all views of a scene, whose cost grows with the square of their number.

Both take the place of :func:`~spa3r.models.attention.packed_attention` in the global layers of a frozen backbone
(``VggtConfig.global_attention``). Queries stay whole, and no mask is built. A plan is made once for all layers, from
the same segments as exact attention, each on its own: a scene doesn't depend on its neighbors in the batch, and context
views see nothing of target views.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from spa3r.models.attention import AttentionModule, Segments, packed_attention
from spa3r.models.packing import to_device

SIMILARITIES_AT_ONCE = 2**26
"""Similarities of keys that are in memory at once."""

EXTRA_WIDTH = 8
"""Channels by which heads are widened to hold a bias per key; kernels need multiples of 8."""


def views_of_segments(segments: Segments, lengths: Sequence[int]) -> list[tuple[range, range]]:
    """The views that ask and the views that are seen in every segment of a global layer.

    Args:
        segments: Segments and key ranges of whole views.
        lengths: Number of tokens of every view.
    """
    starts = list(accumulate(lengths, initial=0))

    def views(first: int, length: int) -> range:
        return range(bisect_left(starts, first), bisect_left(starts, first + length))

    firsts = accumulate(segments.query_lengths, initial=0)
    return [
        (views(first, length), views(*keys))
        for first, length, keys in zip(firsts, segments.query_lengths, segments.key_ranges)
    ]


@dataclass(frozen=True)
class MergedAttention:
    """Attention to fewer keys: similar ones are merged into their mean.

    In every segment the special tokens, all tokens of the first view, and evenly spaced ones of the other patches are
    kept. Each of the other patches is merged into the kept token with the most similar key, by the cosine of the keys'
    means over heads. A merged key and its value are means, and its score gets the logarithm of the number of tokens
    that it stands for, as in Token Merging (arXiv 2210.09461, "proportional attention"). FastVGGT (arXiv 2509.02560)
    merges tokens of VGGT in a similar way, but queries, too.

    Attributes:
        kept: For every segment, the places of the kept tokens in the packed sequence.
        merged: For every segment, the places of the others.
    """

    kept: tuple[Tensor, ...]
    merged: tuple[Tensor, ...]

    @classmethod
    def plan(
        cls, segments: Segments, lengths: Sequence[int], num_special: int, ratio: float, device: torch.device
    ) -> Self | None:
        """
        Args:
            segments: The segments of exact attention.
            lengths: Number of tokens of every view.
            num_special: Special tokens at the start of every view.
            ratio: Share of the patches of all views but a segment's first that are merged into others.
            device: Device of the tokens.

        Returns:
            The plan; None if nothing is to be merged.
        """
        starts = list(accumulate(lengths, initial=0))
        kept, merged = [], []
        for _, (first, *others) in views_of_segments(segments, lengths):
            patches = [np.arange(starts[view] + num_special, starts[view + 1]) for view in others]
            patches = np.concatenate(patches) if patches else np.arange(0)
            is_kept = np.zeros(len(patches), bool)
            count = len(patches) - int(ratio * len(patches))
            is_kept[(2 * np.arange(count) + 1) * len(patches) // (2 * max(count, 1))] = True
            special = [np.arange(starts[view], starts[view] + num_special) for view in others]
            first_view = np.arange(starts[first], starts[first + 1])
            kept.append(np.concatenate([first_view, *special, patches[is_kept]]))
            merged.append(patches[~is_kept])
        if not any(map(len, merged)):
            return None
        return cls(*(tuple(to_device(place, torch.long, device) for place in places) for places in (kept, merged)))

    def __call__(
        self, module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, segments: Segments
    ) -> Tensor:  # (Sq, heads, head_dim), twice (Sk, heads, head_dim) -> (Sq, heads, head_dim)
        scaling = query.shape[-1] ** -0.5
        means = [_merge(key, value, kept, merged) for kept, merged in zip(self.kept, self.merged)]
        keys, values, sizes = (torch.cat(parts) for parts in zip(*means))
        bias = (sizes.log() / scaling).to(key.dtype)[:, None, None].expand(-1, key.shape[1], -1)
        output = packed_attention(
            module,
            pad(torch.cat([query, torch.ones_like(query[..., :1])], dim=-1), (0, EXTRA_WIDTH - 1)),
            pad(torch.cat([keys, bias], dim=-1), (0, EXTRA_WIDTH - 1)),
            pad(values, (0, EXTRA_WIDTH)),  # kernels want one width
            Segments.across(segments.query_lengths, [len(kept) for kept in self.kept]),
            scaling,
        )
        return output[..., : query.shape[-1]]


def _merge(key: Tensor, value: Tensor, kept: Tensor, merged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of keys and values, each (kept, heads, head_dim), and the number of tokens in each, (kept,) float32."""
    with torch.no_grad():
        directions = normalize(key.mean(1).float(), dim=-1).to(key.dtype)
    sizes = torch.ones(len(kept), device=key.device)
    keys, values = key[kept].float(), value[kept].float()
    targets = directions[kept].t()
    for part in merged.split(max(1, SIMILARITIES_AT_ONCE // len(kept))):
        nearest = (directions[part] @ targets).argmax(-1)
        sizes.index_add_(0, nearest, torch.ones_like(nearest, dtype=sizes.dtype))
        keys = keys.index_add_(0, nearest, key[part].float())
        values = values.index_add_(0, nearest, value[part].float())
    counts = sizes[:, None, None]
    return (keys / counts).to(key.dtype), (values / counts).to(value.dtype), sizes


@dataclass(frozen=True)
class SubsetAttention:
    """Attention of each view to a fixed number of views: itself, the segment's first, and the most similar ones.

    Views are compared by the cosine of the means of their patch embeddings. The queries of a few views are computed at
    a time, with copies of the keys that they attend to, at most as many as the packed sequence has tokens.

    Attributes:
        parts: (number of tokens, places of their keys, segments) of the consecutive parts of the packed sequence.
    """

    parts: tuple[tuple[int, Tensor, Segments], ...]

    @classmethod
    @torch.no_grad()
    def plan(cls, segments: Segments, lengths: Sequence[int], patches: Sequence[Tensor], num_views: int) -> Self | None:
        """Choose the views. The choice is read back from the device, once for all layers.

        Args:
            segments: The segments of exact attention.
            lengths: Number of tokens of every view.
            patches: The patch embeddings of every view, each (N, C).
            num_views: Number of views that each view attends to, at least 2.

        Returns:
            The plan; None if no segment has more views.
        """
        views = views_of_segments(segments, lengths)
        if all(len(seen) <= num_views for _, seen in views):
            return None
        means = normalize(torch.stack([tokens.float().mean(0) for tokens in patches]), dim=-1)
        chosen: list[list[int]] = []
        for asking, seen in views:
            similarity = means[asking.start : asking.stop] @ means[seen.start : seen.stop].t()
            similarity.diagonal(asking.start - seen.start).fill_(3)  # a cosine is at most 1
            similarity[:, 0] += 3  # the first view
            order = similarity.sort(dim=-1, descending=True, stable=True).indices[:, :num_views]
            chosen += (order.sort(dim=-1).values + seen.start).tolist()
        starts, most = list(accumulate(lengths, initial=0)), sum(lengths)
        parts, first = [], 0
        while first < len(chosen):
            last, key_lengths = first, []
            while last < len(chosen):
                count = sum(lengths[view] for view in chosen[last])
                if key_lengths and sum(key_lengths) + count > most:
                    break
                key_lengths.append(count)
                last += 1
            keys = [np.arange(starts[view], starts[view + 1]) for own in chosen[first:last] for view in own]
            part = Segments.across(lengths[first:last], key_lengths)
            places = to_device(np.concatenate(keys), torch.long, means.device)
            parts.append((sum(lengths[first:last]), places, part))
            first = last
        return cls(tuple(parts))

    def __call__(
        self, module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, segments: Segments
    ) -> Tensor:  # (Sq, heads, head_dim), twice (Sk, heads, head_dim) -> (Sq, heads, head_dim)
        queries = query.split([count for count, _, _ in self.parts])
        return torch.cat(
            [
                packed_attention(module, own, key[places], value[places], part)
                for own, (_, places, part) in zip(queries, self.parts)
            ]
        )


Approximation = MergedAttention | SubsetAttention
