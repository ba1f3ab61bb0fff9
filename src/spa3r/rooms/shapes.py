"""The primitives from which all furniture is built, as triangles for the ray caster."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_ROUND_SIDES = 16  # a multiple of 4, so that a ring touches its bounding box on all four sides

# Corners 0..7 of the unit cube count in binary (x, y, z); two triangles per face: -x, +x, -y, +y, -z, +z.
_BOX_CORNERS = "013 032 457 476 015 054 237 276 026 064 137 175".split()
_UNIT_BOX = np.array([[int(corner) for corner in triangle] for triangle in _BOX_CORNERS])[..., None] // [4, 2, 1] % 2


def _fan(ring: np.ndarray, apex: np.ndarray) -> np.ndarray:
    """Triangles (n, 3, 3) from a closed ring (n, 3) to one point."""
    return np.stack([ring, np.roll(ring, -1, axis=0), np.broadcast_to(apex, ring.shape)], axis=1)


def _band(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Triangles (2n, 3, 3) between two closed rings (n, 3)."""
    next_lower, next_upper = np.roll(lower, -1, axis=0), np.roll(upper, -1, axis=0)
    return np.concatenate(
        [np.stack([lower, next_lower, next_upper], axis=1), np.stack([lower, next_upper, upper], axis=1)]
    )


def _ring(x: float, y: float, z: float, radius_x: float, radius_y: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(_ROUND_SIDES) / _ROUND_SIDES
    return np.stack(
        [x + radius_x * np.cos(angles), y + radius_y * np.sin(angles), np.full(_ROUND_SIDES, float(z))], axis=1
    )


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> np.ndarray:
    """Triangles (12, 3, 3) of an axis-aligned box; lowest and highest coordinate of each axis, meters.

    Two triangles per face, in the order -x, +x, -y, +y, -z, +z.
    """
    low, high = np.array([x, y, z], dtype=np.float64).T
    return low + _UNIT_BOX * (high - low)


def frustum(
    x: float, y: float, z: tuple[float, float], bottom: tuple[float, float], top: tuple[float, float]
) -> np.ndarray:
    """Triangles (T, 3, 3) of an upright elliptic (truncated) cone around (x, y); radii along x and y, meters."""
    lower, upper = _ring(x, y, z[0], *bottom), _ring(x, y, z[1], *top)
    return np.concatenate(
        [_fan(lower, np.array([x, y, z[0]])), _band(lower, upper), _fan(upper, np.array([x, y, z[1]]))]
    )


def ellipsoid(center: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    """Triangles (T, 3, 3) of an axis-aligned ellipsoid, meters."""
    latitudes = np.pi * np.arange(1, 6) / 6
    rings = [
        _ring(*center[:2], center[2] - radii[2] * np.cos(a), radii[0] * np.sin(a), radii[1] * np.sin(a))
        for a in latitudes
    ]
    poles = [np.array([*center[:2], center[2] + sign * radii[2]]) for sign in (-1, 1)]
    bands = [_band(low, high) for low, high in pairwise(rings)]
    return np.concatenate([_fan(rings[0], poles[0]), *bands, _fan(rings[-1], poles[1])])
