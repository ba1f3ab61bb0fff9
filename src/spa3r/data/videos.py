"""Scenes as videos: frames are decoded on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spa3r.data.folders import IndexedScenes, listed
from spa3r.data.index import Entry, natural_key
from spa3r.data.source import LoadedScene, SceneError
from spa3r.media.files import VIDEOS, inside
from spa3r.media.videos import count_frames, read_frames


class VideoScenes(IndexedScenes):
    """One video per scene. Counting frames reads every file once; the index stores the counts.

    Args:
        root: The folder of the videos.
        scenes: Names of the files to use, or a text file with one per line; None: all.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports; None: the folder's name.
        cache_dir: Folder of the index; None: the user's cache.

    Raises:
        ValueError: The folder doesn't exist or holds no video, or a named video is missing.
    """

    def __init__(
        self,
        root: str | Path,
        scenes: Sequence[str] | str | Path | None = None,
        stride: Sequence[int] = (5, 30),
        name: str | None = None,
        cache_dir: str | Path | None = None,
    ):
        super().__init__(root, scenes, stride, name, cache_dir)

    def _entries(self, scenes: list[str] | None) -> list[Entry]:
        names = scenes
        if names is None:
            names = sorted((file for file in listed(self.root) if Path(file).suffix.lower() in VIDEOS), key=natural_key)
        for file in names:
            if not inside(self.root, file, "A name of `scenes`").is_file():
                raise ValueError(
                    f"`scenes` names {file!r}, and there is no file {self.root / file}. Take it out of the list, or "
                    "add it."
                )
        if not names:
            raise ValueError(f"{self.root} holds no video ({', '.join(sorted(VIDEOS))}). Check the path.")
        return [(file, str(self.root / file)) for file in names]

    def _scan(self, path: str) -> tuple[list[str], int]:
        try:
            return [], count_frames(path)
        except ValueError:  # reported when the scene is loaded
            return [], 0

    def load(self, scene: int, frames: Sequence[int]) -> LoadedScene:
        try:
            found = read_frames(self.index.path(scene), frames)
        except ValueError as error:
            raise SceneError(str(error)) from error
        read = [int(frame) for frame in frames if frame in found]
        if not read:
            raise SceneError(f"The video {self.index.path(scene)} is damaged: none of its frames can be decoded.")
        unread = [(f"frame {frame}", "It can't be decoded.") for frame in frames if frame not in found]
        return LoadedScene(read, [found[frame] for frame in read], unread=unread)
