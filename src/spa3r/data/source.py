"""What a source of scenes is: names, numbers of frames, and pictures on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image


class SceneError(ValueError):
    """A whole scene can't be read; the message says why. Its batch goes on without it."""


@dataclass
class LoadedScene:
    """Pictures of some frames of a scene.

    Attributes:
        frames: Which of the wanted frames could be read, in the order in which they were asked for.
        images: Their pictures, RGB, in the original size.
        extrinsics: (frames, 4, 4) camera-from-world, OpenCV axes, of any world that the scene's frames share; None
            where a camera is not known.
        intrinsics: (frames, 3, 3), pixels of the original picture, pixel centres at +0.5; None as above.
        unread: Names of the pictures that could not be read, and why.
    """

    frames: list[int]
    images: list[PIL.Image.Image]
    extrinsics: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    unread: list[tuple[str, str]] = field(default_factory=list)


class SceneSource(ABC):
    """One place where scenes come from.

    Attributes:
        name: What reports call the source.
        stride: Smallest and largest step from one drawn frame to the next, for :func:`~spa3r.data.sample_frames`.
    """

    name: str
    stride: tuple[int, int]

    @abstractmethod
    def __len__(self) -> int:
        """How many scenes there are.

        Raises:
            TypeError: The source has no end, or doesn't know it.
        """

    @abstractmethod
    def scene_name(self, scene: Any) -> str:
        """What reports call a scene. Scenes are numbered from 0."""

    @abstractmethod
    def num_frames(self, scene: Any) -> int:
        """How many frames a scene has; 0 where that is not known because the scene is broken."""

    @abstractmethod
    def load(self, scene: Any, frames: Sequence[int]) -> LoadedScene:
        """The pictures of some frames, with cameras where they are known. Nothing stays open.

        Raises:
            SceneError: The whole scene can't be read.
        """

    def check_cameras(self) -> None:
        """Refuses a source without known cameras before anything is trained on it.

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
    """A stride range as two integers.

    Raises:
        ValueError: It is not 1 <= lowest <= highest.
    """
    numbers = tuple(stride) if isinstance(stride, Sequence) and not isinstance(stride, str) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(
            "`stride` must be the smallest and the largest step between frames, two ints with 1 <= smallest <= "
            f"largest, got {stride!r}. For example (1, 4)."
        )
    return numbers
