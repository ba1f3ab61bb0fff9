"""Collates conversations with answers into padded training batches, with labels on the answers only."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from spa3r.checks import check_ranges
from spa3r.models.spa3_vlm.modeling_spa3_vlm import IGNORED
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Writes texts unchanged, with those of the assistant marked.
_MARKING_TEMPLATE = (
    "{%- for message in messages -%}{%- for item in message['content'] if item['type'] == 'text' -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{ item['text'] }}{%- endgeneration -%}"
    "{%- else -%}{{ item['text'] }}{%- endif -%}{%- endfor -%}{%- endfor -%}"
)

# The input of a process if none of its rows can be used: no loss, but an ordinary step.
_NOTHING = [{"role": "user", "content": [{"type": "text", "text": "."}]}]

# Parts of a row that every processor should accept.
_PLAIN_QUESTION, _PLAIN_ANSWER = "How many chairs are there?", "There are three chairs."

logger = logging.get_logger(__name__)


@dataclass
class Spa3VLMCollator:
    """Collates conversations for a Spa3-VLM, for ``Trainer(data_collator=...)`` or ``DataLoader(collate_fn=...)``.

    An example is a dictionary with ``messages``, in any form that :class:`~spa3r.Spa3VLMProcessor` accepts. The keys
    that the instruction data sets add (``source``, ``row``, ``skipped``) are used for reports and are optional. A batch
    may mix videos, single pictures and text rows.

    Rows with pictures come before text rows, and all are padded on the right. Labels cover the assistant's words
    and the token that ends them. If the chat template marks them with ``{% generation %}``, these marks are used;
    otherwise they are found by difference: the rendered conversation up to an answer, minus the rendered prompt for
    that answer. White space after the end token has no labels. If the template doesn't end an answer, the tokenizer's
    end token does: the one that follows, or one that is added at the end of the row.

    A row longer than `max_length` is truncated in the text after its last picture, if answers remain. Otherwise it is
    left out and reported, as is a row that can't be used: without an answer, with a picture that can't be read or that
    the processor rejects, not in the chat format, or with a special token in its text
    (:attr:`Spa3VLMProcessor.reserved_tokens <spa3r.Spa3VLMProcessor.reserved_tokens>`). If no row of a batch
    remains, the batch is one text row without labels, since every process needs a batch. A step without any labels
    has no loss: :class:`FinetuningTrainer <spa3r.training.FinetuningTrainer>` uses 0, a plain ``Trainer`` gets nan.

    Args:
        processor: Its chat template and tokenizer must be those of the trained VLM.
        max_length: Maximum number of tokens of a row, including those of pictures; None: no limit.
        pad_to_multiple_of: Pad the length of the batch to a multiple of this.

    Raises:
        ValueError: The processor has no chat template, a number is below 1, or `max_length` is given and the
            processor has no ``image_token_id``.
    """

    processor: Spa3VLMProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if not isinstance(self.processor.chat_template, str):
            raise ValueError(
                f"`processor` must have one chat template, got {self.processor.chat_template!r}. Set "
                "`processor.chat_template` to the template that the VLM was trained with."
            )
        check_ranges(vars(self), {"max_length": (1, None), "pad_to_multiple_of": (1, None)})
        if self.max_length is not None and self.processor.image_token_id is None:
            raise ValueError(
                "`processor.image_token_id` must be known for `max_length`, so that no picture is cut, got None. Set "
                "it to the `image_token_id` of the VLM's configuration."
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch.

        Args:
            examples: At least one example.

        Returns:
            The model's inputs: the VLM's own (``input_ids`` and ``attention_mask`` (batch, sequence), ``pixel_values``
            and so on), ``view_pixel_values``, ``view_grid_hw``, ``views_per_scene``, ``image_tokens_per_scene`` and
            ``labels`` (batch, sequence), -100 where no loss is computed. Two more keys are for reports: ``skipped``, a
            dictionary of source, scene (the row's name), picture ("" for a whole row) and reason for everything that
            was left out, here or while the examples were read; and ``num_rows``, the number of rows tried.

        Raises:
            ValueError: An example has no ``messages``, or even rows with plain text and pictures can't be used: the
                chat template doesn't mark the assistant's words, or the processor wasn't made for
                conversations. The message says what to do.
        """
        skipped = [entry for example in examples for entry in example.get("skipped") or ()]
        num_rows = len(examples) + len(skipped)
        kept = []
        for example in examples:
            if "messages" not in example:
                raise ValueError(
                    f"An example must have `messages`, got the keys {sorted(example)}. Give the trainer's arguments "
                    "`remove_unused_columns=False`: otherwise the trainer takes away what the model's forward doesn't "
                    "name."
                )
            with self._leaving_out(example, skipped):
                kept.append((example, self._marked(example["messages"])))
        # Some processors (InternVL's, Idefics3's) fail if the first row has no picture and another one has.
        kept.sort(key=lambda row: not row[1][0]["content"])
        batch = None
        if len(kept) > 1:
            with suppress(Exception):  # otherwise row by row, to find the faulty one
                batch = self._process([conversation for _, conversation in kept])
        if batch is None:
            kept, tried = [], kept
            for example, conversation in tried:
                with self._leaving_out(example, skipped):
                    batch = self._process([conversation])
                    kept.append((example, conversation))
            if batch is None or len(kept) != 1:
                batch = self._process([conversation for _, conversation in kept] or [_NOTHING])
        reasons = [self._unusable(ids, labels, n) for ids, labels, n in _rows(batch)] if kept else []
        if any(reasons):
            skipped += [_entry(example, reason) for (example, _), reason in zip(kept, reasons) if reason]
            # Processed again: how a batch's pixels are packed differs by family. And it is rare.
            usable = [conversation for (_, conversation), reason in zip(kept, reasons) if not reason]
            batch = self._process(usable or [_NOTHING])
        lengths = batch["attention_mask"].sum(1)
        return self._fit(batch, int(lengths.max())) | {"skipped": skipped, "num_rows": num_rows}

    # Rows that can't be used

    @contextmanager
    def _leaving_out(self, example: Mapping[str, Any], skipped: list[dict[str, str]]) -> Generator[None]:
        """Report a row that can't be used, unless plain rows fail too: then the processor is at fault."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            is_pictured, rounds = _outline(example["messages"])
            self._try_plain_row(is_pictured, rounds, error)
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            skipped.append(_entry(example, shorten(reason, 300)))
            logger.warning(f"A row is left out of training: {skipped[-1]}")

    def _try_plain_row(self, is_pictured: bool, rounds: int, error: Exception) -> None:
        """Raise the error again if a row with the same outline but plain text and pictures fails as well."""
        if (is_pictured, rounds) in self._tried_plain_rows:
            return
        pictures = [{"type": "image", "image": PIL.Image.new("RGB", (112, 112))}] * is_pictured
        first = {"role": "user", "content": [*pictures, {"type": "text", "text": _PLAIN_QUESTION}]}
        messages = [first, *([_say("assistant", _PLAIN_ANSWER), _say("user", _PLAIN_QUESTION)] * rounds)][:-1]
        try:
            self._process([self._marked(messages)])
        except Exception:
            raise error from None
        self._tried_plain_rows.add((is_pictured, rounds))

    @cached_property
    def _tried_plain_rows(self) -> set[tuple[bool, int]]:
        return set()

    # Words

    def _marked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation for `_MARKING_TEMPLATE`: pictures, then the text that the chat template writes, split into
        pieces; those of the assistant are to be learned."""
        self.processor.check_messages(messages)
        messages = [_listed(message) for message in messages]
        pictures, messages = self.processor._pictures_of(
            messages, {"num_frames": self.processor.num_frames, "frames": self.processor.frames}, placeholders=False
        )
        if self.processor.spatial_tokens is not None:  # one placeholder stands for all until the views are known
            messages = self.processor._with_spatial_tokens(messages, 1)
        text, spans = self._spans(messages)
        conversation = [{"role": "user", "content": [{"type": "image", "image": picture} for picture in pictures]}]
        end = 0
        for start, stop in spans:
            text, stop = self._ended(text, start, stop)
            conversation += [_say("user", text[end:start]), _say("assistant", text[start:stop])]
            end = stop
        return [*conversation, _say("user", text[end:])]

    def _spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The output of the chat template, and the spans of the assistant in it."""
        if GENERATION.search(str(self.processor.chat_template)):
            text, (spans,) = self._render(messages, return_assistant_tokens_mask=True)
            return text, spans
        text, _ = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                through, _ = self._render(messages[: index + 1])
                before, _ = self._render(messages[:index], add_generation_prompt=True)
                _check_prefix(through, text, index, "the text up to it", "what stands there when messages follow")
                _check_prefix(before, through, index, "the prompt for it", "what stands there with the answer")
                spans.append((len(before), len(through)))
                _check_written(message, text[len(before) : len(through)], index)
        return text, spans

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> tuple[str, Any]:
        (text,), spans = render_jinja_template(
            [messages],
            chat_template=self.processor.chat_template,  # ty: ignore[invalid-argument-type]  # `__init__` wants a string
            **kwargs,
            **self.processor.tokenizer.special_tokens_map,
        )
        return text, spans

    def _ended(self, text: str, start: int, stop: int) -> tuple[str, int]:
        """The text and the end of an answer in it, including an end token and nothing after it."""
        answer = text[start:stop]
        if answer.rstrip().endswith(self._special_tokens):
            return text, start + len(answer.rstrip())
        end_token = self.processor.tokenizer.eos_token or ""
        if stop == len(text):
            text += end_token
        return text, stop + len(end_token) if text.startswith(end_token, stop) else stop

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        tokens = self.processor.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.special)

    @cached_property
    def _special_ids(self) -> set[int]:
        return {index for index, token in self.processor.tokenizer.added_tokens_decoder.items() if token.special}

    # Tokens

    def _process(self, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
        written: Any = self.processor._write(  # the output has the special tokens of the chat template
            conversations,
            chat_template=_MARKING_TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        batch = dict(written)
        if "labels" in batch:
            name = type(self.processor.vlm_processor).__name__
            raise ValueError(
                f"The VLM's processor must take conversations, got {name}, which writes parts of the prompt and labels "
                "by itself. Train a VLM that was made for conversations."
            )
        is_answer = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        return batch | {"labels": batch["input_ids"].masked_fill(~is_answer, IGNORED)}

    def _unusable(self, input_ids: Tensor, labels: Tensor, length: int) -> str | None:
        """Why a row can't be used for training; None if it can."""
        answers = (labels != IGNORED).nonzero()
        if not len(answers):
            return "it has no words of an assistant"
        if self.max_length is None or length <= self.max_length:
            return None
        if (end := self._end_of_pictures(input_ids[:length])) > self.max_length:
            return f"its pictures end at token {end} of {length}, beyond `max_length` = {self.max_length}"
        if (first := int(answers[0])) >= self.max_length:
            return f"its answer begins at token {first + 1} of {length}, beyond `max_length` = {self.max_length}"
        return None

    def _end_of_pictures(self, input_ids: Tensor) -> int:
        """The number of tokens up to the last one of a picture, including the tokens that close the picture."""
        tokens = [self.processor.image_token_id]
        if self.processor.spatial_tokens is not None:  # appended to the last picture
            tokens.append(self.processor.spatial_token_id)
        places = torch.isin(input_ids, torch.tensor(tokens)).nonzero()
        end = int(places[-1]) + 1 if len(places) else 0
        while 0 < end < len(input_ids) and int(input_ids[end]) in self._special_ids:
            end += 1
        return end

    def _fit(self, batch: dict[str, Any], length: int) -> dict[str, Any]:
        """Truncate or pad everything with an entry per token to the batch's length."""
        length = min(length, self.max_length or length)
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        shape, padding = batch["input_ids"].shape, {"input_ids": self.processor.tokenizer.pad_token_id or 0}
        padding["labels"] = IGNORED
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point():
                value = value[:, : self.max_length]
                missing = length - value.shape[1]
                batch[key] = torch.nn.functional.pad(value, (0, missing), value=padding.get(key, 0))
        return batch


def _entry(example: Mapping[str, Any], reason: str) -> dict[str, str]:
    name = {"source": example.get("source") or "", "scene": example.get("row") or ""}
    return name | {"picture": "", "reason": reason}


def _outline(messages: Any) -> tuple[bool, int]:
    """Whether there are pictures, and the number of answers, where only one or several matters."""
    messages = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list | tuple) else []
    contents = [message.get("content") for message in messages]
    items = [item for content in contents if isinstance(content, list | tuple) for item in content]
    is_pictured = any(isinstance(item, Mapping) and item.get("type") not in ("text", None) for item in items)
    return is_pictured, min(max(sum(message.get("role") == "assistant" for message in messages), 1), 2)


def _rows(batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, int]]:
    return list(zip(batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1).tolist()))


def _listed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list, which every VLM's template accepts, without the empty fields of tables."""
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    items = [{key: value for key, value in item.items() if value is not None} for item in content]
    return message | {"content": items}


def _say(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _check_prefix(prefix: str, text: str, index: int, what: str, where: str) -> None:
    if not text.startswith(prefix):
        same = next((place for place, pair in enumerate(zip(prefix, text)) if pair[0] != pair[1]), len(text))
        raise ValueError(
            f"The chat template writes message {index}, the assistant's, in two ways, so its words can't be found by "
            f"difference: {what} continues with {prefix[same:][:40]!r}, {where} with {text[same:][:40]!r}. Mark the "
            "words in the template, {% generation %}...{% endgeneration %}, and set `processor.chat_template` to it."
        )


def _check_written(message: Mapping[str, Any], answer: str, index: int) -> None:
    words = "".join("".join(item.get("text", "") for item in message["content"]).split())
    if words[-20:] not in "".join(answer.split()):
        raise ValueError(
            f"The chat template must write the words of message {index}, the assistant's, to their end, "
            f"{words[-20:]!r}, got {answer[:80]!r}. Set `processor.chat_template` to one that reads contents that are "
            "lists, and leaves nothing out."
        )


__all__ = ["Spa3VLMCollator"]
