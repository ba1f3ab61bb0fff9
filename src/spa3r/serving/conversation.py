"""Conversations in OpenAI's form: what is supported, and the same in the chat format of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spa3r.serving.errors import ApiError
from spa3r.serving.requests import ImagePart, Message, ScenePart, VideoPart


def check_conversation(messages: list[Message], length: int) -> None:
    """Raise for a conversation that has no question, or a form that is not supported."""
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and index:
            raise ApiError(
                400, f"Message {index} of the role {message.role!r} must be the first. Move it.", "invalid_value",
                "messages",
            )  # fmt: skip
        if message.role != "user" and not isinstance(message.content, str):
            if other := next((part.type for part in message.content if part.type != "text"), None):
                raise ApiError(
                    400,
                    f"Message {index} of the role {message.role!r} must have text alone, got {other!r}. Put pictures "
                    "into a message of the role 'user'.",
                    "invalid_value",
                    "messages",
                )
    if messages[-1].role != "user":
        raise ApiError(
            400, f"The last message must have the role 'user', got {messages[-1].role!r}.", "invalid_value", "messages"
        )
    texts = ["".join(part["text"] for part in texts_of(message)) for message in messages]
    if not texts[-1].strip():
        raise ApiError(400, "The last message must hold a text, got none. Ask something.", "invalid_value", "messages")
    if (total := sum(map(len, texts))) > length:
        raise ApiError(
            400,
            f"The texts of a conversation must have at most {length} characters together, got {total}. Leave older "
            "messages out.",
            "context_length_exceeded",
            "messages",
        )


def texts_of(message: Message) -> list[dict[str, Any]]:
    """The text items of a message."""
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    return [{"type": "text", "text": part.text} for part in message.content if part.type == "text"]


def media_of(message: Message) -> list[ImagePart | VideoPart | ScenePart]:
    """The pictures, videos and scenes of a message."""
    return [] if isinstance(message.content, str) else [part for part in message.content if part.type != "text"]


def leading_media(message: Message) -> list[ImagePart | VideoPart | ScenePart]:
    """Those with which it begins."""
    found: list[ImagePart | VideoPart | ScenePart] = []
    for part in () if isinstance(message.content, str) else message.content:
        if part.type == "text":
            break
        found.append(part)
    return found


def as_chat(messages: list[Message], pictures: Sequence[Sequence[Any]] | None) -> list[dict[str, Any]]:
    """Messages in the chat format of Hugging Face. `pictures` holds those of each part that is no text, in order;
    None leaves these parts out."""
    rest = iter(pictures or ())
    chat = []
    for message in messages:
        items: list[dict[str, Any]] = []
        for part in [None] if isinstance(message.content, str) else message.content:
            if part is None or part.type == "text":
                items.append({"type": "text", "text": message.content if part is None else part.text})
            elif pictures is not None:
                items += [{"type": "image", "image": picture} for picture in next(rest)]
        chat.append({"role": "system" if message.role == "developer" else message.role, "content": items})
    return chat
