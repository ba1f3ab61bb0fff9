"""A probe of untested VLMs: noise in the image tokens that a VLM is given must move its logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from spa3r.models.spa3_vlm.state import in_eval_mode
from spa3r.models.spa3_vlm.vlm import TESTED_FAMILIES

logger = logging.get_logger(__name__)

THRESHOLD = 1e-3
"""Relative change of the logits below which the image tokens have not reached them."""

_PROBED: WeakSet[PreTrainedModel] = WeakSet()
_LEFT_OUT = {"labels", "logits_to_keep", "mm_encoder_outputs", "return_dict", "use_cache"}
_CACHES = ("cache", "past_key_values")


@torch.no_grad()
def probe_once(
    vlm: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: Mapping[str, Any]
) -> None:
    """Check with the first pictures that a VLM of an untested family reads the image tokens that it is given.

    The check takes two calls of ``forward`` and two of ``generate``. Models whose weights are sharded over processes
    are not probed, since each process would have to take part: the log says so.

    Args:
        vlm: A VLM. If its family is tested, or this model has passed the check, nothing happens.
        input_ids: (batch, sequence), prompts with pictures; or None.
        attention_mask: (batch, sequence); or None.
        inputs: The other inputs, with ``mm_encoder_outputs``.

    Raises:
        ValueError: The logits of ``forward`` or ``generate`` don't depend on the image tokens.
    """
    family = vlm.config.model_type
    if family in TESTED_FAMILIES or vlm in _PROBED:
        return
    is_sharded = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in vlm.parameters())
    logger.warning_once(
        f"The VLM family {family!r} is not among those that are tested with spa3r. "
        + (
            "Its weights are sharded, so it is not probed either: run it in one process before."
            if is_sharded
            else "A probe checks that it reads the image tokens that it is given. Compare its answers with the VLM's."
        )
    )
    if not is_sharded:
        _probe(vlm, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs})
    _PROBED.add(vlm)


def _probe(vlm: Any, inputs: Mapping[str, Any]) -> None:
    base, features = vlm.base_model, inputs["mm_encoder_outputs"]["image"]
    names = {*inspect.signature(vlm.forward).parameters, *inspect.signature(base.forward).parameters} - _LEFT_OUT
    known = {name: value for name, value in inputs.items() if name in names and value is not None}
    offsets = getattr(base, "rope_deltas", None)

    def logits(call: str, tokens: Any) -> Tensor:
        output = copy.copy(features)
        output.pooler_output = tokens
        caches = {name: copy.deepcopy(known[name]) for name in _CACHES if name in known}  # calls extend them
        arguments: dict[str, Any] = known | caches | {"mm_encoder_outputs": {"image": output}}
        if call == "forward":
            return vlm(**arguments).logits.float()
        choice = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
        return vlm.generate(**arguments, **choice, output_logits=True).logits[0].float()

    try:
        with in_eval_mode(vlm):
            for call in ("forward", "generate"):
                still, moved = (logits(call, tokens) for tokens in (features.pooler_output, _noisy(features)))
                if not (moved - still).norm() > THRESHOLD * still.norm():
                    raise ValueError(
                        f"The VLM family {vlm.config.model_type!r} can't be combined with a Spa3R: its {call} ignores "
                        "the image tokens in `mm_encoder_outputs`, since noise in them did not move its logits. Use a "
                        "family that the documentation lists as tested."
                    )
    finally:
        if offsets is not None:
            base.rope_deltas = offsets


def _noisy(features: Any) -> Any:
    """Image tokens with noise as large as they are; grouped as given."""
    generator = torch.Generator().manual_seed(0)

    def noisy(tokens: Tensor) -> Tensor:
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)
        return tokens + noise * tokens.float().square().mean().sqrt().to(tokens)

    tokens = features.pooler_output
    return noisy(tokens) if isinstance(tokens, Tensor) else [noisy(part) for part in tokens]
