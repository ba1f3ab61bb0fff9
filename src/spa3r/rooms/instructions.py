"""Questions about rooms as instruction data: pictures of a walk, a question, and its computed answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch.utils.data import Dataset

from spa3r.checks import check_count
from spa3r.media.images import to_rgb
from spa3r.rooms import Cameras, Room, generate_room, look_around, render
from spa3r.rooms.levels import RoomLevel, resolve_level
from spa3r.rooms.questions import MOST_QUESTIONS, QUESTION_TYPES, RoomWalk, room_questions
from spa3r.rooms.walk import STRIDE_OF_WALK, WALK_VIEWS, walk_steps
from spa3r.vsi_bench.format import make_messages

FIRST_TEST_SEED = 1_000_000
"""Seed of the first test room; a data set holds only training rooms or only test rooms."""

_ROOMS_ASKED = 8  # number of rooms in which a replacement is searched for a question that a room does not allow
_ROOMS_KEPT = 16  # pictures of one room take a third of a megabyte
_WALKS_KEPT = 4096  # a few kilobytes each


class RoomQuestions(Dataset):
    """Questions about rooms with pictures of a walk through each, one example per question.

    An example holds ``messages`` in Hugging Face's chat format (the pictures, then the prompt of VSI-Bench's
    evaluation; the truth as the assistant's answer), ``source``, ``row`` (its name), ``question_type``, and
    ``skipped``, which is empty here. Example i is a pure function of the arguments and i: rooms are generated and
    rendered on demand, and the most recent ones are cached.

    There are ``per_type`` examples for each room and type; the size of a room is asked once. If a room allows too
    few questions of a type, a question of the same type about one of the next seven rooms replaces it, so types stay
    equally frequent. Questions that no other index holds are preferred.

    With ``questions_per_example`` above 1 an example is a conversation: that many questions of mixed types about one
    room, after its pictures are shown once, which trains faster; its ``question_type`` is None. Replacements from other
    rooms are left out, so some conversations are shorter.

    Args:
        first_seed: Seed of the first room. Seeds below :data:`FIRST_TEST_SEED` are training rooms, the others
            test rooms; a data set holds one or the other.
        num_rooms: Number of rooms.
        level: Level of the rooms, 0 (plain) to 3, or a :class:`~spa3r.rooms.RoomLevel`.
        frames: Pictures of each room, those of :func:`~spa3r.rooms.look_around`.
        per_type: Questions of each type per room.
        seed: Seed of the questions.
        types: Question types; None: all ten of VSI-Bench.
        rendered: Folder with a folder of rendered pictures for each room, as ``examples/rooms/render.py`` writes them
            (16 pictures and a ``truth.npz`` with ``instance_ids``, named by the room's seed in seven digits). They must
            be of the same level. Missing rooms are rendered; either way the examples are the same.
        size: Height and width of the pictures in pixels, if they are rendered.
        name: Name of the source in reports.
        questions_per_example: Number of consecutive questions after the pictures.
    """

    def __init__(
        self,
        first_seed: int,
        num_rooms: int,
        level: int | RoomLevel = 0,
        frames: int = 8,
        per_type: int = 1,
        seed: int = 0,
        types: Sequence[str] | None = None,
        rendered: str | Path | None = None,
        size: int = 112,
        name: str = "rooms",
        questions_per_example: int = 1,
    ) -> None:
        check_count("first_seed", first_seed, 0)
        check_count("seed", seed, 0)
        check_count("num_rooms", num_rooms, cure="Ask for at least one.")
        check_count("frames", frames, 1, WALK_VIEWS, "Ask for at least one.")
        check_count("questions_per_example", questions_per_example, cure="Ask for at least one.")
        if first_seed < FIRST_TEST_SEED < first_seed + num_rooms:
            raise ValueError(
                f"`first_seed` + `num_rooms` must be at most {FIRST_TEST_SEED}, where the rooms to test on begin, or "
                f"`first_seed` at least that, got {first_seed} + {num_rooms}. Take rooms from one side."
            )
        if rendered is not None and not Path(rendered).is_dir():
            raise FileNotFoundError(f"`rendered` must be a folder of rendered rooms, got {str(rendered)!r}.")
        self.level, self.first_seed, self.num_rooms = resolve_level(level), first_seed, num_rooms
        self.frames, self.per_type, self.seed, self.size, self.name = frames, per_type, seed, size, name
        self.rendered = None if rendered is None else Path(rendered)
        types = QUESTION_TYPES if types is None else tuple(types)
        self._slots = [(t, k) for t in types for k in range(1 if t == "room_size_estimation" else per_type)]
        self.questions_per_example = questions_per_example
        self._views = walk_steps(frames) // STRIDE_OF_WALK  # the numbers of rendered files
        self._rooms: OrderedDict[int, list[PIL.Image.Image]] = OrderedDict()
        self._walks: OrderedDict[int, tuple[RoomWalk, dict[str, tuple[int, list[dict[str, Any]]]]]] = OrderedDict()

    def __len__(self) -> int:
        return self.num_rooms * self._examples_per_room

    @property
    def num_questions(self) -> int:
        """Number of valid indices of :meth:`row`; equal to the number of examples, unless they are conversations."""
        return self.num_rooms * len(self._slots)

    @property
    def _examples_per_room(self) -> int:
        return -(-len(self._slots) // self.questions_per_example)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._check_index(index, len(self), "examples")
        if self.questions_per_example == 1:
            row = self.row(index)
            name, question_type = f"{row['question_type']}/{row['id'] % MOST_QUESTIONS}", row["question_type"]
            rows = [row]
        else:
            rows, name, question_type = self._conversation(index), f"conversation/{index}", None
        scene = rows[0]["scene_name"]
        messages = make_messages(rows[0], self.pictures(int(scene)))
        for row in rows[1:]:
            messages += make_messages(row, ())
        return {
            "messages": messages,
            "source": self.name,
            "row": f"{scene}/{name}",
            "question_type": question_type,
            "skipped": [],
        }

    def _conversation(self, index: int) -> list[dict[str, Any]]:
        """The questions of a conversation: one set of the room's questions, shuffled, without replacements."""
        room, deal = divmod(index, self._examples_per_room)
        seed = self.first_seed + room
        slots = np.random.default_rng([self.seed, seed]).permutation(len(self._slots))
        rows = [self.row(room * len(self._slots) + int(slot)) for slot in slots[deal :: self._examples_per_room]]
        own = {row["id"]: row for row in rows if int(row["scene_name"]) == seed}  # the replacement may be a duplicate
        return list(own.values()) or self._questions(seed, "room_size_estimation", 1)  # which every room allows

    def row(self, index: int) -> dict[str, Any]:
        """A question in the row format of VSI-Bench, as :func:`~spa3r.rooms.questions.room_questions` returns it: that
        of the example with this index, unless examples are conversations."""
        room, slot = divmod(self._check_index(index, self.num_questions, "questions"), len(self._slots))
        question_type, k = self._slots[slot]
        nearby = [self.first_seed + (room + step) % self.num_rooms for step in range(min(self.num_rooms, _ROOMS_ASKED))]
        for step, seed in enumerate(nearby):
            # Starts at `step * per_type`: earlier questions belong to indices of nearer rooms.
            wanted = k + step * self.per_type
            rows = self._questions(seed, question_type, wanted + 1)
            if wanted < len(rows):
                return rows[wanted]
        for seed in nearby:
            if rows := self._questions(seed, question_type, k + 1):
                return rows[-1]
        return self._questions(nearby[0], "room_size_estimation", 1)[0]  # every room allows that

    @staticmethod
    def _check_index(index: int, number: int, what: str) -> int:
        if not -number <= index < number:
            raise IndexError(f"`index` must be below {number}, the number of {what}, got {index}.")
        return index % number

    def _questions(self, seed: int, question_type: str, number: int) -> list[dict[str, Any]]:
        """The first `number` questions of a type about a room, or as many as it allows."""
        if seed not in self._walks:
            self._walks[seed] = self.walk(seed), {}
            if len(self._walks) > _WALKS_KEPT:
                self._walks.popitem(last=False)
        walk, known = self._walks[seed]
        asked, rows = known.get(question_type, (0, []))
        if asked < number:
            rows = room_questions(walk, self.seed, (question_type,), min(number, MOST_QUESTIONS))
            known[question_type] = number, rows
        return rows[:number]

    def walk(self, seed: int) -> RoomWalk:
        """The room of a seed, and what its pictures show."""
        room, folder = generate_room(seed, self.level), self._folder(seed)
        if folder is None:
            return RoomWalk.from_cameras(room, self._cameras(room))
        with np.load(folder / "truth.npz", allow_pickle=False) as truth:
            return RoomWalk.from_instance_ids(room, truth["instance_ids"][self._views])

    def pictures(self, seed: int) -> list[PIL.Image.Image]:
        """The pictures for the questions about the room of a seed."""
        if seed not in self._rooms:
            folder = self._folder(seed)
            if folder is None:
                room = generate_room(seed, self.level)
                images = [PIL.Image.fromarray(image) for image in render(room, self._cameras(room)).images]
            else:
                images = [to_rgb(folder / f"{view:03d}.png") for view in self._views]
            self._rooms[seed] = images
            if len(self._rooms) > _ROOMS_KEPT:
                self._rooms.popitem(last=False)
        self._rooms.move_to_end(seed)
        return self._rooms[seed]

    def _folder(self, seed: int) -> Path | None:
        folder = self.rendered / f"{seed:07d}" if self.rendered else None
        return folder if folder and folder.is_dir() else None

    def _cameras(self, room: Room) -> Cameras:
        return look_around(room, self.frames, (self.size, self.size))
