"""The small trained checkpoints that come with the package, and the name by which ``from_pretrained`` finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
"""What commands and ``from_pretrained`` call the checkpoints in the package, in place of a folder or hub id."""

_HERE = Path(__file__).parent

SPA3R = _HERE / "rooms"
"""A Spa3R with its semantic teacher."""

SPA3_VLM = _HERE / "rooms_spa3_vlm"
"""A Spa3-VLM."""

VLM = _HERE / "rooms_vlm"
"""The same VLM, trained on the same questions without Spa3R: a Spa3-VLM with ``spatial_source="none"``."""

SCORES = _HERE / "rooms_scores.json"
"""Overall scores of both on many rooms, with the hashes of the weights that were measured."""

EXAMPLE_QUESTIONS = (
    "How many chairs are there?",
    "Is there a bed?",
    "How far is the table from the lamp?",
    "What do you see?",
)
"""Questions that the Spa3-VLM in the package answers in the right form."""

QUESTIONS_NOTE = "Questions that the embedded model can answer: " + " ".join(EXAMPLE_QUESTIONS)


def resolve(name_or_path: Any, model_type: str = "spa3r") -> Any:
    """The folder of the checkpoint in the package for models of a type; any other name as it is."""
    if not isinstance(name_or_path, str) or name_or_path != EMBEDDED:
        return name_or_path
    return SPA3_VLM if model_type == "spa3_vlm" else SPA3R
