"""Converts the released ``spa3_vlm`` folder to :class:`~spa3r.Spa3VLMForConditionalGeneration`: key pattern tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLConfig

from spa3r.models.released import SPA3R_PREFIX, Rule, own_fields, translate
from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
from spa3r.models.spa3r.released_spa3r import translate_spa3r

ADAPTER_RULES = [
    Rule(r"geometry_projector\.0\.(weight|bias)", r"projector.fc1.\1"),
    Rule(r"geometry_projector\.2\.(weight|bias)", r"projector.fc2.\1"),
    Rule(r"geom_cross_attention\.(q_proj|k_proj|v_proj|q_norm|k_norm|proj)\.(weight|bias)", r"cross_attention.\1.\2"),
    Rule(r"ln\.(weight|bias)", r"norm.\1"),
    Rule(r"geometry_adaptor\.0\.(weight|bias)", r"bottleneck.fc1.\1"),
    Rule(r"geometry_adaptor\.2\.(weight|bias)", r"bottleneck.fc2.\1"),
    Rule(r"geometry_gate\.0\.(weight|bias)", r"gate.\1"),
]
VLM_RULES = [
    Rule(r"(model\.(?:visual|language_model)\..*)", r"\1"),  # as saved by transformers since 4.52
    Rule(r"visual\.(.*)", r"model.visual.\1"),
    Rule(r"model\.(.*)", r"model.language_model.\1"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
]
RESEARCH_FIELDS = ("use_geometry_encoder", "spa3r_embed_dim", "spa3r_num_queries")
"""Fields that the research code added to Qwen2.5-VL's configuration; the tensors imply the same values."""


def translate_spa3_vlm(
    tensors: Mapping[str, Tensor], vlm_fields: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Spa3VLMConfig]:
    """Weights of a Spa3-VLM in our names, and its configuration.

    Args:
        tensors: Tensors with the released names.
        vlm_fields: The released ``config.json``.
        fields: Fields of our configuration that neither it nor shapes determine, such as ``spa3r_config``.

    Raises:
        ValueError: Keys are missing or unknown.
    """
    fields = own_fields(fields)
    vlm_fields = {key: value for key, value in vlm_fields.items() if key not in RESEARCH_FIELDS}
    vlm_config = Qwen2_5_VLConfig.from_dict(vlm_fields | own_fields(fields.pop("vlm_config", None) or {}))
    spa3r, vlm, adapter = {}, {}, {}
    for key, tensor in tensors.items():
        of_vlm = re.match(r"(visual|model|lm_head)\.", key)
        (spa3r if key.startswith(SPA3R_PREFIX) else vlm if of_vlm else adapter)[key] = tensor
    # The teacher is needed only for pretraining.
    spa3r_fields = own_fields(fields.pop("spa3r_config", None) or {})
    spa3r, _, spa3r_config = translate_spa3r(spa3r, spa3r_fields, with_teacher=False)
    weights = {f"spa3r.{key}": tensor for key, tensor in spa3r.items()}
    weights |= {f"vlm.{key}": tensor for key, tensor in translate(vlm, VLM_RULES).items()}
    weights |= {f"adapter.{key}": tensor for key, tensor in translate(adapter, ADAPTER_RULES).items()}
    if vlm_config.tie_word_embeddings and "vlm.model.language_model.embed_tokens.weight" in weights:
        weights.setdefault("vlm.lm_head.weight", weights["vlm.model.language_model.embed_tokens.weight"])
    return weights, Spa3VLMConfig(vlm_config=vlm_config, spa3r_config=spa3r_config, **fields)
