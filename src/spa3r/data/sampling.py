"""Random draws of an epoch: the order of the scenes, numbers of views, frames and target views.

Everything is a pure function of the seed, the epoch and a position in the epoch, so every process draws the same: the
plan of a step covers all ranks, and each takes its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np

_VIEWS, _STEPS, _ORDER, _SOURCES, _SCENE = range(5)  # independent random streams
_BLOCK = 4096  # how many numbers are drawn at a time for an endless epoch


def sample_frame_indices(num_frames: int, views: int, stride: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Sample frames of a scene in temporal order, as in the pretraining of Spa3R.

    The step from one frame to the next is drawn from [lowest, highest], and highest is lowered until all views fit.
    If not even the lowest step fits, the frames are drawn without replacement; if there are fewer frames than
    views, with replacement.

    Args:
        num_frames: Number of frames of the scene, at least 1.
        views: Number of frames to draw, at least 1.
        stride: Lowest and highest step, at least 1.
        rng: Random generator.

    Returns:
        (views,) ascending.
    """
    if num_frames < views:
        return np.sort(rng.integers(num_frames, size=views))
    lowest, highest = stride
    gaps = views - 1
    if gaps * lowest >= num_frames:
        return np.sort(rng.choice(num_frames, size=views, replace=False))
    highest = min(highest, (num_frames - 1) // gaps) if gaps else highest
    places = np.concatenate([[0], np.cumsum(rng.integers(lowest, highest, size=gaps, endpoint=True))])
    return rng.integers(num_frames - places[-1]) + places


def sample_targets(views: int, mask_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Sample target views: all but max(1, int(views * (1 - mask_ratio))), never the first.

    Returns:
        (views,) bool.
    """
    num_context = max(1, int(views * (1 - mask_ratio)))
    targets = np.zeros(views, bool)
    targets[1 + rng.permutation(views - 1)[: views - num_context]] = True
    return targets


class Step(NamedTuple):
    """One step of all ranks: `scenes` scenes from position `first` of the epoch, with `views` views each."""

    index: int
    first: int
    scenes: int
    views: int

    def share(self, rank: int, world_size: int) -> range:
        """The positions in the epoch that one rank loads."""
        return range(self.first + self.scenes * rank // world_size, self.first + self.scenes * (rank + 1) // world_size)


@dataclass
class EpochPlan:
    """The scene at every position of an epoch, and its number of views.

    Args:
        lengths: Number of scenes of every source; None for an endless one.
        weights: Shares of the sources in the scenes drawn; None: every scene once.
        num_scenes: Length of the epoch in scenes; None: endless.
        views: Lowest and highest number of views of a scene.
        pictures: Maximum number of pictures per step and rank.
        world_size: Number of ranks.
        seed: Seed of everything drawn.
        epoch: Number of the epoch.
    """

    lengths: Sequence[int | None]
    weights: Sequence[float] | None
    num_scenes: int | None
    views: Sequence[int]
    pictures: int
    world_size: int
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        known = [length for length in self.lengths if length is not None]
        self.shares = None if self.weights is None else np.asarray(self.weights, float) / np.sum(self.weights)
        self.ends = np.cumsum(known) if self.weights is None and len(known) == len(self.lengths) else None
        self._steps: np.ndarray | None = None if self.num_scenes is None else self._finite_steps(self.num_scenes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._counts = [np.zeros(len(self.lengths), np.int64)]  # draws of every source before each block
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def rng(self, *key: int) -> np.random.Generator:
        """An independent random generator for every key."""
        return np.random.default_rng([self.seed, *key])

    def scene_rng(self, place: int) -> np.random.Generator:
        """The random generator of the scene at a position of the epoch."""
        return self.rng(_SCENE, self.epoch, place)

    # Steps

    @property
    def num_steps(self) -> int | None:
        """Number of steps of the epoch, the same in every epoch; None if it is endless."""
        return None if self._steps is None else len(self._steps)

    def steps(self, first: int = 0, stride: int = 1) -> Iterator[Step]:
        """Every `stride`-th step, starting at `first`."""
        if self._steps is None:
            yield from islice(self._endless_steps(), first, None, stride)
            return
        for index in range(first, len(self._steps), stride):
            yield Step(index, *self._steps[index].tolist())

    def _endless_steps(self) -> Iterator[Step]:
        index = place = 0
        for block in count():
            for views in self._draw_views(self.epoch, block):
                scenes = self.world_size * (self.pictures // views)
                yield Step(index, place, scenes, views)
                index, place = index + 1, place + scenes

    def _draw_views(self, epoch: int, block: int) -> list[int]:
        return self.rng(_VIEWS, epoch, block).integers(*self.views, size=_BLOCK, endpoint=True).tolist()

    def _finite_steps(self, num_scenes: int) -> np.ndarray:
        """(steps, 3): first position, scenes, views.

        The numbers of views are drawn once for all epochs and shuffled for each, so all epochs have the same length.
        Every rank gets at least one scene in every step; at most world_size - 1 scenes are left over, and only if the
        budget allows one scene per rank.
        """
        world, left, rows, block = self.world_size, num_scenes, [], 0
        while left >= world:
            for views in self._draw_views(0, block):
                scenes = world * (self.pictures // views)
                missing = world - (left - scenes)  # this many fewer, and the next step has a scene for every rank
                if 0 < missing < world and scenes - missing >= world:
                    scenes -= missing
                scenes = min(scenes, left)
                rows.append((scenes, views))
                left -= scenes
                if left < world:
                    break
            block += 1
        steps = np.asarray(rows, np.int64).reshape(-1, 2)
        steps = self.rng(_STEPS, self.epoch).permutation(steps)
        first = np.cumsum(steps[:, 0]) - steps[:, 0]
        return np.column_stack([first, steps])

    # Scenes

    def scene_at(self, place: int) -> tuple[int, int]:
        """The source, and the scene of that source, at a position of the epoch.

        For an endless source the second number counts the scenes drawn from it in this epoch. Positions beyond the end
        of the epoch continue with a new order.
        """
        if self.shares is not None:
            source, before = self._weighted(place)
            length = self.lengths[source]
            return source, before if length is None else self._shuffled(source, before, length)
        if self.ends is None:
            return 0, place
        scene = self._shuffled(-1, place, int(self.ends[-1]))
        source = int(np.searchsorted(self.ends, scene, side="right"))
        return source, scene - (int(self.ends[source - 1]) if source else 0)

    def _shuffled(self, source: int, before: int, length: int) -> int:
        """The scene that is drawn after `before` others of its source (-1: all sources together) of `length` scenes."""
        turn, place = divmod(before, length)
        if self._orders.get(source, (None, None))[0] != turn:
            order = self.rng(_ORDER, self.epoch, source + 1, turn).permutation(length)
            self._orders[source] = (turn, order.astype(np.uint32))
        return int(self._orders[source][1][place])

    def _weighted(self, place: int) -> tuple[int, int]:
        """The source at a position, and how often it was drawn before."""
        block, offset = divmod(place, _BLOCK)
        while len(self._counts) <= block:
            drawn = self._draw_sources(len(self._counts) - 1)
            self._counts.append(self._counts[-1] + np.bincount(drawn, minlength=len(self.lengths)))
        if self._block is None or self._block[0] != block:
            drawn = self._draw_sources(block)
            counts = np.empty(_BLOCK, np.int64)
            for source, before in enumerate(self._counts[block]):
                places = np.flatnonzero(drawn == source)
                counts[places] = before + np.arange(len(places))
            self._block = (block, drawn, counts)
        return int(self._block[1][offset]), int(self._block[2][offset])

    def _draw_sources(self, block: int) -> np.ndarray:
        return self.rng(_SOURCES, self.epoch, block).choice(len(self.lengths), size=_BLOCK, p=self.shares)
