"""Questions in free wording that the rooms recipe does not train on."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions

RECIPE = Path(__file__).parents[2] / "examples" / "rooms"


@pytest.fixture
def free_questions(monkeypatch):
    monkeypatch.syspath_prepend(RECIPE)
    import free_questions

    return free_questions


def test_questions_are_many_and_kept_back(free_questions):
    rows = [json.loads(line) for line in free_questions.QUESTIONS.open()]
    assert len(rows) >= 200 and len({row["question"] for row in rows}) == len(rows)
    assert Counter(row["form"] for row in rows).keys() == free_questions.FORMS.keys()


def test_slots_are_filled_with_what_the_pictures_show(free_questions):
    walk = RoomQuestions(FIRST_TEST_SEED, 1).walk(FIRST_TEST_SEED)
    rng = np.random.default_rng(0)
    for line in free_questions.QUESTIONS.open():
        question = free_questions.fill(json.loads(line)["question"], walk, rng)
        assert question is not None and not re.search("[{}]", question), line
    shown = [walk.names[k] for k in walk.asked]
    named = free_questions.fill("{a}, {b}, {a}", walk, rng).split(", ")
    assert named[0] == named[2] != named[1] and set(named) <= set(shown)
    walk.__dict__["asked"] = walk.asked[:1]
    assert free_questions.fill("{a} and {b}", walk, rng) is None


@pytest.mark.parametrize(
    ("form", "question", "right", "wrong"),
    [
        ("count", "Number of chairs?", ["2", "2."], ["two chairs", "1.5", ""]),
        ("meters", "How far?", ["1.2 meters", "1.2 metres", "3 m"], ["1.2", "120 cm", "no"]),
        ("centimeters", "How big?", ["80 centimeters", "80 cm"], ["80", "0.8 meters"]),
        ("square meters", "Area?", ["20.5 square meters"], ["20.5 meters", "20"]),
        ("nearest", "the red chair or the bed?", ["red chair", "bed."], ["chair, bed", "sofa", "blue chair", "A"]),
        ("direction", "Where?", ["left", "Right", "front-left", "behind"], ["left right", "bed"]),
        ("yes or no", "Is it?", ["Yes.", "no"], ["yes, it is", "1"]),
        ("order", "bed or desk?", ["bed, desk", "desk"], ["bed, sofa", "first"]),
        ("objects", "What?", ["bed, red chair, trash bin"], ["a bed", "2"]),
        ("color", "Which?", ["red"], ["red bed", "1"]),
        ("outside", "Who?", ["I can only answer questions about rooms."], ["no", "i can only"]),
    ],
)
def test_forms_of_answers(free_questions, form, question, right, wrong):
    assert all(free_questions.has_form(form, question, answer) for answer in right)
    assert not any(free_questions.has_form(form, question, answer) for answer in wrong)
