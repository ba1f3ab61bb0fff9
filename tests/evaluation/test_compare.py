"""Two runs side by side, and how sure their scores are."""

from pathlib import Path

import numpy as np
import pytest
from tiny_benchmark import make_rows

from spa3r.evaluation import EvaluationRun, aggregate, compare_runs
from spa3r.vsi_bench.intervals import difference_intervals, score_intervals

CONDITIONS = {
    "settings": {"num_frames": 32},
    "model": {"weights_sha256": "a", "dtype": {}, "attention": {"vlm": {"text": "sdpa"}}, "image_processor": {}},
    "environments": [{"device": "cpu", "python": "3.12.1", "packages": {"torch": "2.10.0", "pip": "25"}}],
}


def run(scores, name: str = "run", rows=None, **conditions) -> EvaluationRun:
    """A run of given scores."""
    rows = make_rows() if rows is None else rows
    lines = [row | {"prediction": f"said {score}", "score": score} for row, score in zip(rows, scores, strict=True)]
    return EvaluationRun(Path(name), CONDITIONS | conditions, lines)


def many(scenes: int, seed: int = 0) -> list[dict]:
    """Lines of a larger run, each scene with a level of its own."""
    rows, generator = make_rows((3,) * scenes), np.random.default_rng(seed)
    levels = generator.uniform(0.2, 0.8, scenes)
    scene = [int(row["scene_name"].removeprefix("scene")) for row in rows]
    return [row | {"score": float(generator.uniform() < levels[i])} for row, i in zip(rows, scene)]


# Intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scenes_drawn_anew():
    """Against the plain form: draw scenes, score them with `aggregate`, look at the percentiles."""
    lines, generator = many(40), np.random.default_rng(1)
    by_scene = [[line for line in lines if line["scene_name"] == f"scene{scene}"] for scene in range(40)]
    names, drawn = list(aggregate(lines)), []
    for _ in range(1500):
        table = aggregate([line for scene in generator.integers(40, size=40) for line in by_scene[scene]])
        drawn.append([table.get(name, np.nan) for name in names])
    intervals = score_intervals(lines)
    assert list(intervals) == names
    plain = np.nanpercentile(drawn, (2.5, 97.5), axis=0).T
    spread = plain[:, 1] - plain[:, 0]
    assert (np.abs(np.array(list(intervals.values())) - plain) <= 0.12 * spread[:, None] + 1).all()
    assert all(low <= aggregate(lines)[name] <= high for name, (low, high) in intervals.items())


def test_intervals_shrink_with_scenes_and_are_the_same_every_time():
    few, lots = (score_intervals(many(scenes))["overall"] for scenes in (20, 320))
    assert few[1] - few[0] > 3 * (lots[1] - lots[0]) > 0
    assert score_intervals(many(20))["overall"] == few


def test_a_difference_on_the_same_scenes_is_surer_than_two_scores():
    """Every answer of the second run is a little better: whichever scenes are drawn, it wins."""
    lines = many(40)
    better = [0.5 + line["score"] / 2 for line in lines]
    (low, high), alone = difference_intervals(lines, better)["overall"], score_intervals(lines)["overall"]
    assert 0 < low < high and high - low < alone[1] - alone[0]
    same = difference_intervals(lines, [line["score"] for line in lines])
    assert set(same.values()) == {(0.0, 0.0)}


def test_one_scene_tells_nothing_about_others():
    lines = many(1)
    assert score_intervals(lines)["overall"] == (aggregate(lines)["overall"],) * 2


# Comparison -----------------------------------------------------------------------------------------------------------


def test_scores_differences_and_flips():
    before = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.4, 0.6, 0.9, 0.1, 1.0]
    after = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.6, 0.6, 1.0, 0.5, 1.0]
    compared = compare_runs(run(before, "old"), run(after, "new"))
    assert compared.names == ("old", "new") and compared.left_out == 0 and compared.changed == []
    for name, (a, b) in compared.scores.items():
        assert (a, b) == (aggregate(run(before).answers)[name], aggregate(run(after).answers)[name])
    assert [(flip.first["id"], flip.is_won) for flip in compared.flips] == [(100, False), (101, True), (106, True)]
    assert compared.counts["overall"] == 11 and sum(compared.counts.values()) == 22
    told = compared.to_dict()
    assert told["flips"][1]["a"] == "said 0.0" and told["flips"][1]["score_b"] == 1.0
    assert told["scores"]["overall"]["difference"] == pytest.approx(np.subtract(*compared.scores["overall"][::-1]))
    last = [cell.strip() for cell in compared.table().splitlines()[-1].strip("|").split("|")]
    a, b = compared.scores["overall"]
    assert last[:5] == ["overall", "11", f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"]


def test_what_has_no_score_in_both_is_left_out_and_counted():
    rows = make_rows()
    first = run([1.0] * 10 + [None], rows=rows)
    second = run([0.0] * 9, rows=rows[2:])
    compared = compare_runs(first, second)
    assert compared.left_out == 3 and compared.counts["overall"] == len(compared.flips) == 8


def test_what_else_differs_is_named():
    model = CONDITIONS["model"] | {"attention": {"vlm": {"text": "eager"}}}
    environment = {"device": "cpu", "python": "3.12.1", "packages": {"torch": "2.11.0", "pip": "26"}}
    other = run([0.0] * 11, settings={"num_frames": 16}, model=model, environments=[environment])
    assert compare_runs(run([0.0] * 11), other).changed == [
        "settings.num_frames was 32 and is 16",
        'model.attention.vlm.text was "sdpa" and is "eager"',
        'packages.torch was "2.10.0" and is "2.11.0"',
    ]


def test_runs_of_different_questions_are_refused():
    rows = make_rows()
    rows[3] = rows[3] | {"question": "Another one?"}
    with pytest.raises(ValueError, match=r"question 103 differs in question: 'What of thing 3\?' and 'Another one\?'"):
        compare_runs(run([0.0] * 11), run([0.0] * 11, rows=rows))
    elsewhere = [row | {"id": row["id"] + 50} for row in make_rows()]
    with pytest.raises(ValueError, match=r"must have scored questions in common, and a and b have none"):
        compare_runs(run([0.0] * 11, "a"), run([0.0] * 11, "b", rows=elsewhere))
