"""Answers of a VLM, with or without Spa3R, and their scores.

report = evaluate_answers(model, processor, examples)
print(score_table({"with Spa3R": report}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from spa3r.models.base import finite_logits
from spa3r.models.spa3_vlm.modeling_spa3_vlm import VIEW_KEYS
from spa3r.tables import Table
from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES
from spa3r.vsi_bench.scoring import aggregate, score_prediction, task_of, task_title

Example = Mapping[str, Any]
"""``messages`` in the chat format of Hugging Face, ending with the assistant's true answer. Optional keys:
``question_type`` and ``row`` (the example's name)."""

EXACT_MATCH = "exact_match"
"""Name of the share of exactly matching answers to questions that are not of a VSI-Bench type."""


@dataclass(frozen=True)
class ScoredAnswer:
    """The scored answer to one question.

    Attributes:
        row: The example's name; empty if it has none.
        question_type: The example's question type; None if it has none.
        question: The text of the last question, without its pictures.
        answer: The model's answer.
        truth: The example's answer.
        score: Between 0 and 1: :func:`~spa3r.vsi_bench.scoring.score_prediction` for the types of VSI-Bench; for
            others 1 if answer and truth are equal except for case and surrounding white space.
    """

    row: str
    question_type: str | None
    question: str
    answer: str
    truth: str
    score: float


@dataclass(frozen=True)
class AnswerReport:
    """Result of :func:`evaluate_answers`.

    Attributes:
        answers: One per example, in order.
        skipped: ``row`` (the name) and ``reason`` of each example that was left out because it could not be asked.
    """

    answers: list[ScoredAnswer]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        """Scores in percent: ``"overall"`` and the VSI-Bench tasks that occur, under their official names; and
        ``"exact_match"`` of all other questions, which is not part of the overall score."""
        ours = [answer for answer in self.answers if answer.question_type in (*CHOICE_TYPES, *NUMBER_TYPES)]
        others = [answer.score for answer in self.answers if answer.question_type not in (*CHOICE_TYPES, *NUMBER_TYPES)]
        scores = aggregate(vars(answer) for answer in ours) if ours else {}
        return scores | ({EXACT_MATCH: 100 * sum(others) / len(others)} if others else {})

    @property
    def counts(self) -> dict[str, int]:
        """Number of questions of every entry of :attr:`scores`."""
        types = [answer.question_type for answer in self.answers]
        known = [question_type for question_type in types if question_type in (*CHOICE_TYPES, *NUMBER_TYPES)]
        counts = {"overall": len(known), EXACT_MATCH: len(types) - len(known)}
        tasks = Counter(task_title(task_of(question_type)) for question_type in known)
        return {name: counts.get(name, tasks[task_title(name)]) for name in self.scores}

    def to_dict(self) -> dict[str, Any]:
        """All scores and answers, ready for JSON."""
        answers = [vars(answer) for answer in self.answers]
        return {"scores": self.scores, "counts": self.counts, "answers": answers, "skipped": self.skipped}


def answer(
    model: PreTrainedModel,
    processor: Any,
    examples: Iterable[Example],
    batch_size: int = 8,
    max_new_tokens: int = 16,
    use_spa3r: bool = True,
    show_progress: bool = True,
) -> list[str]:
    """Greedy answers to the last question of every example.

    Args:
        model: A Spa3-VLM, or a VLM of transformers. The training mode of its modules is restored.
        processor: The model's processor: a :class:`~spa3r.Spa3VLMProcessor`, or a processor of transformers for a VLM.
            With the processor of a Spa3-VLM and ``images="aligned"``, the VLM alone gets the same pictures as with
            Spa3R.
        examples: Examples with ``messages``. A final assistant message is removed, since it is the answer. A map-style
            dataset, a list, or any other iterable; it is read batch by batch.
        batch_size: Number of examples per batch, padded on the left.
        max_new_tokens: Maximum length of an answer. VSI-Bench allows 16.
        use_spa3r: False runs only the VLM of a Spa3-VLM, without fusing its image tokens. No effect on a plain VLM.
        show_progress: Whether to show a progress bar.

    Returns:
        The answers, in the examples' order.

    Raises:
        ValueError: `batch_size` is below 1, or an example contains no question.
    """
    asked = (examples, batch_size, max_new_tokens, use_spa3r, show_progress)
    return [text for _, text in _answers(model, processor, *asked)]


def evaluate_answers(
    model: PreTrainedModel,
    processor: Any,
    examples: Iterable[Example],
    batch_size: int = 8,
    max_new_tokens: int = 16,
    use_spa3r: bool = True,
    skip: bool = False,
) -> AnswerReport:
    """Ask a model all questions and score its answers with VSI-Bench's rules.

    Args:
        model: As in :func:`answer`.
        processor: The model's processor.
        examples: Examples whose last message is the assistant's true answer.
        batch_size: Number of examples per batch.
        max_new_tokens: Maximum length of an answer.
        use_spa3r: False runs only the VLM of a Spa3-VLM.
        skip: Whether to skip and report examples that can't be asked, instead of raising an error.

    Raises:
        ValueError: There is no example, or without `skip` an example can't be asked: it contains no question or no
            truth, its picture can't be read, or one of its texts contains a special token.
    """
    report = AnswerReport([])
    asked = (batch_size, max_new_tokens, use_spa3r)
    for example, text in _answers(model, processor, examples, *asked, skipped=report.skipped if skip else None):
        try:
            report.answers.append(score_answer(example, text))
        except ValueError as error:
            if not skip:
                raise
            report.skipped.append({"row": example.get("row") or "", "reason": str(error)})
    if not report.answers and not report.skipped:
        raise ValueError("`examples` must hold at least one example, got none.")
    return report


def score_answer(example: Example, answer: str) -> ScoredAnswer:
    """Score one answer by the rules of its question type.

    Args:
        example: An example whose last message is the assistant's true answer.
        answer: The model's answer.

    Raises:
        ValueError: The example contains no question or no truth.
    """
    name, question_type = example.get("row") or "", example.get("question_type")
    *questions, last = example["messages"]
    if not questions or last["role"] != "assistant":
        raise ValueError(
            f"`messages` of example {name!r} must end with a question and the assistant's answer, the truth; got "
            f"the roles {[message['role'] for message in example['messages']]}."
        )
    truth = _text(last)
    if question_type in (*CHOICE_TYPES, *NUMBER_TYPES):
        score = score_prediction({"question_type": question_type, "ground_truth": truth}, answer)
    else:
        score = float(answer.strip().lower() == truth.strip().lower())
    return ScoredAnswer(name, question_type, _text(questions[-1]), answer, truth, score)


def score_table(reports: Mapping[str, AnswerReport]) -> Table:
    """Scores of several reports by task, as a Markdown table that is readable as plain text.

    Args:
        reports: Results of :func:`evaluate_answers` about the same questions, by column heading.
    """
    scores = [report.scores for report in reports.values()]
    counts = next(iter(reports.values())).counts
    names = sorted(counts, key=lambda name: name in ("overall", EXACT_MATCH))  # tasks first
    rows = [[task_title(name), str(counts[name]), *(f"{s[name]:.1f}" for s in scores)] for name in names]
    return Table(["percent", "questions", *reports], rows)


def _answers(
    model: PreTrainedModel,
    processor: Any,
    examples: Iterable[Example],
    batch_size: int,
    max_new_tokens: int,
    use_spa3r: bool,
    show_progress: bool = True,
    skipped: list[dict[str, str]] | None = None,
) -> Iterator[tuple[Example, str]]:
    """Every example with its answer; examples that can't be asked are added to the list of skipped ones, if given."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    is_spa3_vlm = hasattr(model, "vlm")  # also inside a PEFT model
    asked = model if use_spa3r or not is_spa3_vlm else model.vlm
    left_out = () if is_spa3_vlm and use_spa3r else VIEW_KEYS
    if left_out and getattr(processor, "spatial_tokens", None) is not None:
        processor = copy(processor)
        processor.spatial_tokens = None  # no places for tokens that are not appended
    tokenizer = getattr(processor, "tokenizer", processor)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with logging.tqdm(total=_length(examples), desc="Answering", leave=False, disable=not show_progress) as bar:
            for batch in _batches(examples, batch_size):
                size = len(batch)
                try:
                    inputs = _inputs(processor, batch)
                except Exception:
                    if skipped is None:
                        raise
                    batch = _usable(processor, batch, skipped)
                    inputs = _inputs(processor, batch) if batch else None
                bar.update(size)
                if inputs is None:
                    continue
                inputs = inputs.to(model.device)
                inputs = {key: value for key, value in inputs.items() if key not in left_out}
                output = asked.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    logits_processor=finite_logits(asked),
                )
                words = output[:, inputs["input_ids"].shape[1] :]
                for example, text in zip(batch, tokenizer.batch_decode(words, skip_special_tokens=True)):
                    yield example, text.strip()
    finally:
        for module, mode in modes.items():
            module.training = mode


def _inputs(processor: Any, batch: Sequence[Example]) -> Any:
    return processor.apply_chat_template(
        [_prompt(example) for example in batch],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def _usable(processor: Any, batch: Sequence[Example], skipped: list[dict[str, str]]) -> list[Example]:
    """The examples of a batch that can be asked; the others are added to the list of skipped ones."""
    usable = []
    for example in batch:
        try:
            _inputs(processor, [example])
        except Exception as error:
            skipped.append({"row": example.get("row") or "", "reason": f"{type(error).__name__}: {error}"})
        else:
            usable.append(example)
    return usable


def _length(examples: Iterable[Example]) -> int | None:
    return len(examples) if hasattr(examples, "__len__") else None


def _batches(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    if hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):  # a dataset may not raise IndexError
        rows = (examples[index] for index in range(len(examples)))
    else:
        rows = iter(examples)
    while batch := list(islice(rows, batch_size)):
        yield batch


def _prompt(example: Example) -> Sequence[Mapping[str, Any]]:
    """The messages without the final answer."""
    messages = list(example["messages"])
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"`messages` of example {example.get('row')!r} must hold a question, got none.")
    return messages


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text")
