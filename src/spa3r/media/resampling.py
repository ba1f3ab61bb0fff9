"""Pillow's ``resize`` for some rows of the result: bit-identical, without computing the other rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import PIL.Image
from PIL.Image import Resampling

PLAIN_PIXELS = 2**24
"""Up to this many pixels of a result, Pillow computes all of them, which is faster."""

_PRECISION_BITS = 22  # of Pillow's weights for 8-bit pictures


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def _bicubic(x: float) -> float:
    return (1.5 * x - 2.5) * x * x + 1 if x < 1 else (((x - 5) * x + 8) * x - 4) * -0.5


FILTERS: dict[Resampling, tuple[int, Callable[[float], float]]] = {
    Resampling.BILINEAR: (1, lambda x: 1 - x),
    Resampling.BICUBIC: (2, _bicubic),
    Resampling.LANCZOS: (3, lambda x: _sinc(x) * _sinc(x / 3)),
}
"""Pillow's filters: support in rows, and weight by distance from the center."""


def resize_rows(
    picture: PIL.Image.Image, size: tuple[int, int], top: int, height: int, resample: Resampling
) -> PIL.Image.Image:
    """``picture.resize(size, resample).crop((0, top, size[0], top + height))``, bit-identical.

    If the result has many more rows than the picture, memory and time depend only on the number of requested rows.

    Args:
        picture: 8-bit, one or more channels.
        size: Width and height of the whole result.
        top: First requested row.
        height: Number of requested rows, at least 1.
        resample: One of :data:`FILTERS`.
    """
    width, all_rows = size
    if width * all_rows <= PLAIN_PIXELS or all_rows <= picture.height:
        resized = picture.resize(size, resample)
        return resized if height == all_rows else resized.crop((0, top, width, top + height))
    weights = [_weights(row, picture.height, all_rows, resample) for row in range(top, top + height)]
    first, end = weights[0][0], max(start + len(values) for start, values in weights)
    # Pillow resizes rows first and columns second, unless the height shrinks.
    rows = picture.crop((0, first, picture.width, end)).resize((width, end - first), resample)
    pixels = np.asarray(rows)
    result = np.empty((height, *pixels.shape[1:]), np.uint8)
    for index, (start, values) in enumerate(weights):
        used = pixels[start - first : start - first + len(values)].astype(np.int64)
        total = np.tensordot(values, used, 1) + (1 << (_PRECISION_BITS - 1))
        result[index] = (total >> _PRECISION_BITS).clip(0, 255)
    return PIL.Image.fromarray(result)


def _weights(row: int, rows_in: int, rows_out: int, resample: Resampling) -> tuple[int, np.ndarray]:
    """The first source row of a row of an enlarged result, and the weights of the source rows as Pillow rounds them
    (``precompute_coeffs`` and ``normalize_coeffs_8bpc`` in its ``Resample.c``)."""
    reach, shape = FILTERS[resample]
    center = (row + 0.5) * (rows_in / rows_out)
    start, end = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), rows_in)
    distances = [abs(index - center + 0.5) for index in range(start, end)]
    values = [shape(x) if x < reach else 0.0 for x in distances]
    total = sum(values)
    values = [value / total for value in values]
    return start, np.array([int(math.copysign(0.5, value) + value * (1 << _PRECISION_BITS)) for value in values])
