"""Position encodings of packed sequences: rotary positions of patches (RoPE) and projective ones of cameras (PRoPE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from spa3r.models.cameras import calibration, homogeneous, invert_extrinsics


@dataclass(frozen=True)
class RotaryEncoding:
    """RoPE in two dimensions (base 100 in VGGT and Spa3R): cosines and sines of a packed sequence.

    Queries and keys are rotated; values and outputs are not.

    Half of the head's width rotates by the row y, the other half by the column x. In a half of width d, the angles are
    position * base^(-2k/d) for k = 0..d/2-1, and channel k pairs with channel k + d/2.
    """

    cos: Tensor  # (S, 1, head_dim), float32
    sin: Tensor  # includes the sign of the rotation

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

    def rows(self, start: int, stop: int) -> RotaryEncoding:
        """The encoding of some consecutive tokens."""
        return RotaryEncoding(self.cos[start:stop], self.sin[start:stop])

    def encode(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (S, heads, head_dim) -> the same shapes."""
        return self._rotate(query), self._rotate(key), value

    def decode(self, output: Tensor) -> Tensor:
        """(S, heads, head_dim), the attention's output -> the same."""
        return output

    def _rotate(self, tokens: Tensor) -> Tensor:
        partner = tokens.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
        return tokens * self.cos.to(tokens.dtype) + partner * self.sin.to(tokens.dtype)


@dataclass(frozen=True)
class ProjectiveEncoding:
    """PRoPE (arXiv 2507.10496): cameras and positions of a packed sequence.

    The head's width is split: one half consists of 4-vectors that are multiplied by the token's camera, one quarter
    rotates by the patch's column, one by its row. Queries, keys and values are encoded, and the output is decoded.
    Tokens without a camera use the identity and angle 0.
    """

    projection: Tensor  # (S, 4, 4), float32: P = lift(K) @ extrinsics, of each token's view
    inverse: Tensor  # (S, 4, 4), float32: P^-1
    cos: Tensor  # (S, 1, head_dim / 4), float32; columns, then rows
    sin: Tensor  # (S, 1, head_dim / 4), float32

    @classmethod
    def from_cameras(
        cls, projection: Tensor, inverse: Tensor, positions: Tensor, head_dim: int, base: float
    ) -> ProjectiveEncoding:
        """
        Args:
            projection: (S, 4, 4), from :func:`projection_matrices`, one row per token.
            inverse: (S, 4, 4), from :func:`projection_matrices`, one row per token.
            positions: (S, 2), (y, x) of every token's patch, from 0.
            head_dim: Width of one attention head, a multiple of 8.
            base: Base of the geometric series of frequencies.
        """
        eighth = head_dim // 8
        exponents = torch.arange(eighth, device=positions.device, dtype=torch.float32) / eighth
        angles = positions.float().flip(-1)[:, :, None] * base**-exponents  # (S, 2, head_dim / 8): x, then y
        return cls(projection, inverse, angles.cos().flatten(1)[:, None], angles.sin().flatten(1)[:, None])

    def rows(self, start: int, stop: int) -> ProjectiveEncoding:
        """The encoding of some consecutive tokens."""
        parts = (self.projection, self.inverse, self.cos, self.sin)
        return ProjectiveEncoding(*(part[start:stop] for part in parts))

    def encode(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (S, heads, head_dim) -> the same shapes: q by P^T, k and v by P^-1, all rotated."""
        return (
            self._apply(query, self.projection.transpose(-2, -1), self.sin),
            self._apply(key, self.inverse, self.sin),
            self._apply(value, self.inverse, self.sin),
        )

    def decode(self, output: Tensor) -> Tensor:
        """(S, heads, head_dim), the attention's output -> the same: by P, rotated back."""
        return self._apply(output, self.projection, -self.sin)

    def _apply(self, tokens: Tensor, matrix: Tensor, sin: Tensor) -> Tensor:
        # Always float32, even under autocast: translations times features lose too much precision in half precision.
        with maybe_autocast(tokens.device.type, enabled=False):
            heads, head_dim = tokens.shape[1:]
            projective, rotary = tokens.float().split(head_dim // 2, dim=-1)
            vectors = projective.reshape(-1, heads * head_dim // 8, 4)
            projective = (vectors @ matrix.transpose(-2, -1)).reshape(projective.shape)
            # (S, heads, head_dim / 2) -> the two elements of each rotated pair, columns before rows
            first, second = (part.flatten(-2) for part in rotary.unflatten(-1, (2, 2, -1)).unbind(-2))
            pair = (first * self.cos + second * sin, second * self.cos - first * sin)
            rotary = torch.stack([member.unflatten(-1, (2, -1)) for member in pair], dim=-2).flatten(-3)
            return torch.cat([projective, rotary], dim=-1).to(tokens.dtype)


def projection_matrices(
    extrinsics: Tensor, intrinsics: Tensor, image_hw: Tensor
) -> tuple[Tensor, Tensor]:  # (V, 4, 4), (V, 3, 3), (V, 2) -> (V, 4, 4), (V, 4, 4)
    """P = lift(K) @ extrinsics and its inverse, with K in units of the image: f / size and c / size - 0.5.

    The inverse has a closed form: exact, and without the device synchronization of a general inverse.

    Args:
        extrinsics: (V, 4, 4) camera-from-world, rigid.
        intrinsics: (V, 3, 3) in pixels, no skew.
        image_hw: (V, 2), height and width of the processed views in pixels.
    """
    with maybe_autocast(extrinsics.device.type, enabled=False):
        extrinsics, intrinsics = extrinsics.float(), intrinsics.float()
        height, width = image_hw.float().unbind(-1)
        fx, fy = intrinsics[:, 0, 0] / width, intrinsics[:, 1, 1] / height
        cx, cy = intrinsics[:, 0, 2] / width - 0.5, intrinsics[:, 1, 2] / height - 0.5
        projection = homogeneous(calibration(fx, fy, cx, cy)) @ extrinsics
        inverse = homogeneous(calibration(1 / fx, 1 / fy, -cx / fx, -cy / fy))
        return projection, invert_extrinsics(extrinsics) @ inverse
