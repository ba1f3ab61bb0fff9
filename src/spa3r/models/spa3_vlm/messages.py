"""Validation of conversations before a chat template is applied: chat format, and no special tokens in texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import ProcessorMixin

Conversations = Sequence[Any]
"""A conversation, which is a list of messages, or a list of conversations."""

FORMS = '`{"role": "user", "content": ...}`, with a text or a list of items as content'
_CONTEXT = 20  # characters of context around a token in a message


def is_batch_of_conversations(conversations: Any) -> bool:
    """Whether it is a list of conversations, and not one conversation."""
    return (
        isinstance(conversations, list | tuple) and bool(conversations) and isinstance(conversations[0], list | tuple)
    )


def special_texts(processor: ProcessorMixin) -> frozenset[str]:
    """Texts that a VLM reads as tokens: its tokenizer's special tokens, placeholders of pictures, videos and audio.

    Args:
        processor: The VLM's own processor.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    tokens |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    return frozenset(token for token in tokens if isinstance(token, str) and token.strip())


def check_conversations(conversations: Conversations, tokens: Collection[str]) -> None:
    """:func:`check_messages` of a conversation or a list of them."""
    for messages in conversations if is_batch_of_conversations(conversations) else [conversations]:
        check_messages(messages, tokens)


def check_messages(messages: Any, tokens: Collection[str]) -> None:
    """Raise for a conversation that is not in the chat format of Hugging Face, or has special tokens in its texts.

    Args:
        messages: The conversation.
        tokens: Texts that the VLM reads as tokens, such as its image placeholder.

    Raises:
        ValueError: A message is invalid; the error gives its number and role.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"A conversation must be a list of messages, {FORMS}, got {_described(messages)}.")
    if not messages:
        raise ValueError(f"A conversation must hold at least one message, {FORMS}, got none.")
    pattern = _any_of(frozenset(tokens))
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"Message {index} must be {FORMS}, got {_described(message)}. Give a dictionary.")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"Message {index} must have a role such as 'user', got {_described(message.get('role'))}.")
        name = f"message {index} ({_described(message.get('role'))})"
        texts = [value for key, value in message.items() if isinstance(value, str) and key != "content"]
        for text in (*texts, *_joined(_texts(message, name))):
            if found := pattern.search(text):
                around = text[max(found.start() - _CONTEXT, 0) : found.end() + _CONTEXT]
                raise ValueError(
                    f"The text of {name} must not contain {found[0]!r}, which the VLM would read as a token and not as "
                    f"words, got {around!r}. Write it otherwise, for example with a space behind its first character; "
                    "a picture or video is an item of its own in the content."
                )


def _texts(message: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a message's content, in order."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if content is None and message.get("tool_calls"):
        return []
    if isinstance(content, Mapping):
        raise ValueError(f"The content of {name} must be a text or a list of items, got one item. Put it into a list.")
    if not isinstance(content, list | tuple):
        raise ValueError(f"The content of {name} must be a text or a list of items, got {_described(content)}.")
    if not content:
        raise ValueError(f"The content of {name} must hold at least one item, got none. Leave the message out.")
    texts = []
    for item in content:
        if isinstance(item, str):
            raise ValueError(
                f'An item of the content of {name} must be a dictionary such as {{"type": "text", "text": ...}}, got '
                f"the text {_described(item)}. Give the text as such an item, or as the whole content."
            )
        if not isinstance(item, Mapping):
            raise ValueError(f"An item of the content of {name} must be a dictionary, got {_described(item)}.")
        if item.get("type") == "text":
            if not isinstance(item.get("text"), str):
                raise ValueError(
                    f"A text item of {name} must have a text under 'text', got {_described(item.get('text'))}."
                )
            texts.append(item["text"])
    return texts


def _joined(texts: Sequence[str]) -> list[str]:
    """Texts as templates may join them: directly adjacent, with and without surrounding white space."""
    return [text for text in {"".join(texts), "".join(text.strip() for text in texts)} if text]


@lru_cache(16)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    # Among tokens with a common start, the longest is reported. Without tokens nothing matches.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _described(value: Any) -> str:
    """A value for an error message: short texts and numbers unchanged, the type of anything else."""
    if isinstance(value, str) and len(value) > 40:
        return f"{value[:40]!r}..."
    return repr(value) if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


__all__ = ["check_messages"]
