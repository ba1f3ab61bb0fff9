"""What the HTTP server needs of an engine: encode a scene, generate with streaming, cancel, close. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        messages: The conversation in the chat format of Hugging Face. Without `scene`, it holds its pictures as items
            ``{"type": "image", "image": ...}``. With `scene`, the scene's pictures are left out: they belong before the
            content of the first user message.
        scene: What :meth:`Engine.encode` returned for the system prompt of these messages; or None.
    """

    messages: Sequence[Mapping[str, Any]]
    scene: EncodedPlace | None = None


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Attributes:
        max_tokens: Maximum length of the answer.
        temperature: 0 for the most likely token; above 0, tokens are drawn.
        top_p: Only the most likely tokens with this total probability are drawn, above 0 and up to 1.
        seed: Seed of the draw; None: a new one each time.
        stop: Texts that end the answer; they are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: The next characters; the pieces of an answer joined are the answer without surrounding white space.
        num_tokens: Number of tokens generated so far.
        finish_reason: ``"stop"`` or ``"length"`` in the last piece, None before.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None


class EncodedPlace(Protocol):
    """A scene in the engine's memory, such as :class:`~spa3r.EncodedScene`."""

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        ...

    def __len__(self) -> int:
        """Number of tokens of the prompt up to the end of the pictures."""
        ...


class Generation(Protocol):
    """An answer that is being generated: an asynchronous iterator over its pieces."""

    prompt_tokens: int
    """Number of tokens of the prompt."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def cancel(self) -> None:
        """Free its work; it may be finished or cancelled already."""
        ...


class Engine(Protocol):
    """Answers questions about scenes; all methods are called from one event loop."""

    name: str
    """Name for ``/health``."""

    def check(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise for a conversation that can't be asked, before its pictures are read.

        Args:
            messages: The conversation in the chat format of Hugging Face, without its pictures.

        Raises:
            ValueError: A text contains a special token of the model, such as its image placeholder.
        """
        ...

    async def encode(self, pictures: Sequence[Any], system: str | None) -> EncodedPlace:
        """Encode the pictures of a scene, after a system prompt. Cancelling the call frees its work, as far as it has
        not begun.

        Raises:
            ValueError: The scene can't be encoded.
            EngineClosed: The engine was closed before.
        """
        ...

    async def generate(self, prompt: Prompt, samplings: Sequence[Sampling]) -> Sequence[Generation]:
        """Begin several answers to one prompt. Iterating over one may raise ValueError, or EngineClosed.

        Args:
            prompt: What is asked.
            samplings: How each answer is generated; at least one.

        Raises:
            ValueError: The conversation is invalid, or too long for the model.
            EngineClosed: The engine was closed before.
        """
        ...

    def load(self) -> tuple[int, int]:
        """Number of answers that are being generated, and of those that wait."""
        ...

    async def close(self) -> None:
        """Stop: running and waiting work raises EngineClosed."""
        ...


class EngineClosed(RuntimeError):
    """The engine was closed before the work was finished."""
