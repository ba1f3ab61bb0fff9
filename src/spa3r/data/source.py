"""The interface of a scene source: names, numbers of frames, and pictures on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image


class SceneError(ValueError):
    """A whole scene can't be read; the message says why. Its batch continues without it."""


@dataclass
class LoadedScene:
    """Pictures of some frames of a scene.

    Attributes:
        frames: The requested frames that could be read, in the requested order.
        images: Their pictures, RGB, in the original size.
        extrinsics: (frames, 4, 4) camera-from-world, OpenCV axes, in any world frame shared by the scene's frames; None
            if a camera is not known.
        intrinsics: (frames, 3, 3), pixels of the original picture, pixel centers at +0.5; None as above.
        unread: Names of unreadable pictures, and why.
    """

    frames: list[int]
    images: list[PIL.Image.Image]
    extrinsics: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    unread: list[tuple[str, str]] = field(default_factory=list)


class SceneSource(ABC):
    """A source of scenes.

    Attributes:
        name: Name of the source in reports.
        stride: Lowest and highest step from one drawn frame to the next, for :func:`~spa3r.data.sample_frame_indices`.
    """

    name: str
    stride: tuple[int, int]

    @abstractmethod
    def __len__(self) -> int:
        """Number of scenes.

        Raises:
            TypeError: The source is endless, or its length is unknown.
        """

    @abstractmethod
    def scene_name(self, scene: Any) -> str:
        """The name of a scene in reports. Scenes are numbered from 0."""

    @abstractmethod
    def num_frames(self, scene: Any) -> int:
        """Number of frames of a scene; 0 if it is unknown because the scene is broken."""

    @abstractmethod
    def load(self, scene: Any, frames: Sequence[int]) -> LoadedScene:
        """Load the pictures of some frames, with cameras if they are known. No file stays open.

        Raises:
            SceneError: The whole scene can't be read.
        """

    def check_cameras(self) -> None:
        """Reject a source without known cameras before training starts.

        Raises:
            ValueError: Not every scene has cameras.
        """
        raise ValueError(
            f'cameras="given" wants sources whose cameras are known, got {self.name!r}, and {type(self).__name__} '
            'knows none. Use cameras="predicted", or leave the source out.'
        )

    def camera_frames(self, scene: Any) -> np.ndarray:
        """The frames of a scene whose cameras are known and valid, ascending."""
        return np.arange(0)


def check_stride(stride: Sequence[int]) -> tuple[int, int]:
    """Convert a stride range to two integers.

    Raises:
        ValueError: The range is not 1 <= lowest <= highest.
    """
    numbers = tuple(stride) if isinstance(stride, Sequence) and not isinstance(stride, str) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(
            "`stride` must be the smallest and the largest step between frames, two ints with 1 <= smallest <= "
            f"largest, got {stride!r}. For example (1, 4)."
        )
    return numbers
