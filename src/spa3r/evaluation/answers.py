"""Scores of a model's answers to examples whose true answers are known.

report = evaluate_answers(model, processor, examples)
print(score_table({"with Spa3R": report}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from spa3r.answering.engine import AnsweringEngine, Example
from spa3r.tables import Table
from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES, task_title
from spa3r.vsi_bench.scoring import aggregate, score_prediction, task_of

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


def evaluate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Iterable[Example],
    batch_size: int = 8,
    max_new_tokens: int = 16,
    use_spa3r: bool = True,
    skip: bool = False,
) -> AnswerReport:
    """Ask a model all questions and score its answers with VSI-Bench's rules.

    Args:
        model: A Spa3-VLM, or a VLM of transformers; see :class:`~spa3r.answering.engine.AnsweringEngine`.
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
    report, engine = AnswerReport([]), AnsweringEngine(model, processor, use_spa3r)
    for example, text in engine.answer_examples(
        examples, batch_size, max_new_tokens, skipped=report.skipped if skip else None
    ):
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


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text")
