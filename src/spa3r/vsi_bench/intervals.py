"""Confidence intervals of scores by bootstrap: scenes are resampled with replacement (Efron, percentile method).

Scores of questions about one scene are correlated, so scenes are resampled instead of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa3r.vsi_bench.scoring import aggregate, task_of

SAMPLES, SEED = 10_000, 0
CHUNK = 500  # samples per chunk: their weights for a thousand scenes take four megabytes

Line = Mapping[str, Any]


def score_intervals(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """95 % intervals of every entry of :func:`~spa3r.evaluation.aggregate`, in percent.

    Args:
        lines: Lines with ``dataset``, ``scene_name``, ``question_type`` and ``score``.
    """
    names = list(aggregate(lines))
    samples = _resampled(lines, [[line["score"] for line in lines]])[0]
    return dict(zip(names, _intervals(samples)))


def difference_intervals(lines: Sequence[Line], others: Sequence[float]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the score differences of two runs on the same scenes, `others` minus the scores of the lines.

    Args:
        lines: As in :func:`score_intervals`.
        others: The other run's score for every line.
    """
    names = list(aggregate(lines))
    ours, theirs = _resampled(lines, [[line["score"] for line in lines], others])
    return dict(zip(names, _intervals(theirs - ours)))


def _intervals(samples: np.ndarray) -> list[tuple[float, float]]:
    low, high = np.nanpercentile(samples, (2.5, 97.5), axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high)]


def _resampled(lines: Sequence[Line], scores: Sequence[Sequence[float]]) -> np.ndarray:
    """The score table of every sample for every list of scores, (lists, samples, entries): overall, then the tasks.

    A task without questions in a sample is left out of the sample's overall score.
    """
    scenes = {scene: i for i, scene in enumerate(dict.fromkeys((r["dataset"], r["scene_name"]) for r in lines))}
    types = {name: i for i, name in enumerate(sorted({line["question_type"] for line in lines}))}
    names = list(aggregate([{**line, "score": 0.0} for line in lines]))[1:]
    tasks = [[i for t, i in types.items() if name.startswith(task_of(t))] for name in names]
    places = (
        [scenes[line["dataset"], line["scene_name"]] for line in lines],
        [types[line["question_type"]] for line in lines],
    )
    sums = np.zeros((1 + len(scores), len(scenes), len(types)))
    for total, values in zip(sums, (np.ones(len(lines)), *map(np.asarray, scores))):
        np.add.at(total, places, values)

    generator, tables = np.random.default_rng(SEED), []
    with np.errstate(invalid="ignore"):
        for start in range(0, SAMPLES, CHUNK):
            size = min(CHUNK, SAMPLES - start)
            weights = generator.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), size).astype(float)
            counts, *totals = np.einsum("sn,knt->kst", weights, sums, optimize=True)
            by_type = np.stack(totals) / counts  # nan if a sample has no question of a type
            by_task = np.stack([_mean(by_type[..., members]) for members in tasks], -1)
            tables.append(100 * np.concatenate([_mean(by_task)[..., None], by_task], -1))
    return np.concatenate(tables, 1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, ignoring nan; nan if all are nan."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / known.sum(-1)
