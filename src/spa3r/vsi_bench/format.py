"""The row format of VSI-Bench: questions, question types, and prompts.

A row is a dict ``{id, dataset, scene_name, question_type, question, ground_truth, options}`` about the video
``<dataset>/<scene_name>.mp4``. The types and the prompt are those of the official evaluation of VSI-Bench
(arXiv 2412.14171).
"""

from collections.abc import Iterable, Mapping
from typing import Any

CHOICE_TYPES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
"""Types answered by the letter of an option."""

NUMBER_TYPES = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
"""Types answered by a number: meters, a count, centimeters, square meters."""

TYPE_TITLES = {
    "object_counting": "How many",
    "object_abs_distance": "Distance",
    "object_size_estimation": "Object size",
    "room_size_estimation": "Room size",
    "object_rel_distance": "Which is nearest",
    "object_rel_direction_easy": "Direction, easy",
    "object_rel_direction_medium": "Direction, medium",
    "object_rel_direction_hard": "Direction, hard",
    "route_planning": "Route",
    "obj_appearance_order": "Order of appearance",
}
"""Short titles of all types."""

FIRST_WORDS = "These are frames of a video."
NUMBER_WORDS = "Please answer the question using a single word or phrase."
CHOICE_WORDS = "Answer with the option's letter from the given choices directly."


def is_choice(question_type: str) -> bool:
    """Whether questions of a type are answered by the letter of an option, rather than by a number.

    Args:
        question_type: One of :data:`CHOICE_TYPES` and :data:`NUMBER_TYPES`.

    Raises:
        ValueError: The type is not one of VSI-Bench's.
    """
    if question_type in CHOICE_TYPES:
        return True
    if question_type in NUMBER_TYPES:
        return False
    types = ", ".join((*NUMBER_TYPES, *CHOICE_TYPES))
    raise ValueError(f"`question_type` must be a type of VSI-Bench ({types}), got {question_type!r}.")


def task_title(name: str) -> str:
    """The readable name of a score: ``object counting`` of ``object_counting_MRA:.5:.95:.05``."""
    return name.partition("_MRA")[0].removesuffix("_accuracy").replace("_", " ")


def make_prompt(row: Mapping[str, Any]) -> str:
    """The text prompt after the frames, identical to the official evaluation.

    Args:
        row: A row of VSI-Bench; uses ``question_type``, ``question`` and, for a choice, ``options``, such as
            ``["A. left", "B. right"]``.

    Returns:
        Lines: an opening, the question, the options if it is a choice, and the answer format.

    Raises:
        ValueError: The type is not one of VSI-Bench's, the question is not a text, or the options of a choice are
            missing or not texts.
    """
    if not isinstance(row["question"], str):
        raise ValueError(f"`question` must be a text, got {row['question']!r}.")
    if not is_choice(row["question_type"]):
        return "\n".join((FIRST_WORDS, row["question"], NUMBER_WORDS))
    options = row.get("options")
    are_texts = not isinstance(options, str | None) and all(isinstance(option, str) for option in options)
    if not are_texts or len(options) == 0:
        raise ValueError(
            f'`options` of a question of type {row["question_type"]} must be a list of choices such as "A. left", '
            f"got {options!r}."
        )
    return "\n".join((FIRST_WORDS, row["question"], "Options:", *options, CHOICE_WORDS))


def make_messages(row: Mapping[str, Any], frames: Iterable[Any]) -> list[dict[str, Any]]:
    """Convert a row to a conversation in the chat format of Hugging Face: frames and prompt, then the truth.

    Args:
        row: A row of VSI-Bench.
        frames: Pictures, in order.

    Returns:
        The user's message, with an item ``{"type": "image", "image": ...}`` per frame, and the assistant's.
    """
    content = [*({"type": "image", "image": frame} for frame in frames), {"type": "text", "text": make_prompt(row)}]
    truth = [{"type": "text", "text": str(row["ground_truth"])}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": truth}]
