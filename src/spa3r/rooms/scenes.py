"""Rooms as a scene source: endless, seeded, rendered on demand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from spa3r.checks import check_count
from spa3r.data.source import LoadedScene, SceneSource, check_stride
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.levels import resolve_level
from spa3r.rooms.walk import check_size


class RoomScenes(SceneSource):
    """Rooms of a level, each seen from every `stride_of_walk`-th frame of one camera walk. Scene i is the room with
    seed first_seed + i. Cameras are known.

    Args:
        level: Level of the rooms, 0 (plain) to 3.
        num_frames: Frames per room.
        stride_of_walk: Steps of the walk between two frames; three show nearly all of a room in 16 frames.
        first_seed: Seed of the first room.
        num_rooms: Number of rooms; None: endless, with new rooms in every epoch. Hold out rooms before `first_seed`.
        size: Height and width of the pictures in pixels.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports.
    """

    def __init__(
        self,
        level: int = 0,
        num_frames: int = 16,
        stride_of_walk: int = 3,
        first_seed: int = 0,
        num_rooms: int | None = None,
        size: int = 112,
        stride: Sequence[int] = (1, 3),
        name: str = "rooms",
    ) -> None:
        check_count("first_seed", first_seed, 0)
        check_size((size, size))
        resolve_level(level)
        check_count("num_frames", num_frames, cure="Ask for at least one.")
        check_count("stride_of_walk", stride_of_walk)
        if num_rooms is not None:
            check_count("num_rooms", num_rooms, cure="Ask for at least one.")
        self.level, self.frames, self.stride_of_walk = level, num_frames, stride_of_walk
        self.first_seed, self.num_rooms, self.size = first_seed, num_rooms, (size, size)
        self.stride, self.name = check_stride(stride), name

    def __len__(self) -> int:
        if self.num_rooms is None:
            raise TypeError("RoomScenes without `num_rooms` have no end. Give `num_rooms`.")
        return self.num_rooms

    def scene_name(self, scene: int) -> str:
        return f"{self.first_seed + scene:07d}"

    def num_frames(self, scene: int) -> int:
        return self.frames

    def load(self, scene: int, frames: Sequence[int]) -> LoadedScene:
        room = generate_room(self.first_seed + scene, self.level)
        walk = camera_walk(room, self.frames * self.stride_of_walk, self.size)
        views = render(room, walk[np.asarray(frames, int) * self.stride_of_walk])
        images = [PIL.Image.fromarray(image) for image in views.images]
        return LoadedScene(list(frames), images, views.extrinsics, views.intrinsics)

    def check_cameras(self) -> None:
        """Rooms always have cameras."""

    def camera_frames(self, scene: int) -> np.ndarray:
        return np.arange(self.frames)
