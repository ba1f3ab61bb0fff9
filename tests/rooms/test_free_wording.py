"""Questions in free wording that the rooms recipe trains on: true answers, and none that is kept back."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from spa3r.rooms import COLORS, FURNITURE
from spa3r.rooms.instructions import RoomQuestions

RECIPE = Path(__file__).parents[2] / "examples" / "rooms"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(RECIPE)
    import free_questions
    import free_wording as wording


def normalized(question: str) -> str:
    """A question without what templates and held-back questions fill in or spell in their own way."""
    question = re.sub(r"\bcm\b", "centimeters", question.lower())
    question = re.sub(rf"\b(\d+|{'|'.join(wording.NUMBERS[1:])}|fifteen|twenty)( (centi)?meters?)?\b", "{n}", question)
    return " ".join(re.sub("[^a-z{} ]", "", re.sub("{[a-z]+}", "{}", question)).split())


def test_templates_are_many_and_none_is_kept_back():
    held_back = {normalized(json.loads(line)["question"]) for line in free_questions.QUESTIONS.open()}
    assert len(held_back) > 195 and normalized("Are there 3 {as}?") == normalized("are there three {bs}")
    assert wording.TEMPLATES.keys() == free_questions.FORMS.keys()
    for form, groups in wording.TEMPLATES.items():
        templates = [template for group in groups for template in group]
        assert len(templates) == len(set(templates)) >= 30, form
        begun = [opening + template for opening in ("", *wording.OPENINGS) for template in templates]
        assert not [template for template in begun if normalized(template) in held_back], form


def free(seed: int) -> tuple[wording.FreeQuestions, np.ndarray]:
    """Questions about a room, and its objects in the axes of the first camera: right, down, ahead."""
    questions = RoomQuestions(seed, 1)
    walk = questions.walk(seed)
    first = questions._cameras(walk.room).extrinsics[0].astype(float)
    middles = np.array([item.center for item in walk.room.objects])
    seen = middles @ first[:3, :3].T + first[:3, 3]
    return wording.FreeQuestions(walk, seen[:, [0, 2]], np.random.default_rng(seed)), seen


def test_answers_have_the_form_of_their_question():
    for seed in range(3):
        questions, _ = free(seed)
        for form in wording.TEMPLATES:
            make = getattr(questions, form.replace(" ", "_"))
            turns = [turn for turn in (make() for _ in range(60)) if turn is not None]
            assert len(turns) >= 10, form
            for question, answer in turns:
                assert not re.search("[{}]", question)
                assert free_questions.has_form(form, question, answer), (question, answer)
                assert form == "outside" or not free_questions.has_form("outside", question, answer)


def test_forms_are_drawn_as_often_as_planned():
    questions, _ = free(0)
    turns = list(islice(questions, 600))
    refused = np.mean([answer == wording.REFUSAL for _, answer in turns])
    judged = np.mean([answer in ("yes", "no") for _, answer in turns])
    assert 0.15 < refused < 0.3 and 0.15 < judged < 0.3
    assert 0.4 < np.mean([answer == "yes" for _, answer in turns if answer in ("yes", "no")]) < 0.6
    assert any(question.startswith(wording.OPENINGS) for question, _ in turns)
    assert any(question[0].islower() for question, _ in turns)
    assert [turn for turn, _ in zip(free(0)[0], range(20))] == turns[:20], "the same seed gives the same questions"


@pytest.mark.slow
def test_answers_are_true():
    checked = sum((check_answers(seed) for seed in range(6)), Counter())
    assert min(checked.values()) >= 5 and len(checked) == 27, checked


def check_answers(seed: int) -> Counter:
    """Check the answers about a room, each by its own rule. Return how many questions of each kind were checked."""
    checked: Counter = Counter()
    questions, seen = free(seed)
    objects, names = questions.walk.room.objects, questions.walk.names
    edges = []
    for item in objects:  # points around each footprint
        corners = item.footprint()
        steps = np.linspace(0, 1, 41)[:, None, None]
        edges.append((corners * (1 - steps) + np.roll(corners, 1, 0) * steps).reshape(-1, 2))

    def away(one: int, other: int) -> float:
        return np.linalg.norm(edges[one][:, None] - edges[other], axis=-1).min()

    def number(name: str) -> int:
        kind = name.replace("bookshelves", "bookshelfs").removesuffix("s")
        return sum(kind in (item.name, f"{item.color} {item.name}") for item in objects)

    def check(make, templates, is_right) -> None:
        """Every answer of a method to one of the templates is what the slots of the question ask for."""
        found = 0
        for turn in filter(None, (make() for _ in range(120))):
            matched = (re.fullmatch(as_pattern(template), turn[0]) for template in templates)
            if slots := next((match.groupdict() for match in matched if match), None):
                known = {k: names.index(v) for k, v in slots.items() if k in list("abcd") and v in names}
                assert is_right(slots, known, turn[1]), turn
                found += 1
        checked[templates[0]] += found

    check(questions.count, wording.COUNT, lambda s, k, told: int(told) == number(s["as"]))
    check(
        questions.meters,
        wording.METERS,
        lambda s, k, told: abs(float(told.split()[0]) - away(k["a"], k["b"])) < 0.08,
    )
    check(questions.centimeters, wording.CENTIMETERS,
          lambda s, k, told: told == f"{100 * max(objects[k['a']].size):.0f} centimeters")  # fmt: skip
    check(questions.nearest, wording.NEAREST, lambda s, k, told: told == names[
        min((k[slot] for slot in "abc" if slot in k), key=lambda other: away(other, k["d"]))])  # fmt: skip

    def turns_to(s, k, told) -> bool:
        stand, facing, target = (np.array(objects[k[slot]].center)[:2] for slot in "abc")
        ahead, there = facing - stand, target - stand
        if told == "behind":
            return ahead @ there < 0
        return (ahead[0] * there[1] - ahead[1] * there[0] > 0) == (told == "left")

    check(questions.direction, wording.DIRECTION, turns_to)
    check(questions.color, wording.COLOR, lambda s, k, told: told == objects[k["a"]].color)
    first = questions.walk.first_clear
    check(
        questions.order,
        wording.FIRST,
        lambda s, k, told: first[names.index(told)] == min(first[i] for i in k.values()),
    )
    check(
        questions.order,
        wording.ORDER,
        lambda s, k, told: (np.diff([first[names.index(n)] for n in told.split(", ")]) > 0).all(),
    )
    check(questions.is_there, wording.IS_THERE, lambda s, k, told: told == (number(s.get("as") or s["a"]) > 0))
    check(questions.is_there, wording.IS_THERE_COLORED,
          lambda s, k, told: told == any((i.name, i.color) == (s["a"], s["color"]) for i in objects))  # fmt: skip
    check(questions.is_beside, wording.IS_LEFT, lambda s, k, told: told == (seen[k["a"], 0] < seen[k["b"], 0]))
    check(questions.is_beside, wording.IS_RIGHT, lambda s, k, told: told == (seen[k["a"], 0] > seen[k["b"], 0]))
    check(questions.is_closer, wording.IS_CLOSER_TO[:-1],
          lambda s, k, told: told == (away(k["a"], k["b"]) < away(k["a"], k["c"])))  # fmt: skip
    check(questions.is_closer, wording.IS_CLOSER_THAN[:3],
          lambda s, k, told: told == (away(k["a"], k["b"]) < away(k["c"], k["b"])))  # fmt: skip
    length = [max(item.size) for item in objects]
    check(questions.is_bigger, wording.IS_BIGGER, lambda s, k, told: told == (length[k["a"]] > length[k["b"]]))
    check(questions.is_bigger, wording.IS_SMALLER, lambda s, k, told: told == (length[k["a"]] < length[k["b"]]))
    check(questions.is_apart, wording.IS_APART, lambda s, k, told: told == (away(k["a"], k["b"]) > meters(s["n"])))
    check(questions.is_apart, wording.IS_WITHIN, lambda s, k, told: told == (away(k["a"], k["b"]) < meters(s["n"])))
    check(questions.is_near, wording.IS_FAR, lambda s, k, told: told == (away(k["a"], k["b"]) > 3))
    check(questions.is_near, wording.IS_NEAR, lambda s, k, told: told == (away(k["a"], k["b"]) < 1))
    check(questions.are_more, wording.MORE_THAN, lambda s, k, told: told == (number(s["as"]) > number(s["bs"])))
    check(
        questions.are_more,
        wording.AT_LEAST,
        lambda s, k, told: told == (number(s["as"]) >= wording.NUMBERS.index(s["n"])),
    )
    check(questions.are_more, wording.SEVERAL, lambda s, k, told: told == (number(s.get("as") or s["a"]) > 1))
    check(questions.are_more, wording.EXACTLY_ONE, lambda s, k, told: told == (number(s["a"]) == 1))
    check(questions.is_colored, wording.IS_COLOR, lambda s, k, told: told == (objects[k["a"]].color == s["color"]))
    area = np.prod(questions.walk.room.size[:2])
    check(questions.is_larger, wording.IS_ROOM_LARGER, lambda s, k, told: told == (area > float(s["n"])))
    check(questions.is_larger, wording.IS_LONGER_THAN, lambda s, k, told: told == (length[k["a"]] > meters(s["n"])))
    assert all(told == f"{area:.1f} square meters" for _, told in (questions.square_meters() for _ in range(3)))
    (kinds,) = {told for _, told in (questions.objects() for _ in range(5))}
    assert set(kinds.split(", ")) == {objects[k].name for k in np.flatnonzero(first < len(questions.walk.shares))}
    return checked


def as_pattern(template: str) -> str:
    name = rf"(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(FURNITURE)})"
    kinds = "|".join(map(wording.plural, FURNITURE))
    slots = {"as": kinds, "bs": kinds, "color": "[a-z]+", "n": "[a-z0-9.]+(?: (?:centi)?meters?)?"}
    return re.sub(r"\\{([a-z]+)\\}", lambda match: f"(?P<{match[1]}>{slots.get(match[1], name)})", re.escape(template))


def meters(told: str) -> float:
    amount, unit = told.split()
    return (wording.NUMBERS.index(amount) if amount in wording.NUMBERS else float(amount)) / (
        100 if unit.startswith("centi") else 1
    )
