"""What a VLM answers, with Spa3R and without, and how much of it is right.

report = evaluate_answers(model, processor, examples)
print(score_table({"with Spa3R": report}))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from spa3r.models.base import finite_logits
from spa3r.models.spa3_vlm.modeling_spa3_vlm import VIEW_KEYS
from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES
from spa3r.vsi_bench.scoring import aggregate, score_prediction

Example = Mapping[str, Any]
"""``messages`` in the chat form of Hugging Face, the last one the assistant's: the truth. ``question_type`` and ``row``
(its name) may stand beside them."""

EXACT_MATCH = "exact_match"
"""Name of the share of right answers, letter by letter, to questions that are of no type of VSI-Bench."""


@dataclass(frozen=True)
class ScoredAnswer:
    """One question's outcome.

    Attributes:
        row: The example's name; empty if it has none.
        question_type: As in the example; None if it has none.
        question: The text of the last question, without its pictures.
        answer: What the model said.
        truth: What the example says.
        score: Between 0 and 1: :func:`~spa3r.vsi_bench.scoring.score_prediction` for the types of VSI-Bench; for
            others 1 if answer and truth are the same but for case and white space around them.
    """

    row: str
    question_type: str | None
    question: str
    answer: str
    truth: str
    score: float


@dataclass(frozen=True)
class AnswerReport:
    """What :func:`evaluate_answers` returns.

    Attributes:
        answers: One for each example, in their order.
        skipped: Of examples that could not be asked and were left out their name, ``row``, and the ``reason``.
    """

    answers: list[ScoredAnswer]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        """In per cent: ``"overall"`` and the tasks of VSI-Bench that occur, under their official names; and
        ``"exact_match"`` of all other questions, which is no part of the overall score."""
        ours = [answer for answer in self.answers if answer.question_type in (*CHOICE_TYPES, *NUMBER_TYPES)]
        others = [answer.score for answer in self.answers if answer.question_type not in (*CHOICE_TYPES, *NUMBER_TYPES)]
        scores = aggregate(vars(answer) for answer in ours) if ours else {}
        return scores | ({EXACT_MATCH: 100 * sum(others) / len(others)} if others else {})

    @property
    def counts(self) -> dict[str, int]:
        """Of every entry of :attr:`scores` the number of questions."""
        types = [answer.question_type for answer in self.answers]
        known = [question_type for question_type in types if question_type in (*CHOICE_TYPES, *NUMBER_TYPES)]
        counts = {"overall": len(known), EXACT_MATCH: len(types) - len(known)}
        return {name: counts.get(name, sum(t.startswith(_task(name)) for t in known)) for name in self.scores}

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
        model: A Spa3-VLM, or a VLM of transformers. Its modules are left in the mode in which they were.
        processor: The model's: a :class:`~spa3r.Spa3VLMProcessor`, or a processor of transformers for a VLM. Of a
            Spa3-VLM with ``images="aligned"`` the VLM alone sees the same pictures as with Spa3R.
        examples: With ``messages``; an assistant's message at the end is what is asked for, and the model does not see
            it. A data set of map style, a list, or anything else to iterate over; read batch by batch.
        batch_size: Examples answered at once, padded on the left.
        max_new_tokens: Length of an answer at most. VSI-Bench allows 16.
        use_spa3r: False: a Spa3-VLM's VLM alone, whose image tokens are not fused. A plain VLM has nothing to leave
            out.
        show_progress: Whether a bar shows how far it is.

    Returns:
        The answers, in the examples' order.

    Raises:
        ValueError: `batch_size` is below 1, or an example holds no question.
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
    """Ask a model everything and score its answers by VSI-Bench's rules.

    Args:
        model: As in :func:`answer`, like all arguments.
        processor: The model's.
        examples: The last message of each is the assistant's: the truth.
        batch_size: Examples answered at once.
        max_new_tokens: Length of an answer at most.
        use_spa3r: False: a Spa3-VLM's VLM alone.
        skip: Whether an example that can't be asked is left out and named, and not an error.

    Raises:
        ValueError: There is no example, or without `skip` an example can't be asked: it holds no question or no truth,
            its picture can't be read, or a text of it holds a special token.
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
        example: With the truth as its last message, the assistant's.
        answer: The model's.

    Raises:
        ValueError: The example holds no question or no truth.
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


def score_table(reports: Mapping[str, AnswerReport]) -> str:
    """Scores by task side by side, as a Markdown table that is readable as plain text.

    Args:
        reports: By the heading of its column what :func:`evaluate_answers` returned, all about the same questions.
    """
    scores = [report.scores for report in reports.values()]
    counts = next(iter(reports.values())).counts
    names = sorted(counts, key=lambda name: name in ("overall", EXACT_MATCH))  # the tasks first
    cells = [["per cent", "questions", *reports]]
    cells += [[_task(name).replace("_", " "), str(counts[name]), *(f"{s[name]:.1f}" for s in scores)] for name in names]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _task(score: str) -> str:
    """``object_counting`` of ``object_counting_MRA:.5:.95:.05``."""
    return score.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05")


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
    """Every example with its answer; but for those that can't be asked, if there is a list for their names."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    is_spa3_vlm = hasattr(model, "vlm")  # also below a peft model
    asked = model if use_spa3r or not is_spa3_vlm else model.vlm
    left_out = () if is_spa3_vlm and use_spa3r else VIEW_KEYS
    if left_out and getattr(processor, "spatial_tokens", None) is not None:
        processor = copy(processor)
        processor.spatial_tokens = None  # no places for tokens that nobody appends
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
    """The examples of a batch that can be asked; the others are named."""
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
    if hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):  # a data set may know no IndexError
        rows = (examples[index] for index in range(len(examples)))
    else:
        rows = iter(examples)
    while batch := list(islice(rows, batch_size)):
        yield batch


def _prompt(example: Example) -> Sequence[Mapping[str, Any]]:
    """The messages without the answer that is asked for."""
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
