"""Questions about objects that no picture given to the VLM shows, but a view given to Spa3R does.

Every room has 8 views. The VLM gets the first 4 as pictures. Spa3R gets all 8, or only the same 4: the inputs of its
views (`view_pixel_values` and what belongs to it) are independent of the VLM's pictures. Asked are objects that are
clearly visible in a later view and invisible in the pictures: is there one (beside as many absent classes), how many,
how far from another object. Scores are those of VSI-Bench, in percent; yes or no is right or wrong; ± is the standard
error over rooms.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from common import FIRST_HELD_OUT
from evaluate import about

from spa3r import Spa3VLM, Spa3VLMProcessor
from spa3r.checkpoints import EMBEDDED, VLM
from spa3r.evaluation import Measure, score_prediction
from spa3r.models.spa3_vlm.asking import conversation
from spa3r.models.spa3_vlm.processing_spa3_vlm import prompt_inputs
from spa3r.rooms import FURNITURE, RoomWalk, generate_room, look_around, render
from spa3r.tables import Table
from spa3r.vsi_bench.format import make_prompt

VIEWS, PICTURES = 8, 4
CLEAR, TRACE = 0.004, 0.0004
"""Share of a picture from which an object counts as clearly visible, and below which as invisible, as in questions."""

KINDS = ("existence", "count", "distance")


@dataclass
class Asked:
    """A question: its prompt, and the row by whose rules an answer is scored; None for yes or no."""

    kind: str
    prompt: str
    truth: str
    row: dict[str, str] | None = field(default=None)

    def score(self, answer: str) -> float:
        if self.row is None:
            return float(answer.strip().lower().startswith(self.truth))
        return score_prediction(self.row, answer)


def questions(walk: RoomWalk, rng: np.random.Generator) -> list[Asked]:
    """All questions about what only later views of a room show."""
    objects, names = walk.room.objects, walk.names
    invisible = walk.shares[:PICTURES].max(0) < TRACE
    clear = walk.shares[PICTURES:].max(0) >= CLEAR
    classes = {item.name for item in objects}
    hidden = {name for name in classes if all(invisible[i] for i, item in enumerate(objects) if item.name == name)}
    hidden = sorted(name for name in hidden if any(clear[i] for i, item in enumerate(objects) if item.name == name))
    asked = []
    absent = rng.permutation(sorted(set(FURNITURE) - classes))[: len(hidden)]
    for name, truth in [*((name, "yes") for name in hidden), *((str(name), "no") for name in absent)]:
        asked.append(Asked("existence", f"Is there a {name}?", truth))
    for name in hidden:
        truth = str(sum(item.name == name for item in objects))
        asked.append(vsi("count", "object_counting", f"How many {name}(s) are in this room?", truth))
    known = np.flatnonzero(walk.shares.max(0) >= CLEAR)
    for one in np.flatnonzero(invisible & clear):
        others = [other for other in known if other != one and names[other] and walk.distances[one, other] >= 0.5]
        if names[one] and others:
            other = rng.choice(others)
            question = (
                "Measuring from the closest point of each object, what is the distance between the "
                f"{names[one]} and the {names[other]} (in meters)?"
            )
            asked.append(vsi("distance", "object_abs_distance", question, f"{walk.distances[one, other]:.1f}"))
    return asked


def vsi(kind: str, question_type: str, question: str, truth: str) -> Asked:
    """A question in the form of VSI-Bench."""
    row = {"question_type": question_type, "question": question, "ground_truth": truth, "options": None}
    return Asked(kind, make_prompt(row), truth, row)


@torch.no_grad()
def answers(
    model: Spa3VLM,
    processor: Spa3VLMProcessor,
    pictures: Sequence[PIL.Image.Image],
    views: Sequence[PIL.Image.Image],
    prompts: Sequence[str],
) -> list[str]:
    """Answers of a model whose VLM gets the pictures and whose Spa3R gets the views."""
    inputs = prompt_inputs(processor, [conversation(pictures, prompt) for prompt in prompts])
    inputs = {**inputs, **processor.view_image_processor([list(views)] * len(prompts))}
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(tokens, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spa3-vlm", nargs="+", default=[EMBEDDED], help="Spa3-VLMs, one for each seed")
    parser.add_argument("--vlm", nargs="+", default=[str(VLM)], help="VLMs alone")
    parser.add_argument("--vggt", nargs="*", default=[], help="VLMs with VGGT's tokens")
    parser.add_argument("--rooms", type=int, default=100)
    args = parser.parse_args()
    rooms = []
    for seed in range(FIRST_HELD_OUT, FIRST_HELD_OUT + args.rooms):
        room = generate_room(seed, 0)
        cameras = look_around(room, VIEWS)
        if asked := questions(RoomWalk.from_cameras(room, cameras), np.random.default_rng(seed)):
            rooms.append((asked, [PIL.Image.fromarray(image) for image in render(room, cameras).images]))
    print(f"{about()}\n{sum(len(asked) for asked, _ in rooms)} questions about {len(rooms)} unseen rooms of level 0 of "
          f"{args.rooms}; the others have no such object\n", flush=True)  # fmt: skip

    def row(title: str, names: Sequence[str], pictures: int, views: int) -> list[str]:
        measures = {kind: Measure() for kind in (*KINDS, "all")}
        for name in names:
            model, processor = Spa3VLM.from_pretrained(name), Spa3VLMProcessor.from_pretrained(name)
            for asked, shown in rooms:
                told = answers(model, processor, shown[:pictures], shown[:views], [one.prompt for one in asked])
                scores = [(one.kind, 100 * one.score(answer)) for one, answer in zip(asked, told)]
                for kind, measure in measures.items():
                    if found := [score for of, score in scores if kind in (of, "all")]:
                        measure.add(sum(found) / len(found))
        return [title, *(f"{m.mean:.1f} ± {m.standard_error:.1f}" for m in measures.values())]

    rows = []
    for title, names, sees in (
        ("Spa3-VLM", args.spa3_vlm, "Spa3R"),
        ("+ VGGT's tokens", args.vggt, "VGGT"),
        ("the VLM alone", args.vlm, None),
    ):
        if not names:
            rows.append([f"{title}: not trained", *["–"] * 4])
            continue
        if sees:
            rows.append(row(f"{title}: {PICTURES} pictures, {sees} sees all {VIEWS} views", names, PICTURES, VIEWS))
            rows.append(row(f"{title}: {PICTURES} pictures, {sees} sees the same", names, PICTURES, PICTURES))
        else:
            rows.append(row(f"{title}: {PICTURES} pictures", names, PICTURES, PICTURES))
        rows.append(row(f"{title}: all {VIEWS} pictures", names, VIEWS, VIEWS))
    print(Table(["", *KINDS, "all"], rows))


if __name__ == "__main__":
    main()
