"""VSI-Bench's scores: those of the official code, to the digit, and an answer where that has none."""

import json
import math

import pytest
from tiny import GOLDEN

from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES, is_choice, make_messages
from spa3r.vsi_bench.scoring import aggregate, make_prompt, parse_prediction, score_prediction

OFFICIAL = json.loads((GOLDEN / "vsi_bench_scores.json").read_text(encoding="utf-8"))


def number_row(truth, question_type="room_size_estimation") -> dict:
    return {"question_type": question_type, "question": "How large?", "ground_truth": truth, "options": None}


def choice_row(truth="B", options=("A. left", "B. right"), question_type="route_planning") -> dict:
    return {"question_type": question_type, "question": "Where?", "ground_truth": truth, "options": options}


# As in the official evaluation ----------------------------------------------------------------------------------------


def test_prompts_are_the_official_ones():
    assert {row["doc"]["question_type"] for row in OFFICIAL["rows"]} == {*CHOICE_TYPES, *NUMBER_TYPES}
    assert [make_prompt(row["doc"]) for row in OFFICIAL["rows"]] == [row["prompt"] for row in OFFICIAL["rows"]]


def test_scores_are_the_official_ones():
    ours = [score_prediction(row["doc"], row["prediction"]) for row in OFFICIAL["rows"]]
    assert ours == [row["score"] for row in OFFICIAL["rows"]]


def test_the_aggregate_is_the_official_one():
    ours = aggregate({**row["doc"], "score": row["score"]} for row in OFFICIAL["rows"])
    assert ours == OFFICIAL["aggregate"]
    assert next(iter(ours)) == "overall" and len(ours) == 9


@pytest.mark.parametrize(
    ("prediction", "parsed"),
    [
        *[
            ("B", "B"),
            ("B.", "B"),
            ("B. chair", "B"),
            (" B", ""),
            ("4.5 metres", "4.5"),
            ("4.5\nmetres", "4.5\nmetres"),
        ],
        *[("", ""), ("...", ""), ("2...", "2"), ("2\n", "2"), ("2.\n", "2."), ("(A)", "(A)")],
    ],
)
def test_an_answer_is_read_up_to_its_first_space(prediction, parsed):
    assert parse_prediction(prediction) == parsed


def test_messages_hold_frames_prompt_and_truth():
    row = choice_row(truth="B")
    user, assistant = make_messages(row, ["first", "second"])
    assert user == {
        "role": "user",
        "content": [
            {"type": "image", "image": "first"},
            {"type": "image", "image": "second"},
            {"type": "text", "text": make_prompt(row)},
        ],
    }
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "B"}]}
    assert make_messages(number_row(4.5), [])[1]["content"][0]["text"] == "4.5"


# Beyond it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ("0", 0, 0.0, "0.0"))
def test_a_true_zero_is_scored(truth):
    scores = {prediction: score_prediction(number_row(truth), prediction) for prediction in ("0", "0.", "0.1", "no")}
    assert scores == {"0": 1.0, "0.": 1.0, "0.1": 0.0, "no": 0.0}


@pytest.mark.parametrize("prediction", ("nan", "inf", "-inf", "1e999", "four", "", "4,5", "\x00", "4" * 5000))
def test_what_is_no_finite_number_scores_zero(prediction):
    assert score_prediction(number_row(4.5), prediction) == 0.0


def test_a_threshold_counts_when_it_is_just_reached():
    assert score_prediction(number_row(4.0), "6.0") == pytest.approx(0.1)  # off by 50 %: theta = 0.5 only
    assert score_prediction(number_row(4.0), "2.0") == pytest.approx(0.1)
    assert score_prediction(number_row(4.0), "6.1") == 0.0


def test_the_truth_may_be_a_number():
    assert score_prediction(number_row(4), "4") == score_prediction(number_row("4"), "4") == 1.0


def test_a_truth_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"`ground_truth` of .* room_size_estimation must be a finite number, got 'B'"):
        score_prediction(number_row("B"), "4")
    with pytest.raises(ValueError, match=r"must be a finite number, got 'inf'"):
        score_prediction(number_row("inf"), "inf")


def test_missing_tasks_and_levels_are_left_out_of_the_means():
    rows = [
        {"question_type": "object_rel_direction_easy", "score": 1.0},
        {"question_type": "object_rel_direction_easy", "score": 0.0},
        {"question_type": "object_rel_direction_hard", "score": 1.0},
        {"question_type": "object_counting", "score": 0.25},
    ]
    assert aggregate(rows) == {
        "overall": 50.0,  # of 25 and 75
        "object_counting_MRA:.5:.95:.05": 25.0,
        "object_rel_direction_accuracy": 75.0,  # of 50 and 100
    }
    assert aggregate(rows[2:3]) == {"overall": 100.0, "object_rel_direction_accuracy": 100.0}
    with pytest.raises(ValueError, match=r"`rows_with_scores` must hold at least one scored row, got none"):
        aggregate([])


def test_unknown_types_are_refused_everywhere():
    row = number_row(1, "object_color") | {"score": 1.0}
    calls = (lambda: make_prompt(row), lambda: score_prediction(row, "1"), lambda: aggregate([row]))
    for call in calls:
        with pytest.raises(ValueError, match=r"`question_type` must be a type of VSI-Bench \(.*\), got 'object_color'"):
            call()
    assert is_choice("route_planning") and not is_choice("object_counting")


@pytest.mark.parametrize("options", (None, [], "A. left"))
def test_a_choice_without_options_is_refused(options):
    with pytest.raises(ValueError, match=r"`options` of a question of type route_planning must be a list of choices"):
        make_prompt(choice_row(options=options))


def test_scores_are_plain_numbers():
    assert all(
        type(score) is float for score in (score_prediction(number_row(2), "3"), score_prediction(choice_row(), "b"))
    )
    assert all(
        math.isfinite(value) and type(value) is float for value in aggregate([number_row(1) | {"score": 1}]).values()
    )
