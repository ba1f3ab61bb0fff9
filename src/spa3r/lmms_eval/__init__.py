"""Spa3-VLM in lmms-eval: the target of this package's entry point in the group ``lmms_eval.models``.

lmms-eval loads the group whenever it lists its models, even to run another one. The class, which imports half of
lmms-eval, is therefore only named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The registration for lmms-eval: ``--model spa3r``, alias ``spa3_vlm``, with chat messages."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="spa3r", chat_class_path="spa3r.lmms_eval.model.Spa3VLMForLmmsEval", aliases=("spa3_vlm",)
    )
