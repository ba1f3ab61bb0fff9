"""VSI-Bench's official scores, and what they leave undefined.

Multiple choice is right or wrong; a number earns the mean relative accuracy, MRA (arXiv 2412.14171, section 3).
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
"""The eight tasks, in the order of the paper's tables. The relative direction is the mean of its three levels."""


def parse_prediction(text: str) -> str:
    """The part of an answer that is scored: up to the first space (not a newline), without full stops at its end."""
    return text.split(" ")[0].rstrip(".").strip()


def score_prediction(row: Mapping[str, Any], prediction: str) -> float:
    """The score of one answer, between 0 and 1.

    A choice scores 1 if its letter is the ground truth, in either case. A number p scores the share of thresholds theta
    in 0.5, 0.55, ..., 0.95 with ``|p - g| / g <= 1 - theta``; what is no finite number scores 0. A ground truth g of 0,
    of which the official code makes an error, scores 1 for p = 0 and else 0.

    Args:
        row: A row of VSI-Bench; read are ``question_type`` and ``ground_truth``, which may be a number or its text.
        prediction: The model's answer, as it came.

    Raises:
        ValueError: The type is none of VSI-Bench's, or a numerical ground truth is no finite number.
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
    # nan fails every comparison, inf is far from everything: both score 0.
    return float((abs(number - target) / abs(target) <= 1 - CONFIDENCES).mean())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def aggregate(rows_with_scores: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The table of VSI-Bench, in per cent.

    Args:
        rows_with_scores: Of every question a mapping with ``question_type`` and ``score``; more keys don't matter.

    Returns:
        ``"overall"``, the unweighted mean of the tasks, and the mean score of every task under its official name:
        ``"object_counting_MRA:.5:.95:.05"``, ..., ``"object_rel_direction_accuracy"``, ... Relative direction is the
        unweighted mean of its three levels. Tasks and levels of which no row exists are left out of the means, where
        the official code stops.

    Raises:
        ValueError: There is no row, or a row's type is none of VSI-Bench's.
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
    # Summed one by one, as the official code does: numpy's own sum differs in the last digit.
    return sum(values) / len(values)


def task_of(question_type: str) -> str:
    is_choice(question_type)  # or an error
    return "object_rel_direction" if question_type.startswith("object_rel_direction") else question_type
