"""The engine that runs the model of transformers in this process.

One thread generates: it repeats steps, each of which computes the next token of every answer, and between steps takes
the questions about one scene that wait. Another thread encodes scenes at the same time, so that running answers
continue: models are safe to use from several threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from spa3r.answering.engine import AnsweringEngine
from spa3r.answering.stepwise import StepwiseAnswer, StepwiseBatch
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.asking import continuations, encode_prompt
from spa3r.models.spa3_vlm.processing_spa3_vlm import check_messages
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.serving.encoder import CLOSED, EncodingThread
from spa3r.serving.engine import EngineClosed, Piece, Prompt, Sampling
from spa3r.serving.text import GrowingText

logger = logging.get_logger(__name__)


class TransformersEngine:
    """Implements :class:`~spa3r.serving.engine.Engine`.

    Args:
        model: A Spa3-VLM, or a VLM of transformers, on its device.
        processor: Its processor.
        max_running: Maximum number of answers that are generated together.
        observe_step: Called with the number of answers after each step, for measurements; from the engine's thread.

    Raises:
        ValueError: The scenes of this VLM can't be encoded once for many questions; the message gives the reason.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_running: int = 16,
        observe_step: Callable[[int], object] = lambda answers: None,
    ):
        answering = AnsweringEngine(model, processor)
        if reason := answering.needs_whole_prompts:
            raise ValueError(f"This model can't be served: {reason}")
        self._answering, self._model, self._processor = answering, model, processor
        self._max_running, self._observe_step = max_running, observe_step
        self._device = execution_device(model)
        self._batch = StepwiseBatch(model)
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._condition = threading.Condition()
        self._is_closed = False
        self._encoder = EncodingThread()
        self._generator = threading.Thread(target=self._generate_all, name="spa3r-generate", daemon=True)
        self._generator.start()

    # Called from the event loop

    def check(self, messages: Sequence[Mapping[str, Any]]) -> None:
        check_messages(self._processor, [message for message in messages if message["content"]])

    async def encode(self, pictures: Sequence[Any], system: str | None) -> EncodedScene:
        return await self._on_encoder(partial(self._answering.encode, list(pictures), system))

    async def generate(self, prompt: Prompt, samplings: Sequence[Sampling]) -> list[_Running]:
        scene: Any = prompt.scene
        if scene is None:
            scene, tail = await self._on_encoder(partial(encode_prompt, self._model, self._processor, prompt.messages))
        else:
            [tail] = await asyncio.to_thread(continuations, self._model, scene, [prompt.messages])
        loop = asyncio.get_running_loop()
        begun = await asyncio.to_thread(lambda: [self._begin(scene, tail, sampling, loop) for sampling in samplings])
        with self._condition:
            self._check_open()
            self._waiting += begun
            self._condition.notify()
        return begun

    def load(self) -> tuple[int, int]:
        with self._condition:
            return len(self._running), len(self._waiting)

    async def close(self) -> None:
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._encoder.close()
        await asyncio.to_thread(self._generator.join)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed(CLOSED)

    async def _on_encoder(self, work: Callable[[], Any]) -> Any:
        return await self._encoder.run(partial(self._encoding, work))

    def _encoding(self, work: Callable[[], Any]) -> Any:
        """Do work beside the generating thread: on GPUs in a stream of its own, since work of one stream waits."""
        if self._device.type != "cuda":
            return work()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            result = work()
        stream.synchronize()
        return result

    def _begin(self, scene: EncodedScene, tail: list[int], sampling: Sampling, loop: Any) -> _Running:
        answer = StepwiseAnswer(
            self._model,
            scene,
            tail,
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        decode = partial(self._processor.decode, skip_special_tokens=True)
        return _Running(answer, GrowingText(decode, sampling.stop), loop, self)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    # The generating thread

    def _generate_all(self) -> None:
        while True:
            with self._condition:
                while not (self._is_closed or self._waiting or self._running):
                    self._condition.wait()
                closed = self._is_closed
                new = [] if closed else self._taken()
            if closed:
                break
            try:
                if new:
                    self._batch.add([running.answer for running in new])
                if self._batch.answers:
                    self._batch.step()
            except Exception as error:  # out of memory, for example; the server goes on
                logger.exception("Generating failed.")
                for running in self._running:
                    running.fail(error)
                self._batch.clear()
            self._observe_step(len(self._running))
            self._send()
            new = []  # no reference to finished answers while waiting
        self._batch.clear()
        for running in [*self._running, *self._waiting]:
            running.fail(EngineClosed(CLOSED))
        self._running.clear()
        self._waiting.clear()

    def _taken(self) -> list[_Running]:
        """The waiting questions that join the batch: about one scene, so that running answers wait for few tokens."""
        self._waiting = deque(running for running in self._waiting if not running.is_cancelled)
        free = self._max_running - len(self._running)
        if not self._waiting or free < 1:
            return []
        together = {id(answer) for answer in StepwiseBatch.together([r.answer for r in self._waiting], free)}
        new = [running for running in self._waiting if id(running.answer) in together]
        self._waiting = deque(running for running in self._waiting if id(running.answer) not in together)
        self._running += new
        return new

    def _send(self) -> None:
        """Send what is new, and drop answers that are finished or that nobody waits for."""
        for running in self._running:
            running.send()
        self._batch.remove_done()
        with self._condition:
            self._running = [running for running in self._running if not running.answer.is_done]


class _Running:
    """An answer that is being generated; implements :class:`~spa3r.serving.engine.Generation`."""

    def __init__(self, answer: StepwiseAnswer, text: GrowingText, loop: Any, engine: TransformersEngine):
        self.answer, self._text, self._loop, self._engine = answer, text, loop, engine
        self.prompt_tokens = len(answer.scene) + len(answer.tail)
        self.is_cancelled = False
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._was_ended = False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def cancel(self) -> None:
        self.is_cancelled = True
        self._engine._wake()

    # The generating thread

    def send(self) -> None:
        answer = self.answer
        if self.is_cancelled:
            answer.finish_reason = "cancelled"
            return
        if answer.error is not None:
            self.fail(answer.error)
            return
        text = self._text.next(answer.tokens, answer.is_done)
        if self._text.is_stopped:
            answer.finish_reason = "stop"
        if text or answer.is_done:
            self._put(Piece(text, len(answer.tokens), answer.finish_reason))

    def fail(self, error: Exception) -> None:
        if not self.answer.is_done:
            self.answer.finish_reason = "error"
        if not self._was_ended:
            self._was_ended = True
            self._put(error)

    def _put(self, piece: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
