"""The layouts of ScanNet and ScanNet++."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spa3r.data.folders import (
    Camera,
    PictureFolders,
    existing_folder,
    folders_in,
    read_json,
    valid_camera,
)
from spa3r.data.index import Entry, natural_key
from spa3r.data.source import SceneError
from spa3r.media.files import read_text

_OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


class ScanNetScenes(PictureFolders):
    """ScanNet: ``<root>/scene0000_00/color/0.jpg``. Cameras, if they were exported, are ``pose/0.txt``
    (camera-to-world) and ``intrinsic/intrinsic_color.txt``; a pose with infinite values is invalid.

    Args:
        root: The folder that holds the scene folders.
        scenes: Names of the scenes to use, or a text file with one per line, such as ``scannetv2_train.txt``; None:
            all. Scenes that are not on disk are left out with a warning.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports.
        cache_dir: Folder of the index; None: the user's cache.

    Raises:
        ValueError: The folder doesn't exist or has no scene.
    """

    endings = (".jpg",)

    def __init__(
        self,
        root: str | Path,
        scenes: Sequence[str] | str | Path | None = None,
        stride: Sequence[int] = (2, 6),
        name: str = "scannet",
        cache_dir: str | Path | None = None,
    ):
        super().__init__(root, scenes, stride, name, cache_dir)

    def _entries(self, scenes: list[str] | None) -> list[Entry]:
        found = {scene for scene in folders_in(self.root) if scene.startswith("scene")}
        return [
            (scene, str(self.root / scene / "color")) for scene in present(scenes, sorted(found, key=natural_key), self)
        ]

    def _why_empty(self) -> str:
        return f"ScanNet's layout is <root>/scene*/color/*.jpg; {self.root} holds no such picture. Check the path."

    def _camera_file(self, folder: Path) -> Path:
        return folder.parent / "intrinsic" / "intrinsic_color.txt"

    def _cameras(
        self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] | None
    ) -> list[Camera | None]:
        file = self._camera_file(folder)
        if not file.exists():
            return [None] * len(names)
        matrix = read_matrix(file)
        if matrix is None:
            raise SceneError(f"{file} must hold a 4 x 4 matrix of finite numbers. Export it again.")
        intrinsics = matrix[:3, :3]
        cameras: list[Camera | None] = []
        for name in names:
            world_from_camera = read_matrix(folder.parent / "pose" / f"{Path(name).stem}.txt")
            known = world_from_camera is not None
            cameras.append((np.linalg.inv(world_from_camera), intrinsics) if known else None)
        return cameras


class ScanNetPPScenes(PictureFolders):
    """ScanNet++: ``<root>/data/<scene>/dslr/undistorted_images``, or else ``resized_undistorted_images``; the scenes
    are listed in ``<root>/splits/<split>.txt``. Cameras, if there are any, are in
    ``dslr/nerfstudio/transforms_undistorted.json``.

    Args:
        root: The folder that holds ``data`` and ``splits``.
        split: Name of the file in ``splits`` that lists the scenes. Scenes that are not on disk are left out with a
            warning.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports.
        cache_dir: Folder of the index; None: the user's cache.

    Raises:
        ValueError: The folder or the split doesn't exist, or has no scene.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "nvs_sem_train",
        stride: Sequence[int] = (20, 60),
        name: str = "scannetpp",
        cache_dir: str | Path | None = None,
    ):
        self.split = split
        super().__init__(root, existing_folder(root) / "splits" / f"{split}.txt", stride, name, cache_dir)

    def _entries(self, scenes: list[str] | None) -> list[Entry]:
        data = self.root / "data"
        found = folders_in(data) if data.is_dir() else []
        return [(scene, self._pictures(data / scene)) for scene in present(scenes, found, self)]

    @staticmethod
    def _pictures(scene: Path) -> str:
        plain, resized = (scene / "dslr" / name for name in ("undistorted_images", "resized_undistorted_images"))
        return str(plain if plain.is_dir() or not resized.is_dir() else resized)

    def _why_empty(self) -> str:
        return (
            f"ScanNet++'s layout is <root>/data/<scene>/dslr/undistorted_images; {self.root} holds no such picture "
            f"of a scene of splits/{self.split}.txt. Check the path."
        )

    def _camera_file(self, folder: Path) -> Path:
        return folder.parent / "nerfstudio" / "transforms_undistorted.json"

    def _cameras(
        self, folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]] | None
    ) -> list[Camera | None]:
        file = self._camera_file(folder)
        if not file.exists():
            return [None] * len(names)
        content = read_json(file)
        try:
            intrinsics = np.array(
                [[content["fl_x"], 0, content["cx"]], [0, content["fl_y"], content["cy"]], [0, 0, 1]], np.float64
            )
            full_size = content["w"], content["h"]
            poses = {
                Path(frame["file_path"]).name: np.asarray(frame["transform_matrix"], np.float64)
                for key in ("frames", "test_frames")
                for frame in content.get(key, [])
            }
            cameras: list[Camera | None] = []
            for place, name in enumerate(names):
                pose = poses.get(name)
                if pose is None or not np.isfinite(pose).all():
                    cameras.append(None)
                    continue
                # The pictures may have been resized afterwards.
                scale = np.ones(2) if sizes is None else np.array(sizes[place]) / full_size
                camera_from_world = np.linalg.inv(pose @ _OPENGL_FROM_OPENCV)
                cameras.append(valid_camera(camera_from_world, np.diag([*scale, 1]) @ intrinsics))
            return cameras
        except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            raise SceneError(f"{file} is not in nerfstudio's format: {error!r}. Export it again.") from error


def present(wanted: list[str] | None, found: list[str], source: PictureFolders) -> list[str]:
    """The requested scenes that were found, with a warning about the others."""
    if wanted is None:
        return found
    there = set(found)
    missing = [scene for scene in wanted if scene not in there]
    if missing:
        warnings.warn(
            f"{source.name}: {len(missing)} of {len(wanted)} scenes of the list are not in {source.root} and are left "
            f"out, the first: {missing[0]}.",
            stacklevel=5,
        )
    return [scene for scene in wanted if scene in there]


def read_matrix(file: Path) -> np.ndarray | None:
    """Read a (4, 4) matrix from a text file; None if it is missing, not finite, or not invertible."""
    try:
        matrix = np.array(read_text(file).split(), np.float64).reshape(4, 4)
    except (OSError, ValueError):
        return None
    return matrix if np.isfinite(matrix).all() and np.linalg.det(matrix) else None
