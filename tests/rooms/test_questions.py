"""Questions about rooms: their answers are recomputed from points, worlds made by hand, and rows as they are."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from spa3r.rooms import (
    LEVELS,
    QUESTION_TYPES,
    Room,
    RoomObject,
    RoomWalk,
    camera_walk,
    generate_room,
    render,
    room_questions,
)
from spa3r.rooms.furniture import FURNITURE
from spa3r.rooms.questions import _SEEN_FIRST
from spa3r.rooms.render import render_instance_ids

SEEDS = range(8)


def walk_of(room: Room) -> RoomWalk:
    return RoomWalk.from_cameras(room, camera_walk(room, 48)[::6])


@pytest.fixture(scope="module")
def walks() -> list[RoomWalk]:
    return [walk_of(generate_room(seed, level)) for level in (0, 2) for seed in SEEDS]


@pytest.fixture(scope="module")
def asked(walks) -> list[tuple[RoomWalk, dict]]:
    return [(walk, row) for walk in walks for row in room_questions(walk, per_type=4)]


def of_type(asked, prefix: str) -> list[tuple[RoomWalk, dict]]:
    chosen = [(walk, row) for walk, row in asked if row["question_type"].startswith(prefix)]
    assert chosen
    return chosen


def answer_of(row: dict) -> str:
    assert [option[:3] for option in row["options"]] == [f"{letter}. " for letter in "ABCD"[: len(row["options"])]]
    return row["options"]["ABCD".index(row["ground_truth"])][3:]


def thing(walk: RoomWalk, name: str) -> int:
    """The one object that fits the name."""
    fits = [k for k, item in enumerate(walk.room.objects) if name in (item.name, f"{item.color} {item.name}")]
    assert len(fits) == 1, (name, fits)
    return fits[0]


def surface(item: RoomObject, count: int = 41) -> np.ndarray:
    """Points on the outline of an object's box, seen from above."""
    corners = item.footprint()
    steps = np.linspace(0, 1, count)[:, None]
    return np.concatenate([a + (b - a) * steps for a, b in zip(corners, np.roll(corners, -1, axis=0))])


def closest(walk: RoomWalk, one: int, other: int) -> float:
    a, b = surface(walk.room.objects[one]), surface(walk.room.objects[other])
    return float(np.linalg.norm(a[:, None] - b[None], axis=-1).min())


def turn(walk: RoomWalk, at: int, towards: int, target: int) -> float:
    """Degrees, counter-clockwise, from looking at one object to looking at another; -180..180."""
    middle = [np.array(item.center[:2]) for item in walk.room.objects]
    ahead, wanted = middle[towards] - middle[at], middle[target] - middle[at]
    return float(np.degrees(np.arctan2(ahead[0] * wanted[1] - ahead[1] * wanted[0], ahead @ wanted)))


# By definition --------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_room(asked):
    for walk, row in of_type(asked, "object_counting"):
        name = re.fullmatch(r"How many (.+)\(s\) are in this room\?", row["question"])[1]
        seen = [
            share.max() >= 0.004
            for share, item in zip(walk.shares.T, walk.room.objects, strict=True)
            if item.name == name
        ]
        assert all(seen) and row["ground_truth"] == str(len(seen)) and row["options"] is None


def test_distances_are_between_closest_points(asked):
    for walk, row in of_type(asked, "object_abs_distance"):
        pair = re.search(r"between the (.+) and the (.+) \(in meters\)\?", row["question"]).groups()
        distance = closest(walk, *(thing(walk, name) for name in pair))
        assert float(row["ground_truth"]) == pytest.approx(distance, abs=0.051 + 0.03)  # rounded; points lie apart
        assert distance >= 0.5


def test_distances_of_any_pair_agree_with_points(walks):
    for walk in walks[:: len(SEEDS) // 2]:
        for one, other in combinations(range(len(walk.room.objects)), 2):
            assert walk.distances[one, other] == pytest.approx(closest(walk, one, other), abs=0.03)
        np.testing.assert_array_equal(walk.distances, walk.distances.T)


def test_sizes_are_the_longest_dimension_in_centimeters(asked):
    for walk, row in of_type(asked, "object_size"):
        item = walk.room.objects[thing(walk, re.search(r"\) of the (.+), measured", row["question"])[1])]
        assert float(row["ground_truth"]) == pytest.approx(100 * max(item.size), abs=0.5)


def test_room_size_is_the_floor(asked):
    for walk, row in of_type(asked, "room_size"):
        assert float(row["ground_truth"]) == pytest.approx(walk.room.size[0] * walk.room.size[1], abs=0.051)


def test_the_nearest_of_four_is_clearly_nearest(asked):
    for walk, row in of_type(asked, "object_rel_distance"):
        listed, to = re.search(r"these objects \((.+)\) is the closest to the (.+)\?", row["question"]).groups()
        names = listed.split(", ")
        assert names == [option[3:] for option in row["options"]] and len(set(names)) == 4 and to not in names
        distances = {name: closest(walk, thing(walk, name), thing(walk, to)) for name in names}
        nearest, second = sorted(names, key=distances.get)[:2]
        assert answer_of(row) == nearest and distances[second] - distances[nearest] > 0.2


def test_directions_are_those_of_someone_who_stands_there(asked):
    for walk, row in of_type(asked, "object_rel_direction"):
        words = re.match(
            r"If I am standing by the (.+) and facing the (.+), is the (.+?) to (?:the|my) ", row["question"]
        ).groups()
        angle = turn(walk, *(thing(walk, name) for name in words))
        side = "left" if angle > 0 else "right"
        level = row["question_type"].rpartition("_")[2]
        if level == "easy":
            wanted, borders = side, (0, 180)
        elif level == "medium":
            wanted, borders = "back" if abs(angle) >= 135 else side, (0, 135)
        else:
            wanted, borders = f"{'front' if abs(angle) < 90 else 'back'}-{side}", (0, 90, 180)
        assert answer_of(row) == wanted
        assert min(abs(abs(angle) - border) for border in borders) >= 11.9
        assert {option[3:] for option in row["options"]} == {
            "easy": {"left", "right"},
            "medium": {"left", "right", "back"},
            "hard": {"front-left", "front-right", "back-left", "back-right"},
        }[level]


def test_routes_lead_to_their_goal(asked):
    lengths = Counter()
    for walk, row in of_type(asked, "route_planning"):
        start, facing, goal = re.match(
            r"You are a robot beginning at the (.+) facing the (.+?)\. You want to navigate to the (.+?)\. ",
            row["question"],
        ).groups()
        steps = re.findall(r"\d\. (\[please fill in\]|Go forward until the .+?)(?= \d\. |\. You)", row["question"])
        turns, at, ahead = answer_of(row).split(", "), thing(walk, start), thing(walk, facing)
        came_from = None
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if step == "[please fill in]":
                target = thing(walk, following.removeprefix("Go forward until the "))
                if came_from is None:
                    angle = turn(walk, at, ahead, target)
                else:  # who came from somewhere looks away from it
                    angle = (turn(walk, at, came_from, target) + 360) % 360 - 180
                wanted = "Turn Back" if abs(angle) >= 135 else "Turn Left" if angle > 0 else "Turn Right"
                assert turns.pop(0) == wanted and abs(angle) > 30
            else:
                came_from, at = at, thing(walk, step.removeprefix("Go forward until the "))
                way = np.linspace(walk.room.objects[came_from].center[:2], walk.room.objects[at].center[:2], 50)
                others = tuple(item for k, item in enumerate(walk.room.objects) if k not in (came_from, at))
                assert (replace(walk.room, objects=others).clearance(way) > 0).all()
        assert not turns and at == thing(walk, goal)
        lengths[len(steps)] += 1
    assert set(lengths) == {3, 4}  # with one turn, and with two


def test_orders_are_those_of_the_pictures(asked):
    for walk, row in of_type(asked, "obj_appearance_order"):
        listed = re.search(r"in the video: (.+)\?", row["question"])[1].split(", ")
        order = answer_of(row).split(", ")
        assert len(order) in (3, 4) and sorted(order) == sorted(listed)
        assert len(set(row["options"])) == 4
        for earlier, later in pairwise(order):
            first = int((walk.shares[:, thing(walk, earlier)] >= 0.004).argmax())
            assert walk.shares[: first + 1, thing(walk, later)].max() < 0.0004, (
                "not a trace of it when the other is clear"
            )


def test_whatever_is_asked_about_is_seen(asked):
    for walk, row in asked:
        if row["question_type"] not in ("room_size_estimation", "object_counting"):
            mentioned = [k for k, name in enumerate(walk.names) if name and re.search(rf"\b{name}\b", row["question"])]
            assert mentioned and walk.shares[:, mentioned].max(axis=0).min() >= 0.004


# By hand --------------------------------------------------------------------------------------------------------------


def hand_made(*places: tuple[str, str, float, float]) -> RoomWalk:
    """A room of 8 x 8 m with cubes of half a metre; picture i shows object i for the first time."""
    objects = tuple(RoomObject(name, color, (x, y, 0.25), (0.5, 0.5, 0.5), 0.0) for name, color, x, y in places)
    room = replace(generate_room(0), objects=objects, size=(8.0, 8.0, 2.6))
    return RoomWalk(room, np.triu(np.full((len(places), len(places)), 0.1)).T)


def only(walk: RoomWalk, question_type: str, containing: str) -> dict:
    rows = room_questions(walk, types=(question_type,), per_type=100)
    return next(row for row in rows if containing in row["question"])


CROSS = (("sofa", "red", 0.0, -3.0), ("bed", "blue", 0.0, 0.0), ("lamp", "teal", -3.0, 0.0), ("desk", "pink", 3.0, 3.0))
"""Seen from the sofa: the bed straight ahead, the lamp left behind it, the desk right."""


def test_a_hand_made_room_has_the_answers_that_one_sees():
    walk = hand_made(*CROSS)
    distances = room_questions(walk, types=("object_abs_distance",), per_type=100)
    found = {frozenset(re.search(r"the (\w+) and the (\w+)", row["question"]).groups()): row for row in distances}
    assert len(found) == 6 and found[frozenset(("lamp", "bed"))]["ground_truth"] == "2.5"
    row = only(walk, "object_rel_direction_easy", "by the sofa and facing the bed, is the lamp")
    assert answer_of(row) == "left"
    row = only(walk, "object_rel_direction_hard", "by the bed and facing the sofa, is the desk")
    assert answer_of(row) == "back-left"
    row = only(walk, "route_planning", "at the sofa facing the bed. You want to navigate to the lamp")
    assert answer_of(row) == "Turn Left"
    row = only(walk, "obj_appearance_order", "in the video")
    assert answer_of(row) == "sofa, bed, lamp, desk"


def test_objects_get_the_shortest_name_that_fits_one():
    walk = hand_made(("chair", "red", 0, 0), ("chair", "blue", 2, 0), ("bed", "red", -2, 0), ("stool", "red", 0, 2))
    assert walk.names == ["red chair", "blue chair", "bed", "stool"]
    walk = hand_made(("chair", "red", 0, 0), ("chair", "red", 2, 0), ("bed", "red", -2, 0))
    assert walk.names == [None, None, "bed"] and walk.asked.tolist() == [2]


def test_what_is_hidden_is_not_asked_about():
    walk = hand_made(*CROSS)
    shares = walk.shares.copy()
    shares[:, 1] = 0.003  # the bed: too small in every picture
    rows = room_questions(RoomWalk(walk.room, shares), per_type=100)
    assert rows and not [row for row in rows if "bed" in row["question"]]


# Balance --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[dict]:
    """Questions about 300 rooms of which everything is seen, object by object."""
    rows = []
    for seed in range(300):
        room = generate_room(seed, 0)
        count = len(room.objects)
        order = np.random.default_rng(seed).permutation(count)
        rows += room_questions(RoomWalk(room, np.triu(np.full((count, count), 0.1)).T[:, order]))
    return rows


@pytest.mark.parametrize("question_type", [name for name in QUESTION_TYPES if name.startswith("object_rel_direction")])
def test_every_direction_is_as_frequent(many, question_type):
    counts = Counter(answer_of(row) for row in many if row["question_type"] == question_type)
    total, kinds = sum(counts.values()), {"easy": 2, "medium": 3, "hard": 4}[question_type.rpartition("_")[2]]
    assert len(counts) == kinds and total >= 150
    for count in counts.values():
        assert abs(count - total / kinds) < 4 * (total * (1 / kinds) * (1 - 1 / kinds)) ** 0.5, counts


def test_every_letter_is_as_frequent(many):
    places = Counter()
    for row in many:
        if row["options"] and len(row["options"]) == 4:
            places[row["ground_truth"]] += 1
    total = sum(places.values())
    assert total > 400 and set(places) == set("ABCD")
    assert all(abs(count - total / 4) < 4 * (total * 3 / 16) ** 0.5 for count in places.values()), places


@pytest.mark.slow
def test_orders_are_not_told_by_what_is_mostly_seen_first():
    """A table comes before a trash bin in most rooms, but not in most answers."""
    assert set(_SEEN_FIRST) == set(FURNITURE)

    def first_of(name: str) -> float:
        return next(first for kind, first in _SEEN_FIRST.items() if name.endswith(kind))

    likeliest = asked = 0
    for seed in range(150):
        for row in room_questions(walk_of(generate_room(seed)), types=("obj_appearance_order",), per_type=3):
            places = [
                sum(place * first_of(name) for place, name in enumerate(option[3:].split(", ")))
                for option in row["options"]
            ]
            likeliest += places["ABCD".index(row["ground_truth"])] == max(places)
            asked += 1
    assert asked > 60 and 0.1 < likeliest / asked < 0.45, (likeliest, asked)


def test_no_count_prevails(many):
    counts = Counter(row["ground_truth"] for row in many if row["question_type"] == "object_counting")
    assert max(counts.values()) < 0.7 * sum(counts.values())


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_vsi_bench(asked):
    keys = ["id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options"]
    for _, row in asked:
        assert list(row) == keys and row["dataset"] == "rooms" and isinstance(row["ground_truth"], str)
    assert len(QUESTION_TYPES) == 10 and {row["question_type"] for _, row in asked} == set(QUESTION_TYPES)
    rows = [row for walk, row in asked if walk.room.level is LEVELS[0]]
    assert len({row["id"] for row in rows}) == len(rows) == len({(r["scene_name"], r["question"]) for r in rows})


def test_questions_depend_on_nothing_but_walk_and_seed(walks):
    walk = walks[-1]
    rows = room_questions(walk)
    assert room_questions(walk) == rows and room_questions(walk, seed=1) != rows
    assert room_questions(walk, types=("route_planning",)) == [
        r for r in rows if r["question_type"] == "route_planning"
    ]
    more = room_questions(walk, per_type=5)
    assert [row for row in more if row["id"] % 100 == 0] == rows


def test_instance_ids_are_those_of_the_pictures():
    room = generate_room(3, 3)
    cameras = camera_walk(room, 8, (40, 56))[::4]
    views = render(room, cameras)
    np.testing.assert_array_equal(render_instance_ids(room, cameras), views.instance_ids)
    walk = RoomWalk.from_instance_ids(room, views.instance_ids)
    np.testing.assert_array_equal(walk.shares, RoomWalk.from_cameras(room, cameras).shares)
    assert walk.shares[1, 0] == (views.instance_ids[1] == 1).mean()


def test_errors_say_what_was_wanted(walks):
    with pytest.raises(ValueError, match=r"types: wanted names out of object_counting, .* got 'counting'"):
        room_questions(walks[0], types=("counting",))
    with pytest.raises(ValueError, match=r"`per_type` must be a whole number from 1 to 100, got 0"):
        room_questions(walks[0], per_type=0)
    with pytest.raises(ValueError, match="`seed` must be a whole number of at least 0, got -1"):
        room_questions(walks[0], seed=-1)
    with pytest.raises(ValueError, match="are they of another room"):
        RoomWalk.from_instance_ids(walks[0].room, np.full((1, 2, 2), 40))
    with pytest.raises(ValueError, match=r"shares: wanted an array \(views, \d objects\), got \(2, 1\)"):
        RoomWalk(walks[0].room, np.zeros((2, 1)))
