"""Step 10 of the rooms recipe: answers of all variants about unseen rooms, compared with blind answers."""

import argparse
import platform
from pathlib import Path

import torch
import transformers

from spa3r.evaluation import EvaluationRun
from spa3r.evaluation.blind import blind_scores
from spa3r.rooms.instructions import RoomQuestions
from spa3r.vsi_bench.intervals import difference_intervals
from spa3r.vsi_bench.scoring import aggregate

VARIANTS = {
    "vlm": "the VLM alone",
    "vggt": "+ VGGT's tokens",
    "append": "Spa3-VLM, appended",
    "spa3_vlm": "Spa3-VLM, cross-attention",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of runs of `spa3r eval rooms`: vlm-0, vlm-1, vggt-0, ...")
    parser.add_argument("--training-rooms", type=int, default=1000, help="whose answers the blind baselines know")
    args = parser.parse_args()
    runs = {name: [EvaluationRun.load(path) for path in sorted(args.runs.glob(f"{name}-[0-9]"))] for name in VARIANTS}
    runs = {name: found for name, found in runs.items() if found}
    test = next(iter(runs.values()))[0].answers
    known = RoomQuestions(0, args.training_rooms)
    training = list({row["id"]: row for row in map(known.row, range(known.num_questions))}.values())
    scores = {
        "without looking, most frequent answer": [blind_scores(training, test, "most_frequent")],
        "without looking, by the question's words": [blind_scores(training, test, "question")],
    } | {
        f"{VARIANTS[name]} ({len(found)} seed{'s' * (len(found) > 1)})": [run.scores for run in found]
        for name, found in runs.items()
    }
    print(f"{platform.machine()} CPU; Python {platform.python_version()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    print(f"{len(test)} questions about {len({row['scene_name'] for row in test})} unseen rooms of level 0; scores of "
          "VSI-Bench in percent: mean (lowest to highest)\n")  # fmt: skip
    tasks = list(scores["without looking, most frequent answer"][0])
    print(f"| task | {' | '.join(scores)} |\n|---|{'---|' * len(scores)}")
    for task in tasks:
        cells = [told([one[task] for one in column]) for column in scores.values()]
        print(f"| {task.removesuffix('_accuracy').removesuffix('_MRA:.5:.95:.05')} | {' | '.join(cells)} |")

    print("\noverall, more than the VLM alone of the same seed (95 % interval over rooms):\n")
    print("| seed | variant | difference | interval |\n|---|---|---|---|")
    for name in ("vggt", "append", "spa3_vlm"):
        pairs = list(zip(runs["vlm"], runs.get(name, [])))
        for alone, run in pairs:
            print(compared(run.folder.name[-1], name, alone.answers, run.answers))
        if len(pairs) > 1:  # the same draw of rooms for all seeds
            before, after = ([line for run in column for line in run.answers] for column in zip(*pairs))
            print(compared("all", name, before, after))


def compared(seed: str, name: str, before: list[dict], after: list[dict]) -> str:
    """A row of the last table: the same questions answered by the VLM alone and by a variant."""
    difference = aggregate(after)["overall"] - aggregate(before)["overall"]
    low, high = difference_intervals(before, [line["score"] for line in after])["overall"]
    return f"| {seed} | {VARIANTS[name]} | {difference:+.1f} | {low:+.1f} to {high:+.1f} |"


def told(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
