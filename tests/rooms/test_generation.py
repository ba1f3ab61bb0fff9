"""Rooms: drawn from a seed alone, and possible as real rooms."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from spa3r.rooms import COLORS, FURNITURE, LEVELS, Finish, Room, RoomLevel, RoomObject, generate_room
from spa3r.rooms.finishes import PATTERNS

SEEDS = range(40)


def outline(item: RoomObject) -> np.ndarray:
    """Points (N, 2) along the four sides of an object's footprint, 2 cm apart or less."""
    corners = item.footprint()
    t = np.linspace(0, 1, 120)[:, None]
    return np.concatenate([a + t * (b - a) for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)])


def inside(points: np.ndarray, item: RoomObject, margin: float) -> np.ndarray:
    """Whether points (N, 2) lie in the footprint grown by a margin."""
    local = (points - np.array(item.center[:2])) @ item.rotation[:2, :2]
    return (np.abs(local) < np.array(item.size[:2]) / 2 + margin).all(axis=1)


def test_same_seed_same_room_in_any_order():
    first = [generate_room(seed, level=2) for seed in (4, 5)]
    np.random.default_rng().random(10)
    again = [generate_room(seed, level=2) for seed in (5, 4)][::-1]
    assert first == again
    assert first[0] != first[1]
    assert generate_room(np.int64(4), 2) == first[0]


def test_levels_differ_and_grow():
    rooms = [[generate_room(seed, level) for seed in SEEDS] for level in range(len(LEVELS))]
    counts = [np.mean([len(room.objects) for room in of_level]) for of_level in rooms]
    assert counts == sorted(counts) and counts[-1] > 2 * counts[0]
    plain = [{finish.pattern for room in of_level for finish in room.walls} for of_level in rooms]
    assert plain[0] == plain[1] == {"plain"} and len(plain[3]) >= 4
    walls = [{tuple(finish.rgb for finish in room.walls) for room in of_level} for of_level in rooms]
    assert len(walls[0]) == 1 and all(len(drawn) > 5 for drawn in walls[1:])
    assert len({room.floor for room in rooms[0]}) == 1 and len({room.floor for room in rooms[3]}) >= 5
    aspects = [max(room.size[0] / room.size[1] for room in of_level) for of_level in rooms]
    assert aspects[3] > aspects[0]
    quarter_turns = [[item.yaw / (np.pi / 2) for room in of_level for item in room.objects] for of_level in rooms]
    assert np.allclose(quarter_turns[0], np.round(quarter_turns[0]))
    assert not np.allclose(quarter_turns[1], np.round(quarter_turns[1]))


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_objects_stand_on_the_floor_inside_the_walls_apart_from_one_another(level):
    for seed in SEEDS:
        room = generate_room(seed, level)
        lowest, highest = room.level.num_objects
        assert lowest <= len(room.objects) <= highest
        for item in room.objects:
            assert item.center[2] == item.size[2] / 2
            assert item.size[2] < room.size[2]
            assert (np.abs(item.footprint()) < np.array(room.size[:2]) / 2).all()
            assert -np.pi <= item.yaw < np.pi
            low, high = np.array(FURNITURE[item.name].smallest), np.array(FURNITURE[item.name].largest)
            assert (item.size >= low - 1e-9).all() and (item.size <= high + 1e-9).all()
        for a, b in combinations(room.objects, 2):
            assert not inside(outline(a), b, margin=0.07).any(), (seed, a, b)
            assert not inside(outline(b), a, margin=0.07).any(), (seed, a, b)


def test_free_standing_objects_leave_a_passage_all_around():
    for seed in SEEDS:
        room = generate_room(seed, level=3)
        for k, item in enumerate(room.objects):
            if not FURNITURE[item.name].at_wall:
                others = dataclasses.replace(room, objects=room.objects[:k] + room.objects[k + 1 :])
                assert others.clearance(outline(item)).min() >= 0.8 - 1e-9


def test_the_door_stays_free():
    for seed in SEEDS:
        room = generate_room(seed, level=3)
        door = room.fixtures[0]
        t = np.linspace(-0.5, 0.5, 30) * door.size[0]
        inwards = room.size[door.wall % 2] / 2 - 0.4
        side = -1 if door.wall < 2 else 1
        along_axis = 1 - door.wall % 2
        points = np.zeros((30, 2))
        points[:, door.wall % 2] = side * inwards
        # Along a wall, x or y grows with the yaw of what leans on it.
        direction = {0: 1, 1: -1, 2: -1, 3: 1}[door.wall]
        points[:, along_axis] = direction * (door.along + t)
        assert (room.clearance(points) > 0.07).all()  # a neighbor along the same wall may be 0.08 m beside it


@pytest.mark.parametrize("name", FURNITURE)
@pytest.mark.parametrize("extreme", ["smallest", "largest"])
def test_meshes_fill_their_box_exactly(name, extreme):
    size = getattr(FURNITURE[name], extreme)
    item = RoomObject(name, "red", (0.0, 0.0, size[2] / 2), size, 0.3)
    points = np.concatenate([part.triangles.reshape(-1, 3) for part in item.parts()])
    w, d, h = size
    np.testing.assert_allclose(points.min(axis=0), [-w / 2, -d / 2, 0], atol=1e-9)
    np.testing.assert_allclose(points.max(axis=0), [w / 2, d / 2, h], atol=1e-9)
    assert any(part.finish.rgb == COLORS["red"] for part in item.parts())


def test_classes_are_many_and_made_of_several_parts():
    assert len(FURNITURE) >= 10 and len(COLORS) >= 8
    for name in FURNITURE:
        assert len(RoomObject(name, "red", (0, 0, 0), FURNITURE[name].smallest, 0.0).parts()) >= 2, name


def test_patterns_stay_between_nothing_and_full_darkness():
    u, v = np.random.default_rng(0).uniform(-20, 20, (2, 5000))
    for name, darkness in PATTERNS.items():
        values = darkness(u, v)
        assert values.shape == u.shape and values.min() >= 0 and values.max() <= 1, name
        assert name == "plain" or values.std() > 0.05, name


def test_clearance_is_the_distance_to_the_nearest_thing():
    item = RoomObject("table", "red", (1.0, 0.0, 0.4), (1.0, 0.6, 0.8), np.pi / 2)
    room = dataclasses.replace(generate_room(0), size=(6.0, 5.0, 2.6), objects=(item,))
    points = np.array([[1.0, 0.0], [1.0, 0.7], [0.0, 0.0], [1.0 + 0.3 + 0.3, 0.5 + 0.4], [-2.9, 0.0], [3.5, 0.0]])
    np.testing.assert_allclose(room.clearance(points), [-0.3, 0.2, 0.7, 0.5, 0.1, -0.5], atol=1e-12)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_seed_errors(seed):
    with pytest.raises(
        ValueError,
        match=r"^`seed` must be a whole number of at least 0, got .*[.] Pass for example the index of the room",
    ):
        generate_room(seed)


@pytest.mark.parametrize("level", [-1, 4, 1.0, True, "hard"])
def test_level_errors(level):
    with pytest.raises(ValueError, match=r"^level: wanted an int in 0..3 or a RoomLevel, got .*; vary a level with"):
        generate_room(0, level)


def test_a_level_of_ones_own():
    level = dataclasses.replace(LEVELS[0], num_objects=(2, 2))
    room = generate_room(3, level)
    assert isinstance(room, Room) and room.level == level and len(room.objects) == 2
    with pytest.raises(ValueError, match=r"^RoomLevel.pitch: wanted \(lowest, highest\), got \(5.0, -5.0\); put"):
        dataclasses.replace(LEVELS[0], pitch=(5.0, -5.0))
    crowded = dataclasses.replace(LEVELS[3], num_objects=(30, 30), side=(4.0, 4.0))
    with pytest.raises(
        ValueError, match=r"^level.num_objects: wanted at least 30 objects, got places for \d+ in rooms"
    ):
        generate_room(0, crowded)
    assert isinstance(level, RoomLevel)


def test_unknown_class_and_color_errors():
    with pytest.raises(ValueError, match=r"^RoomObject.name: wanted one of bed, sofa, .*, got 'throne'; take a listed"):
        RoomObject("throne", "red", (0, 0, 0.5), (1, 1, 1), 0.0)
    with pytest.raises(ValueError, match=r"^RoomObject.color: wanted one of red, orange, .*, got 'mauve'; take a"):
        RoomObject("chair", "mauve", (0, 0, 0.5), (1, 1, 1), 0.0)
    assert Finish((1.0, 1.0, 1.0)).pattern == "plain"
