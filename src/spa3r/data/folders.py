"""Scenes as folders of pictures: any folder of folders, and the base of other layouts."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa3r.data.index import Entry, SceneIndex, natural_key
from spa3r.data.source import LoadedScene, SceneError, SceneSource, check_stride
from spa3r.media.files import PICTURES, inside, read_text
from spa3r.media.images import to_rgb

Camera = tuple[np.ndarray, np.ndarray]
"""Extrinsics (4, 4) camera-from-world, and intrinsics (3, 3) in pixels of the original picture."""


class IndexedScenes(SceneSource):
    """Base of the sources on disk: an index of folders or files, of which each is a scene.

    Args:
        root: The folder of the scenes.
        scenes: Names of the scenes to use, or a text file with one per line; None: all.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports; None: the folder's name.
        cache_dir: Folder of the index; None: the user's cache.
    """

    def __init__(
        self,
        root: str | Path,
        scenes: Sequence[str] | str | Path | None = None,
        stride: Sequence[int] = (1, 4),
        name: str | None = None,
        cache_dir: str | Path | None = None,
    ):
        self.root = existing_folder(root)
        self.name, self.stride = name or self.root.name, check_stride(stride)
        self.index = SceneIndex.build(
            [type(self).__name__, self.root.resolve(), *([] if scenes is None else [str(scenes)])],
            self._entries(read_names(scenes)),
            self._scan,
            cache_dir,
        )
        self._rows = self._usable()

    @abstractmethod
    def _entries(self, scenes: list[str] | None) -> list[Entry]:
        """Names of the scenes, and the folder or file of each."""

    @abstractmethod
    def _scan(self, path: str) -> tuple[list[str], int]:
        """Names of the pictures of a scene, if it has any, and its number of frames."""

    def _usable(self) -> np.ndarray:
        """The rows of the index that are scenes."""
        return np.arange(len(self.index))

    def __len__(self) -> int:
        return len(self._rows)

    def scene_name(self, scene: int) -> str:
        return self.index.name(self._rows[scene])

    def num_frames(self, scene: int) -> int:
        return int(self.index.counts[self._rows[scene]])


class PictureFolders(IndexedScenes):
    """Base of the layouts of picture folders; folders without pictures are left out."""

    endings = PICTURES

    def _usable(self) -> np.ndarray:
        rows = np.flatnonzero(self.index.counts)
        if not len(rows):
            raise ValueError(self._why_empty())
        return rows

    @abstractmethod
    def _why_empty(self) -> str:
        """The error message if there are no scenes."""

    def _scan(self, path: str) -> tuple[list[str], int]:
        names = [name for name in listed(path) if name.lower().endswith(self.endings)]
        names.sort(key=natural_key)
        return names, len(names)

    def load(self, scene: int, frames: Sequence[int]) -> LoadedScene:
        row = self._rows[scene]
        folder = Path(self.index.path(row))
        if not folder.is_dir():
            raise SceneError(f"The folder {folder} is gone. Start the run again to index the source anew.")
        loaded, names = LoadedScene([], []), []
        for frame in frames:
            picture = self.index.picture(row, int(frame))
            try:
                loaded.images.append(to_rgb(folder / picture))
            except ValueError as error:
                loaded.unread.append((picture, str(error)))
            else:
                loaded.frames.append(int(frame))
                names.append(picture)
        try:
            cameras = self._cameras(folder, names, [image.size for image in loaded.images])
        except SceneError:  # callers that need cameras call `camera_frames` first, which raises it
            return loaded
        if names and all(camera is not None for camera in cameras):
            loaded.extrinsics, loaded.intrinsics = (np.stack(values) for values in zip(*cameras))
        return loaded

    def check_cameras(self) -> None:
        files = [self._camera_file(Path(self.index.path(row))) for row in self._rows]
        missing = [scene for scene, file in enumerate(files) if not file.exists()]
        if missing:
            raise ValueError(
                f'cameras="given" wants known cameras for every scene; of {self.name!r}, {len(missing)} of {len(self)} '
                f"scenes have none, the first: {self.scene_name(missing[0])} (no {files[missing[0]]}). Add them, "
                'choose other scenes with `scenes`, or use cameras="predicted".'
            )

    def camera_frames(self, scene: int) -> np.ndarray:
        row = self._rows[scene]
        cameras = self._cameras(Path(self.index.path(row)), self.index.pictures(row), None)
        return np.flatnonzero([camera is not None for camera in cameras])

    @abstractmethod
    def _camera_file(self, folder: Path) -> Path:
        """The file that must exist for a scene's cameras to be known."""

    @abstractmethod
    def _cameras(
        self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] | None
    ) -> list[Camera | None]:
        """Cameras of pictures, None where unknown or invalid. `sizes` (width, height): None if only validity
        matters."""


class FolderScenes(PictureFolders):
    """A folder per scene, with pictures in natural order of their names.

    A scene's folder may hold ``cameras.json``: ``{"000.png": {"extrinsics": 4 x 4 camera-from-world with OpenCV axes,
    "intrinsics": 3 x 3 in pixels of that file}, ...}``.

    Args:
        root: The folder that holds the scene folders. Hidden folders and folders without pictures are ignored.
        scenes: Names of the folders to use, or a text file with one per line; None: all.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports; None: the folder's name.
        cache_dir: Folder of the index; None: the user's cache.

    Raises:
        ValueError: The folder doesn't exist or holds no scene, or a named scene is missing.
    """

    def _entries(self, scenes: list[str] | None) -> list[Entry]:
        if scenes is None:
            return [(name, str(self.root / name)) for name in sorted(folders_in(self.root), key=natural_key)]
        folders = [inside(self.root, name, "A name of `scenes`") for name in scenes]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(
                    f"`scenes` names {folder.name!r}, and there is no folder {folder}. Take it out of the list, or "
                    "add it."
                )
        return [(name, str(folder)) for name, folder in zip(scenes, folders)]

    def _why_empty(self) -> str:
        if self._scan(str(self.root))[1]:
            return (
                f"`root` must be a folder of folders, one for every scene, got {self.root}, which holds pictures "
                "itself. Give the folder above it."
            )
        return f"{self.root} holds no folder with pictures ({', '.join(PICTURES)}). Check the path."

    def _camera_file(self, folder: Path) -> Path:
        return folder / "cameras.json"

    def _cameras(
        self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] | None
    ) -> list[Camera | None]:
        file = self._camera_file(folder)
        if not file.exists():
            return [None] * len(names)
        known = read_json(file)
        try:
            return [
                valid_camera(known[name]["extrinsics"], known[name]["intrinsics"]) if name in known else None
                for name in names
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise SceneError(
                f"{file} must map names of pictures to {{'extrinsics': 4 x 4, 'intrinsics': 3 x 3}}, got {error!r}."
            ) from error


def existing_folder(path: str | Path) -> Path:
    """The folder, after checking that it exists."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"`root` must be a folder, got {folder}, which is none. Check the path.")
    return folder


def listed(folder: str | Path) -> list[str]:
    """Contents of a folder without hidden names; empty if it can't be read."""
    try:
        with os.scandir(folder) as content:
            return [entry.name for entry in content if not entry.name.startswith(".")]
    except OSError:
        return []


def folders_in(folder: str | Path) -> list[str]:
    """Names of the subfolders of a folder, without hidden ones."""
    with os.scandir(folder) as content:
        return [entry.name for entry in content if entry.is_dir() and not entry.name.startswith(".")]


def read_names(scenes: Sequence[str] | str | Path | None) -> list[str] | None:
    """Names of scenes, from a sequence or from a text file with one per line."""
    if scenes is None or not isinstance(scenes, str | Path):
        return None if scenes is None else list(scenes)
    try:
        lines: Iterable[str] = read_text(Path(scenes).expanduser()).splitlines()
    except OSError as error:
        raise ValueError(
            f"`scenes` must be names, or a text file with one name a line, got {scenes} ({error.strerror})."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SceneError: The file can't be read.
    """
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise SceneError(f"{file} can't be read as JSON ({error}). Repair or remove it.") from error
    if not isinstance(content, dict):
        raise SceneError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def valid_camera(extrinsics: Any, intrinsics: Any) -> Camera | None:
    """A camera of finite numbers; None if some are not finite.

    Raises:
        ValueError: The shapes are wrong.
    """
    extrinsics, intrinsics = np.asarray(extrinsics, np.float64), np.asarray(intrinsics, np.float64)
    if extrinsics.shape != (4, 4) or intrinsics.shape != (3, 3):
        raise ValueError(f"extrinsics of shape {extrinsics.shape}, intrinsics of shape {intrinsics.shape}")
    return (extrinsics, intrinsics) if np.isfinite(extrinsics).all() and np.isfinite(intrinsics).all() else None
