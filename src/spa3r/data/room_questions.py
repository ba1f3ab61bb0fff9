"""Questions about rooms as instruction data: pictures of a walk, a question, its computed answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch.utils.data import Dataset

from spa3r.data.vsi_format import make_prompt
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.levels import RoomLevel, resolve_level
from spa3r.rooms.questions import MOST_QUESTIONS, QUESTION_TYPES, RoomWalk, room_questions
from spa3r.rooms.room import check_seed
from spa3r.video import uniform_indices

WALK_VIEWS = 16
STRIDE_OF_WALK = 3
"""Pictures that a walk gives, and its steps between two of them: so many show nearly all of a room."""

_ROOMS_KEPT = 16  # their pictures are a third of a megabyte each
_WALKS_KEPT = 4096  # a few kilobytes each


class RoomQuestions(Dataset):
    """Questions about rooms with pictures of a walk through each, one example a question.

    An example holds ``messages`` in the chat form of Hugging Face (the pictures, then the prompt of VSI-Bench's
    evaluation; the truth as the assistant's answer), ``source``, ``row`` (its name), ``question_type``, and
    ``skipped``, which is empty here. Example i is a pure function of the arguments and i: rooms are drawn and rendered
    when an example asks for them, the last ones are kept.

    There are ``per_type`` examples for each room and type; the size of a room is asked once. Where a room allows too
    few questions of a type, one of the same type about one of the next rooms stands in, so types stay equally
    frequent; it is a question that no other index holds.

    Args:
        first_seed: Seed of the first room. Take what you train on and what you test on from ranges that don't overlap,
            as the rooms recipe does: below 1 000 000 for training, from there on for tests.
        num_rooms: How many rooms.
        level: Level of the rooms, 0 (plain) to 3, or a :class:`~spa3r.rooms.RoomLevel`.
        frames: Pictures of each room, uniformly from the walk's 16, first and last included.
        per_type: Questions of each type for a room.
        seed: Other questions for every value.
        types: Which types; None: all ten of VSI-Bench.
        rendered: Folder with a folder of rendered pictures for each room, as ``examples/rooms/render.py`` writes them
            (16 pictures and a ``truth.npz`` with ``instance_ids``, named by the room's seed in seven digits). They must
            be of the same level. Rooms that are not there are rendered; either way the examples are the same.
        size: Height and width of the pictures in pixels, where they are rendered.
        name: What reports call the source.
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
    ):
        check_seed(first_seed)
        check_seed(seed)
        for key, value, most in (("num_rooms", num_rooms, None), ("frames", frames, WALK_VIEWS)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most and value > most):
                wanted = f"an int in 1..{most}" if most else "an int >= 1"
                raise ValueError(f"`{key}` must be {wanted}, got {value!r}. Ask for at least one.")
        if rendered is not None and not Path(rendered).is_dir():
            raise FileNotFoundError(f"`rendered` must be a folder of rendered rooms, got {str(rendered)!r}.")
        self.level, self.first_seed, self.num_rooms = resolve_level(level), first_seed, num_rooms
        self.frames, self.per_type, self.seed, self.size, self.name = frames, per_type, seed, size, name
        self.rendered = None if rendered is None else Path(rendered)
        types = QUESTION_TYPES if types is None else tuple(types)
        self._slots = [(t, k) for t in types for k in range(1 if t == "room_size_estimation" else per_type)]
        self._rooms: OrderedDict[int, tuple[list[PIL.Image.Image], np.ndarray]] = OrderedDict()
        self._walks: OrderedDict[int, tuple[RoomWalk, dict[str, list[dict[str, Any]]]]] = OrderedDict()

    def __len__(self) -> int:
        return self.num_rooms * len(self._slots)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.row(index)
        images, _ = self._room(int(row["scene_name"]))
        content = [{"type": "image", "image": image} for image in images]
        return {
            "messages": [
                {"role": "user", "content": [*content, {"type": "text", "text": make_prompt(row)}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["ground_truth"]}]},
            ],
            "source": self.name,
            "row": f"{row['scene_name']}/{row['question_type']}/{row['id'] % MOST_QUESTIONS}",
            "question_type": row["question_type"],
            "skipped": [],
        }

    def row(self, index: int) -> dict[str, Any]:
        """The question of an example in the row format of VSI-Bench, as
        :func:`~spa3r.rooms.questions.room_questions` gives it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, the number of examples, got {index}.")
        room, slot = divmod(index % len(self), len(self._slots))
        question_type, k = self._slots[slot]
        for step in range(
            min(self.num_rooms, MOST_QUESTIONS // self.per_type)
        ):  # this room, or the next that allows it
            # From `step * per_type` on: the questions before stand at indices of nearer rooms.
            wanted = k + step * self.per_type
            rows = self._questions(self.first_seed + (room + step) % self.num_rooms, question_type, wanted + 1)
            if wanted < len(rows):
                return rows[wanted]
        return self._questions(self.first_seed + room, "room_size_estimation", 1)[0]  # every room allows that

    def _questions(self, seed: int, question_type: str, number: int) -> list[dict[str, Any]]:
        """The first `number` questions of a type about a room, or as many as it allows."""
        if seed not in self._walks:
            _, ids = self._room(seed)
            self._walks[seed] = RoomWalk.from_instance_ids(generate_room(seed, self.level), ids), {}
            if len(self._walks) > _WALKS_KEPT:
                self._walks.popitem(last=False)
        walk, known = self._walks[seed]
        if len(known.get(question_type, ())) < number:
            known[question_type] = room_questions(walk, self.seed, (question_type,), min(number, MOST_QUESTIONS))
        return known[question_type]

    def _room(self, seed: int) -> tuple[list[PIL.Image.Image], np.ndarray]:
        """Pictures of a room and their instance ids (V, H, W)."""
        if seed not in self._rooms:
            folder = self.rendered / f"{seed:07d}" if self.rendered else None
            self._rooms[seed] = self._read(folder) if folder and folder.is_dir() else self._render(seed)
            if len(self._rooms) > _ROOMS_KEPT:
                self._rooms.popitem(last=False)
        self._rooms.move_to_end(seed)
        return self._rooms[seed]

    def _chosen(self) -> np.ndarray:
        return uniform_indices(WALK_VIEWS, self.frames)

    def _read(self, folder: Path) -> tuple[list[PIL.Image.Image], np.ndarray]:
        images = []
        for view in self._chosen():
            with PIL.Image.open(folder / f"{view:03d}.png") as image:
                images.append(image.convert("RGB"))
        with np.load(folder / "truth.npz", allow_pickle=False) as truth:
            return images, truth["instance_ids"][self._chosen()]

    def _render(self, seed: int) -> tuple[list[PIL.Image.Image], np.ndarray]:
        room = generate_room(seed, self.level)
        walk = camera_walk(room, WALK_VIEWS * STRIDE_OF_WALK, (self.size, self.size))[::STRIDE_OF_WALK]
        views = render(room, walk[self._chosen()])
        return [PIL.Image.fromarray(image) for image in views.images], views.instance_ids
