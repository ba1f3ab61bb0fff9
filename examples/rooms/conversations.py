"""Step 7 of the rooms recipe: conversations about rooms, as instruction data for `spa3r finetune`.

Every room gives conversations of VSI-Bench's question types with their computed answers, one that describes each
picture of its walk, and some in free wording. The rows are a JSONL file next to the rendered pictures.
"""

import argparse
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from free_wording import FreeQuestions, Turn
from render import VIEWS
from torch import Tensor, nn

from spa3r.media.videos import uniform_indices
from spa3r.rooms import COLORS, FURNITURE, generate_room, room_questions
from spa3r.rooms.instructions import RoomQuestions
from spa3r.vsi_bench.format import FIRST_WORDS, NUMBER_WORDS, make_prompt

FILE = "conversations.jsonl"
FRAMES = 8
CONVERSATIONS = 8
"""Number of conversations per room, each with one question of every task: a second direction question could be
answered from the first without the pictures. Every second conversation asks questions with options without the options:
the letter of an answer says little about why it is right."""

FREE_CONVERSATIONS = 5
FREE_QUESTIONS = 10
"""Number of conversations in free wording per room, and of questions in each."""

BACK = "_back"
WALKS = ("", BACK)
"""Suffixes of the files of a walk: the walk of the rows, and the way back."""

CLEAR = 0.004
"""Minimum share of a picture that an object covers to be named in its description: 50 pixels."""

WORDS = (*FURNITURE, *(f"{color} " for color in COLORS))
"""Words for objects; a color comes before a kind of furniture."""

DESCRIBE = "Which objects does each picture show?"


def describe(names: list[str | None], shares: np.ndarray) -> str:
    """Describe what each picture shows, from the (V, O) shares of its pixels."""
    shown = [
        ", ".join(sorted(name for name, share in zip(names, view) if name and share > CLEAR)) or "none"
        for view in shares
    ]
    return " ".join(f"{number}: {listed}." for number, listed in enumerate(shown, start=1))


def seen_from(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Meters to the right and ahead (O, 2), on the floor, of points (O, 3); the camera (4, 4) is camera-from-room."""
    rotation = camera[:3, :3]
    axes = [axis / np.linalg.norm(axis) for axis in rotation[[0, 2], :2]]
    return (points[:, :2] + (rotation.T @ camera[:3, 3])[:2]) @ np.stack(axes, axis=1)


def asked_openly(turn: Turn) -> Turn:
    """A question without its options, with the right option as the answer."""
    question, answer = turn
    question, _, options = question.partition("\nOptions:\n")
    if not options:
        return turn
    (told,) = (option[3:] for option in options.splitlines() if option.startswith(f"{answer}. "))
    return f"{question}\n{NUMBER_WORDS}", told


def rows_of(seed: int, data: Path) -> list[dict]:
    """The rows about one room."""
    questions = RoomQuestions(seed, 1, frames=FRAMES, rendered=data)
    walk, folder = questions.walk(seed), data / f"{seed:07d}"
    rng = np.random.default_rng([seed, 7])
    tasks: dict[str, list[Turn]] = {}
    for row in room_questions(walk, per_type=CONVERSATIONS):
        turn = make_prompt(row), row["ground_truth"]
        tasks.setdefault(re.sub("_(easy|medium|hard)$", "", row["question_type"]), []).append(turn)
    dealt = [[turns[i] for i in rng.permutation(len(turns))[:CONVERSATIONS]] for turns in tasks.values()]
    conversations = [[turns[deal] for turns in dealt if deal < len(turns)] for deal in range(CONVERSATIONS)]
    conversations = [[turns[i] for i in rng.permutation(len(turns))] for turns in conversations]
    conversations[1::2] = [[asked_openly(turn) for turn in turns] for turns in conversations[1::2]]
    conversations.append([(DESCRIBE, describe(walk.names, walk.shares))])
    cameras = json.loads((folder / "cameras.json").read_text())
    views = [list(cameras)[view] for view in uniform_indices(len(cameras), FRAMES)]
    pictures = [f"{folder.name}/{view}" for view in views]
    places = seen_from(np.array(cameras[views[0]]["extrinsics"]), np.array([item.center for item in walk.room.objects]))
    free = iter(FreeQuestions(walk, places, rng))
    conversations += [list(islice(free, FREE_QUESTIONS)) for _ in range(FREE_CONVERSATIONS)]
    return [
        {"id": f"{folder.name}/{number}", "images": pictures, "messages": list(messages(turns))}
        for number, turns in enumerate(conversations)
        if turns
    ]


def messages(turns: list[Turn]) -> Iterator[dict[str, str]]:
    """The turns of a conversation, the pictures before the first."""
    for number, (question, answer) in enumerate(turns):
        yield {"role": "user", "content": "<image>" * FRAMES * (number == 0) + question}
        yield {"role": "assistant", "content": answer}


class Conversations:
    """The rows in memory; batches of their questions, with placeholders for pictures, which are not read.

    Args:
        data: Output folder of `render.py` with the rows.
        back: Use the pictures between those of the rows, from the last to the first: another walk through the same
            room.
    """

    def __init__(self, data: Path, back: bool = False):
        self.data = data
        self.walks: dict[str, list[str]] = {}
        self.turns: list[list[Turn]] = []
        for line in (data / FILE).open():
            row = json.loads(line)
            if (room := row["id"].partition("/")[0]) not in self.walks:
                others = [
                    name for name in (f"{room}/{view:03d}.png" for view in range(VIEWS)) if name not in row["images"]
                ]
                self.walks[room] = others[::-1] if back else row["images"]
                self.turns.append([])
            said = [message["content"].replace("<image>", "") for message in row["messages"]]
            self.turns[-1] += zip(said[::2], said[1::2])

    def texts(self, rooms: int) -> list[str]:
        """What a tokenizer is trained on: texts in the benchmark's wording and the words of free ones.

        They are about the first `rooms` rooms. A line of the benchmark can become one token, but a token of a free
        question is not longer than a word: other questions consist of the same words.
        """
        texts = []
        for turns in self.turns[:rooms]:
            for turn in turns:
                if turn[0].startswith((FIRST_WORDS, DESCRIBE)):
                    texts += turn
                else:
                    texts += [word for text in turn for word in re.findall("(?:^| )[^ ]+", text)]
        return texts

    def pictures(self) -> Iterator[np.ndarray]:
        """(FRAMES, H, W, 3) uint8 of every room."""
        for names in self.walks.values():
            yield np.stack([np.asarray(PIL.Image.open(self.data / name)) for name in names])

    def objects(self) -> dict[str, Tensor]:
        """All rooms' objects, padded.

        Returns:
            ``words`` (rooms, objects, 2), numbers of kind and color among `WORDS`, -1 for padding; ``middles`` (rooms,
            objects, 2), meters to the right and ahead, seen from the first picture.
        """
        words, middles = [], []
        for room, names in self.walks.items():
            objects = generate_room(int(room), 0).objects
            camera = json.loads((self.data / room / "cameras.json").read_text())[Path(names[0]).name]["extrinsics"]
            words.append(torch.tensor([[WORDS.index(item.name), WORDS.index(f"{item.color} ")] for item in objects]))
            seen = seen_from(np.array(camera), np.array([item.center for item in objects]))
            middles.append(torch.from_numpy(seen).float())
        pad = nn.utils.rnn.pad_sequence
        return {"words": pad(words, batch_first=True, padding_value=-1), "middles": pad(middles, batch_first=True)}

    def cells(self, number: int) -> dict[str, Tensor]:
        """What each of `number` cells of a walk's pictures shows, with the cells in the order of the VLM's image
        tokens.

        Returns:
            ``names`` (rooms, cells, words): which kinds of furniture and which of its colors cover a seventh of the
            cell; ``places`` (rooms, cells, 2): the position of the object that covers most of it, meters to the right
            and ahead, seen from the first picture; ``is_clear`` (rooms, cells): whether it covers a fifth.
        """
        named, places, is_clear = [], [], []
        for room, names in self.walks.items():
            folder, views = self.data / room, [int(Path(name).stem) for name in names]
            with np.load(folder / "truth.npz") as truth:
                ids = truth["instance_ids"][views]
            side = round((number // FRAMES) ** 0.5)
            ids = ids.reshape(FRAMES, side, ids.shape[1] // side, side, -1).swapaxes(2, 3).reshape(number, -1)
            objects = generate_room(int(room), 0).objects
            shares = (ids[:, :, None] == np.arange(1, len(objects) + 1)).mean(1)  # (cells, objects)
            words = np.array([[word in (item.name, f"{item.color} ") for word in WORDS] for item in objects])
            named.append(shares @ words > 0.15)
            camera = json.loads((folder / "cameras.json").read_text())[Path(names[0]).name]["extrinsics"]
            places.append(seen_from(np.array(camera), np.array([item.center for item in objects]))[shares.argmax(1)])
            is_clear.append(shares.max(1) > 0.2)
        found = {"names": named, "places": np.array(places, np.float32), "is_clear": is_clear}
        return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of render.py")
    parser.add_argument("--rooms", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    output = args.data / FILE
    with ProcessPoolExecutor(args.processes) as pool, output.with_suffix(".tmp").open("w") as file:
        for rows in pool.map(partial(rows_of, data=args.data), range(args.rooms), chunksize=50):
            file.writelines(json.dumps(row) + "\n" for row in rows)
    output.with_suffix(".tmp").replace(output)
    print(f"{output}: {sum(1 for _ in output.open())} conversations about {args.rooms} rooms")


if __name__ == "__main__":
    main()
