"""Answers in OpenAI's form: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from spa3r.serving.engine import Generation, Piece
from spa3r.serving.metrics import Metrics
from spa3r.serving.requests import ChatRequest


async def merged(generations: list[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come. Leaving it cancels the answers."""
    pieces: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def follow(index: int, generation: Generation) -> None:
        try:
            async for piece in generation:
                pieces.put_nowait((index, piece))
        except Exception as error:
            pieces.put_nowait((index, error))

    tasks = [asyncio.ensure_future(follow(index, generation)) for index, generation in enumerate(generations)]
    left = len(tasks)
    try:
        while left:
            index, piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.finish_reason is not None
            yield index, piece
    finally:
        for task, generation in zip(tasks, generations):
            generation.cancel()
            task.cancel()


class Answer:
    """One request to ``/v1/chat/completions`` after its answers have begun."""

    def __init__(
        self, metrics: Metrics, asked: ChatRequest, generations: list[Generation], cached_tokens: int, start: float
    ):
        self.metrics, self.asked, self.generations = metrics, asked, generations
        self.cached_tokens, self.start = cached_tokens, start
        self.tokens = [0] * len(generations)
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        metrics, is_first = self.metrics, True
        async with aclosing(merged(self.generations)) as all_pieces:
            async for index, piece in all_pieces:
                if is_first:
                    metrics.first_token.observe(time.perf_counter() - self.start)
                    is_first = False
                metrics.generated_tokens.inc(piece.num_tokens - self.tokens[index])
                self.tokens[index] = piece.num_tokens
                yield index, piece
        metrics.whole_answer.observe(time.perf_counter() - self.start)

    @property
    def usage(self) -> dict[str, Any]:
        prompt, generated = self.generations[0].prompt_tokens, sum(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        texts, reasons = [""] * len(self.tokens), [""] * len(self.tokens)
        async with aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                texts[index] += piece.text
                reasons[index] = piece.finish_reason or ""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": reason,
                "logprobs": None,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons))
        ]
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as server-sent events."""
        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        head = self.head | {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

        def chunk(index: int, delta: dict[str, Any], reason: str | None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
            return as_event(head | {"choices": [choice]})

        try:
            for index in range(len(self.generations)):
                yield chunk(index, {"role": "assistant", "content": ""}, None)
            async with aclosing(self.pieces()) as pieces:
                async for index, piece in pieces:
                    if piece.text:
                        yield chunk(index, {"content": piece.text}, None)
                    if piece.finish_reason is not None:
                        yield chunk(index, {}, piece.finish_reason)
            if with_usage:
                yield as_event(head | {"choices": [], "usage": self.usage})
            yield b"data: [DONE]\n\n"
        finally:
            for generation in self.generations:
                generation.cancel()


def as_event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
