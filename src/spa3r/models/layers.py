"""The transformer layer that all parts of the method use, on packed sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from spa3r.models.attention import Segments, packed_attention
from spa3r.models.global_attention import Approximation
from spa3r.models.packing import join_rows, spans

FLOAT32_EPS = torch.finfo(torch.float32).eps
"""Epsilon of the released models' RMSNorms; set explicitly, since PyTorch's default depends on the input's dtype."""

CPU_CHUNK_BYTES, CHUNK_BYTES = 2**25, 2**28
"""Size of the MLP's inner activation of one chunk of tokens in inference, on a CPU and on other devices, which need
more work at a time to be busy."""


def rows_at_once(intermediate_size: int, tokens: Tensor) -> int:
    """Tokens of one chunk in inference, for an MLP of this inner size."""
    size = CPU_CHUNK_BYTES if tokens.device.type == "cpu" else CHUNK_BYTES
    return max(1, size // (intermediate_size * tokens.element_size()))


HALF_PRECISION = (torch.float16, torch.bfloat16)


class PositionEncoding(Protocol):
    """Common interface of the encodings of :mod:`spa3r.models.encodings`."""

    def rows(self, start: int, stop: int) -> Self: ...

    def encode(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def decode(self, output: Tensor) -> Tensor: ...


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return self.fc2(nn.functional.gelu(self.fc1(tokens)))


class GatedMlp(nn.Module):
    """SwiGLU: one Linear for gate and value, SiLU of the gate times the value, Linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, 2 * hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        gate, value = self.fc1(tokens).chunk(2, dim=-1)
        return self.fc2(nn.functional.silu(gate) * value)


class Float32Module(nn.Module):
    """A module whose weights are never cast to half precision, which degrades poses; other dtypes are as usual."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Like ``nn.Module._apply``, which moves and casts, but never casts to half precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device, torch.float32) if result.dtype in HALF_PRECISION else result

        return super()._apply(keep_precision, recurse)


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the weight cast to the input's dtype: under autocast they differ, which rules out fused kernels."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> the same
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Multi-head attention within segments, with an optional norm of each head's queries and keys."""

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        qk_norm: Literal["layer_norm", "rms_norm"] | None,
    ):
        super().__init__()
        self.config = config  # selects the attention back end, which may change later
        self.head_dim = hidden_size // num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = (
            nn.Identity()
            if qk_norm is None
            else nn.LayerNorm(self.head_dim, eps=1e-5)
            if qk_norm == "layer_norm"
            else RMSNorm(self.head_dim, eps=FLOAT32_EPS)
            for _ in range(2)
        )
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        tokens: Tensor,
        segments: Segments,
        positions: PositionEncoding | None,
        approximation: Approximation | None = None,
    ) -> Tensor:  # (S, C) -> (S, C)
        query, key, value = self.project(tokens, positions)
        return self.output((approximation or packed_attention)(self, query, key, value, segments), positions)

    def project(
        self, tokens: Tensor, positions: PositionEncoding | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # (S, C) -> queries, keys, values, each (S, heads, head_dim)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        return (query, key, value) if positions is None else positions.encode(query, key, value)

    def output(self, attended: Tensor, positions: PositionEncoding | None) -> Tensor:
        """The attention's result (S, heads, head_dim) -> (S, C)."""
        if positions is not None:
            attended = positions.decode(attended)
        return self.proj(attended.flatten(-2))


class TransformerLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP with residuals.

    Without gradients, a long sequence passes in chunks of rows: of a layer's intermediate results only queries, keys
    and values are held for the whole of a scene, and no attention scores.

    Args:
        config: The model's configuration; its ``_attn_implementation`` selects the attention back end.
        hidden_size: Token width C.
        num_attention_heads: Number of heads; must divide C.
        intermediate_size: Inner width of the MLP.
        layer_norm_eps: Epsilon of the two LayerNorms.
        qk_norm: Norm of each head's queries and keys.
        layer_scale: Initial value of a learned factor on each residual branch; None for no factor.
        mlp: Class of the MLP.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float,
        qk_norm: Literal["layer_norm", "rms_norm"] | None = None,
        layer_scale: float | None = None,
        mlp: type[Mlp] | type[GatedMlp] = Mlp,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = SelfAttention(config, hidden_size, num_attention_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = mlp(hidden_size, intermediate_size, hidden_size)
        self.intermediate_size = intermediate_size
        self.layer_scale_init = layer_scale
        if layer_scale is None:
            self.layer_scale1 = self.layer_scale2 = 1.0
        else:
            self.layer_scale1, self.layer_scale2 = (
                nn.Parameter(torch.full((hidden_size,), layer_scale)) for _ in range(2)
            )

    def forward(
        self,
        tokens: Tensor,
        segments: Segments,
        positions: PositionEncoding | None = None,
        approximation: Approximation | None = None,
    ) -> Tensor:  # (S, C) -> (S, C)
        rows = rows_at_once(self.intermediate_size, tokens)
        if torch.is_grad_enabled() or len(tokens) <= rows or torch.compiler.is_compiling():
            return self._at_once(tokens, segments, positions, approximation)
        if approximation is not None:  # it is planned for the whole sequence
            return self._in_chunks(tokens, segments, positions, approximation, rows)

        def outputs() -> Iterator[tuple[Tensor]]:
            for first, last, part in segments.parts(rows):
                run = self._at_once if last - first <= rows else functools.partial(self._in_chunks, rows=rows)
                yield (run(tokens[first:last], part, None if positions is None else positions.rows(first, last), None),)

        return join_rows(outputs(), len(tokens))[0]

    def _at_once(
        self,
        tokens: Tensor,
        segments: Segments,
        positions: PositionEncoding | None,
        approximation: Approximation | None,
    ) -> Tensor:  # (S, C) -> (S, C)
        attended = self.attention(self.norm1(tokens), segments, positions, approximation)
        return self._add_branches(tokens, attended)

    def _in_chunks(
        self,
        tokens: Tensor,
        segments: Segments,
        positions: PositionEncoding | None,
        approximation: Approximation | None,
        rows: int,
    ) -> Tensor:  # (S, C) -> (S, C)
        """The same without gradients: queries, keys and values are held, all else is computed for `rows` at a time."""

        def encoding(start: int, stop: int) -> PositionEncoding | None:
            return None if positions is None else positions.rows(start, stop)

        query, key, value = join_rows(
            (
                self.attention.project(self.norm1(tokens[start:stop]), encoding(start, stop))
                for start, stop in spans(len(tokens), rows)
            ),
            len(tokens),
        )
        whole = None if approximation is None else approximation(self.attention, query, key, value, segments)
        outputs = query.flatten(-2)  # outputs take the place of queries that are not needed any more
        for start, stop, own in segments.query_chunks(rows):
            if whole is None:
                attended = packed_attention(self.attention, query[start:stop], key, value, own)
            else:
                attended = whole[start:stop]
            output = self._add_branches(tokens[start:stop], self.attention.output(attended, encoding(start, stop)))
            if outputs.dtype != output.dtype:  # under autocast
                outputs = torch.empty_like(tokens, dtype=output.dtype)
            outputs[start:stop] = output
        return outputs

    def _add_branches(self, tokens: Tensor, attended: Tensor) -> Tensor:  # (S, C), (S, C) -> (S, C)
        """Both residuals and the MLP, which depend on no segments; ``compile_layers`` compiles it."""
        tokens = tokens + self.layer_scale1 * attended
        return tokens + self.layer_scale2 * self.mlp(self.norm2(tokens))


def make_layers(
    count: int,
    config: PreTrainedConfig,
    hidden_size: int,
    num_attention_heads: int,
    mlp_ratio: float,
    layer_norm_eps: float,
    **options: Any,
) -> nn.ModuleList:
    """A stack of layers; arguments as in :class:`TransformerLayer`, the MLP's inner width being `mlp_ratio` wider."""
    return nn.ModuleList(
        TransformerLayer(
            config, hidden_size, num_attention_heads, int(hidden_size * mlp_ratio), layer_norm_eps, **options
        )
        for _ in range(count)
    )
