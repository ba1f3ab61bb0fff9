"""Furniture by class: size, frequency, placement, and the few parts that make its shape recognizable.

Frame of an object: origin at the center of its footprint on the floor, x to the right when viewed
from behind, y from front to back, z up; so its front is the -y side, and its back is placed against a wall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from spa3r.rooms.finishes import COLORS, Finish
from spa3r.rooms.shapes import box, ellipsoid, frustum

Size = tuple[float, float, float]


class Part(NamedTuple):
    """Triangles (T, 3, 3) in the frame of their object, meters, and their finish."""

    triangles: np.ndarray
    finish: Finish


@dataclass(frozen=True)
class Furniture:
    """A class of objects.

    Attributes:
        smallest: width (x), depth (y), height (z) of the smallest one, meters.
        largest: the same of the largest one.
        at_wall: it stands with its back against a wall; otherwise it is free-standing.
        most: maximum number in a room.
        build: (size, finish) -> parts that fill the box of that size exactly. `finish` has the named color.
    """

    smallest: Size
    largest: Size
    at_wall: bool
    most: int
    build: Callable[[Size, Finish], list[Part]]


_DARK = Finish((0.12, 0.12, 0.13))
_METAL = Finish((0.62, 0.63, 0.65))
_LINEN = Finish((0.93, 0.92, 0.88))
_WOOD = Finish((0.50, 0.34, 0.19))
_LEAF = Finish((0.13, 0.42, 0.14), "mottle", 0.06, 0.5)
_SOIL = Finish((0.20, 0.13, 0.08))


def _tinted(finish: Finish, factor: float) -> Finish:
    """The same finish, lighter or darker, to distinguish parts of one color."""
    return replace(finish, rgb=tuple(min(1.0, factor * channel) for channel in finish.rgb))


def _legs(width: float, depth: float, top: float, thick: float) -> np.ndarray:
    x, y = width / 2, depth / 2
    return np.concatenate(
        [
            box((sx * x - (sx > 0) * thick, sx * x + (sx < 0) * thick), (sy, sy + thick), (0, top))
            for sx in (-1, 1)
            for sy in (-y, y - thick)
        ]
    )


def _table(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    return [
        Part(box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.05, h)), finish),
        Part(_legs(w - 0.08, d - 0.08, h - 0.05, 0.07), _tinted(finish, 0.8)),
    ]


def _chair(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    seat = 0.5 * h
    return [
        Part(_legs(w, d, seat - 0.05, 0.05), _WOOD),
        Part(box((-w / 2, w / 2), (-d / 2, d / 2), (seat - 0.05, seat)), finish),
        Part(box((-w / 2, w / 2), (d / 2 - 0.05, d / 2), (seat + 0.12, h)), finish),
        Part(
            np.concatenate(
                [box((x, x + 0.05), (d / 2 - 0.05, d / 2), (seat, seat + 0.12)) for x in (-w / 2, w / 2 - 0.05)]
            ),
            _WOOD,
        ),
    ]


def _stool(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    legs = [
        frustum(x * w * 0.3, y * d * 0.3, (0, h - 0.06), (0.02, 0.02), (0.02, 0.02)) for x in (-1, 1) for y in (-1, 1)
    ]
    return [
        Part(np.concatenate(legs), _METAL),
        Part(frustum(0, 0, (h - 0.06, h), (w / 2, d / 2), (w / 2, d / 2)), finish),
    ]


def _sofa(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    arm, back, seat = 0.18, 0.22, 0.5 * h
    inner = w - 2 * arm
    cushions = max(2, round(inner / 0.75))
    edges = -inner / 2 + inner * np.arange(cushions + 1) / cushions
    return [
        Part(box((-w / 2, w / 2), (-d / 2, d / 2), (0, 0.6 * seat)), _tinted(finish, 0.75)),
        Part(box((-w / 2, w / 2), (d / 2 - back, d / 2), (0.6 * seat, h)), finish),
        Part(
            np.concatenate(
                [box((x, x + arm), (-d / 2, d / 2 - back), (0.6 * seat, 0.75 * h)) for x in (-w / 2, w / 2 - arm)]
            ),
            finish,
        ),
        Part(
            np.concatenate(
                [
                    box((a + 0.012, b - 0.012), (-d / 2 + 0.02, d / 2 - back), (0.6 * seat, seat))
                    for a, b in pairwise(edges)
                ]
            ),
            _tinted(finish, 1.2),
        ),
    ]


def _bed(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    top = 0.5 * h
    pillows = 2 if w > 1.2 else 1
    slot = w / pillows
    return [
        Part(box((-w / 2, w / 2), (-d / 2, d / 2), (0, 0.5 * top)), _WOOD),
        Part(box((-w / 2, w / 2), (d / 2 - 0.08, d / 2), (0.5 * top, h)), _WOOD),
        Part(box((-w / 2 + 0.03, w / 2 - 0.03), (d / 2 - 0.65, d / 2 - 0.08), (0.5 * top, top)), _LINEN),
        # the blanket has the named color
        Part(box((-w / 2 + 0.01, w / 2 - 0.01), (-d / 2 + 0.01, d / 2 - 0.65), (0.4 * top, top + 0.02)), finish),
        Part(
            np.concatenate(
                [
                    ellipsoid((-w / 2 + slot * (i + 0.5), d / 2 - 0.34, top + 0.03), (0.38 * slot, 0.2, 0.09))
                    for i in range(pillows)
                ]
            ),
            _LINEN,
        ),
    ]


def _lamp(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    return [
        Part(frustum(0, 0, (0, 0.03), (0.35 * w, 0.35 * d), (0.35 * w, 0.35 * d)), _DARK),
        Part(frustum(0, 0, (0.03, h - 0.28), (0.02, 0.02), (0.02, 0.02)), _DARK),
        Part(frustum(0, 0, (h - 0.33, h), (w / 2, d / 2), (0.28 * w, 0.28 * d)), finish),
    ]


def _bookshelf(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    plank, rows = 0.03, max(3, round(h / 0.38))
    heights = (h - plank) * np.arange(rows + 1) / rows
    frame = [box((x, x + plank), (-d / 2, d / 2), (0, h)) for x in (-w / 2, w / 2 - plank)]
    frame += [box((-w / 2 + plank, w / 2 - plank), (-d / 2, d / 2), (z, z + plank)) for z in heights]
    parts = [
        Part(np.concatenate(frame), finish),
        Part(box((-w / 2 + plank, w / 2 - plank), (d / 2 - 0.02, d / 2), (plank, h - plank)), _tinted(finish, 0.7)),
    ]
    covers = [Finish(COLORS[name]) for name in ("red", "blue", "white", "green", "yellow", "brown", "black")]
    for row, z in enumerate(heights[:-1]):
        x, book = -w / 2 + plank + 0.01, 3 * row
        # Fixed but irregular widths and heights; every row leaves some empty space at its end.
        while x < w / 2 - 0.08 - 0.12 * ((row * 7) % 3):
            wide, tall = 0.035 + 0.01 * (book * 5 % 4), (0.6 + 0.07 * (book * 3 % 5)) * (heights[1] - plank)
            parts.append(
                Part(
                    box((x, x + wide - 0.004), (-d / 2 + 0.05, d / 2 - 0.03), (z + plank, z + plank + tall)),
                    covers[book * 4 % 7],
                )
            )
            x, book = x + wide, book + 1
    return parts


def _cabinet(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    front, gap = -d / 2 + 0.03, 0.008
    doors = [
        box((-w / 2 + 0.03, -gap), (front - 0.015, front), (0.14, h - 0.07)),
        box((gap, w / 2 - 0.03), (front - 0.015, front), (0.14, h - 0.07)),
    ]
    knobs = [box((x - 0.015, x + 0.015), (-d / 2, front - 0.015), (0.5 * h, 0.5 * h + 0.1)) for x in (-0.07, 0.07)]
    return [
        Part(_legs(w - 0.02, d - 0.05, 0.1, 0.05), _DARK),
        Part(box((-w / 2, w / 2), (front, d / 2), (0.1, h - 0.03)), _tinted(finish, 0.7)),
        Part(box((-w / 2, w / 2), (-d / 2 + 0.01, d / 2), (h - 0.03, h)), finish),
        Part(np.concatenate(doors), finish),
        Part(np.concatenate(knobs), _METAL),
    ]


def _desk(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    chest = (w / 2 - 0.42, w / 2 - 0.03)
    drawers = [
        box((chest[0] + 0.02, chest[1] - 0.02), (-d / 2 + 0.02, -d / 2 + 0.04), (z, z + 0.27 * h))
        for z in (0.05, 0.05 + 0.3 * h, 0.05 + 0.6 * h)
    ]
    return [
        Part(box((-w / 2, w / 2), (-d / 2, d / 2), (h - 0.04, h)), finish),
        Part(box((-w / 2 + 0.03, -w / 2 + 0.07), (-d / 2 + 0.04, d / 2 - 0.04), (0, h - 0.04)), finish),
        Part(box((-w / 2 + 0.07, chest[0]), (d / 2 - 0.08, d / 2 - 0.05), (0.3, h - 0.04)), _tinted(finish, 0.8)),
        Part(box(chest, (-d / 2 + 0.04, d / 2 - 0.04), (0, h - 0.04)), _tinted(finish, 0.65)),
        Part(np.concatenate(drawers), finish),
    ]


def _plant(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    pot = 0.32 * h
    leaves = [ellipsoid((0, 0, 0.72 * h), (0.36 * w, 0.36 * d, 0.28 * h))]
    for i in range(5):
        x, y = np.cos(2 * np.pi * i / 5 + 0.3), np.sin(2 * np.pi * i / 5 + 0.3)
        leaves.append(
            ellipsoid((0.28 * w * x, 0.28 * d * y, (0.52 + 0.09 * (i % 3)) * h), (0.2 * w, 0.2 * d, 0.13 * h))
        )
    # The two outermost leaves make the box exact: the foliage has its width and depth.
    leaves += [
        ellipsoid((0, 0, 0.5 * h), (w / 2, 0.1 * d, 0.07 * h)),
        ellipsoid((0, 0, 0.58 * h), (0.1 * w, d / 2, 0.07 * h)),
    ]
    return [
        Part(frustum(0, 0, (0, pot), (0.24 * w, 0.24 * d), (0.34 * w, 0.34 * d)), finish),
        Part(frustum(0, 0, (pot, pot + 0.01), (0.3 * w, 0.3 * d), (0.3 * w, 0.3 * d)), _SOIL),
        Part(frustum(0, 0, (pot, 0.6 * h), (0.02, 0.02), (0.02, 0.02)), _WOOD),
        Part(np.concatenate(leaves), _LEAF),
    ]


def _television(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    bench = 0.36 * h
    screen = (bench + 0.09, h)
    flaps = [box((x, x + w / 2 - 0.06), (-d / 2, -d / 2 + 0.012), (0.05, bench - 0.05)) for x in (-w / 2 + 0.04, 0.02)]
    return [
        Part(box((-w / 2, w / 2), (-d / 2 + 0.012, d / 2), (0, bench)), finish),
        Part(np.concatenate(flaps), _tinted(finish, 0.8)),
        Part(box((-0.16, 0.16), (-0.09, 0.09), (bench, bench + 0.02)), _DARK),
        Part(box((-0.04, 0.04), (-0.02, 0.02), (bench + 0.02, bench + 0.09)), _DARK),
        Part(box((-0.46 * w, 0.46 * w), (-0.025, 0.025), screen), _METAL),
        Part(
            box((-0.445 * w, 0.445 * w), (-0.035, -0.025), (screen[0] + 0.025, h - 0.025)), Finish((0.03, 0.04, 0.06))
        ),
    ]


def _refrigerator(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    front, split = -d / 2 + 0.04, 0.64 * h
    doors = [
        box((-w / 2, w / 2), (front - 0.02, front), (0.06, split - 0.012)),
        box((-w / 2, w / 2), (front - 0.02, front), (split + 0.012, h)),
    ]
    handles = [
        box((w / 2 - 0.09, w / 2 - 0.05), (-d / 2, front - 0.02), z)
        for z in ((split - 0.4, split - 0.06), (split + 0.06, split + 0.3))
    ]
    return [
        Part(box((-w / 2, w / 2), (front, d / 2), (0, h)), _tinted(finish, 0.7)),
        Part(np.concatenate(doors), finish),
        Part(np.concatenate(handles), _DARK),
    ]


def _trash_bin(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    return [
        Part(frustum(0, 0, (0, h - 0.05), (0.36 * w, 0.36 * d), (0.46 * w, 0.46 * d)), finish),
        Part(frustum(0, 0, (h - 0.05, h - 0.001), (w / 2, d / 2), (w / 2, d / 2)), _tinted(finish, 0.7)),
        Part(frustum(0, 0, (h - 0.001, h), (0.42 * w, 0.42 * d), (0.42 * w, 0.42 * d)), Finish((0.03, 0.03, 0.03))),
    ]


def _washer(size: Size, finish: Finish) -> list[Part]:
    w, d, h = size
    front, middle = -d / 2 + 0.04, 0.44 * h
    # An upright disc, rotated so that its axis points to the front: (x, y, z) -> (x, z, y).
    ring, glass = (
        frustum(0, middle, z, (r, r), (r, r))[..., [0, 2, 1]]
        for r, z in ((0.36 * w, (front - 0.03, front)), (0.26 * w, (-d / 2, front - 0.03)))
    )
    return [
        Part(box((-w / 2, w / 2), (front, d / 2), (0, h)), finish),
        Part(box((-w / 2 + 0.02, w / 2 - 0.02), (front - 0.01, front), (h - 0.14, h - 0.02)), _METAL),
        Part(box((w / 2 - 0.22, w / 2 - 0.06), (front - 0.015, front - 0.01), (h - 0.11, h - 0.05)), _DARK),
        Part(ring, _METAL),
        Part(glass, _DARK),
    ]


FURNITURE: dict[str, Furniture] = {
    "bed": Furniture((1.0, 1.9, 0.8), (1.8, 2.15, 1.1), True, 1, _bed),
    "sofa": Furniture((1.5, 0.8, 0.75), (2.3, 1.0, 0.95), True, 2, _sofa),
    "table": Furniture((0.9, 0.7, 0.68), (1.6, 1.0, 0.8), False, 3, _table),
    "desk": Furniture((1.1, 0.55, 0.7), (1.6, 0.75, 0.8), True, 2, _desk),
    "bookshelf": Furniture((0.7, 0.28, 1.4), (1.2, 0.4, 1.9), True, 3, _bookshelf),
    "cabinet": Furniture((0.7, 0.4, 0.8), (1.2, 0.55, 1.2), True, 3, _cabinet),
    "television": Furniture((1.0, 0.35, 1.0), (1.6, 0.45, 1.3), True, 1, _television),
    "refrigerator": Furniture((0.6, 0.6, 1.5), (0.8, 0.75, 1.9), True, 1, _refrigerator),
    "washer": Furniture((0.55, 0.55, 0.8), (0.65, 0.65, 0.9), True, 1, _washer),
    "chair": Furniture((0.4, 0.4, 0.8), (0.5, 0.52, 1.05), False, 6, _chair),
    "stool": Furniture((0.32, 0.32, 0.42), (0.42, 0.42, 0.7), False, 3, _stool),
    "plant": Furniture((0.45, 0.45, 0.7), (0.75, 0.75, 1.4), True, 4, _plant),
    "lamp": Furniture((0.34, 0.34, 1.3), (0.5, 0.5, 1.75), True, 3, _lamp),
    "trash bin": Furniture((0.25, 0.25, 0.3), (0.38, 0.38, 0.6), True, 2, _trash_bin),
}
"""All classes of objects by name."""
