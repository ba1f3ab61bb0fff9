"""Engines that leave the language model to vLLM: image tokens are computed in this process, answers by vLLM.

VllmEngine(model, processor, LocalVllm(model, processor, max_pictures=64))
VllmEngine(model, processor, RemoteVllm("http://gpu-server:8000"))
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
from transformers.utils import logging

from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor, check_messages
from spa3r.serving.encoder import CLOSED, EncodingThread
from spa3r.serving.engine import EngineClosed, Piece, Prompt, Sampling
from spa3r.serving.text import GrowingText
from spa3r.serving.vllm import (
    FusedPrompt,
    FusedScene,
    check_served,
    export_vlm,
    fused_prompt,
    fused_scene,
    prompt_about,
)

logger = logging.get_logger(__name__)

Tokens = tuple[list[int], str | None]
"""The next tokens of an answer, and why it ends: "stop", "length", or None if it goes on."""


class Vllm(Protocol):
    """An engine of vLLM that runs the exported VLM."""

    def tokens(self, prompt: FusedPrompt, sampling: Sampling) -> AsyncGenerator[Tokens]:
        """The tokens of an answer as they come. Leaving the generator frees the work.

        Raises:
            ValueError: vLLM refuses the prompt.
            EngineClosed: vLLM gives no answer.
        """
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


class VllmEngine:
    """Implements :class:`~spa3r.serving.engine.Engine` with an engine of vLLM.

    Args:
        model: A Spa3-VLM, on its device. Its language model is not used, apart from its settings.
        processor: Its processor.
        vllm: The engine of vLLM: :class:`LocalVllm` or :class:`RemoteVllm`.

    Raises:
        ValueError: vLLM takes no fused image tokens of this model.
    """

    name = "vllm"

    def __init__(self, model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, vllm: Vllm):
        check_served(model)
        self._model, self._processor, self._vllm = model, processor, vllm
        self._encoder = EncodingThread()
        self._running: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    def check(self, messages: Sequence[Mapping[str, Any]]) -> None:
        check_messages(self._processor, [message for message in messages if message["content"]])

    async def encode(self, pictures: Sequence[Any], system: str | None) -> FusedScene:
        return await self._encoder.run(partial(fused_scene, self._model, self._processor, list(pictures), system))

    async def generate(self, prompt: Prompt, samplings: Sequence[Sampling]) -> list[_Answer]:
        scene: Any = prompt.scene
        if scene is None:
            fused = await self._encoder.run(partial(fused_prompt, self._model, self._processor, prompt.messages))
        else:
            fused = await asyncio.to_thread(prompt_about, self._model, self._processor, scene, prompt.messages)
        self._check_open()
        return [_Answer(self, fused, sampling) for sampling in samplings]

    def load(self) -> tuple[int, int]:
        return len(self._running), 0  # vLLM has a queue of its own

    async def close(self) -> None:
        self._is_closed = True
        for task in list(self._running):
            task.cancel()
        self._encoder.close()
        await self._vllm.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed(CLOSED)


class _Answer:
    """An answer that vLLM generates; implements :class:`~spa3r.serving.engine.Generation`."""

    def __init__(self, engine: VllmEngine, prompt: FusedPrompt, sampling: Sampling):
        self._engine, self._prompt, self._sampling = engine, prompt, sampling
        self.prompt_tokens = prompt.num_tokens
        decode = partial(engine._processor.decode, skip_special_tokens=True)
        self._text = GrowingText(decode, sampling.stop)
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        engine, tokens, last = self._engine, [], None
        engine._check_open()
        if self._is_cancelled:
            return
        self._task = asyncio.current_task()
        assert self._task is not None
        engine._running.add(self._task)
        try:
            async with aclosing(engine._vllm.tokens(self._prompt, self._sampling)) as stream:
                async for fresh, reason in stream:
                    tokens += fresh
                    text = self._text.next(tokens, reason is not None)
                    if self._text.is_stopped:
                        reason = "stop"
                    if reason is not None:
                        last = Piece(text, len(tokens), reason)
                        break
                    if text:
                        yield Piece(text, len(tokens))
        except asyncio.CancelledError:
            if not self._is_cancelled:
                engine._check_open()  # raises if the engine was closed
            raise
        finally:
            engine._running.discard(self._task)
        if last is not None:  # with the stream closed: who reads this piece may cancel the task at once
            yield last

    def cancel(self) -> None:
        self._is_cancelled = True


class LocalVllm:
    """vLLM in this process. It must be installed, in an environment with the versions that it needs.

    Args:
        model: A Spa3-VLM. Its VLM is written to a temporary folder, from which vLLM loads it.
        processor: Its processor.
        max_pictures: Maximum number of pictures of a prompt.
        **options: Other arguments of ``vllm.AsyncEngineArgs``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vLLM takes no fused image tokens of this model.
    """

    def __init__(
        self, model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, max_pictures: int, **options: Any
    ):
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ImportError(
                f"`--engine vllm` needs vLLM in this environment ({error}). Install it, or start `vllm serve` "
                "elsewhere and give its address."
            ) from error
        self._folder = Path(tempfile.mkdtemp(prefix="spa3r-vllm-"))
        try:
            export_vlm(model, processor, self._folder)
            arguments = AsyncEngineArgs(
                model=str(self._folder),
                enable_mm_embeds=True,
                limit_mm_per_prompt={"image": max_pictures},
                **{"dtype": str(model.dtype).removeprefix("torch."), **options},
            )
            self._engine = AsyncLLM.from_engine_args(arguments)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        # What `generate` of transformers takes from the same file, such as a repetition penalty.
        self._defaults = {
            name: value
            for name, value in self._engine.model_config.get_diff_sampling_param().items()
            if name == "repetition_penalty"
        }

    async def tokens(self, prompt: FusedPrompt, sampling: Sampling) -> AsyncGenerator[Tokens]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = SamplingParams(
            **self._defaults,
            **_options(sampling),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        # Leaving this generator aborts the request.
        async for output in self._engine.generate(prompt.for_engine(), options, secrets.token_hex(16)):
            part = output.outputs[0]
            yield list(part.token_ids), _reason(part.finish_reason)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)
        shutil.rmtree(self._folder, ignore_errors=True)


class RemoteVllm:
    """A server of vLLM, started with ``vllm serve FOLDER --enable-mm-embeds`` on what ``spa3r export`` wrote.

    Args:
        url: Its address, such as ``http://gpu-server:8000``.
        api_key: Its key; None: none.
        timeout: Seconds to wait for the next token of an answer.

    Raises:
        ValueError: There is no server of vLLM at the address.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300.0):
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            answer = httpx.get(f"{self._url}/v1/models", headers=headers, timeout=10)
            self._model = answer.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"`--engine` must be the address of a server of vLLM, got {url!r}, which does not list its models "
                f"({type(error).__name__}: {error}). Start it with `vllm serve FOLDER --enable-mm-embeds`."
            ) from error
        # The server limits the requests, and vLLM has a queue.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        timeouts = httpx.Timeout(10, read=timeout, write=timeout)
        self._client = httpx.AsyncClient(headers=headers, timeout=timeouts, limits=limits)

    async def tokens(self, prompt: FusedPrompt, sampling: Sampling) -> AsyncGenerator[Tokens]:
        body = {"model": self._model, "stream": True, "return_token_ids": True, **_options(sampling)}
        body["messages"] = await asyncio.to_thread(prompt.for_server)
        last: Tokens | None = None
        try:
            async with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    text = (await answer.aread()).decode(errors="replace")[:500]
                    error = ValueError if answer.status_code == 400 else EngineClosed
                    raise error(f"vLLM refused the request with the status {answer.status_code}: {text}")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                        fresh: Tokens = (list(choice.get("token_ids") or ()), _reason(choice.get("finish_reason")))
                        if fresh[1] is None:
                            yield fresh
                        else:
                            last = fresh  # the response is read to its end before, so that its connection is kept
        except httpx.HTTPError as error:
            logger.error(f"vLLM at {self._url}: {type(error).__name__}: {error}")
            raise EngineClosed("The engine behind this server gives no answer. Ask again later.") from error
        if last is not None:
            yield last

    async def close(self) -> None:
        await self._client.aclose()


def _options(sampling: Sampling) -> dict[str, Any]:
    """Names of vLLM for how an answer is generated. Texts that end an answer are found in this process."""
    options = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return options | {"top_k": 0} | ({} if sampling.seed is None else {"seed": sampling.seed})


def _reason(given: str | None) -> str | None:
    """ "stop" or "length"; None while the answer goes on.

    Raises:
        EngineClosed: vLLM ended the answer before its end.
    """
    if given not in (None, "stop", "length"):
        raise EngineClosed(f"vLLM ended the answer before its end ({given}). Ask again.")
    return given


__all__ = ["LocalVllm", "RemoteVllm", "Vllm", "VllmEngine"]
