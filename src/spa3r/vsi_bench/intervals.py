"""How sure a score is: scenes are drawn anew, with replacement, and scored again (Efron's bootstrap, percentiles).

Questions about one scene stand or fall together, so scenes are drawn and not questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa3r.vsi_bench.scoring import aggregate, task_of

SAMPLES, SEED = 10_000, 0
CHUNK = 500  # samples at once: their weights of a thousand scenes are four megabytes

Line = Mapping[str, Any]


def score_intervals(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """95 % intervals of every entry of :func:`~spa3r.evaluation.aggregate`, per cent.

    Args:
        lines: With ``dataset``, ``scene_name``, ``question_type`` and ``score``.
    """
    names = list(aggregate(lines))
    samples = _resampled(lines, [[line["score"] for line in lines]])[0]
    return dict(zip(names, _intervals(samples)))


def difference_intervals(lines: Sequence[Line], others: Sequence[float]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the difference of two runs' scores, `others` minus those of the lines, on the same scenes.

    Args:
        lines: As in :func:`score_intervals`.
        others: The other run's score of every line.
    """
    names = list(aggregate(lines))
    ours, theirs = _resampled(lines, [[line["score"] for line in lines], others])
    return dict(zip(names, _intervals(theirs - ours)))


def _intervals(samples: np.ndarray) -> list[tuple[float, float]]:
    low, high = np.nanpercentile(samples, (2.5, 97.5), axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high)]


def _resampled(lines: Sequence[Line], scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Of every list of scores the table of every sample, (lists, samples, entries): overall, then the tasks.

    A task of which a sample holds no question is left out of the sample's overall score.
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
            by_type = np.stack(totals) / counts  # nan where a sample holds no question of a type
            by_task = np.stack([_mean(by_type[..., members]) for members in tasks], -1)
            tables.append(100 * np.concatenate([_mean(by_task)[..., None], by_task], -1))
    return np.concatenate(tables, 1)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, without what is nan; nan where all is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / known.sum(-1)
