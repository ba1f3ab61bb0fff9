"""The server's work, without routes: what it allows, who is admitted, scenes, prompts."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import PIL.Image

from spa3r.checks import check_count
from spa3r.console import Evicted, Limits
from spa3r.serving.conversation import as_chat, check_conversation, leading_media, media_of, texts_of
from spa3r.serving.engine import Engine, Generation, Prompt, Sampling
from spa3r.serving.errors import ApiError
from spa3r.serving.metrics import Metrics
from spa3r.serving.pictures import PictureReader
from spa3r.serving.requests import ChatRequest, Message, ScenePart
from spa3r.serving.scenes import SceneStore, UploadedScene

DEFAULT_TOKENS = 128
"""Maximum length of an answer if the request names none, as for :meth:`~spa3r.Spa3VLM.ask`."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    Attributes:
        limits: Limits on the pictures of a scene, on their bytes, and on the characters of a conversation.
        max_tokens: Maximum length of an answer in tokens.
        max_choices: Maximum number of answers of a request (`n`).
        max_running: Maximum number of answers that are generated together.
        max_waiting: Maximum number of answers beyond these that wait.
        timeout: Maximum time of a request in seconds, from its first byte to the last of its answer.
        grace: Seconds that running requests have after a signal to stop.
        cache_bytes: Memory for encoded scenes.
        picture_bytes: Memory for the pictures of uploaded scenes.
        evicted: What happens to a question about an uploaded scene whose encoding left the memory.
        allow_remote: Whether pictures and videos at http(s) URLs are downloaded.
        api_key: The key that clients must send; None: none.

    Raises:
        ValueError: A number is out of range.
    """

    limits: Limits = field(default_factory=lambda: Limits(question_length=32_000, file_bytes=64 * 2**20))
    max_tokens: int = 1024
    max_choices: int = 8
    max_running: int = 16
    max_waiting: int = 64
    timeout: float = 300.0
    grace: float = 30.0
    cache_bytes: int = 4 * 2**30
    picture_bytes: int = 2**30
    evicted: Evicted = Evicted.ENCODE
    allow_remote: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_choices", "max_running"):
            check_count(name, getattr(self, name))
        check_count("max_waiting", self.max_waiting, 0)


class Service:
    """The server's work, without routes.

    Args:
        engine: Encodes and generates.
        model_name: The name of the model for clients.
        settings: What is allowed.
        keep: Function that reduces each picture when it is read; None: keep pictures whole.
        metrics: What is counted.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        settings: ServerSettings,
        keep: Callable[[PIL.Image.Image], PIL.Image.Image] | None,
        metrics: Metrics,
    ):
        self.engine, self.model_name, self.settings, self.metrics = engine, model_name, settings, metrics
        self.scenes = SceneStore(engine, settings.cache_bytes, settings.picture_bytes, settings.evicted)
        self.reader = PictureReader(settings.limits, settings.allow_remote, keep)
        self._reading = asyncio.Semaphore(2)  # decoded pictures are large
        self.in_flight = 0
        self.is_stopping = False
        self._mean_seconds = 1.0
        self._closing: asyncio.Task | None = None
        metrics.gauge("running", "Answers that are being generated.", lambda: engine.load()[0])
        metrics.gauge("waiting", "Answers that wait.", lambda: engine.load()[1])
        metrics.gauge("in_flight", "Accepted answers that are not finished.", lambda: self.in_flight)
        metrics.gauge("scenes", "Uploaded scenes.", lambda: len(self.scenes.uploaded))
        metrics.gauge("encoded_scenes", "Encoded scenes in memory.", lambda: len(self.scenes.encoded))
        metrics.gauge("encoded_bytes", "Bytes of encoded scenes.", lambda: self.scenes.encoded.num_bytes)

    # Access

    def check_key(self, authorization: str) -> None:
        """Raise for a request without the server's key.

        Args:
            authorization: The header.
        """
        if self.settings.api_key is None:
            return
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.settings.api_key.encode()):
            raise ApiError(
                401,
                "This server needs its API key in the header 'Authorization: Bearer KEY', got "
                f"{'another key' if key else 'none'}. Ask its operator.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @contextmanager
    def admitted(self, count: int = 1) -> Generator[None]:
        """Context manager of requests that are accepted: it counts their answers, and refuses what is too much.

        Raises:
            ApiError: The server is stopping, or has too many requests.
        """
        if self.is_stopping:
            raise ApiError(503, "The server is shutting down. Ask again when it is back.", "shutting_down")
        most = self.settings.max_running + self.settings.max_waiting
        if self.in_flight + count > most:
            self.metrics.refused.inc()
            seconds = max(1, math.ceil(self._mean_seconds * self.settings.max_waiting / self.settings.max_running))
            raise ApiError(
                429,
                f"The server takes at most {most} answers at a time ({self.settings.max_running} are generated, the "
                f"others wait), and {self.in_flight} are under way. Ask again in {seconds} seconds.",
                "too_many_requests",
                headers={"Retry-After": str(seconds)},
            )
        self.in_flight += count
        start = time.perf_counter()
        try:
            yield
        finally:
            self.in_flight -= count
            self._mean_seconds += 0.1 * (time.perf_counter() - start - self._mean_seconds)

    def stop(self) -> None:
        """Accept no more requests, and end those that still run after the time of grace."""
        self.is_stopping = True
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close_later())

    async def _close_later(self) -> None:
        await asyncio.sleep(self.settings.grace)
        await self.engine.close()

    # Scenes

    async def read(self, read: Callable[[], list[list[PIL.Image.Image]]]) -> list[list[PIL.Image.Image]]:
        """The pictures of the parts of a request, read in a thread."""
        async with self._reading:
            return await asyncio.to_thread(read)

    async def add_scene(
        self, read: Callable[[], list[list[PIL.Image.Image]]], system: str | None, to: UploadedScene | None = None
    ) -> UploadedScene:
        """Encode an uploaded scene, or one with more pictures."""
        start = time.perf_counter()
        if system is not None:
            self.check_texts([{"role": "system", "content": [{"type": "text", "text": system}]}])
        pictures = list(chain.from_iterable(await self.read(read)))
        if to is not None:
            if to.pictures is None:
                raise ApiError(
                    409,
                    "This server keeps no pictures of its scenes, so none can be added. Upload all pictures as a new "
                    "scene.",
                    "pictures_not_kept",
                )
            pictures = [*to.pictures, *pictures]
            try:
                self.settings.limits.check_views(len(pictures))
            except ValueError as error:
                raise ApiError(400, str(error), "too_many_pictures") from error
        scene = await self.scenes.add(pictures, system, to)
        self.metrics.encoding.observe(time.perf_counter() - start)
        return scene

    def described(self, scene: UploadedScene) -> dict[str, Any]:
        """A scene for clients."""
        return {
            "id": scene.id,
            "object": "scene",
            "created": scene.created,
            "views": scene.num_views,
            "prompt_tokens": scene.num_tokens,
            "bytes": scene.num_bytes,
            "in_memory": (scene.key, scene.system) in self.scenes.encoded,
        }

    # Chat

    def check_chat(self, asked: ChatRequest) -> Sampling:
        """How the answers of a request are generated.

        Raises:
            ApiError: The request asks for another model, or for too much.
        """
        settings = self.settings
        self.check_model(asked.model)
        if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
            raise ApiError(
                400,
                "`max_tokens` and `max_completion_tokens` are two names of the same limit, got "
                f"{asked.max_tokens} and {asked.max_completion_tokens}. Give one of them.",
                "invalid_value",
                "max_completion_tokens",
            )
        tokens = asked.max_completion_tokens or asked.max_tokens or min(DEFAULT_TOKENS, settings.max_tokens)
        for name, value, most in (("max_tokens", tokens, settings.max_tokens), ("n", asked.n, settings.max_choices)):
            if value is not None and value > most:
                raise ApiError(400, f"`{name}` must be at most {most}, got {value}. Give less.", "invalid_value", name)
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "`stream_options` needs `stream`. Leave it out.", "invalid_value", "stream_options")
        return Sampling(
            tokens, asked.temperature or 0.0, 1.0 if asked.top_p is None else asked.top_p, asked.seed,
            tuple(asked.stop or ()),
        )  # fmt: skip

    def check_model(self, name: str) -> None:
        """Raise for a model that is not served."""
        if name != self.model_name:
            raise ApiError(
                404,
                f"There is no model {name[:80]!r} here, but {self.model_name!r}. Ask for this one.",
                "model_not_found",
                "model",
            )

    def check_texts(self, chat: list[dict[str, Any]]) -> None:
        """Raise for texts with special tokens of the model."""
        try:
            self.engine.check(chat)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "messages") from error

    async def prompt(self, messages: list[Message]) -> tuple[Prompt, int]:
        """The prompt of a conversation, with its scene encoded, and how many of its tokens were in memory.

        Raises:
            ApiError: The conversation has a form that is not supported, or a picture can't be read.
        """
        check_conversation(messages, self.settings.limits.question_length)
        self.check_texts(as_chat(messages, None))
        system = None
        if messages[0].role in ("system", "developer"):
            system = "".join(part["text"] for part in texts_of(messages[0]))
        first = next(message for message in messages if message.role == "user")
        media = [part for message in messages for part in media_of(message)]
        leading = leading_media(first)
        if scenes := [part for part in media if isinstance(part, ScenePart)]:
            if len(media) > 1 or leading != media:
                raise ApiError(
                    400,
                    "A scene must be the only pictures of a conversation, and the first part of its first user "
                    "message. To ask about more pictures, add them to the scene: POST /v1/scenes/{id}/pictures.",
                    "invalid_value",
                    "messages",
                )
            encoded, was_kept = await self.scenes.ask(scenes[0].id, system)
            return Prompt(as_chat(messages, None), encoded), len(encoded) if was_kept else 0
        files = [part for part in media if not isinstance(part, ScenePart)]
        pictures = await self.read(lambda: self.reader.parts(files, "messages"))
        if not media or leading != media:
            return Prompt(as_chat(messages, pictures)), 0
        _, was_kept, encoded = await self.scenes.encode(list(chain.from_iterable(pictures)), system)
        return Prompt(as_chat(messages, None), encoded), len(encoded) if was_kept else 0

    async def begin(self, prompt: Prompt, sampling: Sampling, count: int) -> list[Generation]:
        """Begin the answers to a prompt. Each has the next seed, if there is one."""
        seeds = [None if sampling.seed is None else sampling.seed + index for index in range(count)]
        begun = await self.engine.generate(prompt, [replace(sampling, seed=seed) for seed in seeds])
        self.metrics.prompt_tokens.inc(sum(generation.prompt_tokens for generation in begun))
        return list(begun)
