"""The assignment of tokens to views and scenes, as plain Python integers.

The processor computes the layout of a batch (``view_grid_hw``, ``views_per_scene``), and the models split their packed
sequences by it. Lengths are never read from an accelerator if the caller leaves the two small tensors on the CPU, as
the output of :meth:`Spa3RImageProcessor <spa3r.Spa3RImageProcessor>` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa3r.checks import is_count, shorten

MAX_GRID = 4096
"""Maximum side of a view in patches: above every picture, and low enough that positions fit into memory."""


@dataclass(frozen=True)
class ViewLayout:
    """The views of a batch, scene by scene: their patch grids, and the number of views of each scene."""

    grid_hw: tuple[tuple[int, int], ...]
    views_per_scene: tuple[int, ...]

    @classmethod
    def from_inputs(
        cls,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> ViewLayout:
        """Validate the two small inputs and convert them to integers.

        Args:
            view_grid_hw: (views, 2), patch grid (height, width) of every view, at least (1, 1).
            views_per_scene: (scenes,), every entry at least 1.

        Raises:
            ValueError: There are no views, an entry is not a whole number or out of range, or the inputs contradict
                each other.
        """
        rows, scenes = whole_numbers("view_grid_hw", view_grid_hw, 2), whole_numbers("views_per_scene", views_per_scene)
        if wrong := [row for row in rows if len(row) != 2 or min(row) < 1]:
            raise ValueError(
                "`view_grid_hw` must hold a (height, width) of at least (1, 1) patches for every view, got "
                f"{shorten(wrong[0])}. Pass it as the processor returned it."
            )
        if wrong := [row for row in rows if max(row) > MAX_GRID]:
            raise ValueError(
                f"`view_grid_hw` must hold sides of at most {MAX_GRID} patches, got {wrong[0]}. Pass it as the "
                "processor returned it."
            )
        grids = tuple((height, width) for height, width in rows)
        scenes = tuple(scenes)
        if not grids or not scenes:
            raise ValueError(
                "`view_grid_hw` and `views_per_scene` must hold at least one view of one scene, got "
                f"{len(grids)} views in {len(scenes)} scenes. Give the processor at least one image."
            )
        if min(scenes) < 1:
            raise ValueError(
                f"`views_per_scene` must be at least 1 everywhere, got {shorten(list(scenes))}. "
                "Leave scenes without views out of the batch."
            )
        if sum(scenes) != len(grids):
            raise ValueError(
                f"`views_per_scene` must add up to the number of views, {len(grids)} (the rows of `view_grid_hw`), "
                f"got {shorten(list(scenes))}, which adds up to {sum(scenes)}. Pass both as the processor returned "
                "them."
            )
        return cls(grids, scenes)

    @classmethod
    def from_pixels(
        cls,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
        patch_size: int,
    ) -> ViewLayout:
        """Like :meth:`from_inputs`, and check that the pixels fit.

        Args:
            view_pixel_values: (sum of N, 3 * p * p), normalized, floating point.
            view_grid_hw: (views, 2).
            views_per_scene: (scenes,).
            patch_size: Side of a patch in pixels, p.
        """
        layout = cls.from_inputs(view_grid_hw, views_per_scene)
        wanted = (sum(layout.patches_per_view), 3 * patch_size**2)
        check_tensor("view_pixel_values", view_pixel_values)
        if view_pixel_values.ndim != 2 or len(view_pixel_values) != wanted[0]:
            raise ValueError(
                f"`view_pixel_values` must have {wanted[0]} rows, one for each patch of `view_grid_hw`, got shape "
                f"{tuple(view_pixel_values.shape)}. Pass both as the processor returned them."
            )
        if view_pixel_values.shape[1] != wanted[1]:
            raise ValueError(
                f"`view_pixel_values` must have {wanted[1]} columns (3 x {patch_size} x {patch_size} pixels a patch), "
                f"got {view_pixel_values.shape[1]}. Use the processor that was saved with the model."
            )
        if not view_pixel_values.is_floating_point():
            raise ValueError(
                "`view_pixel_values` must be floating point, normalized as the processor does it, got "
                f"{view_pixel_values.dtype}."
            )
        return layout

    @property
    def num_views(self) -> int:
        return len(self.grid_hw)

    @property
    def patches_per_view(self) -> tuple[int, ...]:
        return tuple(height * width for height, width in self.grid_hw)

    @property
    def first_views(self) -> tuple[int, ...]:
        """Index of each scene's first view."""
        return tuple(accumulate(self.views_per_scene[:-1], initial=0))

    def per_scene(self, per_view: Sequence[int]) -> tuple[int, ...]:
        """Sums over the views of each scene."""
        return tuple(
            sum(per_view[first : first + count]) for first, count in zip(self.first_views, self.views_per_scene)
        )

    def same_grid(self) -> dict[tuple[int, int], list[int]]:
        """Views by patch grid, for operations that need equal sizes."""
        groups: dict[tuple[int, int], list[int]] = {}
        for view, grid in enumerate(self.grid_hw):
            groups.setdefault(grid, []).append(view)
        return groups

    def map_grids(self, function: Callable[[tuple[int, int], list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """Results of every view, of a function that takes a patch grid and its views and returns their results."""
        results: dict[int, Tensor] = {}
        for grid, views in self.same_grid().items():
            results |= zip(views, function(grid, views))
        return [results[view] for view in range(self.num_views)]

    def select(self, views: Sequence[int], views_per_scene: Sequence[int]) -> ViewLayout:
        """The layout of some views in a given order."""
        return ViewLayout(tuple(self.grid_hw[view] for view in views), tuple(views_per_scene))

    def split_context(self, targets: Sequence[bool]) -> ContextSplit:
        """Sort context before target views within every scene, so that each attention segment is contiguous.

        Args:
            targets: Whether each view is a target; each scene's first view must not be.
        """
        scenes = [range(first, first + count) for first, count in zip(self.first_views, self.views_per_scene)]
        order = [view for scene in scenes for view in sorted(scene, key=lambda view: targets[view])]
        context_views = [view for view in order if not targets[view]]
        return ContextSplit(
            order=order,
            places=[order.index(view) for view in range(self.num_views)],
            sorted_layout=self.select(order, self.views_per_scene),
            context_views=context_views,
            context_layout=self.select(context_views, [sum(not targets[view] for view in scene) for scene in scenes]),
        )

    def image_hw(self, patch_size: int) -> tuple[tuple[int, int], ...]:
        """Height and width of every processed view in pixels."""
        return tuple((height * patch_size, width * patch_size) for height, width in self.grid_hw)

    def positions(self, device: torch.device) -> Tensor:  # -> (sum of N, 2)
        """(y, x) of every patch, from 0, view by view."""
        grids = {
            (height, width): torch.cartesian_prod(
                torch.arange(height, device=device), torch.arange(width, device=device)
            ).view(-1, 2)
            for height, width in set(self.grid_hw)
        }
        return torch.cat([grids[grid] for grid in self.grid_hw])

    def token_positions(
        self, num_prefix: int, lengths: Sequence[int], device: torch.device, first: int = 1
    ) -> Tensor:  # -> (S, 2)
        """(y, x) of every token of a packed sequence with a prefix before each segment; (0, 0) for the prefix.

        Args:
            num_prefix: Tokens before each segment.
            lengths: Patches of each segment.
            device: Device of the result.
            first: Position of a view's first row and column.
        """
        prefix = torch.zeros(len(lengths), num_prefix, 2, dtype=torch.long, device=device)
        return prepend_tokens(prefix, self.positions(device) + first, lengths)


def to_device(values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from Python numbers or an array; pinned and asynchronous on CUDA to avoid synchronization."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class ContextSplit:
    """A batch with context before target views within every scene, and the mapping back to the caller's order."""

    order: list[int]  # the caller's view at each sorted position
    places: list[int]  # the sorted position of each of the caller's views
    sorted_layout: ViewLayout
    context_views: list[int]  # in the caller's numbering, scene by scene
    context_layout: ViewLayout


def check_tensor(name: str, value: Any, cure: str = "Pass it as the processor returned it.") -> None:
    """Raise for a value that is not a tensor.

    Args:
        name: Name of the value in the error, without quotes.
        value: The value.
        cure: The last sentence of the error.

    Raises:
        ValueError: It is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {shorten(value)}. {cure}")


def whole_numbers(name: str, values: Tensor | Sequence, depth: int = 1) -> list:
    """Convert a small tensor, array or sequence of whole numbers to Python integers, without rounding.

    Args:
        name: Name of the values in the error, without quotes.
        values: A tensor or array of integers, or a sequence of them; a single number is allowed if `depth` is 1.
        depth: Dimensions: 1, or 2 for a list of rows.

    Raises:
        ValueError: It is something else: fractions, booleans, texts, other dimensions, a tensor without data.
    """
    if isinstance(values, Tensor | np.ndarray | np.generic):
        if 0 in values.shape:
            return []
        if isinstance(values, Tensor):
            is_whole = not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)
            is_whole &= not values.is_meta
        else:
            is_whole = values.dtype.kind in "iu"
        if is_whole and (values.ndim == depth or (depth == 1 and not values.ndim)):
            return as_list(values)
    elif depth == 1:
        entries = as_list(values)
        if all(is_count(entry, -math.inf) for entry in entries):
            return [int(entry) for entry in entries]
    elif isinstance(values, Sequence):
        rows = [as_list(row) for row in values if hasattr(row, "__len__") and not isinstance(row, str)]
        if len(rows) == len(values) and all(is_count(entry, -math.inf) for row in rows for entry in row):
            return [[int(entry) for entry in row] for row in rows]
    what = "a row of whole numbers for every view" if depth == 2 else "whole numbers"
    dtype = f" and type {values.dtype}" if hasattr(values, "dtype") else ""
    raise ValueError(f"`{name}` must hold {what}, got {shorten(values)}{dtype}. Pass it as the processor returned it.")


def as_list(values: Any) -> list:
    """Convert a small tensor, array or sequence to Python numbers; a single number becomes a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Sequence) else [values]


def spans(length: int, at_most: int) -> list[tuple[int, int]]:
    """(start, stop) of spans of `at_most` that cover `length`; the last may be shorter."""
    return [(start, min(start + at_most, length)) for start in range(0, length, at_most)]


def join_rows(blocks: Iterable[tuple[Tensor, ...]], rows: int) -> tuple[Tensor, ...]:
    """Concatenate tuples of tensors row by row, as the blocks are made: they are never all held at once.

    Args:
        blocks: Tuples of tensors, all with the same number of rows within a tuple.
        rows: Rows of all blocks together.
    """
    whole: tuple[Tensor, ...] = ()
    start = 0
    for block in blocks:
        stop = start + len(block[0])
        if stop - start == rows:
            return block
        whole = whole or tuple(part.new_empty(rows, *part.shape[1:]) for part in block)
        for target, part in zip(whole, block):
            target[start:stop] = part
        start = stop
    return whole


def select_rows(rows: Tensor, lengths: Sequence[int], views: Sequence[int]) -> Tensor:
    """The rows of some views of a packed tensor, in the given order; `lengths` is the number of rows of each view."""
    parts = rows.split(list(lengths))
    return torch.cat([parts[view] for view in views])


def prepend_tokens(prefix: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Put tokens before each segment of a packed sequence.

    Args:
        prefix: (segments, n, C).
        tokens: (sum of lengths, C).
        lengths: Rows of each segment.

    Returns:
        (segments * n + sum of lengths, C).
    """
    if len(set(lengths)) == 1:  # few operations for any number of segments
        return torch.cat([prefix, tokens.unflatten(0, (len(lengths), -1))], dim=1).flatten(0, 1)
    parts = tokens.split(list(lengths))
    return torch.cat([part for pair in zip(prefix.unbind(0), parts) for part in pair])


def split_prefix(tokens: Tensor, lengths: Sequence[int], prefix: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`prepend_tokens`: (segments, prefix, C) and (sum of lengths, C)."""
    if len(set(lengths)) == 1:
        segments = tokens.unflatten(0, (len(lengths), -1))
        return segments[:, :prefix], segments[:, prefix:].flatten(0, 1)
    # A single split has one concatenation as its gradient; nested slices would have one gradient each.
    parts = tokens.split([count for length in lengths for count in (prefix, length)])
    return torch.stack(parts[::2]), torch.cat(parts[1::2])
