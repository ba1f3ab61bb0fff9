"""Blind baselines: answers that follow from the questions of other rooms alone, without pictures.

answers = blind_answers(training_rows, test_rows, "question")
print(blind_scores(training_rows, test_rows, "question"))
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from spa3r.rooms import COLORS
from spa3r.vsi_bench.format import is_choice
from spa3r.vsi_bench.scoring import aggregate, score_prediction

Row = Mapping[str, Any]
BlindMethod = Literal["most_frequent", "best_constant", "question"]
"""How to answer without pictures; see :func:`blind_answers`."""

_ENOUGH = 5  # training questions with the same words; with fewer the answer depends on the type only
_COLOR = re.compile(rf"\b({'|'.join(COLORS)}) ")


def blind_answers(
    training_rows: Sequence[Row], test_rows: Sequence[Row], method: BlindMethod = "most_frequent"
) -> list[str]:
    """Answer questions about rooms without their pictures.

    Args:
        training_rows: Rows in VSI-Bench's format with their answers.
        test_rows: The questions; their answers are not read. Every type must occur in `training_rows`.
        method: ``"most_frequent"``: for every type the most frequent answer, a number or a letter. ``"best_constant"``:
            for every type the answer that scores best on the training rows; for numbers this is a middle value.
            ``"question"``: uses the words, without colors: for numbers the best constant of the training rows with
            the same question, for choices the option whose words were most often right where they were offered
            (word by word at its position, if options are lists).

    Raises:
        ValueError: The method is unknown, or a type is missing in the training rows.
    """
    if method not in ("most_frequent", "best_constant", "question"):
        raise ValueError(
            f'`method` must be "most_frequent", "best_constant" or "question", got {method!r}. Take one of them.'
        )
    pick = _most_frequent if method == "most_frequent" else _best
    by_type = {name: pick(rows) for name, rows in _grouped(training_rows, _type).items()}
    missing = {row["question_type"] for row in test_rows} - by_type.keys()
    if missing:
        raise ValueError(f"`training_rows` must hold every type of `test_rows`, got none of {', '.join(missing)}.")
    if method != "question":
        return [by_type[row["question_type"]] for row in test_rows]
    by_words = {
        words: _best(rows)
        for words, rows in _grouped((row for row in training_rows if not row["options"]), _words).items()
        if len(rows) >= _ENOUGH
    }
    shares = _shares(training_rows)
    return [
        _likeliest(row, shares) if row["options"] else by_words.get(_words(row), by_type[row["question_type"]])
        for row in test_rows
    ]


def blind_scores(
    training_rows: Sequence[Row], test_rows: Sequence[Row], method: BlindMethod = "most_frequent"
) -> dict[str, float]:
    """VSI-Bench's table of scores, in percent, for :func:`blind_answers`.

    Args:
        training_rows: As in :func:`blind_answers`.
        test_rows: Rows with their answers.
        method: How to answer.
    """
    answers = blind_answers(training_rows, test_rows, method)
    return aggregate(
        {"question_type": row["question_type"], "score": score_prediction(row, answer)}
        for row, answer in zip(test_rows, answers)
    )


def _type(row: Row) -> str:
    return row["question_type"]


def _words(row: Row) -> str:
    return _COLOR.sub("", row["question"])


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _most_frequent(rows: Sequence[Row]) -> str:
    counts = Counter(row["ground_truth"] for row in rows)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _best(rows: Sequence[Row]) -> str:
    """Of all occurring answers, the one that scores best on the rows."""
    if is_choice(rows[0]["question_type"]):
        return _most_frequent(rows)
    truths = Counter(row["ground_truth"] for row in rows)

    def score(answer: str) -> float:
        return sum(
            count * score_prediction({**rows[0], "ground_truth": truth}, answer) for truth, count in truths.items()
        )

    return max(sorted(truths), key=score)


def _parts(row: Row, option: str) -> list[tuple[str, int, str]]:
    """Type, position and words of the parts of an option: "C. Turn Left, Turn Back" has two parts."""
    listed = _COLOR.sub("", option.partition(". ")[2]).split(", ")
    return [(f"{row['question_type']} of {len(listed)}", place, words) for place, words in enumerate(listed)]


def _shares(rows: Sequence[Row]) -> Callable[[tuple[str, int, str]], float]:
    """How often a part of an option was right where it was offered in the training rows."""
    offered, right = Counter(), Counter()
    for row in rows:
        for option in row["options"] or ():
            parts = _parts(row, option)
            offered.update(parts)
            if option.partition(". ")[0] == row["ground_truth"]:
                right.update(parts)
    return lambda part: (right[part] + 1) / (offered[part] + 4)  # as if it had been offered four more times


def _likeliest(row: Row, share: Callable[[tuple[str, int, str]], float]) -> str:
    def mean(option: str) -> float:
        parts = _parts(row, option)
        return sum(map(share, parts)) / len(parts)

    return max(row["options"], key=mean).partition(". ")[0]
