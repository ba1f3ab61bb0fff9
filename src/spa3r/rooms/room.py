"""Rooms and their contents, drawn from a seed. Every fact that a question may ask for is a plain number here.

World frame of a room: metric, right-handed, z up, origin at the center of the floor. The inside is
|x| <= length / 2, |y| <= width / 2, 0 <= z <= height. Walls 0..3 are at -x, -y, +x, +y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa3r.checks import check_count
from spa3r.rooms.finishes import COLORS, Finish, Rgb
from spa3r.rooms.furniture import FURNITURE, Part, Size
from spa3r.rooms.levels import Range, RoomLevel, resolve_level
from spa3r.rooms.shapes import box

_PASSAGE = 0.8  # minimum passage in meters between two objects
_SIDE_BY_SIDE = 0.08  # meters between neighbors along the same wall
_BEHIND = 0.04  # meters between a wall and the back of an object: space for a picture frame
_DOOR = (0.9, 2.0)  # width, height, meters
_TRIES = 60  # places tried for an object
_ATTEMPTS = 20  # rooms tried for a seed

_WALL_COLORS: tuple[Rgb, ...] = (
    (0.86, 0.80, 0.70),
    (0.70, 0.80, 0.86),
    (0.76, 0.85, 0.72),
    (0.88, 0.73, 0.70),
    (0.90, 0.87, 0.62),
    (0.80, 0.74, 0.86),
    (0.84, 0.84, 0.83),
    (0.62, 0.72, 0.74),
)
_FLOORS: tuple[Finish, ...] = (
    Finish((0.72, 0.68, 0.62), "checker", 0.5, 0.35),
    Finish((0.66, 0.47, 0.29), "planks", 0.16, 0.45),
    Finish((0.45, 0.31, 0.20), "planks", 0.22, 0.45),
    Finish((0.72, 0.74, 0.74), "tiles", 0.4, 0.5),
    Finish((0.62, 0.42, 0.34), "tiles", 0.3, 0.5),
    Finish((0.56, 0.58, 0.64), "stripes", 0.4, 0.3),
    Finish((0.52, 0.47, 0.45), "mottle", 0.25, 0.5),
)


@dataclass(frozen=True)
class RoomObject:
    """A piece of furniture, given by its oriented box; the mesh fills that box exactly.

    Attributes:
        name: class, a key of `FURNITURE`.
        color: name of the color of its main part, a key of `COLORS` (a plant's pot, a television's bench, a bed's
            blanket).
        center: center of the box in the room's frame, meters.
        size: width, depth, height along the object's own axes (x to its right, y to its back, z up), meters.
        yaw: rotation of these axes about z, counter-clockwise, radians in [-pi, pi).
        pattern: texture of the main part; see `Finish`.
        period: period of the pattern, meters.
        contrast: contrast of the pattern, 0..1.
    """

    name: str
    color: str
    center: tuple[float, float, float]
    size: Size
    yaw: float
    pattern: str = "plain"
    period: float = 1.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        for argument, value, known in (("name", self.name, FURNITURE), ("color", self.color, COLORS)):
            if value not in known:
                raise ValueError(
                    f"RoomObject.{argument}: wanted one of {', '.join(known)}, got {value!r}; take a listed one."
                )

    @property
    def rotation(self) -> np.ndarray:
        """Room-from-object rotation (3, 3)."""
        return _turn(self.yaw)

    def parts(self) -> list[Part]:
        """Meshes in the object's frame (origin on the floor, below its center) with their finishes."""
        finish = Finish(COLORS[self.color], self.pattern, self.period, self.contrast)
        return FURNITURE[self.name].build(self.size, finish)

    def footprint(self) -> np.ndarray:
        """Corners (4, 2) of the box seen from above, counter-clockwise, in the room's frame, meters."""
        w, d, _ = self.size
        corners = np.array([[-w, -d], [w, -d], [w, d], [-w, d]]) / 2
        return corners @ self.rotation[:2, :2].T + self.center[:2]


@dataclass(frozen=True)
class Fixture:
    """A door, window or picture: a thin board on a wall, part of the background.

    Attributes:
        wall: number of the wall, 0..3.
        along: signed distance of its center from the center of the wall, meters.
        bottom: height of its lower edge, meters.
        size: width and height, meters.
        finish: finish of the board inside its frame.
    """

    wall: int
    along: float
    bottom: float
    size: tuple[float, float]
    finish: Finish


@dataclass(frozen=True)
class Light:
    """A point light under the ceiling.

    Attributes:
        position: position in the room's frame, meters.
        rgb: strength per channel; 1 = neutral.
        ambient: ambient share of the light, 0..1.
    """

    position: tuple[float, float, float]
    rgb: Rgb
    ambient: float


@dataclass(frozen=True)
class Room:
    """A furnished room. Rooms with the same seed and level are equal.

    Attributes:
        seed: the seed from which it was drawn, together with `level`.
        level: how much varies.
        size: length (x), width (y), height (z), meters.
        objects: object k of the instance ids is `objects[k - 1]`.
        floor: finish of the floor.
        ceiling: finish of the ceiling.
        walls: finishes of walls 0..3.
        fixtures: door, window, pictures.
        light: the lamp.
    """

    seed: int
    level: RoomLevel
    size: Size
    objects: tuple[RoomObject, ...]
    floor: Finish
    ceiling: Finish
    walls: tuple[Finish, ...]
    fixtures: tuple[Fixture, ...]
    light: Light

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """Distance to the nearest object or wall, seen from above.

        Args:
            points: (..., 2) in the room's frame, meters.

        Returns:
            (...) meters; negative inside an object's box or behind a wall.
        """
        nearest = (np.array(self.size[:2]) / 2 - np.abs(points)).min(axis=-1)
        for item in self.objects:
            local = (points - np.array(item.center[:2])) @ item.rotation[:2, :2]
            outside = np.abs(local) - np.array(item.size[:2]) / 2
            distance = np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(axis=-1), 0)
            nearest = np.minimum(nearest, distance)
        return nearest

    def background(self) -> list[Part]:
        """Floor, ceiling, walls and fixtures as meshes in the room's frame."""
        x, y, z = (extent / 2 for extent in self.size)
        shell = box((-x, x), (-y, y), (0.0, 2 * z))  # two triangles per face: -x, +x, -y, +y, floor, ceiling
        looks = (self.walls[0], self.walls[2], self.walls[1], self.walls[3], self.floor, self.ceiling)
        parts = [Part(shell[2 * i : 2 * i + 2], look) for i, look in enumerate(looks)]
        for fixture in self.fixtures:
            (w, h), bottom = fixture.size, fixture.bottom
            frame = box((-w / 2, w / 2), (-0.02, 0), (bottom, bottom + h))
            board = box((-w / 2 + 0.06, w / 2 - 0.06), (-0.025, 0), (bottom + 0.06, bottom + h - 0.06))
            back, turn = _wall_pose(self.size, fixture.wall, fixture.along)
            rotation = _turn(turn)
            for triangles, look in ((frame, Finish((0.30, 0.22, 0.15))), (board, fixture.finish)):
                parts.append(Part(triangles @ rotation.T + np.array([*back, 0.0]), look))
        return parts


def generate_room(seed: int, level: int | RoomLevel = 0) -> Room:
    """Generate a room.

    Objects stand on the floor within the walls. Seen from above, boxes are at least 0.08 m apart along the same wall
    and at least 0.8 m apart otherwise, so that there is a passage around every free-standing object.

    Args:
        seed: >= 0. The same seed and level give the same room, independent of earlier calls.
        level: index of `LEVELS`, or a custom `RoomLevel`.
    """
    check_count("seed", seed, 0, cure="Pass for example the index of the room.")
    level = resolve_level(level)
    most = 0
    for attempt in range(_ATTEMPTS):  # a narrow room may not fit enough objects; then another one is drawn
        rng = np.random.default_rng([seed, 0, attempt])
        size = (_draw(rng, level.side), _draw(rng, level.side), _draw(rng, level.ceiling))
        fixtures = _draw_fixtures(rng, level, size)
        objects = _furnish(rng, level, size, door=fixtures[0])
        if len(objects) >= level.num_objects[0]:
            return Room(
                seed=int(seed),
                level=level,
                size=size,
                objects=objects,
                floor=_FLOORS[rng.integers(len(_FLOORS)) if level.varied_floor else 0],
                ceiling=Finish((0.92, 0.91, 0.88), "tiles", 0.6, 0.25 if level.wall_contrast else 0.0),
                walls=_draw_walls(rng, level),
                fixtures=tuple(fixtures),
                light=_draw_light(rng, level, size),
            )
        most = max(most, len(objects))
    raise ValueError(
        f"level.num_objects: wanted at least {level.num_objects[0]} objects, got places for {most} in rooms with "
        f"sides of {level.side[0]}..{level.side[1]} m; lower num_objects or raise side."
    )


def _draw(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _wall_pose(size: Size, wall: int, along: float) -> tuple[np.ndarray, float]:
    """Point (2,) on a wall and the yaw of an object with its back against it."""
    yaw = (np.pi / 2, -np.pi, -np.pi / 2, 0.0)[wall]  # its +y axis points into the wall: -x, -y, +x, +y
    reach = size[wall % 2] / 2
    return np.array([-np.sin(yaw), np.cos(yaw)]) * reach + np.array([np.cos(yaw), np.sin(yaw)]) * along, yaw


def _turn(yaw: float) -> np.ndarray:
    """Rotation (3, 3) about z, counter-clockwise."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _gaps(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Widest strip between a rectangle (4, 2) and others (N, 4, 2) along any of their sides: (N,) meters, < 0: overlap.

    This never exceeds their distance (separating axes), so a required distance is kept.
    """
    sides = np.concatenate(
        [others[:, [1, 3]] - others[:, :1], np.broadcast_to(one[[1, 3]] - one[0], others[:, :2].shape)], 1
    )
    axes = (sides / np.linalg.norm(sides, axis=2, keepdims=True)).transpose(0, 2, 1)  # (N, 2, 4 axes)
    ours, theirs = one @ axes, others @ axes  # (N, 4 corners, 4 axes)
    return np.maximum(ours.min(axis=1) - theirs.max(axis=1), theirs.min(axis=1) - ours.max(axis=1)).max(axis=1)


def _furnish(rng: np.random.Generator, level: RoomLevel, size: Size, door: Fixture) -> tuple[RoomObject, ...]:
    count = int(rng.integers(level.num_objects[0], level.num_objects[1] + 1))
    bag = [name for name, furniture in FURNITURE.items() for _ in range(furniture.most)]
    names = [bag[i] for i in rng.permutation(len(bag))]
    # Large ones first, while there is space; an object that doesn't fit is replaced by the next one from the bag.
    names[:count] = sorted(names[:count], key=lambda name: -FURNITURE[name].largest[0] * FURNITURE[name].largest[1])
    point, yaw = _wall_pose(size, door.wall, door.along)
    inwards = _PASSAGE * np.array([np.sin(yaw), -np.cos(yaw)])
    half_door = door.size[0] / 2 * np.array([np.cos(yaw), np.sin(yaw)])
    doorway = np.stack([point - half_door, point + half_door, point + half_door + inwards, point - half_door + inwards])
    taken: list[tuple[np.ndarray, int | None]] = [(doorway, door.wall)]  # footprint, wall behind it
    objects: list[RoomObject] = []
    for name in names:
        if len(objects) == count:
            break
        item, wall = _place(rng, level, size, name, taken)
        if item is not None:
            objects.append(item)
            taken.append((item.footprint(), wall))
    return tuple(objects)


def _place(
    rng: np.random.Generator, level: RoomLevel, size: Size, name: str, taken: list[tuple[np.ndarray, int | None]]
) -> tuple[RoomObject | None, int | None]:
    """Try some places for an object; return it and its wall, or None if it does not fit."""
    furniture = FURNITURE[name]
    smallest, largest = np.array(furniture.smallest), np.array(furniture.largest)
    spread = level.size_variation * rng.uniform(-0.5, 0.5, 3)
    width, depth, height = (float(extent) for extent in (smallest + largest) / 2 + spread * (largest - smallest))
    color = str(rng.choice(list(COLORS)))
    pattern, period, contrast = _draw_texture(
        rng, ("plain", "stripes", "checker", "mottle"), level.object_contrast, 0.12
    )
    half_floor = np.array(size[:2]) / 2
    for _ in range(_TRIES):
        if furniture.at_wall:
            wall = int(rng.integers(4))
            reach = half_floor[1 - wall % 2] - width / 2 - _SIDE_BY_SIDE
            point, yaw = _wall_pose(size, wall, rng.uniform(-reach, reach))
            middle = point + (depth / 2 + _BEHIND) * np.array([np.sin(yaw), -np.cos(yaw)])
        else:
            wall = None
            yaw = rng.uniform(-np.pi, np.pi) if level.any_yaw else np.pi / 2 * rng.integers(-2, 2)
            middle = rng.uniform(-half_floor, half_floor)
        center = (float(middle[0]), float(middle[1]), height / 2)
        item = RoomObject(name, color, center, (width, depth, height), float(yaw), pattern, period, contrast)
        corners = item.footprint()
        if wall is None and (half_floor - np.abs(corners)).min() < _PASSAGE:
            continue
        needed = [_SIDE_BY_SIDE if wall is not None and wall == other else _PASSAGE for _, other in taken]
        if (_gaps(corners, np.stack([other for other, _ in taken])) >= needed).all():
            return item, wall
    return None, None


def _draw_texture(
    rng: np.random.Generator, patterns: tuple[str, ...], contrast: float, period: float
) -> tuple[str, float, float]:
    """Pattern, period and contrast of a `Finish`; plain if `contrast`, the maximum allowed, is 0."""
    pattern = str(rng.choice(patterns))
    period, strength = period * rng.uniform(0.7, 1.4), contrast * rng.uniform(0.4, 1.0)
    return (pattern, float(period), float(strength)) if contrast else ("plain", 1.0, 0.0)


def _draw_walls(rng: np.random.Generator, level: RoomLevel) -> tuple[Finish, ...]:
    colors = rng.permutation(len(_WALL_COLORS))[:4]  # four different ones: the color identifies the wall
    if not level.varied_walls:
        colors = range(4)
    patterns = ("plain", "stripes", "bricks", "tiles", "mottle")
    return tuple(Finish(_WALL_COLORS[i], *_draw_texture(rng, patterns, level.wall_contrast, 0.35)) for i in colors)


def _draw_fixtures(rng: np.random.Generator, level: RoomLevel, size: Size) -> list[Fixture]:
    """A door, a window, and pictures that hang beside them."""
    door_wall = int(rng.integers(4))
    kinds = [(door_wall, 0.0, _DOOR, Finish((0.55, 0.36, 0.20), "planks", 0.3, 0.3))]
    window = (_draw(rng, (1.0, 1.8)), _draw(rng, (0.9, 1.2)))
    kinds.append(
        ((door_wall + int(rng.integers(1, 4))) % 4, 0.95, window, Finish((0.72, 0.88, 1.0), "tiles", 0.5, 0.3))
    )
    for _ in range(rng.integers(level.num_pictures[0], level.num_pictures[1] + 1)):
        picture = (_draw(rng, (0.4, 0.8)), _draw(rng, (0.35, 0.6)))
        red, green, blue = (float(channel) for channel in rng.uniform(0.25, 0.95, 3))
        pattern = str(rng.choice(("stripes", "checker", "mottle", "bricks")))
        kinds.append(
            (int(rng.integers(4)), _draw(rng, (1.35, 1.6)), picture, Finish((red, green, blue), pattern, 0.15, 0.7))
        )
    fixtures: list[Fixture] = []
    for wall, bottom, extent, finish in kinds:
        reach = (size[1 - wall % 2] - extent[0]) / 2 - 0.3
        along = _draw(rng, (-reach, reach))
        beside = (abs(along - f.along) > (extent[0] + f.size[0]) / 2 + 0.1 for f in fixtures if f.wall == wall)
        if all(beside):
            fixtures.append(Fixture(wall, along, bottom, extent, finish))
    return fixtures


def _draw_light(rng: np.random.Generator, level: RoomLevel, size: Size) -> Light:
    x, y = level.light_offset * rng.uniform(-0.5, 0.5, 2) * size[:2]
    tint = level.light_tint * rng.uniform(-1.0, 1.0)
    strength = _draw(rng, level.light_strength)
    # 0.35 m below the ceiling is above all furniture.
    return Light(
        position=(float(x), float(y), size[2] - 0.35),
        rgb=(strength * (1 + tint), strength, strength * (1 - tint)),
        ambient=0.45,
    )
