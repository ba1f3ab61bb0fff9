"""VSI-Bench's official scores, extended to cases that they leave undefined.

Multiple choice is right or wrong; numbers are scored by mean relative accuracy, MRA (arXiv 2412.14171, section 3).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES, is_choice, make_prompt

__all__ = ["CHOICE_TYPES", "NUMBER_TYPES", "aggregate", "make_prompt", "parse_prediction", "score_prediction"]

CONFIDENCES = np.linspace(0.5, 0.95, 10)
"""The thresholds theta of the mean relative accuracy."""

TASKS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "object_rel_distance",
    "object_rel_direction",
    "route_planning",
    "obj_appearance_order",
)
"""The eight tasks, in the order of the paper's tables. Relative direction is the mean of its three levels."""


def parse_prediction(text: str) -> str:
    """The part of an answer that is scored: up to the first space (not a newline), without trailing periods."""
    return text.split(" ")[0].rstrip(".").strip()


def score_prediction(row: Mapping[str, Any], prediction: str) -> float:
    """The score of one answer, between 0 and 1.

    A choice scores 1 if its letter equals the ground truth, ignoring case. A number p scores the share of thresholds
    theta in 0.5, 0.55, ..., 0.95 with ``|p - g| / g <= 1 - theta``; anything but a finite number scores 0. For a ground
    truth g of 0, which is an error in the official code, p = 0 scores 1 and anything else 0.

    Args:
        row: A row of VSI-Bench; uses ``question_type`` and ``ground_truth``, which may be a number or its text.
        prediction: The model's unmodified answer.

    Raises:
        ValueError: The type is not one of VSI-Bench's, or a numerical ground truth is not a finite number.
    """
    answer, truth = parse_prediction(prediction), row["ground_truth"]
    if is_choice(row["question_type"]):
        return float(answer.lower() == str(truth).lower())
    target = _number(truth)
    if not math.isfinite(target):
        raise ValueError(
            f"`ground_truth` of a question of type {row['question_type']} must be a finite number, got {truth!r}."
        )
    number = _number(answer)
    if target == 0:
        return float(number == 0)
    # nan fails every comparison, and inf is far from every number: both score 0.
    return float((abs(number - target) / abs(target) <= 1 - CONFIDENCES).mean())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def aggregate(rows_with_scores: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The score table of VSI-Bench, in percent.

    Args:
        rows_with_scores: One mapping per question with ``question_type`` and ``score``; other keys are ignored.

    Returns:
        ``"overall"``, the unweighted mean of the tasks, and the mean score of every task under its official name:
        ``"object_counting_MRA:.5:.95:.05"``, ..., ``"object_rel_direction_accuracy"``, ... Relative direction is the
        unweighted mean of its three levels. Tasks and levels without rows are left out of the means; the official code
        fails on them.

    Raises:
        ValueError: There is no row, or a row's type is not one of VSI-Bench's.
    """
    scores = defaultdict(list)
    for row in rows_with_scores:
        scores[task_of(row["question_type"])].append((row["question_type"], float(row["score"])))
    if not scores:
        raise ValueError("`rows_with_scores` must hold at least one scored row, got none.")
    table = {}
    for task in (task for task in TASKS if task in scores):
        levels = defaultdict(list)
        for question_type, score in scores[task]:
            levels[question_type].append(score)
        metric = "accuracy" if is_choice(scores[task][0][0]) else "MRA:.5:.95:.05"
        table[f"{task}_{metric}"] = _mean([float(np.mean(level)) for level in levels.values()])
    return {name: 100 * mean for name, mean in {"overall": _mean(list(table.values())), **table}.items()}


def _mean(values: list[float]) -> float:
    # Summed sequentially, as in the official code: numpy's sum differs in the last digit.
    return sum(values) / len(values)


def task_of(question_type: str) -> str:
    """The task of a type: relative direction is one task for its three levels."""
    is_choice(question_type)  # raises for an unknown type
    return "object_rel_direction" if question_type.startswith("object_rel_direction") else question_type
