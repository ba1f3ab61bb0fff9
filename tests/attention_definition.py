"""The plain definition of attention over segments, and inputs for it."""

import torch
from tiny import vggt_config

from spa3r.models.attention import Segments

SEGMENTS = {
    "uniform": Segments.within([7, 7, 7]),
    "ragged": Segments.within([3, 1, 8, 3]),
    "one": Segments.within([9]),
    "uniform cross": Segments.across([4, 4], [6, 6]),
    "ragged cross": Segments.across([4, 1, 4], [6, 2, 5]),
    "overlapping": Segments((5, 4, 2, 6), ((0, 5), (0, 9), (9, 2), (9, 8))),
    "overlapping, of one shape": Segments((4, 4), ((0, 8), (0, 8))),
    "with a gap": Segments((2, 3), ((4, 5), (0, 2))),
}


class Caller(torch.nn.Module):
    """A layer as the back ends see it: it names one."""

    is_causal = False

    def __init__(self, back_end: str):
        super().__init__()
        self.config = vggt_config()
        self.config._attn_implementation = back_end


def tensors(segments: Segments, heads: int = 2, head_dim: int = 16, dtype=torch.float32, device="cpu") -> list:
    """Queries, keys and values for the segments, with room for gradients."""
    num_keys = max(start + length for start, length in segments.key_ranges)
    shapes = (sum(segments.query_lengths), num_keys, num_keys)
    return [torch.randn(n, heads, head_dim, dtype=dtype, device=device).requires_grad_() for n in shapes]


def dense_definition(query, key, value, segments: Segments, scaling: float | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64 over the whole sequence, under one explicit mask."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    allowed = torch.zeros(len(query), len(key), dtype=torch.bool, device=query.device)
    start = 0
    for count, (first, length) in zip(segments.query_lengths, segments.key_ranges):
        allowed[start : start + count, first : first + length] = True
        start += count
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scaling or query.shape[-1] ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), value)
