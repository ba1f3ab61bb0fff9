"""Questions about rooms with computed answers: the eight tasks of VSI-Bench in its row format and wording.

    room = generate_room(seed=0)
    walk = RoomWalk.from_cameras(room, look_around(room))
    rows = room_questions(walk)

A question refers only to objects that are clearly visible in one of the walk's pictures and have a unique name, and
its answer is far from every border between two answers. For choices the answer is drawn first, uniformly, and then a
question with this answer; if a room has no question for one of the answers, that choice is not asked. Numbers are
drawn so that they are spread out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, pairwise, permutations, product
from typing import Any

import numpy as np

from spa3r.checks import check_count
from spa3r.rooms.render import render_instance_ids
from spa3r.rooms.room import Room
from spa3r.rooms.walk import Cameras

Asked = tuple[str, str, list[str] | None]
"""Question, ground truth and options of a row; None for a number."""

_CLEAR = 0.004  # minimum share of a picture for a clearly visible object: 50 pixels of 112 x 112
_TRACE = 0.0004  # objects that cover less count as invisible: 5 pixels of 112 x 112
_NEAREST_PAIR = 0.5  # meters; smaller distances can hardly be measured in a picture
_APART = 1.0  # meters between the centers of two objects for which a direction is asked
_CLEARLY_NEARER = (1.2, 0.3)  # the second nearest is farther by this factor and by this many meters
_WAY = 0.15  # clearance of a straight path in meters
_LETTERS = "ABCD"
_SEEN_FIRST = {  # index of the first of a walk's eight pictures that shows a class: means of 1 200 rooms of level 0
    **{"table": 0.1, "chair": 0.4, "bed": 0.4, "sofa": 1.1, "stool": 1.1, "refrigerator": 1.4, "desk": 1.5},
    **{"cabinet": 1.5, "bookshelf": 1.8, "washer": 1.8, "television": 1.8, "plant": 1.8, "lamp": 2.9, "trash bin": 4.5},
}
_PLACES = (0.098, 0.148, 0.386, 0.368)  # places that are possible in fewer of those rooms are tried more often
MOST_QUESTIONS = 100
"""Maximum number of questions of a type about a room; their numbers are the last two digits of a row's id."""


@dataclass(frozen=True)
class RoomWalk:
    """A room and what the pictures of a walk show of it.

    Attributes:
        room: The room.
        shares: (V, O): share of the pixels of each picture that each object covers, 0..1.
    """

    room: Room
    shares: np.ndarray

    def __post_init__(self) -> None:
        if np.ndim(self.shares) != 2 or np.shape(self.shares)[1] != len(self.room.objects):
            raise ValueError(
                f"shares: wanted an array (views, {len(self.room.objects)} objects), got {np.shape(self.shares)}; "
                "RoomWalk.from_instance_ids counts them."
            )

    @classmethod
    def from_instance_ids(cls, room: Room, instance_ids: np.ndarray) -> RoomWalk:
        """Create a walk from rendered pictures.

        Args:
            room: The room that was rendered.
            instance_ids: (V, H, W) integers; 0 = background, k = `room.objects[k - 1]`.
        """
        if np.ndim(instance_ids) != 3 or np.max(instance_ids, initial=0) > len(room.objects):
            raise ValueError(
                f"instance_ids: wanted an array (V, H, W) with ids up to {len(room.objects)}, the objects of the room, "
                f"got {np.shape(instance_ids)} up to {np.max(instance_ids, initial=0)}; are they of another room?"
            )
        counts = [np.bincount(view.ravel(), minlength=len(room.objects) + 1)[1:] for view in instance_ids]
        return cls(room, np.array(counts) / np.prod(np.shape(instance_ids)[1:]))

    @classmethod
    def from_cameras(cls, room: Room, cameras: Cameras) -> RoomWalk:
        """Create a walk from the cameras, without rendering pictures."""
        return cls.from_instance_ids(room, render_instance_ids(room, cameras))

    @cached_property
    def first_clear(self) -> np.ndarray:
        """(O,) index of the first picture that clearly shows each object; V: none does."""
        return _first(self.shares >= _CLEAR)

    @cached_property
    def first_trace(self) -> np.ndarray:
        """(O,) index of the first picture that shows any part of each object; V: none does."""
        return _first(self.shares >= _TRACE)

    @cached_property
    def names(self) -> list[str | None]:
        """The name of each object: its class, with its color if there are several of the class; None if the name is
        ambiguous."""
        objects = self.room.objects
        classes = Counter(item.name for item in objects)
        looks = Counter((item.name, item.color) for item in objects)
        return [
            item.name
            if classes[item.name] == 1
            else f"{item.color} {item.name}"
            if looks[item.name, item.color] == 1
            else None
            for item in objects
        ]

    @cached_property
    def asked(self) -> np.ndarray:
        """Numbers of the objects that questions may refer to: clearly visible and named."""
        named = np.array([name is not None for name in self.names])
        return np.flatnonzero((self.first_clear < len(self.shares)) & named)

    @cached_property
    def distances(self) -> np.ndarray:
        """(O, O) meters between the closest points of the boxes of two objects.

        All boxes are upright and stand on the floor, so this is the distance of their footprints; these do not overlap,
        so one of the two points is a corner.
        """
        corners = np.stack([item.footprint() for item in self.room.objects])  # (O, 4, 2)
        nearest = self._to_footprints(corners).min(axis=1)  # (O, O): from the corners of one to the other
        distances = np.minimum(nearest, nearest.T)
        np.fill_diagonal(distances, 0)
        return distances

    @cached_property
    def bearings(self) -> np.ndarray:
        """(O, O) radians, counter-clockwise from x: direction from the center of one object to that of another."""
        x, y = self._middles.T
        return np.arctan2(y[None] - y[:, None], x[None] - x[:, None])

    @cached_property
    def apart(self) -> np.ndarray:
        """(O, O) meters between the centers of two objects, seen from above."""
        return np.linalg.norm(self._middles[:, None] - self._middles[None], axis=-1)

    @cached_property
    def free_ways(self) -> np.ndarray:
        """(O, O) bool: the straight path between the centers of two objects is clear of all others."""
        middles = self._middles
        steps = np.linspace(0, 1, 33)[:, None]
        ways = middles[:, None, None] * (1 - steps) + middles[None, :, None] * steps  # (O, O, 33, 2)
        near = self._to_footprints(ways).min(axis=2) < _WAY  # (O, O, O)
        index = np.arange(len(middles))
        near[index, :, index] = near[:, index, index] = False  # the start and the end of the path
        free = ~near.any(axis=2)
        np.fill_diagonal(free, False)
        return free

    @property
    def _middles(self) -> np.ndarray:
        return np.array([item.center[:2] for item in self.room.objects]).reshape(-1, 2)

    def _to_footprints(self, points: np.ndarray) -> np.ndarray:
        """Distances (..., O) of points (..., 2) to the footprints of all objects; 0 inside."""
        rotation = np.stack([item.rotation[:2, :2] for item in self.room.objects])
        half = np.array([item.size[:2] for item in self.room.objects]) / 2
        local = np.einsum("...oi,oij->...oj", points[..., None, :] - self._middles, rotation)
        return np.linalg.norm(np.maximum(np.abs(local) - half, 0), axis=-1)


def room_questions(
    walk: RoomWalk, seed: int = 0, types: Sequence[str] | None = None, per_type: int = 1
) -> list[dict[str, Any]]:
    """Questions about a room, in the row format of VSI-Bench.

    Args:
        walk: The room and what is visible of it.
        seed: Seed of the questions. The same walk and seed give the same questions for any `types`, and a larger
            `per_type` only adds to them.
        types: Types from `QUESTION_TYPES`; None: all.
        per_type: Maximum number of questions of each type; a room and its pictures may allow fewer.

    Returns:
        Rows ``{id, dataset, scene_name, question_type, question, ground_truth, options}`` in the order of `types`:
        ``id`` an int, ``ground_truth`` a string (a number, or a letter), ``options`` a list such as ``["A. left",
        ...]`` or None.
    """
    check_count("seed", seed, 0)
    types = QUESTION_TYPES if types is None else types
    unknown = [name for name in types if name not in _ASK]
    if unknown:
        raise ValueError(f"types: wanted names out of {', '.join(_ASK)}, got {unknown[0]!r}; take a listed one.")
    check_count("per_type", per_type, 1, MOST_QUESTIONS, "Ask for at least one.")
    rows = []
    for question_type in types:
        number = QUESTION_TYPES.index(question_type)
        rng = np.random.default_rng([walk.room.seed, 2, seed, number])
        for k, (question, truth, options) in enumerate(islice(_ASK[question_type](walk, rng), per_type)):
            rows.append(
                {
                    "id": (walk.room.seed * len(QUESTION_TYPES) + number) * MOST_QUESTIONS + k,
                    "dataset": "rooms",
                    "scene_name": f"{walk.room.seed:07d}",
                    "question_type": question_type,
                    "question": question,
                    "ground_truth": truth,
                    "options": options,
                }
            )
    return rows


# Numbers --------------------------------------------------------------------------------------------------------------


def _count(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    seen = walk.first_clear < len(walk.shares)
    counts = Counter(item.name for item in walk.room.objects)
    hidden = {item.name for item, is_seen in zip(walk.room.objects, seen) if not is_seen}
    single = sorted(name for name in counts.keys() - hidden if counts[name] == 1)
    several = sorted(name for name in counts.keys() - hidden if counts[name] > 1)
    # Most classes occur once, a few twice, hardly any more often. To keep the answers balanced, rooms without any
    # class twice are mostly left out, and counts above 1 come first in most others.
    order = []
    if single and rng.random() < (0.3 if several else 0.2):
        order = [str(rng.choice(single))]
    while several:
        weights = np.array([float(counts[name] ** 3) for name in several])
        order.append(several.pop(int(rng.choice(len(several), p=weights / weights.sum()))))
    for name in order:
        yield f"How many {name}(s) are in this room?", str(counts[name]), None


def _absolute_distance(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    pairs = [pair for pair in combinations(walk.asked, 2) if walk.distances[pair] >= _NEAREST_PAIR]
    for i in _spread(rng, [walk.distances[pair] for pair in pairs]):
        first, second = (walk.names[k] for k in rng.permutation(pairs[i]))
        yield (
            "Measuring from the closest point of each object, what is the distance between the "
            f"{first} and the {second} (in meters)?",
            f"{walk.distances[pairs[i]]:.1f}",
            None,
        )


def _object_size(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    sizes = [max(walk.room.objects[k].size) for k in walk.asked]
    for i in _spread(rng, sizes):
        yield (
            "What is the length of the longest dimension (length, width, or height) of the "
            f"{walk.names[walk.asked[i]]}, measured in centimeters?",
            str(round(100 * sizes[i])),
            None,
        )


def _room_size(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    length, width, _ = walk.room.size
    yield (
        "What is the size of this room (in square meters)? "
        "If multiple rooms are shown, estimate the size of the combined space.",
        f"{length * width:.1f}",
        None,
    )


def _spread(rng: np.random.Generator, values: Sequence[float]) -> Iterator[int]:
    """All indices, in an order in which small and large values are about equally frequent.

    Errors are relative to the truth, so a value is drawn uniformly on a logarithmic scale and the nearest one is taken.
    """
    logs = np.log(np.array(values, float))
    left = list(range(len(logs)))
    while left:
        wanted = rng.uniform(logs.min(), logs.max())
        yield left.pop(int(np.argmin(np.abs(logs[left] - wanted))))


# Choices --------------------------------------------------------------------------------------------------------------


def _relative_distance(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    factor, margin = _CLEARLY_NEARER

    def farther(answer: int, to: int) -> list[int]:
        """Objects that are clearly farther away than the answer."""
        limit = max(factor * walk.distances[answer, to], walk.distances[answer, to] + margin)
        return [k for k in walk.asked if k not in (answer, to) and walk.distances[k, to] >= limit]

    found = {
        answer: [to for to in walk.asked if to != answer and len(farther(answer, to)) >= 3] for answer in walk.asked
    }
    for answer, to in _balanced(rng, {answer: anchors for answer, anchors in found.items() if anchors}):
        others = rng.permutation(farther(answer, to))[:3]
        options, truth = _options(rng, walk.names[answer], [walk.names[k] for k in others])
        listed = ", ".join(option[3:] for option in options)
        yield (
            f"Measuring from the closest point of each object, which of these objects ({listed}) "
            f"is the closest to the {walk.names[to]}?",
            truth,
            options,
        )


Sector = tuple[float, float]
"""Lowest and highest angle, degrees, counter-clockwise from the viewing direction."""

# Far from the borders between two answers, which are at 0, 90 and 180 degrees (easy, hard) or at 135 (medium).
_EASY: dict[str, Sector] = {"left": (15, 165), "right": (-165, -15)}
_MEDIUM: dict[str, Sector] = {"left": (35, 115), "right": (-115, -35), "back": (147, 213)}
_HARD: dict[str, Sector] = {
    "front-left": (15, 75),
    "front-right": (-75, -15),
    "back-left": (105, 165),
    "back-right": (-165, -105),
}


def _in_sector(walk: RoomWalk, sector: Sector) -> np.ndarray:
    """(O, O, O) bool: from a, facing b, c is in the sector; all are far enough apart and may be asked about."""
    low, high = np.radians(sector)
    angle = walk.bearings[:, None, :] - walk.bearings[:, :, None]
    inside = (angle - low) % (2 * np.pi) <= high - low
    far = (walk.apart >= _APART) & np.isin(np.arange(len(walk.apart)), walk.asked)
    far &= far.T  # both are asked about
    return inside & far[:, :, None] & far[:, None, :] & far[None]


def _directions(sectors: dict[str, Sector], wording: str) -> Callable[[RoomWalk, np.random.Generator], Iterator[Asked]]:
    def ask(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
        found = {answer: np.argwhere(_in_sector(walk, sector)) for answer, sector in sectors.items()}
        for answer, (stand, facing, target) in _balanced(rng, found):
            options, truth = _options(rng, answer, [other for other in sectors if other != answer])
            names = {"stand": walk.names[stand], "facing": walk.names[facing], "target": walk.names[target]}
            yield wording.format(**names), truth, options

    return ask


_TURNS: dict[str, Sector] = {"Turn Left": (35, 115), "Turn Right": (-115, -35), "Turn Back": (147, 213)}


def _route(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    """Routes with one turn and with two, in random order; when one kind is used up, the other."""
    kinds = [_route_of_one_turn(walk, rng), _route_of_two_turns(walk, rng)]
    while kinds:
        kind = kinds[int(rng.integers(len(kinds)))]
        asked = next(kind, None)
        if asked is None:
            kinds.remove(kind)
        else:
            yield asked


def _turns_on_ways(walk: RoomWalk) -> dict[str, np.ndarray]:
    """(O, O, O) bool for each turn: going from a to b requires this turn towards c, and all paths are free."""
    reverse = {}
    for turn, sector in _TURNS.items():
        # On arrival at b the view is away from a: half a turn from facing a.
        behind = _in_sector(walk, (sector[0] + 180, sector[1] + 180))  # [b, a, c]
        reverse[turn] = behind.transpose(1, 0, 2) & walk.free_ways[:, :, None] & walk.free_ways[None]
    return reverse


def _route_of_one_turn(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    found = {turn: np.argwhere(possible) for turn, possible in _turns_on_ways(walk).items()}
    names = walk.names
    for turn, (start, middle, goal) in _balanced(rng, found):
        steps = [f"Go forward until the {names[middle]}", None, f"Go forward until the {names[goal]}"]
        yield _route_question(walk, rng, start, middle, goal, steps, turn, [other for other in found if other != turn])


def _route_of_two_turns(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    first = {turn: _in_sector(walk, sector) for turn, sector in _TURNS.items()}  # [start, facing, middle]
    second = _turns_on_ways(walk)  # [start, middle, goal]
    index = np.arange(len(walk.names))
    found = {}
    for turns in product(_TURNS, repeat=2):
        possible = first[turns[0]][..., None] & second[turns[1]][:, None]  # [start, facing, middle, goal]
        possible &= index[:, None, None] != index  # otherwise the goal would be given away
        found[", ".join(turns)] = np.argwhere(possible)
    possible = [turns for turns in found if len(found[turns])]
    if len(possible) < len(_LETTERS):
        return
    # Each of the four options is true for some route here: none can be ruled out because such routes are rare.
    options = [str(turns) for turns in rng.permutation(possible)[: len(_LETTERS)]]
    names = walk.names
    for turns, (start, facing, middle, goal) in _balanced(rng, {turns: found[turns] for turns in options}):
        steps = [None, f"Go forward until the {names[middle]}", None, f"Go forward until the {names[goal]}"]
        yield _route_question(walk, rng, start, facing, goal, steps, turns, [o for o in options if o != turns])


def _route_question(
    walk: RoomWalk,
    rng: np.random.Generator,
    start: int,
    facing: int,
    goal: int,
    steps: list[str | None],
    turns: str,
    others: list[str],
) -> Asked:
    options, truth = _options(rng, turns, others)
    listed = " ".join(f"{number}. {step or '[please fill in]'}" for number, step in enumerate(steps, start=1))
    return (
        f"You are a robot beginning at the {walk.names[start]} facing the {walk.names[facing]}. "
        f"You want to navigate to the {walk.names[goal]}. You will perform the following actions "
        "(Note: for each [please fill in], choose either 'turn back,' 'turn left,' or 'turn right.'): "
        f"{listed}. You have reached the final destination.",
        truth,
        options,
    )


def _appearance_order(walk: RoomWalk, rng: np.random.Generator) -> Iterator[Asked]:
    """Orders of four objects, or of three if no four can be told apart."""
    by_first = sorted(walk.asked, key=lambda k: walk.first_clear[k])
    for number in (4, 3):
        orders = [
            order
            for order in combinations(by_first, number)
            if all(walk.first_clear[a] < walk.first_trace[b] for a, b in pairwise(order))
        ]
        if orders:
            break
    # Some classes mostly appear before others, which can be guessed without pictures. So the options are drawn such
    # that the answer is about equally often the likeliest, the second, the third and the last of them in this respect.
    first = {walk.names[k]: _SEEN_FIRST[item.name] for k, item in enumerate(walk.room.objects)}
    for i in rng.permutation(len(orders)):
        names = [walk.names[k] for k in orders[i]]
        ranked = sorted(  # the likeliest first; equally likely ones in random order
            _shuffled(rng, list(permutations(names))),
            key=lambda order: -sum(place * first[name] for place, name in enumerate(order)),
        )
        rank = ranked.index(tuple(names))
        before, behind = _shuffled(rng, ranked[:rank]), _shuffled(rng, ranked[rank + 1 :])
        place = int(rng.choice(len(_PLACES), p=_PLACES))
        if len(before) < place or len(behind) < 3 - place:
            continue
        others = [*before[:place], *behind[: 3 - place]]
        options, truth = _options(rng, ", ".join(names), [", ".join(other) for other in others])
        yield (
            "What will be the first-time appearance order of the following categories in the video: "
            f"{', '.join(rng.permutation(names))}?",
            truth,
            options,
        )


def _balanced(rng: np.random.Generator, found: Mapping[Any, Sequence[Any] | np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """Pairs of an answer and an item with this answer: every answer once, in random order, then again.

    It stops when an answer has no items left, even at the start: otherwise the others would be more frequent.
    """
    left = {answer: list(rng.permutation(things)) for answer, things in found.items()}
    while left and all(left.values()):
        answers = list(left)
        for i in rng.permutation(len(answers)):
            yield answers[i], left[answers[i]].pop()


def _shuffled(rng: np.random.Generator, things: Sequence[Any]) -> list[Any]:
    return [things[i] for i in rng.permutation(len(things))]


def _options(rng: np.random.Generator, answer: str, others: Sequence[str]) -> tuple[list[str], str]:
    """Options in random order, and the letter of the answer."""
    listed = [answer, *others]
    order = rng.permutation(len(listed))
    letter = _LETTERS[int(np.flatnonzero(order == 0)[0])]
    return [f"{_LETTERS[place]}. {listed[i]}" for place, i in enumerate(order)], letter


def _first(shown: np.ndarray) -> np.ndarray:
    """First True of every column (V, O) -> (O,); V where there is none."""
    return np.where(shown.any(axis=0), shown.argmax(axis=0), len(shown))


_STANDING = "If I am standing by the {stand} and facing the {facing}, is the {target} to "
_ASK: dict[str, Callable[[RoomWalk, np.random.Generator], Iterator[Asked]]] = {
    "object_counting": _count,
    "object_abs_distance": _absolute_distance,
    "object_size_estimation": _object_size,
    "room_size_estimation": _room_size,
    "object_rel_distance": _relative_distance,
    "object_rel_direction_easy": _directions(_EASY, _STANDING + "the left or the right of the {facing}?"),
    "object_rel_direction_medium": _directions(
        _MEDIUM,
        _STANDING + "my left, right, or back? "
        "An object is to my back if I would have to turn at least 135 degrees in order to face it.",
    ),
    "object_rel_direction_hard": _directions(
        _HARD,
        _STANDING + "my front-left, front-right, back-left, or back-right? "
        "The directions refer to the quadrants of a Cartesian plane (if I am standing at the origin and facing along "
        "the positive y-axis).",
    ),
    "route_planning": _route,
    "obj_appearance_order": _appearance_order,
}

QUESTION_TYPES: tuple[str, ...] = tuple(_ASK)
"""The ten values of ``question_type`` in VSI-Bench: its eight tasks, relative direction in three levels."""
