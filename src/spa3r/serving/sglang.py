"""Prompts for an engine of SGLang, which takes image tokens in place of pictures as vLLM does.

It is written to the interface that SGLang documents for Qwen2.5-VL ("Query VLM with Offline Engine", precomputed
embeddings), and was not run with SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.serving.vllm import fused_prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl")


def sglang_arguments(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, messages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The arguments of ``sglang.Engine.generate`` for a conversation; not run with SGLang.

    The engine loads the folder that :func:`~spa3r.serving.export_vlm` writes.

    Args:
        model: A Spa3-VLM of the family ``qwen2_vl`` or ``qwen2_5_vl``.
        processor: Its processor.
        messages: See :func:`~spa3r.serving.vllm_prompt`.

    Returns:
        ``input_ids``, with a placeholder for each image token, and for prompts with pictures ``image_data``: one item
        of the format ``"precomputed_embedding"`` with ``feature`` (image tokens, width) and ``image_grid_thw``.

    Raises:
        ValueError: The family has no such interface that is documented, a message is invalid, or a picture can't be
            read.
    """
    prompt = fused_prompt(model, processor, messages)
    if (family := model.vlm.config.model_type) not in FAMILIES:
        raise ValueError(
            f"SGLang documents image tokens in place of pictures for {' and '.join(FAMILIES)} only, got a VLM of the "
            f"family {family!r}. Use vLLM: spa3r.serving.vllm_prompt."
        )
    arguments: dict[str, Any] = {"input_ids": prompt.whole_ids}
    if prompt.pictures:
        feature = torch.cat([picture.tokens for picture in prompt.pictures])
        item = {"format": "precomputed_embedding", "feature": feature, "image_grid_thw": prompt.grids}
        arguments["image_data"] = [item]
    return arguments


__all__ = ["sglang_arguments"]
