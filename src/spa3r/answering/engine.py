"""The engine that turns pictures and questions into answers, for every command and evaluation.

engine = AnsweringEngine(model, processor)
answers = engine.answers(photos, ["How many chairs are there?", "Which is closer, the lamp or the sofa?"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from copy import copy
from functools import cached_property
from itertools import islice
from typing import Any

import PIL.Image
import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from spa3r.media.images import Image
from spa3r.models.base import finite_logits
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.asking import (
    MAX_NEW_TOKENS,
    ask,
    check_batch_size,
    check_questions,
    conversation,
    encode_scene,
)
from spa3r.models.spa3_vlm.processing_spa3_vlm import VIEW_KEYS, Spa3VLMProcessor, prompt_inputs
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.models.spa3_vlm.state import in_eval_mode, turn

logger = logging.get_logger(__name__)

Message = Mapping[str, Any]
"""A message in the chat format of Hugging Face."""

Example = Mapping[str, Any]
"""``messages`` in the chat format of Hugging Face, ending with the assistant's true answer. Optional keys:
``question_type`` and ``row`` (the example's name)."""


class AnsweringEngine:
    """Asks a model questions, in whole prompts or about scenes that are encoded once. Answers are greedy by default.

    Args:
        model: A Spa3-VLM, or a VLM of transformers; either may have adapters of PEFT. Every call restores the training
            mode of its modules.
        processor: The model's processor: a :class:`~spa3r.Spa3VLMProcessor`, or a processor of transformers for a VLM.
            With a Spa3VLMProcessor and ``image_mode="aligned"``, the VLM alone gets the same pictures as with Spa3R.
        use_spa3r: False runs only the VLM of a Spa3-VLM, without fusing its image tokens. No effect on a plain VLM.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, use_spa3r: bool = True):
        self._fuses = use_spa3r and hasattr(model, "vlm")  # also inside a PEFT model
        self.model: Any = model if use_spa3r else getattr(model, "vlm", model)
        if not self._fuses and isinstance(processor, Spa3VLMProcessor) and processor.spatial_tokens is not None:
            processor = copy(processor)
            processor.spatial_tokens = None  # no places for tokens that are not appended
        self.processor = processor

    # Whole prompts

    @torch.no_grad()
    def generate(
        self, conversations: Sequence[Sequence[Message]], num_frames: int | None = None, **arguments: Any
    ) -> list[str]:
        """The model's next message in each conversation, from whole prompts in one batch.

        Args:
            conversations: Each ends with a question.
            num_frames: Number of frames of each video; None: the processor's. Only for a Spa3VLMProcessor.
            **arguments: Arguments of ``generate``, such as ``max_new_tokens`` (128).

        Raises:
            ValueError: A message is invalid, or a picture can't be read.
        """
        # Some VLMs' processors require a batch's pictures in its first rows.
        order = sorted(range(len(conversations)), key=lambda row: not _has_media(conversations[row]))
        options = {} if num_frames is None else {"num_frames": num_frames}
        inputs = prompt_inputs(self.processor, [conversations[row] for row in order], **options)
        answers = dict(zip(order, self._generate(inputs, **arguments)))
        return [answers[row] for row in range(len(conversations))]

    def _generate(self, inputs: Any, **arguments: Any) -> list[str]:
        inputs = inputs.to(execution_device(self.model))
        length = {} if "max_length" in arguments else {"max_new_tokens": MAX_NEW_TOKENS}
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1} | length | arguments
        if not self._fuses:
            inputs = {key: value for key, value in inputs.items() if key not in VIEW_KEYS}
            options["logits_processor"] = finite_logits(self.model, options.get("logits_processor"))
        with turn(self.model), in_eval_mode(self.model):
            output = self.model.generate(**inputs, **options)
        return self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    # Scenes

    def encode(self, images: Image | Sequence[Image], system: str | None = None) -> EncodedScene:
        """Encode a scene for :meth:`ask`; see :meth:`~spa3r.Spa3VLMForConditionalGeneration.encode_scene`.

        Args:
            images: Pictures of the scene, at least one.
            system: The system prompt; None: the chat template's default, if any.

        Raises:
            ValueError: There is no picture, or whole prompts are needed: the message gives the reason.
        """
        config = getattr(self.model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise ValueError("A scene can't be encoded once with prompt tuning, whose tokens precede the whole prompt.")
        return encode_scene(self._base_model, self.processor, images, system)

    def ask(self, scene: EncodedScene, questions: Sequence[str], **arguments: Any) -> list[str]:
        """Answers about an encoded scene; see :meth:`~spa3r.Spa3VLMForConditionalGeneration.ask`.

        Args:
            scene: The result of :meth:`encode`.
            questions: Any number of questions.
            **arguments: ``max_new_tokens``, ``batch_size``, and arguments of ``generate``.

        Raises:
            TypeError: ``generate`` doesn't take a keyword.
            ValueError: The scene belongs to another model, or a question or an argument is invalid.
        """
        return ask(self._base_model, scene, questions, **arguments)

    @property
    def _base_model(self) -> PreTrainedModel:
        """The model whose layers hold PEFT's adapters, if it has any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def needs_whole_prompts(self) -> str | None:
        """Why scenes can't be encoded once with this model; None if they can."""
        try:
            self.encode(PIL.Image.new("RGB", (56, 56)))
        except ValueError as error:
            return str(error)
        return None

    # Questions about pictures

    def answers(
        self, images: Sequence[Image], questions: Sequence[str], system: str | None = None, **arguments: Any
    ) -> list[str]:
        """Answers to questions about the same pictures, without surrounding white space.

        A single question is asked in a whole prompt; several as by :meth:`about`.

        Args:
            images: Pictures of the scene.
            questions: Any number of questions.
            system: The system prompt; None: the chat template's default, if any.
            **arguments: ``max_new_tokens``, ``batch_size``, and arguments of ``generate``.

        Raises:
            TypeError: ``generate`` doesn't take a keyword.
            ValueError: A picture can't be read, or a question or an argument is invalid.
        """
        check_questions(self.processor, questions)
        asked = self.whole_prompts(images, system) if len(questions) == 1 else self.about(images, system)
        return asked(questions, **arguments)

    def about(self, images: Sequence[Image], system: str | None = None) -> Callable[..., list[str]]:
        """A function that answers lists of questions about pictures: ``ask(questions, **arguments)``.

        The scene is encoded once. If that is impossible with this VLM, these pictures or these arguments, the questions
        are asked in whole prompts, which give the same answers.

        Args:
            images: Pictures of the scene. They are in memory as long as the function.
            system: The system prompt; None: the chat template's default, if any.
        """
        whole = self.whole_prompts(images, system)
        try:
            scene = self.encode(images, system)
        except ValueError as error:
            _warn_of_whole_prompts(error)
            return whole

        def ask_scene(questions: Sequence[str], **arguments: Any) -> list[str]:
            try:
                return self.ask(scene, questions, **arguments)
            except ValueError as error:  # whole prompts are the reference and raise their own errors
                _warn_of_whole_prompts(error)
                return whole(questions, **arguments)

        return ask_scene

    def whole_prompts(self, images: Sequence[Image], system: str | None = None) -> Callable[..., list[str]]:
        """As :meth:`about`, in whole prompts only.

        Args:
            images: Pictures of the scene.
            system: The system prompt; None: the chat template's default, if any.
        """

        def ask_alone(questions: Sequence[str], batch_size: int | None = None, **arguments: Any) -> list[str]:
            answers, batch_size = [], check_batch_size(batch_size)
            for start in range(0, len(questions), batch_size):
                batch = [conversation(images, question, system) for question in questions[start : start + batch_size]]
                answers += self.generate(batch, **arguments)
            return [answer.strip() for answer in answers]

        return ask_alone

    # Examples

    def answer_examples(
        self,
        examples: Iterable[Example],
        batch_size: int = 8,
        max_new_tokens: int = 16,
        skipped: list[dict[str, str]] | None = None,
        show_progress: bool = True,
    ) -> Iterator[tuple[Example, str]]:
        """Examples with the answers to their last questions, from whole prompts, batch by batch.

        Args:
            examples: Examples with ``messages``. A final assistant message is removed, since it is the answer. A
                map-style dataset, a list, or any other iterable; it is read batch by batch.
            batch_size: Number of examples per batch.
            max_new_tokens: Maximum length of an answer.
            skipped: A list to which ``row`` and ``reason`` of examples that can't be asked are added; None: raise an
                error.
            show_progress: Whether to show a progress bar.

        Raises:
            ValueError: `batch_size` is below 1, or an example can't be asked and `skipped` is None.
        """
        batch_size = check_batch_size(batch_size)
        total = len(examples) if isinstance(examples, Sized) else None
        with logging.tqdm(total=total, desc="Answering", leave=False, disable=not show_progress) as bar:
            for batch in _batches(examples, batch_size):
                bar.update(len(batch))
                try:
                    inputs = self._example_inputs(batch)
                except Exception:
                    if skipped is None:
                        raise
                    batch = self._usable(batch, skipped)
                    if not batch:
                        continue
                    inputs = self._example_inputs(batch)
                answers = self._generate(inputs, max_new_tokens=max_new_tokens)
                yield from zip(batch, (answer.strip() for answer in answers))

    def _example_inputs(self, batch: Sequence[Example]) -> Any:
        return prompt_inputs(self.processor, [_prompt(example) for example in batch])

    def _usable(self, batch: Sequence[Example], skipped: list[dict[str, str]]) -> list[Example]:
        """The examples of a batch that can be asked; the others are added to the list of skipped ones."""
        usable = []
        for example in batch:
            try:
                self._example_inputs([example])
            except Exception as error:
                skipped.append({"row": example.get("row") or "", "reason": f"{type(error).__name__}: {error}"})
            else:
                usable.append(example)
        return usable


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Iterable[Example],
    batch_size: int = 8,
    max_new_tokens: int = 16,
    use_spa3r: bool = True,
    show_progress: bool = True,
) -> list[str]:
    """Greedy answers to the last question of every example.

    Args:
        model: A Spa3-VLM, or a VLM of transformers; see :class:`AnsweringEngine`.
        processor: The model's processor.
        examples: See :meth:`AnsweringEngine.answer_examples`.
        batch_size: Number of examples per batch, padded on the left.
        max_new_tokens: Maximum length of an answer. VSI-Bench allows 16.
        use_spa3r: False runs only the VLM of a Spa3-VLM.
        show_progress: Whether to show a progress bar.

    Returns:
        The answers, in the examples' order.

    Raises:
        ValueError: `batch_size` is below 1, or an example contains no question.
    """
    engine = AnsweringEngine(model, processor, use_spa3r)
    asked = engine.answer_examples(examples, batch_size, max_new_tokens, show_progress=show_progress)
    return [text for _, text in asked]


def _warn_of_whole_prompts(error: ValueError) -> None:
    logger.warning_once(f"Questions about the same scene are asked in whole prompts: {error}")


def _has_media(messages: Sequence[Message]) -> bool:
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    items = (item for content in contents if isinstance(content, list | tuple) for item in content)
    return any(isinstance(item, Mapping) and item.get("type") != "text" for item in items)


def _batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    dataset: Any = examples
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):  # it may not raise IndexError
        rows = (dataset[index] for index in range(len(dataset)))
    else:
        rows = iter(dataset)
    while batch := list(islice(rows, batch_size)):
        yield batch


def _prompt(example: Example) -> list[Message]:
    """The messages without the final answer."""
    messages = list(example["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"`messages` of example {example.get('row')!r} must hold a question, got none.")
    return messages
