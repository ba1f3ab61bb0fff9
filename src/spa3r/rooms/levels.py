"""Difficulty levels of rooms: one table of everything that varies, so that a curriculum is defined by numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

Range = tuple[float, float]
"""Lowest and highest value; equal ends mean that the quantity does not vary."""


@dataclass(frozen=True)
class RoomLevel:
    """What varies between rooms, and between the frames of a camera walk.

    Attributes:
        num_objects: lowest and highest number of objects in a room.
        side: length of each side of the floor, meters; drawn twice, so a wide range also gives long and narrow rooms.
        ceiling: height of the room, meters.
        size_variation: 0 = all objects of a class have the same size, 1 = the full range of their class.
        any_yaw: free-standing objects are rotated by any angle, not only by quarter turns.
        varied_walls: the four walls have any of eight colors; otherwise every room has the same four in the same
            order, so that the color of a wall identifies it.
        varied_floor: the floor has one of several patterns and colors instead of always the same checker.
        wall_contrast: strongest pattern on the walls, 0..1; 0 = plain walls.
        object_contrast: strongest pattern on the objects, 0..1; 0 = plain objects.
        num_pictures: lowest and highest number of pictures on the walls, besides the door and window of every room.
        light_offset: maximum distance of the lamp from the middle of the ceiling, as a fraction of the half sides.
        light_strength: brightness of the lamp; 1 = neutral.
        light_tint: maximum deviation of the lamp's red and blue from white.
        camera_height: meters above the floor.
        pitch: degrees, up is positive.
        roll: degrees.
        field_of_view: degrees, across the picture's longer side.
    """

    num_objects: tuple[int, int]
    side: Range
    ceiling: Range
    size_variation: float
    any_yaw: bool
    varied_walls: bool
    varied_floor: bool
    wall_contrast: float
    object_contrast: float
    num_pictures: tuple[int, int]
    light_offset: float
    light_strength: Range
    light_tint: float
    camera_height: Range
    pitch: Range
    roll: Range
    field_of_view: Range

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple) and (len(value) != 2 or value[0] > value[1]):
                raise ValueError(
                    f"RoomLevel.{item.name}: wanted (lowest, highest), got {value!r}; put the smaller one first."
                )


LEVELS: tuple[RoomLevel, ...] = (
    RoomLevel(
        num_objects=(4, 6),
        side=(4.5, 6.0),
        ceiling=(2.6, 2.6),
        size_variation=0.0,
        any_yaw=False,
        varied_walls=False,
        varied_floor=False,
        wall_contrast=0.0,
        object_contrast=0.0,
        num_pictures=(0, 0),
        light_offset=0.0,
        light_strength=(1.0, 1.0),
        light_tint=0.0,
        camera_height=(1.5, 1.5),
        pitch=(-12.0, -12.0),
        roll=(0.0, 0.0),
        field_of_view=(75.0, 75.0),
    ),
    RoomLevel(
        num_objects=(5, 8),
        side=(4.5, 6.5),
        ceiling=(2.5, 2.8),
        size_variation=0.5,
        any_yaw=True,
        varied_walls=True,
        varied_floor=True,
        wall_contrast=0.0,
        object_contrast=0.0,
        num_pictures=(0, 2),
        light_offset=0.3,
        light_strength=(0.9, 1.1),
        light_tint=0.0,
        camera_height=(1.4, 1.6),
        pitch=(-18.0, -6.0),
        roll=(0.0, 0.0),
        field_of_view=(70.0, 80.0),
    ),
    RoomLevel(
        num_objects=(8, 12),
        side=(5.0, 7.0),
        ceiling=(2.5, 3.0),
        size_variation=1.0,
        any_yaw=True,
        varied_walls=True,
        varied_floor=True,
        wall_contrast=0.25,
        object_contrast=0.2,
        num_pictures=(1, 4),
        light_offset=0.6,
        light_strength=(0.8, 1.15),
        light_tint=0.06,
        camera_height=(1.3, 1.7),
        pitch=(-25.0, 0.0),
        roll=(-3.0, 3.0),
        field_of_view=(65.0, 85.0),
    ),
    RoomLevel(
        num_objects=(10, 18),
        side=(5.5, 9.0),
        ceiling=(2.4, 3.2),
        size_variation=1.0,
        any_yaw=True,
        varied_walls=True,
        varied_floor=True,
        wall_contrast=0.45,
        object_contrast=0.35,
        num_pictures=(2, 6),
        light_offset=0.8,
        light_strength=(0.65, 1.2),
        light_tint=0.12,
        camera_height=(1.1, 1.8),
        pitch=(-30.0, 5.0),
        roll=(-7.0, 7.0),
        field_of_view=(60.0, 90.0),
    ),
)
"""Levels 0 (one camera height, yaw only, plain colors, the same walls, few objects) to 3 (all varies, many)."""


def resolve_level(level: int | RoomLevel) -> RoomLevel:
    """The row of `LEVELS` for an index; a custom `RoomLevel` is returned unchanged."""
    if isinstance(level, RoomLevel):
        return level
    if isinstance(level, int) and not isinstance(level, bool) and 0 <= level < len(LEVELS):
        return LEVELS[level]
    raise ValueError(
        f"level: wanted an int in 0..{len(LEVELS) - 1} or a RoomLevel, got {level!r}; "
        "vary a level with dataclasses.replace(LEVELS[1], num_objects=(2, 3))."
    )
