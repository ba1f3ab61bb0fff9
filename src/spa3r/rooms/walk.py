"""The camera walk: a smooth tour through the free space of a room with a view of everything in turn.

The path is a closed loop through points spread over the floor, found on a grid that avoids all obstacles, then
smoothed. The view turns from object to object and wall to wall, so that a long enough walk shows all of them and
neighboring frames overlap. The speed of the camera is bounded: more frames show more of the room until the loop is
closed; beyond that, they take smaller steps along the same loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spa3r.checks import check_count, is_count
from spa3r.rooms.levels import Range
from spa3r.rooms.room import Room

CAMERA_CLEARANCE = 0.25
"""Clearance of a walking camera from objects and walls in meters, seen from above."""

WALK_STEPS = 48
"""Steps of the walk from which the pictures of a room are taken: they show nearly all of it."""

STRIDE_OF_WALK = 3
WALK_VIEWS = WALK_STEPS // STRIDE_OF_WALK
"""Steps of the walk between two possible pictures of a room, and the number of these."""

_CELL = 0.15  # meters; a passage of 0.8 m leaves a free band of 0.3 m, which fits a path of such cells
_COMFORT = 0.35  # target clearance of the smoothed path, meters
_STRIDE = 0.05  # spacing of the smoothed path, meters
_READING_DISTANCE = 0.8  # minimum distance in meters from which an object is viewed
_FIXATION = np.radians(8)  # maximum angle from the center of the picture at which an object counts as viewed
_FLOOR_PER_STOP = 5.0  # square meters of floor per point that the loop visits


@dataclass(frozen=True)
class Cameras:
    """Cameras of a walk, in order.

    Attributes:
        extrinsics: (V, 4, 4) float32, camera-from-world, OpenCV axes; world = the room's frame, meters.
        intrinsics: (V, 3, 3) float32, pixels of a picture of `size`; pixel centers at +0.5.
        size: height and width of the pictures, pixels.
    """

    extrinsics: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_size(self.size)
        for name, value, n in (("extrinsics", self.extrinsics, 4), ("intrinsics", self.intrinsics, 3)):
            if np.ndim(value) != 3 or np.shape(value)[1:] != (n, n):
                raise ValueError(
                    f"{name}: wanted an array (V, {n}, {n}), got {np.shape(value)}; one camera needs a first axis of 1."
                )
        if len(self.extrinsics) != len(self.intrinsics):
            raise ValueError(
                f"intrinsics: wanted {len(self.extrinsics)} views as in extrinsics, got {len(self.intrinsics)}; "
                "repeat a shared one with numpy.repeat."
            )

    def __getitem__(self, views: slice | np.ndarray) -> Cameras:
        """Some of the cameras: a slice, or their numbers as an array. `walk[::3]` takes every third."""
        return replace(self, extrinsics=self.extrinsics[views], intrinsics=self.intrinsics[views])


def camera_walk(
    room: Room,
    num_views: int,
    size: tuple[int, int] = (112, 112),
    seed: int = 0,
    max_step: float = 0.3,
    max_turn: float = 15.0,
) -> Cameras:
    """Generate the cameras of a smooth walk through a room.

    At the default speed 32 views cover about 8 m and one look around, which shows nearly all objects; 64 views show
    all. For fewer views of a whole room use every n-th one of a longer walk: `walk[::n]`. The camera stays
    `CAMERA_CLEARANCE` away from everything, seen from above.

    Args:
        room: the room.
        num_views: number of frames, >= 1.
        size: height and width of the pictures, pixels.
        seed: seed of the walk.
        max_step: maximum movement of the camera between two frames, meters.
        max_turn: maximum rotation between two frames, degrees.
    """
    check_size(size)
    check_count("seed", seed, 0)
    check_count("num_views", num_views, cure="Ask for at least one frame.")
    for name, value in (("max_step", max_step), ("max_turn", max_turn)):
        if not value > 0:
            raise ValueError(f"{name}: wanted a number > 0, got {value!r}; leave it out for the default.")
    rng = np.random.default_rng([room.seed, 1, seed])
    loop = _smooth(room, _loop(rng, room))
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(loop, axis=0, append=loop[:1]), axis=1))])
    # The slow oscillation bounds what the height and the roll add to a step and a turn.
    step = min(0.9 * max_step, along[-1] / num_views)
    turn = max_turn * max(step / (0.9 * max_step), 0.25)
    walked = step * np.arange(num_views)
    closed = np.concatenate([loop, loop[:1]])
    x, y = (np.interp(walked, along, closed[:, axis]) for axis in (0, 1))
    level = room.level
    rise, tilt = np.ptp(level.camera_height), np.ptp(level.roll)
    centers = np.stack([x, y, _wander(rng, level.camera_height, walked, max(6.0, 12 * rise))], axis=1)
    yaw, pitch = _gaze(rng, room, centers, turn)
    roll = np.radians(_wander(rng, level.roll, walked, max(8.0, np.pi * tilt * step / (0.2 * turn))))
    fov = np.radians(_wander(rng, level.field_of_view, walked, 14.0))
    height, width = size
    intrinsics = np.zeros((num_views, 3, 3), np.float32)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = max(size) / 2 / np.tan(fov / 2)
    intrinsics[:, :, 2] = (width / 2, height / 2, 1)
    return Cameras(_extrinsics(centers, yaw, pitch, roll), intrinsics, (int(height), int(width)))


def walk_steps(num_views: int) -> np.ndarray:
    """Steps of a walk of 48 at which the pictures of a room are taken, (num_views,) integers.

    Uniformly chosen from every third step, including the first and the last of these, as VSI-Bench
    samples videos.

    Args:
        num_views: Number of pictures, 1 to 16.
    """
    check_count("num_views", num_views, 1, WALK_VIEWS, "Ask for at least one.")
    return STRIDE_OF_WALK * np.linspace(0, WALK_VIEWS - 1, num_views).astype(int)


def look_around(room: Room, num_views: int = 8, size: tuple[int, int] = (112, 112)) -> Cameras:
    """The cameras of a room's pictures: the same for questions, benchmarks, the demo and the web page.

    Args:
        room: The room.
        num_views: Number of pictures, 1 to 16.
        size: Height and width of the pictures, pixels.
    """
    return camera_walk(room, WALK_STEPS, size)[walk_steps(num_views)]


def new_cameras(room: Room, num_views: int = 8, size: tuple[int, int] = (112, 112)) -> Cameras:
    """Cameras between and beside those of :func:`look_around`, in free space: two on the walk, halfway between two
    neighboring pictures (with 2 pictures only one), then as many 0.2 m beside these, turned to the right by 35 degrees.

    Args:
        room: The room.
        num_views: Number of pictures that :func:`look_around` gives, 2 to 16.
        size: Height and width of the pictures, pixels.
    """
    check_count("num_views", num_views, 2, WALK_VIEWS, "Between fewer there is no camera.")
    steps = walk_steps(num_views)
    halfway = (steps[:-1] + steps[1:]) // 2
    between = camera_walk(room, WALK_STEPS, size)[np.unique(halfway[[len(halfway) // 4, 3 * len(halfway) // 4]])]
    turn, right = np.radians(35), np.array([0.2, 0.0, 0.0])  # less than CAMERA_CLEARANCE
    rotation = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
    beside_from_between = np.block([[rotation, -(rotation @ right)[:, None]], [np.zeros(3), 1.0]])
    beside = (beside_from_between @ between.extrinsics).astype(np.float32)
    return Cameras(np.concatenate([between.extrinsics, beside]), np.concatenate([between.intrinsics] * 2), between.size)


def check_size(size: tuple[int, int]) -> None:
    """Raise a ValueError unless `size` is a height and a width >= 1."""
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(map(is_count, size))):
        raise ValueError(f"size: wanted (height, width), two ints >= 1, got {size!r}; for example (112, 112).")


def _extrinsics(centers: np.ndarray, yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Cameras (V, 4, 4) float32 at centers (V, 3), looking along yaw and pitch (radians), turned by roll about it."""
    zero = np.zeros_like(yaw)
    forward = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], axis=1)
    level_right = np.stack([np.sin(yaw), -np.cos(yaw), zero], axis=1)
    level_down = np.cross(forward, level_right)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    rotation = np.stack([c * level_right + s * level_down, c * level_down - s * level_right, forward], axis=1)
    extrinsics = np.zeros((len(centers), 4, 4), np.float32)
    extrinsics[:, :3, :3] = rotation
    extrinsics[:, :3, 3] = -np.einsum("vij,vj->vi", rotation, centers)
    extrinsics[:, 3, 3] = 1
    return extrinsics


def _wander(rng: np.random.Generator, limits: Range, walked: np.ndarray, shortest: float) -> np.ndarray:
    """A value that varies slowly within its limits; `shortest` is its shortest period, meters walked."""
    low, high = limits
    phase, period = rng.uniform(0, 2 * np.pi), shortest * rng.uniform(1.0, 1.5)
    return (low + high) / 2 + (high - low) / 2 * np.sin(phase + 2 * np.pi * walked / period)


def _loop(rng: np.random.Generator, room: Room) -> np.ndarray:
    """Corners (N, 2) of a closed path through free cells, via points spread over the floor."""
    length, width, _ = room.size
    xs, ys = (np.arange(-extent / 2 + _CELL, extent / 2, _CELL) for extent in (length, width))
    cells = np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1)  # (X, Y, 2)
    clearance = room.clearance(cells)
    free = clearance >= CAMERA_CLEARANCE
    if not free.any():
        raise ValueError(
            f"room: wanted floor {CAMERA_CLEARANCE} m away from everything, got none among {len(room.objects)} objects "
            f"in {length:.1f} x {width:.1f} m; take away objects or enlarge the room."
        )
    cost = np.where(free, 1 + 0.3 / np.maximum(clearance, 0.05), np.inf)  # prefers the middle of a passage
    x, y = np.unravel_index(np.argmax(clearance), clearance.shape)
    reachable = np.argwhere(np.isfinite(_travel(cost, (int(x), int(y)))))
    # Farthest-point sampling spreads the stops; sorting them around the center forms a loop.
    points = cells[tuple(reachable.T)]
    stops = [int(rng.integers(len(points)))]
    spread = np.full(len(points), np.inf)
    for _ in range(max(3, round(length * width / _FLOOR_PER_STOP)) - 1):
        spread = np.minimum(spread, np.linalg.norm(points - points[stops[-1]], axis=1))
        stops.append(int(np.argmax(spread)))
    offsets = points[stops] - points[stops].mean(axis=0)
    order = np.argsort(np.arctan2(offsets[:, 1], offsets[:, 0]))[:: rng.choice((-1, 1))]
    tour = [tuple(reachable[stops[i]]) for i in np.roll(order, rng.integers(len(order)))]
    path = []
    for start, goal in zip(tour, tour[1:] + tour[:1], strict=True):
        path += _descend(_travel(cost, goal), start)
    return cells[tuple(np.array(path).T)]


_NEIGHBORS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)


def _travel(cost: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Cost (X, Y) of the cheapest path from every cell to the goal over eight neighbors; infinite if there is none."""
    x, y = cost.shape
    best = np.full((x + 2, y + 2), np.inf)  # a border of one cell avoids all bounds checks
    best[goal[0] + 1, goal[1] + 1] = 0
    inner = best[1:-1, 1:-1]
    while True:
        ways = [best[1 + i : 1 + i + x, 1 + j : 1 + j + y] + cost * np.hypot(i, j) for i, j in _NEIGHBORS]
        shorter = np.minimum(inner, np.min(ways, axis=0))
        if np.array_equal(shorter, inner):
            return inner
        inner[:] = shorter


def _descend(travel: np.ndarray, start: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells from `start` to the goal of `travel`, without the goal."""
    path, cell = [], start
    padded = np.pad(travel, 1, constant_values=np.inf)
    while travel[cell] > 0:
        path.append(cell)
        cell = min(((cell[0] + i, cell[1] + j) for i, j in _NEIGHBORS), key=lambda c: padded[c[0] + 1, c[1] + 1])
    return path


def _smooth(room: Room, corners: np.ndarray) -> np.ndarray:
    """Closed path (N, 2), evenly spaced and rounded, still clear of all obstacles."""
    path = _respaced(corners)
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 5) ** 2)
    kernel /= kernel.sum()
    for _ in range(12):
        wrapped = np.concatenate([path[-12:], path, path[:12]])
        path = np.stack([np.convolve(wrapped[:, axis], kernel, mode="valid") for axis in (0, 1)], axis=1)
        path = _pushed_away(room, path, _COMFORT)
    path = _respaced(path)
    for _ in range(20):
        if room.clearance(path).min() >= CAMERA_CLEARANCE:
            break
        path = _pushed_away(room, path, CAMERA_CLEARANCE + 0.02)
    return path


def _respaced(path: np.ndarray) -> np.ndarray:
    """The same closed path with points `_STRIDE` apart."""
    closed = np.concatenate([path, path[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    at = np.linspace(0, along[-1], max(32, round(along[-1] / _STRIDE)), endpoint=False)
    return np.stack([np.interp(at, along, closed[:, axis]) for axis in (0, 1)], axis=1)


def _pushed_away(room: Room, points: np.ndarray, wanted: float) -> np.ndarray:
    """Move points (N, 2) that are too close to an obstacle directly away from it."""
    missing = wanted - room.clearance(points)
    near = missing > 0
    if near.any():
        nudge = 1e-4 * np.eye(2)
        slope = np.stack(
            [room.clearance(points[near] + n) - room.clearance(points[near] - n) for n in nudge], axis=1
        ) / (2e-4)
        points = points.copy()
        points[near] += missing[near, None] * slope
    return points


def _gaze(rng: np.random.Generator, room: Room, centers: np.ndarray, max_turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Yaw and pitch (V,) in radians of a camera that views one object or wall after another.

    It turns to the next one that it has not viewed yet, with bounded rate and smooth starts; after the last one
    it starts again.
    """
    limit = np.radians(0.75 * max_turn)  # the rest is left for pitch and roll
    lowest, highest = np.radians(room.level.pitch)
    x, y, z = np.array(room.size) / 2
    walls = [(-x, 0.0, z), (0.0, -y, z), (x, 0.0, z), (0.0, y, z)]
    targets = np.array([item.center for item in room.objects] + walls)
    unseen = np.ones(len(targets), bool)
    to_middle = np.arctan2(-centers[0, 1], -centers[0, 0])
    yaw, rate = to_middle + rng.uniform(-0.5, 0.5), 0.0  # the first frame shows the room, not a wall at close range
    pitch = (lowest + highest) / 2
    yaws, pitches = [], []
    for center in centers:
        offsets = targets - center
        distance = np.linalg.norm(offsets[:, :2], axis=1)
        error = _wrapped(np.arctan2(offsets[:, 1], offsets[:, 0]) - yaw)
        far = distance > _READING_DISTANCE
        looked_at = far & (np.abs(error) < _FIXATION)
        unseen &= ~looked_at
        if not (unseen & far).any():
            unseen[:] = True
        candidates = np.flatnonzero(unseen & far & ~looked_at)
        if len(candidates):
            # Nearest to where the turn is heading: continuing is easier than turning back, and shows more.
            chosen = candidates[np.argmin(np.abs(error[candidates] - 4 * rate))]
            wanted = 0.35 * error[chosen]
            wanted_pitch = np.arctan2(offsets[chosen, 2], distance[chosen])
        else:
            wanted, wanted_pitch = rate, pitch
        rate += np.clip(np.clip(wanted, -limit, limit) - rate, -0.4 * limit, 0.4 * limit)
        yaw = yaw + rate
        pitch += np.clip(0.3 * (np.clip(wanted_pitch, lowest, highest) - pitch), -limit / 3, limit / 3)
        yaws.append(yaw)
        pitches.append(pitch)
    return np.array(yaws), np.array(pitches)


def _wrapped(angle: np.ndarray) -> np.ndarray:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
