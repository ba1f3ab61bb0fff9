"""Step 7 of the rooms recipe: what a VLM is asked about rooms, as instruction data that `spa3r finetune` reads.

Every room gives conversations of VSI-Bench's question types with their computed answers, and one that says what each
picture of its walk shows and where every object stands, seen from the first picture. The rows are a JSONL file beside
the rendered pictures.
"""

import argparse
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spa3r.data.room_questions import RoomQuestions
from spa3r.data.vsi_format import make_prompt
from spa3r.rooms import FURNITURE, generate_room, room_questions
from spa3r.video import uniform_indices

FILE = "conversations.jsonl"
FRAMES = 8
CONVERSATIONS = 4
"""So many about the questions of a room, each with one of every task: two directions would tell of each other, and
then nobody needs to look."""

CLEAR = 0.004
"""Share of a picture that an object covers to be named in its description: 50 pixels."""

DESCRIBE = "Which objects does each picture show?"
LOCATE = "Seen from the first picture, how many meters to the right and ahead is the middle of each object?"

Turn = tuple[str, str]


def describe(names: list[str | None], shares: np.ndarray) -> str:
    """What each picture shows, of (V, O) shares of its pixels."""
    shown = [
        ", ".join(sorted(name for name, share in zip(names, view) if name and share > CLEAR)) or "none"
        for view in shares
    ]
    return " ".join(f"{number}: {listed}." for number, listed in enumerate(shown, start=1))


def seen_from(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Metres to the right and ahead (O, 2), on the floor, of points (O, 3); the camera (4, 4), camera-from-room."""
    rotation = camera[:3, :3]
    axes = [axis / np.linalg.norm(axis) for axis in rotation[[0, 2], :2]]
    return (points[:, :2] + (rotation.T @ camera[:3, 3])[:2]) @ np.stack(axes, axis=1)


def locate(names: list[str | None], middles: np.ndarray, first_camera: np.ndarray) -> str:
    """Where objects stand: (O, 3) in the room's frame."""
    placed = sorted((name, *place) for name, place in zip(names, seen_from(first_camera, middles)) if name)
    return ", ".join(f"{name} {right:.1f} {ahead:.1f}" for name, right, ahead in placed) + "."


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
    cameras = list(json.loads((folder / "cameras.json").read_text()).items())
    names = [name if number in walk.asked else None for number, name in enumerate(walk.names)]
    middles = np.array([item.center for item in walk.room.objects])
    both = [
        (DESCRIBE, describe(walk.names, walk.shares)),
        (LOCATE, locate(names, middles, np.array(cameras[0][1]["extrinsics"]))),
    ]
    conversations.append([both[i] for i in rng.permutation(2)])
    pictures = [f"{folder.name}/{cameras[view][0]}" for view in uniform_indices(len(cameras), FRAMES)]
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
    """The rows in memory; batches of them, in which pictures have places and are not read.

    Args:
        data: Folder of `render.py` with the rows.
    """

    def __init__(self, data: Path):
        self.data = data
        self.rows = [json.loads(line) for line in (data / FILE).open()]
        self.walks = {row["id"].partition("/")[0]: row["images"] for row in self.rows}
        self.numbers = {room: number for number, room in enumerate(self.walks)}

    def texts(self, rooms: int) -> list[str]:
        """All that is said about the first so many rooms."""
        first = set(list(self.walks)[:rooms])
        rows = [row for row in self.rows if row["id"].partition("/")[0] in first]
        return [message["content"].replace("<image>", "") for row in rows for message in row["messages"]]

    def pictures(self) -> Iterator[np.ndarray]:
        """(FRAMES, H, W, 3) uint8 of every room."""
        for names in self.walks.values():
            yield np.stack([np.asarray(PIL.Image.open(self.data / name)) for name in names])

    def cells(self, number: int) -> dict[str, Tensor]:
        """What each of so many cells of a walk's pictures shows, cells in the order of the VLM's image tokens.

        Returns:
            ``kinds`` (rooms, cells, kinds of furniture): which ones take a seventh of the cell; ``places`` (rooms,
            cells, 2): where the object stands that takes most of it, metres to the right and ahead, seen from the first
            picture; ``is_clear`` (rooms, cells): whether that is a fifth.
        """
        kinds, places, is_clear = [], [], []
        for room, names in self.walks.items():
            folder, views = self.data / room, [int(Path(name).stem) for name in names]
            with np.load(folder / "truth.npz") as truth:
                ids = truth["instance_ids"][views]
            side = round((number // FRAMES) ** 0.5)
            ids = ids.reshape(FRAMES, side, ids.shape[1] // side, side, -1).swapaxes(2, 3).reshape(number, -1)
            objects = generate_room(int(room), 0).objects
            shares = (ids[:, :, None] == np.arange(1, len(objects) + 1)).mean(1)  # (cells, objects)
            kind = np.array([[item.name == name for name in FURNITURE] for item in objects])
            kinds.append(shares @ kind > 0.15)
            camera = json.loads((folder / "cameras.json").read_text())[Path(names[0]).name]["extrinsics"]
            places.append(seen_from(np.array(camera), np.array([item.center for item in objects]))[shares.argmax(1)])
            is_clear.append(shares.max(1) > 0.2)
        named = {"kinds": kinds, "places": np.array(places, np.float32), "is_clear": is_clear}
        return {name: torch.from_numpy(np.array(value)) for name, value in named.items()}

    def draw(
        self, rng: np.random.Generator, size: int, tokenizer: PreTrainedTokenizerBase, cells: int, appended: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows at random.

        Args:
            rng: Draws them.
            size: How many.
            tokenizer: With a chat template that marks the assistant's words.
            cells: Places of each picture.
            appended: Places for spatial tokens after the last picture.

        Returns:
            Numbers of the rows' rooms (size,), and the VLM's inputs about text: ``input_ids``, ``attention_mask``,
            ``labels``, ``mm_token_type_ids``, each (size, sequence).
        """
        chosen = [self.rows[index] for index in rng.integers(len(self.rows), size=size)]
        place, last = f"<|vision_start|>{tokenizer.image_token * cells}<|vision_end|>", tokenizer.pad_token * appended
        written = [
            tokenizer.apply_chat_template(
                [
                    message | {"content": message["content"].replace("<image>" * FRAMES, place * FRAMES + last)}
                    for message in row["messages"]
                ],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            for row in chosen
        ]
        ids, masks, is_text = (
            nn.utils.rnn.pad_sequence([torch.tensor(one[key]) for one in written], batch_first=True)
            for key in ("input_ids", "assistant_masks", "attention_mask")
        )
        return torch.tensor([self.numbers[row["id"].partition("/")[0]] for row in chosen]), {
            "input_ids": ids.masked_fill(is_text == 0, tokenizer.pad_token_id),
            "attention_mask": is_text,
            "labels": ids.masked_fill(masks == 0, -100),
            "mm_token_type_ids": (ids == tokenizer.image_token_id).int(),
        }


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
