"""Rotary position encoding of patches in two dimensions (base 100 in VGGT and Spa3R)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryEncoding:
    """Cosines and sines of a packed sequence; rotates queries and keys, leaves values and outputs alone.

    Half of the head's width rotates by the row y, the other half by the column x. In a half of width d the angles are
    position * base^(-2k/d) for k = 0..d/2-1, and channel k pairs with channel k + d/2.
    """

    cos: Tensor  # (S, 1, head_dim), float32
    sin: Tensor  # (S, 1, head_dim), float32; the sign of the rotation is folded in

    @classmethod
    def from_positions(cls, positions: Tensor, head_dim: int, base: float) -> RotaryEncoding:
        """
        Args:
            positions: (S, 2), (y, x) of every token; (0, 0) is no rotation.
            head_dim: Width of one attention head, a multiple of 4.
            base: Base of the geometric series of frequencies.
        """
        quarter = head_dim // 4
        exponents = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
        angles = positions.float()[:, :, None] * base**-exponents  # (S, 2, head_dim / 4)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat([cos, cos], -1).flatten(1)[:, None], torch.cat([-sin, sin], -1).flatten(1)[:, None])

    def encode(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (S, heads, head_dim) -> the same shapes."""
        return self._rotate(query), self._rotate(key), value

    def decode(self, output: Tensor) -> Tensor:
        """(S, heads, head_dim), the attention's output -> the same."""
        return output

    def _rotate(self, tokens: Tensor) -> Tensor:
        partner = tokens.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
        return tokens * self.cos.to(tokens.dtype) + partner * self.sin.to(tokens.dtype)
