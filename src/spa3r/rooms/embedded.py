"""The embedded models: small trained models, so that every command and example runs without a download.

All are trained on rendered rooms only, with the recipe in ``examples/rooms``: a Spa3R, a Spa3-VLM with the architecture
of Qwen2.5-VL and its real processor, and the same VLM without Spa3R for comparison. ``from_pretrained("embedded")``
loads them as well.
"""

from __future__ import annotations

from pathlib import Path

from spa3r.checkpoints import EMBEDDED, VLM
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining

ROOMS_NOTE = "the embedded models were trained on rendered rooms only, not on photographs"

VIEW_SIZE = 112
"""Width of a view in pixels: 8 x 8 patches."""


def embedded_model() -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """Load the embedded Spa3-VLM, trained to answer VSI-Bench's types of questions about rooms of level 0.

    Returns:
        The model, in eval mode on the CPU in float32, and its processor; its views are 112 pixels wide.
    """
    return _load(EMBEDDED)


def embedded_vlm() -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """Load the same VLM without Spa3R (``spatial_source="none"``), trained from the same start on the same data.

    Returns:
        As :func:`embedded_model`.
    """
    return _load(VLM)


def embedded_spa3r() -> tuple[Spa3RForPreTraining, Spa3RImageProcessor]:
    """Load the embedded Spa3R with its semantic teacher, trained on rooms of level 0.

    Returns:
        The model, in eval mode on the CPU in float32, and its image processor; its views are 112 pixels wide.
    """
    return Spa3RForPreTraining.from_pretrained(EMBEDDED), Spa3RImageProcessor.from_pretrained(EMBEDDED)


def _load(checkpoint: str | Path) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    return Spa3VLMForConditionalGeneration.from_pretrained(checkpoint), Spa3VLMProcessor.from_pretrained(checkpoint)
