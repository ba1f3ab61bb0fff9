"""Colors and patterns of surfaces: the texture from which geometry can be inferred."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rgb = tuple[float, float, float]

COLORS: dict[str, Rgb] = {
    "red": (0.82, 0.13, 0.13),
    "orange": (0.95, 0.50, 0.10),
    "yellow": (0.95, 0.83, 0.16),
    "green": (0.16, 0.58, 0.22),
    "teal": (0.10, 0.60, 0.62),
    "blue": (0.14, 0.30, 0.80),
    "purple": (0.50, 0.20, 0.66),
    "pink": (0.95, 0.52, 0.68),
    "brown": (0.44, 0.26, 0.13),
    "white": (0.94, 0.94, 0.92),
    "gray": (0.50, 0.51, 0.53),
    "black": (0.09, 0.09, 0.10),
}
"""Named colors of objects: albedo per channel, 0..1."""


@dataclass(frozen=True)
class Finish:
    """Finish of a surface.

    Attributes:
        rgb: albedo per channel, 0..1.
        pattern: a key of `PATTERNS`.
        period: size of one cell of the pattern, meters.
        contrast: how much darker the pattern's darkest spot is, 0..1. Patterns only darken, so a color keeps its name.
    """

    rgb: Rgb
    pattern: str = "plain"
    period: float = 1.0
    contrast: float = 0.0


def _hash(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Fixed pseudo-random value in 0..1 of every integer cell (i, j)."""
    bits = i.astype(np.int64).astype(np.uint32) * np.uint32(0x9E3779B1)
    bits ^= j.astype(np.int64).astype(np.uint32) * np.uint32(0x85EBCA77)
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x2C1B3C6D)
    return ((bits >> np.uint32(12)) & np.uint32(0xFFF)) / 4095.0


def _plain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.zeros_like(u)


def _checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.floor(u) + np.floor(v)) % 2


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.floor(u) % 2


def _planks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v)
    along = u / 6 + _hash(row, row)  # a plank is six times as long as wide, and rows are offset
    tone = 0.75 * _hash(np.floor(along), row)
    return np.where((v - row < 0.06) | (along % 1 < 0.015), 1.0, tone)


def _tiles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tone = 0.35 * _hash(np.floor(u), np.floor(v))
    return np.where((u % 1 < 0.07) | (v % 1 < 0.07), 1.0, tone)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(2 * v)
    return _tiles(u + 0.5 * (row % 2), 2 * v)


def _mottle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Value noise: hashed lattice values, interpolated smoothly."""
    i, j = np.floor(u), np.floor(v)
    x, y = u - i, v - j
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    low = _hash(i, j) * (1 - x) + _hash(i + 1, j) * x
    high = _hash(i, j + 1) * (1 - x) + _hash(i + 1, j + 1) * x
    return low * (1 - y) + high * y


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "checker": _checker,
    "stripes": _stripes,
    "planks": _planks,
    "tiles": _tiles,
    "bricks": _bricks,
    "mottle": _mottle,
}
"""Darkness, 0..1, at surface coordinates (u, v) measured in periods."""
