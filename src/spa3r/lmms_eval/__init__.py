"""Spa3-VLM in lmms-eval: what the entry-point group ``lmms_eval.models`` of this package leads to.

lmms-eval reads the group whenever it lists its models, also for those who run another one, so the class itself, which
imports half of lmms-eval, is only named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers: ``--model spa3r``, also called ``spa3_vlm``, with chat messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="spa3r", chat_class_path="spa3r.lmms_eval.model.Spa3VLMForLmmsEval", aliases=("spa3_vlm",)
    )
