"""Answers that are generated together, one token in each step; answers join and leave between steps.

batch = StepwiseBatch(model)
batch.add([StepwiseAnswer(model, scene, tail, max_new_tokens=64)])
while batch.answers:
    batch.step()

Answers about different scenes share a batch: rows of different lengths are padded, and a mask excludes the padding.
Each greedy answer has the tokens that :meth:`~spa3r.Spa3VLMForConditionalGeneration.ask` gives it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from spa3r.models.base import check_finite, only_nan
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.asking import check_length, text_token
from spa3r.models.spa3_vlm.prefix_cache import PADDABLE_LAYERS, PrefixLayer, chosen_rows, joined, repeated
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.models.spa3_vlm.state import cache_name, in_eval_mode, place_positions, turn
from spa3r.models.spa3_vlm.vlm import vlm_of


class StepwiseAnswer:
    """One answer of a :class:`StepwiseBatch`, from a scene's prefix and the tokens after it.

    Args:
        model: A Spa3-VLM or a VLM.
        scene: The encoded prefix.
        tail: The tokens after it: the question, up to where the answer begins; at least one.
        max_new_tokens: Maximum length of the answer.
        temperature: 0 for the most likely token; above 0, tokens are drawn.
        top_p: Only the most likely tokens with this total probability are drawn, above 0 and up to 1.
        seed: Seed of the draw; None: a new one each time. With a seed, an answer is the same in any batch.

    Raises:
        ValueError: The answer would need more tokens than the VLM's positions have.

    Attributes:
        tokens: The tokens so far, with the one that ends the answer; decoding skips it if it is a special token.
        finish_reason: ``"stop"`` if the model ended the answer, ``"length"`` if it has the maximum length; None before.
        error: Why the answer can't be continued; None if it can.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scene: EncodedScene,
        tail: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        self.scene, self.tail = scene, list(tail)
        self.max_new_tokens, self.draws = max_new_tokens, temperature > 0
        length = len(scene) + len(self.tail) + max_new_tokens
        check_length(vlm_of(model), length)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(
                f"A prompt with its answer must have at most {most} tokens with this VLM, got {length}. Give fewer or "
                "smaller pictures, leave older messages out, or ask for a shorter answer."
            )
        device = execution_device(model)
        self.ids = torch.cat([scene.input_ids, torch.tensor(self.tail)])[None].to(device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if self.draws else {}
        self._processors: Any  # ids (1, tokens), logits (1, vocabulary) -> scores
        self._processors, self._ends = _prepared(model, self.ids, sampling | {"max_new_tokens": max_new_tokens})
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: ValueError | None = None

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, logits: Tensor, best: int) -> None:
        """Choose the next token.

        Args:
            logits: (1, vocabulary), without NaN.
            best: The most likely token.
        """
        token = best
        if self._processors:
            scores = self._processors(self.ids, logits)
            if self.draws:
                token = int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
            else:
                token = int(scores.argmax(-1))
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"


class StepwiseBatch:
    """Answers of one model that are generated together; used by one thread at a time.

    Args:
        model: A Spa3-VLM or a VLM, which encoded the scenes.

    Attributes:
        answers: The answers that are not finished.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._groups: list[_Rows] = []

    @property
    def answers(self) -> list[StepwiseAnswer]:
        return [answer for rows in self._groups for answer in rows.answers]

    @torch.no_grad()
    def add(self, answers: Sequence[StepwiseAnswer]) -> None:
        """Begin answers about one scene: compute their first tokens.

        Answers about a scene whose cache doesn't support padding must have tails of equal length.
        """
        with turn(self.model), in_eval_mode(self.model):
            rows = _Rows(self.model, answers)
        kept = rows.without_done()
        if kept is not None and self._groups and _pads(kept.cache):
            self._groups = [self._groups[0].with_others(kept)]
        elif kept is not None:
            self._groups.append(kept)

    @torch.no_grad()
    def step(self) -> None:
        """Compute the next token of each answer. Finished answers leave the batch."""
        with turn(self.model), in_eval_mode(self.model):
            for rows in self._groups:
                rows.step()
        self.remove_done()

    def remove_done(self) -> None:
        """Remove answers that are finished or have an error."""
        self._groups = [kept for rows in self._groups if (kept := rows.without_done()) is not None]

    def clear(self) -> None:
        """Remove all answers."""
        self._groups = []

    @staticmethod
    def together(waiting: Sequence[StepwiseAnswer], limit: int) -> list[StepwiseAnswer]:
        """The first of the waiting answers, and those after it that :meth:`add` takes with it.

        Args:
            waiting: At least one answer.
            limit: Maximum number.
        """
        first = waiting[0]
        pads = _pads(first.scene.cache)
        alike = (a for a in waiting if a.scene is first.scene and (pads or len(a.tail) == len(first.tail)))
        return [answer for _, answer in zip(range(limit), alike)]


class _Rows:
    """Answers as rows of one cache, all of which get their next token in one forward pass."""

    def __init__(self, model: PreTrainedModel, answers: Sequence[StepwiseAnswer]):
        self.model, self.answers = model, list(answers)
        scene = answers[0].scene
        longest = max(len(answer.tail) for answer in answers)
        # Padding lies between prefix and tail.
        ids = torch.full((len(answers), longest), text_token(model, scene))
        self.mask = torch.ones(len(answers), len(scene) + longest, dtype=torch.long)  # (rows, columns)
        for row, answer in enumerate(answers):
            ids[row, longest - len(answer.tail) :] = torch.tensor(answer.tail)
            self.mask[row, len(scene) : self.mask.shape[1] - len(answer.tail)] = 0
        self.cache: Cache = repeated(scene.cache, len(answers))
        self.offsets = None
        if scene.rope_delta is not None:
            self.offsets = torch.full((len(answers), 1), scene.rope_delta)
        self._forward(ids)

    def step(self) -> None:
        """Compute the next tokens from the last ones."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.answers), 1)], 1)
        self._forward(torch.tensor([answer.tokens[-1:] for answer in self.answers]))

    def _forward(self, ids: Tensor) -> None:
        vlm: Any = vlm_of(self.model)
        device = execution_device(self.model)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.offsets is not None:
            positions = place_positions(vlm, positions, self.offsets)
        logits = vlm(
            input_ids=ids.to(device),
            attention_mask=self.mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            **{cache_name(vlm): self.cache},
        ).logits[:, -1]
        logits = logits.float()
        wrong, best = logits.isnan().any(-1).tolist(), logits.argmax(-1).tolist()
        for row, answer in enumerate(self.answers):
            if wrong[row]:
                try:
                    check_finite(self.model, only_nan(logits[row]), "logits")
                except ValueError as error:
                    answer.error = error
            else:
                answer.take(logits[row : row + 1], best[row])

    def without_done(self) -> _Rows | None:
        """The rows of answers that are not finished; None if there are none."""
        rows = [row for row, answer in enumerate(self.answers) if not answer.is_done]
        if len(rows) == len(self.answers):
            return self
        return self._chosen(rows) if rows else None

    def with_others(self, others: _Rows) -> _Rows:
        """The rows of both."""
        return _Rows._of(self, [(self, range(len(self.answers))), (others, range(len(others.answers)))])

    def _chosen(self, rows: Sequence[int]) -> _Rows:
        return _Rows._of(self, [(self, rows)])

    @staticmethod
    def _of(like: _Rows, parts: Sequence[tuple[_Rows, Sequence[int]]]) -> _Rows:
        """Chosen rows of several, without the columns that none of them uses."""
        result = object.__new__(_Rows)
        result.model = like.model
        result.answers = [part.answers[row] for part, rows in parts for row in rows]
        masks = [part.mask[list(rows)] for part, rows in parts]
        result.offsets = None
        if like.offsets is not None:
            result.offsets = torch.cat([part.offsets[list(rows)] for part, rows in parts if part.offsets is not None])
        if not _pads(like.cache):  # a single part, whose rows are of equal length
            result.mask, result.cache = masks[0], chosen_rows(like.cache, list(parts[0][1]))
            return result
        used = [mask.any(0).nonzero()[:, 0].tolist() for mask in masks]
        result.cache = joined([(part.cache, list(rows), columns) for (part, rows), columns in zip(parts, used)])
        length = max(map(len, used))
        result.mask = torch.cat(
            [pad(mask[:, columns], (0, length - len(columns))) for mask, columns in zip(masks, used)]
        )
        return result


def _pads(cache: Cache) -> bool:
    """Whether the rows of a cache may have different lengths."""
    return all(type(layer).__name__ in PADDABLE_LAYERS or isinstance(layer, PrefixLayer) for layer in cache.layers)


def _prepared(model: PreTrainedModel, ids: Tensor, arguments: dict[str, Any]) -> tuple[LogitsProcessorList, set[int]]:
    """The logits processors that ``generate`` uses after a prompt, and the tokens that end an answer."""
    seen: dict[str, Any] = {}

    def keep(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        seen.update(prepared)
        return input_ids

    vlm: Any = vlm_of(model)
    greedy = {"do_sample": False, "num_beams": 1, "attention_mask": torch.ones_like(ids)}
    vlm.generate(input_ids=ids, custom_generate=keep, **greedy | arguments)
    ends = seen["generation_config"].eos_token_id
    return seen["logits_processor"], set(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
