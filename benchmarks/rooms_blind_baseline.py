"""Scores of questions about rooms without pictures: three blind baselines, level by level, compared with chance.

python benchmarks/rooms_blind_baseline.py
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np

from spa3r.evaluation.blind import BlindMethod, blind_scores
from spa3r.rooms import LEVELS, RoomLevel
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.rooms.questions import QUESTION_TYPES
from spa3r.vsi_bench.scoring import aggregate


def read(first_seed: int, rooms: int, level: RoomLevel) -> list[dict]:
    """All questions about some rooms, each once."""
    questions = RoomQuestions(first_seed, rooms, level)
    rows = [questions.row(index) for index in range(questions.num_questions)]
    return list({row["id"]: row for row in rows}.values())


def answer_of(row: dict) -> str:
    """The text of the answer; for an option without its letter."""
    if row["options"] is None:
        return row["ground_truth"]
    return next(option[3:] for option in row["options"] if option[0] == row["ground_truth"])


def percent(counts: Counter, most: int) -> str:
    """The most frequent items with their shares."""
    total = sum(counts.values())
    return ", ".join(f"{what} {100 * count / total:.0f} %" for what, count in counts.most_common(most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training-rooms", type=int, default=300, help="rooms of every level whose answers are known")
    parser.add_argument("--test-rooms", type=int, default=200, help="rooms of every level that are asked about")
    args = parser.parse_args()
    levels = {str(index): level for index, level in enumerate(LEVELS)}
    levels["0, sizes vary"] = replace(LEVELS[0], size_variation=1.0)
    print(f"Python {platform.python_version()}, numpy {np.__version__}; all is drawn from seeds")
    print(f"{args.training_rooms} training rooms, {args.test_rooms} test rooms of each level, 8 pictures of each room,")
    print("one question of each type; scores of VSI-Bench in percent\n")
    for name, level in levels.items():
        training = read(0, args.training_rooms, level)
        test = read(FIRST_TEST_SEED, args.test_rooms, level)
        columns = {method: blind_scores(training, test, method) for method in get_args(BlindMethod)}
        chance = [
            {"question_type": row["question_type"], "score": 1 / len(row["options"])} for row in test if row["options"]
        ]
        columns["chance"] = aggregate(chance)
        print(f"## Level {name}\n")
        print(f"| task | {' | '.join(column.replace('_', ' ') for column in columns)} |")
        print("|---|" + "---|" * len(columns))
        for task in columns["most_frequent"]:
            cells = [f"{scores[task]:.1f}" if task in scores else "" for scores in columns.values()]
            if task == "overall":
                cells[-1] = ""  # numbers have no chance level
            print(f"| {task.removesuffix('_accuracy').removesuffix('_MRA:.5:.95:.05')} | {' | '.join(cells)} |")
        print("\n| type | test questions | most frequent answers | letters |")
        print("|---|---|---|---|")
        for question_type in QUESTION_TYPES:
            rows = [row for row in test if row["question_type"] == question_type]
            truths = [answer_of(row) for row in rows]
            letters = Counter(row["ground_truth"] for row in rows if row["options"])
            shown = percent(Counter(truths), 4)
            if question_type in ("object_abs_distance", "object_size_estimation", "room_size_estimation"):
                low, middle, high = np.percentile(np.array(truths, float), (5, 50, 95))
                shown = f"5 % below {low:.3g}, half below {middle:.3g}, 95 % below {high:.3g}"
            elif question_type == "obj_appearance_order":
                lengths = Counter(f"{len(truth.split(', '))} objects" for truth in truths)
                shown = f"{len(set(truths))} different ones; {percent(lengths, 2)}"
            print(f"| {question_type} | {len(rows)} | {shown} | {percent(Counter(sorted(letters.elements())), 4)} |")
        print(flush=True)


if __name__ == "__main__":
    main()
