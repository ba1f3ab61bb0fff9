"""Scenes that clients upload once and ask about often, in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from spa3r.console import Evicted
from spa3r.models.spa3_vlm.scenes import SceneCache
from spa3r.serving.engine import EncodedPlace, Engine
from spa3r.serving.errors import ApiError

REMEMBERED = 10_000
"""Number of removed scenes whose ids are remembered, for errors."""


@dataclass
class UploadedScene:
    """A scene with an id.

    Attributes:
        pictures: Its pictures; None if they are not kept.
        key: Identifies its pictures.
        system: The system prompt after which it was encoded; None: none.
        num_views: Number of pictures.
        num_tokens: Number of tokens up to the end of the pictures.
        num_bytes: Memory of its encoding.
        id: The id.
        created: Time in seconds since 1970.
    """

    pictures: list[PIL.Image.Image] | None
    key: str
    system: str | None
    num_views: int
    num_tokens: int
    num_bytes: int
    id: str = field(default_factory=lambda: f"scene-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class _Encoding:
    """An encoding that is under way, for all requests that wait for it."""

    task: asyncio.Task[EncodedPlace]
    waiters: int = 0


class SceneStore:
    """Encodes scenes and keeps them; used from one event loop.

    Args:
        engine: Encodes scenes.
        cache_bytes: Memory for encoded scenes. The least recently used ones are evicted first.
        picture_bytes: Memory for the pictures of uploaded scenes, so that evicted ones can be encoded again.
        evicted: Whether a question about an evicted scene encodes it again or is refused. When it is refused, no
            pictures are kept.
    """

    def __init__(self, engine: Engine, cache_bytes: int, picture_bytes: int, evicted: Evicted = Evicted.ENCODE):
        self._engine, self._evicted, self._picture_bytes = engine, evicted, picture_bytes
        self.encoded: Any = SceneCache(cache_bytes)  # holds what the engine returns
        self.uploaded: OrderedDict[str, UploadedScene] = OrderedDict()  # least recently used first
        self._under_way: dict[tuple[str, str | None], _Encoding] = {}
        self._removed: deque[str] = deque(maxlen=REMEMBERED)

    async def add(
        self, pictures: list[PIL.Image.Image], system: str | None, replaces: UploadedScene | None = None
    ) -> UploadedScene:
        """Encode a scene and keep it.

        Args:
            pictures: At least one.
            system: The system prompt of its conversations; None: none.
            replaces: A scene whose id it gets.

        Raises:
            ApiError: The scene doesn't fit into the memory.
            ValueError: The scene can't be encoded.
        """
        size = sum(3 * picture.width * picture.height for picture in pictures)
        keeps = self._evicted == Evicted.ENCODE
        if keeps and size > self._picture_bytes:
            raise _too_large("pictures", size, self._picture_bytes)
        key, _, encoded = await self.encode(pictures, system)
        if not keeps and (key, system) not in self.encoded:
            raise _too_large("encoding", encoded.num_bytes, self.encoded.max_bytes)
        facts = (key, system, len(pictures), len(encoded), encoded.num_bytes)
        scene = UploadedScene(pictures if keeps else None, *facts)
        if replaces is not None:
            if replaces.id not in self.uploaded:  # deleted in the meantime
                raise self._unknown(replaces.id)
            scene.id, scene.created = replaces.id, replaces.created
        self.uploaded[scene.id] = scene
        self.uploaded.move_to_end(scene.id)
        self._remove_surplus()
        return scene

    def get(self, scene_id: str) -> UploadedScene:
        """An uploaded scene, by its id; counts as a use.

        Raises:
            ApiError: There is none.
        """
        scene = self.uploaded.get(scene_id)
        if scene is None:
            raise self._unknown(scene_id)
        self.uploaded.move_to_end(scene_id)
        return scene

    def delete(self, scene_id: str) -> None:
        """Forget an uploaded scene.

        Raises:
            ApiError: There is none.
        """
        key = self.get(scene_id).key
        del self.uploaded[scene_id]
        if all(scene.key != key for scene in self.uploaded.values()):
            for name in [name for name in self.encoded if name[0] == key]:
                del self.encoded[name]

    async def ask(self, scene_id: str, system: str | None) -> tuple[EncodedPlace, bool]:
        """The encoding of an uploaded scene, and whether it was in memory.

        Raises:
            ApiError: There is no such scene, or it can't be encoded again.
        """
        scene = self.get(scene_id)
        if (scene.key, system) in self.encoded:
            return self.encoded[scene.key, system], True
        if scene.pictures is None:
            if system == scene.system:
                raise self._unknown(scene_id)
            raise ApiError(
                400,
                f"The scene {scene_id!r} was encoded for the system prompt {scene.system!r}, got {system!r}, and this "
                "server keeps no pictures to encode it again. Upload it with this `system`.",
                "other_system_prompt",
                "messages",
            )
        _, was_kept, encoded = await self.encode(scene.pictures, system, scene.key)
        return encoded, was_kept

    async def encode(
        self, pictures: Sequence[PIL.Image.Image], system: str | None, key: str | None = None
    ) -> tuple[str, bool, EncodedPlace]:
        """The key of pictures, whether their encoding was in memory, and the encoding. Requests for the same one share
        its work, which is dropped when none of them waits any longer."""
        key = key or await asyncio.to_thread(_key, pictures)
        name = (key, system)
        if name in self.encoded:
            return key, True, self.encoded[name]
        encoding = self._under_way.get(name)
        if encoding is None:
            encoding = _Encoding(asyncio.ensure_future(self._encode(name, pictures)))
            self._under_way[name] = encoding
        encoding.waiters += 1
        try:
            return key, False, await asyncio.shield(encoding.task)
        finally:
            encoding.waiters -= 1
            if not encoding.waiters:
                encoding.task.cancel()  # no effect if it is done
                if self._under_way.get(name) is encoding:
                    del self._under_way[name]

    async def _encode(self, name: tuple[str, str | None], pictures: Sequence[PIL.Image.Image]) -> EncodedPlace:
        encoded = await self._engine.encode(pictures, name[1])
        self.encoded[name] = encoded
        self._remove_surplus()
        return encoded

    def _remove_surplus(self) -> None:
        """Remove scenes that can't be asked about any longer."""
        if self._evicted == Evicted.REFUSE:
            for scene in [s for s in self.uploaded.values() if (s.key, s.system) not in self.encoded]:
                self._remove(scene.id)
        while sum(_num_bytes(scene) for scene in self.uploaded.values()) > self._picture_bytes:
            self._remove(next(iter(self.uploaded)))

    def _remove(self, scene_id: str) -> None:
        del self.uploaded[scene_id]
        self._removed.append(scene_id)

    def _unknown(self, scene_id: str) -> ApiError:
        if scene_id in self._removed:
            return ApiError(
                410,
                f"The scene {scene_id!r} was removed from the server's memory to make room for others. Upload its "
                "pictures again.",
                "scene_evicted",
            )
        return ApiError(404, f"There is no scene {scene_id[:80]!r}. Upload it to /v1/scenes.", "scene_not_found")


def _num_bytes(scene: UploadedScene) -> int:
    return sum(3 * picture.width * picture.height for picture in scene.pictures or ())


def _key(pictures: Sequence[PIL.Image.Image]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.size}\n".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def _too_large(what: str, size: int, limit: int) -> ApiError:
    return ApiError(
        413,
        f"The {what} of a scene must have at most {limit} bytes on this server, got {size}. Give fewer pictures, or "
        "ask its operator for more memory.",
        "scene_too_large",
    )
