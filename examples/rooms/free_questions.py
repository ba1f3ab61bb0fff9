"""Questions in free wording: does the embedded Spa3-VLM answer in the right form?

The questions of `paraphrases.jsonl` were written by hand and are used in no training. Each is asked about unseen rooms,
with names of objects that the pictures show. An answer has the right form if it is, for example, a number of meters
for a distance; whether it is true is not counted here. For questions that are not about rooms, the right form is "I can
only answer ...".

    python examples/rooms/free_questions.py
"""

import argparse
import json
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from free_wording import plural

from spa3r import Spa3VLM, Spa3VLMProcessor
from spa3r.rooms import COLORS, FURNITURE, RoomWalk
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions

QUESTIONS = Path(__file__).parent / "paraphrases.jsonl"
REFUSAL = "I can only answer"
NUMBER = r"\d+(\.\d+)?"
NAME = rf"(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(FURNITURE)})"
FORMS = {
    "count": r"\d+",
    "meters": rf"{NUMBER} ?(m|met(er|re)s?)",
    "centimeters": rf"{NUMBER} ?(cm|centimet(er|re)s?)",
    "square meters": rf"{NUMBER} ?(m2|m²|square met(er|re)s?)",
    "nearest": NAME,
    "direction": r"(front-|back-)?(left|right)|behind|ahead|back",
    "yes or no": r"yes|no",
    "order": rf"{NAME}(, {NAME})*",
    "objects": rf"{NAME}(, {NAME})*",
    "color": "|".join(COLORS),
    "outside": rf"{re.escape(REFUSAL)}.*",
}
"""Regular expression of the whole answer, in lower case, without a period at the end."""


def fill(question: str, walk: RoomWalk, rng: np.random.Generator) -> str | None:
    """The question about objects that the walk shows and that have a name; None if the walk shows too few."""
    slots = sorted(set(re.findall(r"{([a-d])s?}", question)))
    shown = [walk.names[k] for k in walk.asked]
    if len(shown) < len(slots):
        return None
    chosen = dict(zip(slots, rng.permutation(shown)[: len(slots)].tolist()))
    kinds = {slot: next(kind for kind in FURNITURE if name.endswith(kind)) for slot, name in chosen.items()}
    plurals = {f"{slot}s": plural(kind) for slot, kind in kinds.items()}
    return question.format(**chosen, **plurals, color=rng.choice(list(COLORS)))


def has_form(form: str, question: str, answer: str) -> bool:
    """Whether an answer has the form that its question wants. Names must be of objects that the question names."""
    answer = answer.strip().removesuffix(".")
    pattern = FORMS[form]
    if form == "outside":
        return re.fullmatch(pattern, answer) is not None
    if re.fullmatch(pattern, answer.lower()) is None:
        return False
    if form in ("nearest", "order"):
        return all(re.search(rf"\b{name}\b", question) for name in answer.lower().split(", "))
    return True


def ask(rooms: int, seed: int, attempts: int = 20) -> Iterator[tuple[int, str, str]]:
    """Room, form and question; each question about `rooms` rooms that show enough objects for it."""
    paraphrases = [json.loads(line) for line in QUESTIONS.open()]
    data = RoomQuestions(FIRST_TEST_SEED + seed, rooms + attempts)
    rng = np.random.default_rng(seed)
    for row in paraphrases:
        asked = 0
        for index in range(rooms + attempts):
            room = FIRST_TEST_SEED + seed + index
            question = fill(row["question"], data.walk(room), rng)
            if question is not None:
                yield room, row["form"], question
                asked += 1
            if asked == rooms:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rooms", type=int, default=3, help="rooms for each question")
    parser.add_argument("--seed", type=int, default=7000, help="number of the first test room, and of the draws")
    parser.add_argument("--show", type=int, default=2, help="examples printed for each form")
    args = parser.parse_args()
    model = Spa3VLM.from_pretrained(args.model).eval()
    processor = Spa3VLMProcessor.from_pretrained(args.model)
    data = RoomQuestions(FIRST_TEST_SEED + args.seed, args.rooms + 20)
    asked: dict[int, list[tuple[str, str]]] = {}
    for room, form, question in ask(args.rooms, args.seed):
        asked.setdefault(room, []).append((form, question))
    results: dict[str, list[tuple[bool, str, str]]] = {form: [] for form in FORMS}
    for room, questions in asked.items():
        with torch.no_grad():
            scene = model.encode_scene(processor, data.pictures(room))
            answers = model.ask(scene, [question for _, question in questions], max_new_tokens=32)
        for (form, question), answer in zip(questions, answers):
            results[form].append((has_form(form, question, answer), question, answer))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"{args.model}, {len(asked)} unseen rooms, every question about {args.rooms} of them\n")
    print(f"{'wanted':<14} {'asked':>6} {'right form %':>13}")
    for form, rows in results.items():
        print(f"{form:<14} {len(rows):>6} {100 * np.mean([right for right, _, _ in rows]):>13.1f}")
    whole = [right for rows in results.values() for right, _, _ in rows]
    print(f"{'all':<14} {len(whole):>6} {100 * np.mean(whole):>13.1f}\n")
    for form, rows in results.items():
        for right, question, answer in rows[:: max(1, len(rows) // args.show)][: args.show]:
            print(f"{form}, {'right' if right else 'wrong'} form: {question!r} -> {answer!r}")


if __name__ == "__main__":
    main()
