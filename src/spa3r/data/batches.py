"""Batches of scenes: a random number of views within a picture budget, independent of the number of workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.utils.data import IterableDataset, get_worker_info

from spa3r.checks import check_ranges
from spa3r.data.dataset_scenes import StreamedScene, StreamedScenes
from spa3r.data.sampling import EpochPlan, Step, sample_frame_indices, sample_targets
from spa3r.data.skipped import SkippedReport
from spa3r.data.source import SceneError, SceneSource
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor

_ROUNDS = 3  # how often other frames are tried in place of unreadable ones
_MOST_SCENES = 100  # scenes tried in turn for a batch of which nothing could be read
_NO_END = 2**32  # number of scenes of an endless epoch


class ResumableBatches(IterableDataset):
    """Batches with a selectable epoch and position, even while worker processes stay alive."""

    def __init__(self):
        super().__init__()
        # Shared with worker processes, which may outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skip = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration. A change of epoch resets `skip_batches`."""
        if epoch != int(self._epoch):
            self._skip.zero_()
        self._epoch.fill_(epoch)

    def skip_batches(self, count: int) -> None:
        """Start the selected epoch after `count` of its batches, to resume."""
        self._skip.fill_(count)


class SceneBatches(ResumableBatches):
    """Batches for pretraining, to be used as ``DataLoader(batches, batch_size=None, num_workers=n)``.

    Each step draws a number of views and takes as many scenes as fit into the budget of pictures, for all ranks
    together; each rank loads its share. Every draw is a pure function of the seed, the epoch and the position in the
    epoch, so the number of workers doesn't change the data. Unreadable pictures are replaced by others of their scene,
    unreadable scenes are left out, and both are reported. If that would leave a batch empty, the next scene of the
    order is used instead, which then occurs twice in that epoch.

    A batch is a dictionary with the model's inputs ``view_pixel_values``, ``view_grid_hw``, ``views_per_scene`` and
    ``target_mask``; with ``cameras="given"`` also ``extrinsics`` (views, 4, 4), relative to each scene's first view,
    and ``intrinsics`` (views, 3, 3) of the processed views, both float32. It also has ``scenes`` (names),
    ``skipped`` (dictionaries of source, scene, picture, reason; the picture is "" for a whole scene) and
    ``num_pictures`` (number of pictures tried in readable scenes).

    Args:
        sources: One or several sources of scenes.
        image_processor: Processes pictures into views.
        views: Lowest and highest number of views of a scene.
        pictures_per_batch: Maximum number of pictures in a batch, at least the highest number of views.
        mask_ratio: Share of the views that are targets, 0..1.
        cameras: ``"given"`` adds the known cameras, and leaves out frames without a valid one.
        weights: Shares of the sources in the scenes drawn; None: every scene once per epoch. Small sources are repeated
            in a new order.
        scenes_per_epoch: Length of an epoch in scenes of all ranks; None: all scenes once. The epoch is then endless if
            any source is.
        seed: Seed of everything drawn, >= 0.
        rank: Rank of this process.
        world_size: Number of processes that train together.
        max_bad_share: Share of pictures or scenes that may be unreadable, 0..1, before iteration fails.

    Raises:
        ValueError: An argument is out of range, a source has no known cameras although they are requested, or several
            sources, one of them endless, have no weights.
    """

    def __init__(
        self,
        sources: SceneSource | Sequence[SceneSource],
        image_processor: Spa3RImageProcessor,
        *,
        views: Sequence[int] = (4, 12),
        pictures_per_batch: int = 24,
        mask_ratio: float = 0.5,
        cameras: Literal["predicted", "given"] = "predicted",
        weights: Sequence[float] | None = None,
        scenes_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_share: float = 0.05,
    ):
        super().__init__()
        self.sources = [sources] if isinstance(sources, SceneSource) else list(sources)
        self.image_processor = image_processor
        self.views, self.pictures_per_batch, self.mask_ratio = tuple(views), pictures_per_batch, mask_ratio
        self.cameras, self.weights, self.scenes_per_epoch = cameras, weights, scenes_per_epoch
        self.seed, self.rank, self.world_size, self.max_bad_share = seed, rank, world_size, max_bad_share
        self._lengths = [_length(source) for source in self.sources]
        self._check()
        self._num_scenes = scenes_per_epoch
        known = [length for length in self._lengths if length is not None]
        if scenes_per_epoch is None and len(known) == len(self._lengths):
            self._num_scenes = sum(known)
        if self._num_scenes is not None and self._num_scenes < world_size:
            raise ValueError(
                f"An epoch must hold at least a scene for each of the {world_size} ranks, got {self._num_scenes}. "
                "Use fewer processes, or more scenes."
            )
        self._num_batches: int | None = None

    def _check(self) -> None:
        if not self.sources or not all(isinstance(source, SceneSource) for source in self.sources):
            raise ValueError(f"`sources` must be at least one SceneSource, got {self.sources!r}.")
        low, high = self.views if len(self.views) == 2 else (0, 0)
        if not 1 <= low <= high:
            raise ValueError(
                f"`views` must be the smallest and the largest number of views, 1 <= smallest <= largest, got "
                f"{self.views}. For example (4, 12)."
            )
        if self.pictures_per_batch < high:
            raise ValueError(
                f"`pictures_per_batch` must hold one scene of the largest number of views, {high}, got "
                f"{self.pictures_per_batch}. Raise it, or lower `views`."
            )
        if self.cameras not in ("predicted", "given"):
            raise ValueError(f"`cameras` must be 'predicted' or 'given', got {self.cameras!r}.")
        check_ranges(vars(self), {"mask_ratio": (0, 1), "max_bad_share": (0, 1), "scenes_per_epoch": (1, None)})
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must be in [0, world_size), got {self.rank} of {self.world_size}.")
        if self.weights is None and len(self.sources) > 1 and None in self._lengths:
            endless = [source.name for source, length in zip(self.sources, self._lengths) if length is None]
            raise ValueError(
                f"Several sources of which some have no end ({', '.join(endless)}) need `weights`, got None. Give each "
                "its share, for example [1, 1]."
            )
        if self.weights is not None:
            if len(self.weights) != len(self.sources) or not all(weight > 0 for weight in self.weights):
                raise ValueError(
                    f"`weights` must be a positive number for each of the {len(self.sources)} sources, got "
                    f"{list(self.weights)}. Leave out a source that must not be seen."
                )
        is_streamed = any(isinstance(source, StreamedScenes) for source in self.sources)
        if self.world_size > 1 and is_streamed and self.scenes_per_epoch is None and self.weights is None:
            raise ValueError(
                f"With {self.world_size} ranks a stream needs `scenes_per_epoch`, got None: its end is not known, and "
                "all ranks must take the same number of steps."
            )
        if self.cameras == "given":
            for source in self.sources:
                source.check_cameras()

    def __len__(self) -> int:
        """Number of batches per epoch and rank: the same for every rank and epoch.

        Raises:
            TypeError: The epoch is endless, or its length isn't known.
        """
        if self._num_batches is None:
            self._num_batches = self._plan(0).num_steps
        if self._num_batches is None:
            raise TypeError(
                "The length of an epoch is not known: a source has no end or is streamed. Give `scenes_per_epoch`."
            )
        return self._num_batches

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            self._lengths,
            self.weights,
            self._num_scenes,
            self.views,
            self.pictures_per_batch,
            self.world_size,
            self.seed,
            epoch,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        skip, epoch = int(self._skip), int(self._epoch)
        run = _Run(self, epoch)
        if not run.streams:
            for step in run.plan.steps(skip + number, workers):
                yield self._batch(run, run.places(step), step.views)
            return
        for step in run.plan.steps():  # the state of a stream depends on all steps before
            places = run.places(step)
            if step.index >= skip and (step.index - skip) % workers == number:
                try:
                    yield self._batch(run, places, step.views)
                except _EndOfStreamError:
                    return

    def _batch(self, run: _Run, places: list[_Place], views: int) -> dict[str, Any]:
        batch = _Batch()
        for place in places:
            try:
                self._add_scene(batch, run, place, run.scene(place), views)
            except _EndOfStreamError:
                if not batch.scenes:
                    raise
                break
        for place in run.following(places[-1], _MOST_SCENES):
            if batch.scenes:
                return self._packed(batch)
            self._add_scene(batch, run, place, run.scene(place, keep=True), views)
        raise RuntimeError(f"None of {_MOST_SCENES} scenes in a row can be read.\n{run.report}")

    def _add_scene(self, batch: _Batch, run: _Run, place: _Place, scene: Any, views: int) -> None:
        source, rng = self.sources[place.source], run.plan.scene_rng(place.number)
        name = source.scene_name(scene)
        targets = sample_targets(views, self.mask_ratio, rng)
        try:
            read = self._read_views(source, scene, views, rng)
        except SceneError as error:
            unread, tried = [("", str(error))], 0
        else:
            unread, tried = read.unread, read.num_tried
            batch.scenes.append(f"{source.name}/{name}")
            batch.views.append(read.views)
            batch.targets += targets.tolist()
            if read.cameras:
                extrinsics, intrinsics = (np.stack(matrices) for matrices in zip(*read.cameras))
                batch.extrinsics.append(relative_to_first(extrinsics))
                batch.intrinsics.append(intrinsics.astype(np.float32))
        skipped = [
            {"source": source.name, "scene": name, "picture": picture, "reason": reason} for picture, reason in unread
        ]
        batch.skipped += skipped
        batch.num_pictures += tried
        run.report.count(skipped, tried, int(tried > 0))

    def _read_views(self, source: SceneSource, scene: Any, views: int, rng: np.random.Generator) -> _Read:
        """The views of a scene. An unreadable frame is replaced by the nearest frame that was not tried yet, or, if
        none is left, by the nearest readable one."""
        if self.cameras == "given":
            usable = source.camera_frames(scene)
            if not len(usable):
                raise SceneError("None of its frames has a valid camera.")
        else:
            usable = np.arange(max(1, source.num_frames(scene)))
        frames = usable[sample_frame_indices(len(usable), views, source.stride, rng)].tolist()
        good: dict[int, _View] = {}
        unread: list[tuple[str, str]] = []
        tried: set[int] = set()
        for _ in range(1 + _ROUNDS):
            wanted = sorted(set(frames) - tried)
            if not wanted:
                break
            tried.update(wanted)
            good |= self._load(source, scene, wanted, unread)
            for bad in sorted(set(wanted) - set(good)):
                left = [frame for frame in usable.tolist() if frame not in tried and frame not in frames]
                if left:
                    nearest = min(left, key=lambda frame: abs(frame - bad))
                    frames = [nearest if frame == bad else frame for frame in frames]
        if not good:
            raise SceneError(f"None of the {len(tried)} pictures tried can be read, the first: {' '.join(unread[0])}")
        chosen = sorted(min(good, key=lambda other: abs(other - frame)) for frame in frames)
        read = [good[frame] for frame in chosen]
        cameras = [view.camera for view in read if view.camera is not None]
        return _Read([view.image for view in read], cameras, unread, len(tried))

    def _load(
        self, source: SceneSource, scene: Any, frames: list[int], unread: list[tuple[str, str]]
    ) -> dict[int, _View]:
        """The processed view and the camera of every readable frame."""
        loaded = source.load(scene, frames)
        unread += loaded.unread
        good: dict[int, _View] = {}
        for place, (frame, image) in enumerate(zip(loaded.frames, loaded.images)):
            camera = None
            try:
                view = self.image_processor.process_view(image)
            except ValueError as error:  # smaller than a patch
                unread.append((str(getattr(image, "filename", "") or f"frame {frame}"), str(error)))
                continue
            if self.cameras == "given":
                if loaded.extrinsics is None or loaded.intrinsics is None:
                    raise SceneError("A camera that was known can't be read any more.")
                size = (image.height, image.width)
                intrinsics = self.image_processor.process_intrinsics(loaded.intrinsics[place], size)
                camera = loaded.extrinsics[place], np.asarray(intrinsics)
            good[frame] = _View(view, camera)
        return good

    def _packed(self, batch: _Batch) -> dict[str, Any]:
        packed = dict(self.image_processor.pack(batch.views))
        packed["target_mask"] = torch.tensor(batch.targets)
        if self.cameras == "given":
            packed["extrinsics"] = torch.from_numpy(np.concatenate(batch.extrinsics))
            packed["intrinsics"] = torch.from_numpy(np.concatenate(batch.intrinsics))
        return packed | {"scenes": batch.scenes, "skipped": batch.skipped, "num_pictures": batch.num_pictures}


class _EndOfStreamError(Exception):
    """A stream that is read only once has no more scenes."""


class _Place(NamedTuple):
    """A position in the epoch, its source, and the scene of that source."""

    number: int
    source: int
    scene: int


class _Run:
    """One iteration over an epoch: its plan, and the positions in its streams."""

    def __init__(self, batches: SceneBatches, epoch: int):
        self.batches, self.plan = batches, batches._plan(epoch)
        self.report = SkippedReport(batches.max_bad_share)
        self.streams = {
            number: _Stream(source, batches, epoch, number)
            for number, source in enumerate(batches.sources)
            if isinstance(source, StreamedScenes)
        }

    def places(self, step: Step) -> list[_Place]:
        """This rank's share of a step. With streams, it must be called for all steps in order."""
        places = []
        for number in step.share(self.batches.rank, self.batches.world_size):
            source, scene = self.plan.scene_at(number)
            stream = self.streams.get(source)
            if stream and stream.is_split:  # the rank's own shards, from their start
                scene = stream.drawn
                stream.drawn += 1
            places.append(_Place(number, source, scene))
        return places

    def following(self, place: _Place, count: int) -> Iterator[_Place]:
        """The places after a place, which belong to other steps or ranks."""
        for ahead in range(1, count + 1):
            source, scene = self.plan.scene_at(place.number + ahead)
            stream = self.streams.get(source)
            if stream and stream.is_split:
                scene = stream.drawn - 1 + ahead
            yield _Place(place.number + ahead, source, scene)

    def scene(self, place: _Place, keep: bool = False) -> Any:
        """The scene of a place, as the source identifies it."""
        if place.source in self.streams:
            return self.streams[place.source].scene(place.scene, keep)
        if self.batches._lengths[place.source] is None:  # every epoch has new ones
            return place.scene + self.plan.epoch * (self.batches._num_scenes or _NO_END)
        return place.scene


class _Stream:
    """The scenes of a stream by number, in ascending order, pass after pass."""

    def __init__(self, source: StreamedScenes, batches: SceneBatches, epoch: int, number: int):
        self.source, self.key = source, [batches.seed, epoch, number]
        self.rank, self.world_size = batches.rank, batches.world_size
        self.is_split = source.splits(batches.world_size)
        self.repeats = batches.scenes_per_epoch is not None or batches.weights is not None
        self.drawn = 0  # scenes that the plan assigned to this rank
        self._first, self._ahead = 0, deque()  # number of the next scene, and scenes that were read early
        self._scenes = self._passes()

    def scene(self, number: int, keep: bool) -> StreamedScene:
        """The scene of a number. Earlier scenes are discarded, unless `keep`."""
        while not keep and self._first < number:
            self._next()
            self._first += 1
        while self._first + len(self._ahead) <= number:
            self._ahead.append(self._read())
        return self._ahead[number - self._first]

    def _next(self) -> StreamedScene:
        return self._ahead.popleft() if self._ahead else self._read()

    def _read(self) -> StreamedScene:
        try:
            return next(self._scenes)
        except StopIteration:
            raise _EndOfStreamError from None

    def _passes(self) -> Iterator[StreamedScene]:
        for turn in count():
            seed = int(np.random.SeedSequence([*self.key, turn]).generate_state(1)[0])
            empty = True
            for scene in self.source.scenes(seed, self.rank, self.world_size):
                empty = False
                yield scene
            if empty:
                raise ValueError(f"The stream {self.source.name!r} holds no scene. Check the split and the columns.")
            if not self.repeats:
                return


@dataclass
class _Batch:
    """A batch while it is being filled, scene by scene."""

    scenes: list[str] = field(default_factory=list)
    views: list[list[PIL.Image.Image]] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    extrinsics: list[np.ndarray] = field(default_factory=list)
    intrinsics: list[np.ndarray] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_pictures: int = 0


class _View(NamedTuple):
    """A processed view; with ``cameras="given"`` its extrinsics and intrinsics."""

    image: PIL.Image.Image
    camera: tuple[np.ndarray, np.ndarray] | None


class _Read(NamedTuple):
    """Views of a scene, and with ``cameras="given"`` the camera of each."""

    views: list[PIL.Image.Image]
    cameras: list[tuple[np.ndarray, np.ndarray]]
    unread: list[tuple[str, str]]
    num_tried: int


def _length(source: SceneSource) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def relative_to_first(extrinsics: np.ndarray) -> np.ndarray:
    """Express cameras in the frame of the first one, which is the world frame in the rest of the library.

    Args:
        extrinsics: (V, 4, 4) camera-from-world, for any world frame.

    Returns:
        (V, 4, 4) float32 camera-from-first-camera; the first is the identity.
    """
    if np.ndim(extrinsics) != 3 or np.shape(extrinsics)[1:] != (4, 4):
        raise ValueError(
            f"extrinsics: wanted an array (V, 4, 4), got {np.shape(extrinsics)}; stack the views of a scene."
        )
    extrinsics = np.asarray(extrinsics, np.float64)
    return (extrinsics @ np.linalg.inv(extrinsics[0])).astype(np.float32)
