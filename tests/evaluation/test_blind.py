"""Answers without looking: what each way knows, and that it knows no more."""

from __future__ import annotations

import numpy as np
import pytest

from spa3r.evaluation import blind_answers, blind_scores

COUNT = "How many chair(s) are in this room?"


def number(truth: str, question: str = COUNT, question_type: str = "object_counting") -> dict:
    return {"question_type": question_type, "question": question, "ground_truth": truth, "options": None}


def size(truth: str, name: str) -> dict:
    words = f"What is the length of the longest dimension of the {name}, measured in centimeters?"
    return number(truth, words, "object_size_estimation")


def choice(truth: str, *options: str, question_type: str = "object_rel_direction_easy") -> dict:
    listed = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    return {"question_type": question_type, "question": "Where?", "ground_truth": truth, "options": listed}


def test_the_most_frequent_answer_of_each_type():
    training = [number("2"), number("2"), number("9"), choice("B", "left", "right"), choice("A", "left", "right")]
    assert blind_answers(training, [number("7"), choice("B", "x", "y")]) == ["2", "A"]  # of equals the first
    scores = blind_scores(training, [number("2"), number("7"), choice("B", "x", "y")])
    assert scores["object_counting_MRA:.5:.95:.05"] == 50 and scores["object_rel_direction_accuracy"] == 0


def test_the_best_constant_scores_best():
    training = [number(str(truth), question_type="room_size_estimation") for truth in (10, 10, 18, 20, 22, 24)]
    assert blind_answers(training, training[:1], "most_frequent") == ["10"]
    (best,) = blind_answers(training, training[:1], "best_constant")
    scores = blind_scores(training, training, "best_constant")["overall"]
    assert best in ("18", "20") and scores > blind_scores(training, training)["overall"]
    for truth in (10, 18, 20, 22, 24):  # as good as any other
        constant = [number(str(truth), question_type="room_size_estimation")]
        assert scores >= blind_scores(constant, training)["overall"]


def test_words_tell_what_a_thing_is_but_not_its_color():
    training = [size("200", "bed")] * 5 + [size("30", "red stool"), size("30", "blue stool")] * 3
    training += [size("90", "lamp")] * 4  # too few to rely on
    asked = [size("?", "bed"), size("?", "green stool"), size("?", "lamp"), size("?", "sofa")]
    answers = blind_answers(training, asked, "question")
    assert answers[:2] == ["200", "30"] and answers[2] == answers[3]


def test_words_tell_which_option_is_often_right():
    training = [choice("A", "left", "right"), choice("B", "right", "left")] * 10 + [choice("A", "right", "left")]
    asked = [choice("?", "right", "left"), choice("?", "left", "right")]
    assert blind_answers(training, asked, "question") == ["B", "A"]
    assert blind_answers(training, asked, "most_frequent") == ["A", "A"]
    kind = "obj_appearance_order"
    training = [choice("B", "red lamp, bed", "bed, red lamp", question_type=kind)] * 5
    asked = [choice("?", "bed, sofa", "sofa, bed", question_type=kind)]
    assert blind_answers(training, asked, "question") == ["A"], "what often comes first, in an order never offered"


@pytest.mark.parametrize("method", ["most_frequent", "best_constant", "question"])
def test_even_answers_give_chance(method):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4000):
        options = [str(option) for option in rng.permutation(list("wxyz"))]
        rows.append(choice("ABCD"[rng.integers(4)], *options, question_type="route_planning"))
    assert blind_scores(rows[:2000], rows[2000:], method)["overall"] == pytest.approx(25, abs=4)


@pytest.mark.parametrize("method", ["most_frequent", "best_constant", "question"])
def test_answers_of_the_test_are_not_read(method):
    rows = [number("1"), number("2"), number("2"), choice("A", "left", "right")] * 3
    hidden = [row | {"ground_truth": None} for row in rows]
    assert blind_answers(rows, hidden, method) == blind_answers(rows, rows, method)


def test_errors_say_what_was_wanted():
    with pytest.raises(ValueError, match=r'`method` must be "most_frequent", .* got \'mean\''):
        blind_answers([number("1")], [number("1")], "mean")
    with pytest.raises(ValueError, match="`training_rows` must hold every type of `test_rows`, got none of route_pl"):
        blind_answers([number("1")], [choice("A", "x", "y", question_type="route_planning")])
