"""The views on which the rooms recipe measures feature fields, with the class of every patch that shows furniture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import FIRST_HELD_OUT, RenderedRooms, first_camera_world, pack
from render import CLASSES, SIZE, VIEWS
from torch import Tensor
from train_teacher import class_shares

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.data import SceneBatches
from spa3r.evaluation import FieldReport, evaluate_field
from spa3r.evaluation.run_folder import weights_hash
from spa3r.models.packing import ViewLayout
from spa3r.rooms import FURNITURE
from spa3r.rooms.scenes import RoomScenes
from spa3r.rooms.walk import walk_steps

KNOWN_ROOMS = 64
"""Rooms, of the training seeds, from whose pictures the mean features of the classes are computed."""

MAJORITY = 0.5
"""A patch shows a class if more than this share of its pixels does."""


@dataclass
class FieldViews:
    """Views of unseen rooms, half of them targets, and what is needed to score objects.

    Attributes:
        batches: Inputs of the model, one room each, with given cameras and `patch_classes`.
        known: Rooms of the training seeds.
        computed: Outputs of frozen parts on these views, which models of the same frozen parts share.
    """

    batches: list[dict[str, Any]]
    known: RenderedRooms
    computed: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, rooms: int, views: int = 8, level: int = 0, known_rooms: int = KNOWN_ROOMS) -> FieldViews:
        """Draw views of rooms as in training, in fixed steps."""
        first, processor = FIRST_HELD_OUT + 1000, Spa3RImageProcessor(size=SIZE)
        source = RoomScenes(level, first_seed=first, num_rooms=rooms, stride=(2, 2))
        batches = SceneBatches(source, processor, views=(views,) * 2, pictures_per_batch=views, cameras="given", seed=0)
        rendered = RenderedRooms.render(first, rooms, level)
        batches = [with_object_classes(rendered, batch) for batch in batches]
        return cls(batches, known_views(known_rooms, level))

    def measure(self, model: Spa3RForPreTraining, cameras: str = "given") -> FieldReport:
        """The metrics of a model, with the score of objects if it predicts semantic features."""
        remember_frozen(model, self.computed)
        batches = self.batches
        if cameras == "predicted":
            left_out = ("extrinsics", "intrinsics")
            batches = [{key: value for key, value in batch.items() if key not in left_out} for batch in batches]
        return evaluate_field(model, batches, class_means=class_means(self.known, model))


def remember_frozen(model: Spa3RForPreTraining, computed: dict[Any, Any]) -> None:
    """Run VGGT and the teacher once for the same pictures, also with the other models of the same frozen parts."""

    def remembering(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = (part, hashlib.sha256(pixels.numpy().data).hexdigest(), str(kwargs))
            if key not in computed:
                computed[key] = function(pixels, *args, **kwargs)
            return computed[key]

        return call

    spa3r: Any = model.spa3r
    spa3r._run_backbone = remembering(spa3r._run_backbone, weights_hash(spa3r.backbone))
    if model.semantic_teacher is not None:
        teaching: Any = model
        teaching._semantic_targets = remembering(model._semantic_targets, weights_hash(model.semantic_teacher))


def known_views(rooms: int = KNOWN_ROOMS, level: int = 0) -> RenderedRooms:
    """Pictures of rooms of the training seeds, for the class means."""
    return RenderedRooms.render(0, rooms, level, walk_steps(VIEWS)[::2])


@torch.no_grad()
def class_means(known: RenderedRooms, model: Spa3RForPreTraining) -> Tensor | None:  # -> (classes, C)
    """Means of the teacher's features by class of the patch, those of `CLASSES`; None without a teacher."""
    if model.semantic_teacher is None:
        return None
    frames, sums, counts = np.arange(known.images.shape[1]), 0, 0
    for room in range(len(known.seeds)):
        inputs = pack(known.images[room : room + 1, frames])
        layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
        features = model._semantic_targets(inputs["view_pixel_values"], layout)
        hot = torch.nn.functional.one_hot(patch_classes(known, room, frames) + 1, len(CLASSES) + 1)[:, 1:]
        sums, counts = sums + hot.to(features.dtype).t() @ features, counts + hot.sum(0)
    if not counts.all():
        missing = [CLASSES[i] for i in (counts == 0).nonzero()[:, 0]]
        raise ValueError(f"No patch of the {len(known.seeds)} known rooms shows {', '.join(missing)}.")
    return sums / counts[:, None]


def patch_classes(rooms: RenderedRooms, room: int, frames: np.ndarray) -> Tensor:  # -> (frames * patches,)
    """For every patch the class, an index into `CLASSES`, that most of its pixels show; -1 if none has a majority."""
    shares = class_shares(rooms, np.full(len(frames), room), frames, "cpu", SIZE // 14).flatten(0, 1)
    share, shown = shares.max(-1)
    return shown.where(share > MAJORITY, -1)


def object_classes(rooms: RenderedRooms, room: int, frames: np.ndarray) -> Tensor:  # -> (frames * patches,)
    """The class of every patch that shows furniture; -1 for all others."""
    shown = patch_classes(rooms, room, frames)
    return shown.where(shown < len(FURNITURE), -1)


def with_object_classes(rooms: RenderedRooms, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of one room, with `patch_classes`."""
    room = rooms.seeds.tolist().index(int(batch["scenes"][0].rpartition("/")[2]))
    frames = _frames(rooms.extrinsics[room], batch["extrinsics"].numpy())
    return batch | {"patch_classes": object_classes(rooms, room, frames)}


def make_batch(rooms: RenderedRooms, room: int, context: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """The model's inputs for some frames of a room as context and others as targets, with `patch_classes`."""
    frames = np.concatenate([context, targets])
    return {
        **pack(rooms.images[room : room + 1, frames]),
        "extrinsics": first_camera_world(rooms.extrinsics[room : room + 1, frames]),
        "intrinsics": torch.from_numpy(rooms.intrinsics[room, frames]),
        "target_mask": torch.arange(len(frames)) >= len(context),
        "patch_classes": object_classes(rooms, room, frames),
    }


def _frames(walk: np.ndarray, extrinsics: np.ndarray) -> np.ndarray:
    """Which cameras of a walk (16, 4, 4) these are; their world is that of the first of them."""
    for first in walk:
        distances = np.abs((extrinsics @ first)[:, None] - walk[None]).max((2, 3))
        if (distances.min(1) < 1e-3).all():
            return distances.argmin(1)
    raise ValueError("The batch's cameras are not of this room's walk.")
