"""Compare two runs: which tasks differ by more than the choice of scenes explains, and which questions flipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spa3r.evaluation.run_folder import EvaluationRun, Line, changes
from spa3r.tables import Table
from spa3r.vsi_bench.format import task_title
from spa3r.vsi_bench.intervals import difference_intervals
from spa3r.vsi_bench.scoring import aggregate, task_of

HALF = 0.5
"""An answer that scores more counts as right for the number of flips; for choices that is the true letter."""


@dataclass(frozen=True)
class Flip:
    """A question that one run answered correctly and the other did not.

    Attributes:
        first: Its line in the first run.
        second: Its line in the second run.
    """

    first: Line
    second: Line

    @property
    def is_won(self) -> bool:
        """Whether the second run is the one that answered correctly."""
        return self.second["score"] > self.first["score"]


@dataclass(frozen=True)
class RunComparison:
    """What :func:`compare_runs` returns. Scores are in percent, over the questions that have scores in both runs.

    Attributes:
        names: Names of both runs.
        scores: Scores of both runs by task: ``"overall"``, then the tasks.
        intervals: 95 % intervals of the second run's score minus the first's, over draws of scenes.
        counts: Number of questions of each task.
        flips: Questions that only one run answered correctly: an answer counts as right if it scores more than one
            half.
        left_out: Questions that only one run has, or that have no score in one of them.
        changed: Other differences: settings, weights, data types, attention back ends, versions.
    """

    names: tuple[str, str]
    scores: dict[str, tuple[float, float]]
    intervals: dict[str, tuple[float, float]]
    counts: dict[str, int]
    flips: list[Flip]
    left_out: int
    changed: list[str]

    def table(self) -> Table:
        """Both scores, their difference and its 95 % interval by task, as a Markdown table."""
        rows = []
        for name in [*list(self.scores)[1:], "overall"]:
            (first, second), (low, high) = self.scores[name], self.intervals[name]
            numbers = (f"{first:.1f}", f"{second:.1f}", f"{second - first:+.1f}", f"{low:+.1f} to {high:+.1f}")
            rows.append([task_title(name), str(self.counts[name]), *numbers])
        return Table(["percent", "questions", "A", "B", "B − A", "95 % interval"], rows)

    def to_dict(self) -> dict[str, Any]:
        """All results, ready for JSON."""
        scores = {
            name: {
                "a": a,
                "b": b,
                "difference": b - a,
                "interval": self.intervals[name],
                "questions": self.counts[name],
            }
            for name, (a, b) in self.scores.items()
        }
        keys = ("id", "dataset", "scene_name", "question_type", "question", "options", "ground_truth")
        flips = [
            {key: flip.first.get(key) for key in keys}
            | {"a": flip.first["prediction"], "b": flip.second["prediction"]}
            | {"score_a": flip.first["score"], "score_b": flip.second["score"]}
            for flip in self.flips
        ]
        return {"scores": scores, "flips": flips, "left_out": self.left_out, "changed": self.changed}


def compare_runs(first: EvaluationRun, second: EvaluationRun) -> RunComparison:
    """Compare two runs question by question.

    Args:
        first: A run.
        second: Another run of the same questions, or of some of them.

    Raises:
        ValueError: They have no scored question in common, or questions with the same id differ.
    """
    theirs = {line["id"]: line for line in second.answers}
    common = [(line, theirs[line["id"]]) for line in first.answers if line["id"] in theirs]
    for a, b in common:
        if differing := [key for key in ("question_type", "question", "options", "ground_truth") if a[key] != b[key]]:
            raise ValueError(
                f"Both runs must be of the same questions, and question {a['id']} differs in {', '.join(differing)}: "
                f"{a[differing[0]]!r} and {b[differing[0]]!r}. Compare runs of one benchmark."
            )
    pairs = [(a, b) for a, b in common if a["score"] is not None and b["score"] is not None]
    if not pairs:
        raise ValueError(
            f"Both runs must have scored questions in common, and {first.folder} and {second.folder} have none. "
            "Compare runs of one benchmark."
        )
    ours, others = [a for a, _ in pairs], [b for _, b in pairs]
    scores = {name: (score, aggregate(others)[name]) for name, score in aggregate(ours).items()}
    tasks = [task_of(line["question_type"]) for line in ours]
    counts = {name: sum(name.startswith(task) for task in tasks) for name in scores} | {"overall": len(tasks)}
    flips = [Flip(a, b) for a, b in pairs if (a["score"] > HALF) != (b["score"] > HALF)]
    return RunComparison(
        names=(first.name, second.name),
        scores=scores,
        intervals=difference_intervals(ours, [line["score"] for line in others]),
        counts=counts,
        flips=flips,
        left_out=len({line["id"] for line in first.answers} | theirs.keys()) - len(pairs),
        changed=changes(_conditions(first.about), _conditions(second.about)),
    )


def _conditions(about: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions that scores may depend on, with the environment of the last start."""
    environment = about["environments"][-1]
    packages = environment["packages"]
    return {
        "settings": about["settings"],
        "model": {key: about["model"][key] for key in ("weights_sha256", "dtype", "attention", "image_processor")},
        "device": environment["device"],
        "python": environment["python"],
        "packages": {
            name: packages.get(name) for name in ("torch", "transformers", "xformers", "spa3r", "pillow", "av")
        },
    }
