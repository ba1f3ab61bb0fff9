"""Synthetic rooms: seeded, furnished rooms seen by a camera that moves through them.

They replace real data where there is none: pictures with exact depth, instance ids and cameras, and rooms in which
every fact is known. Plain numpy; the same seed and level give the same arrays, in any order and process.

    room = generate_room(seed=0, level=2)
    cameras = look_around(room)
    views = render(room, cameras)
"""

from spa3r.rooms.finishes import COLORS, Finish
from spa3r.rooms.furniture import FURNITURE, Furniture
from spa3r.rooms.levels import LEVELS, RoomLevel
from spa3r.rooms.questions import QUESTION_TYPES, RoomWalk, room_questions
from spa3r.rooms.render import RoomViews, render
from spa3r.rooms.room import Fixture, Light, Room, RoomObject, generate_room
from spa3r.rooms.walk import CAMERA_CLEARANCE, Cameras, camera_walk, look_around, new_cameras

__all__ = [
    "CAMERA_CLEARANCE",
    "COLORS",
    "FURNITURE",
    "LEVELS",
    "QUESTION_TYPES",
    "Cameras",
    "Finish",
    "Fixture",
    "Furniture",
    "Light",
    "Room",
    "RoomLevel",
    "RoomObject",
    "RoomViews",
    "RoomWalk",
    "camera_walk",
    "generate_room",
    "look_around",
    "new_cameras",
    "render",
    "room_questions",
]
