"""Converts the released ``spa3r.ckpt`` to our Spa3R: tables of key patterns; sizes are read off the tensors.

The semantic teacher, a DINOv3, may use the names of its authors (facebookresearch/dinov3, as in the released file) or
those of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DINOv3ViTConfig, PreTrainedConfig

from spa3r.models.released import SPA3R_PREFIX, Rule, count_layers, layer_rules, own_fields, require, translate
from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
from spa3r.models.vggt.released_vggt import translate_vggt

SPA3R_RULES = [
    *layer_rules(r"encoder\.blocks", "encoder.layers"),
    *layer_rules(r"decoder\.blocks", "decoder.layers"),
    Rule(r"(encoder|decoder)\.(norm\.weight|norm\.bias|register_tokens)", r"\1.\2"),
    Rule(r"projection\.(weight|bias)", r"encoder.input_projection.\1"),
    Rule(r"query_embed\.weight", "encoder.query_tokens", lambda queries: queries[None]),
    Rule(r"pose_tokenizer\.(weight|bias)", r"decoder.ray_projection.\1"),
    Rule(r"heads\.geo\.(fc1|fc2)\.(weight|bias)", r"geometry_head.\1.\2"),
    Rule(r"heads\.sem\.(fc1|fc2)\.(weight|bias)", r"semantic_head.\1.\2"),
    Rule(r"depth_prob\.(fc1|fc2)\.(weight|bias)", r"depth_probe.\1.\2"),
]
BACKBONE_KEY = re.compile(r"(aggregator|camera_head|depth_head|point_head|track_head)\..*")
TEACHER_PREFIX = "dino."

PERIODS = "rope_embed.periods"
DINOV3_RULES = [
    Rule(r"cls_token", "embeddings.cls_token"),
    Rule(r"storage_tokens", "embeddings.register_tokens"),
    Rule(r"mask_token", "embeddings.mask_token", lambda token: token[None]),
    Rule(r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
    Rule(r"blocks\.(\d+)\.norm(1|2)\.(weight|bias)", r"model.layer.\1.norm\2.\3"),
    Rule(r"blocks\.(\d+)\.ls(1|2)\.gamma", r"model.layer.\1.layer_scale\2.lambda1"),
    Rule(
        r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)",
        tuple(rf"model.layer.\1.attention.{name}_proj.\2" for name in "qkv"),
        lambda stacked: stacked.chunk(3),
    ),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"model.layer.\1.attention.o_proj.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.(?:fc1|w2)\.(weight|bias)", r"model.layer.\1.mlp.up_proj.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.(?:fc2|w3)\.(weight|bias)", r"model.layer.\1.mlp.down_proj.\2"),
    Rule(r"blocks\.(\d+)\.mlp\.w1\.(weight|bias)", r"model.layer.\1.mlp.gate_proj.\2"),
    Rule(r"norm\.(weight|bias)", r"norm.\1"),
    Rule(re.escape(PERIODS), None),  # given by the configuration
]
MASKED_BIAS_RULES = [
    # The mask is 1 for queries and values and 0 for keys, so keys have no bias, whatever value is stored.
    Rule(r"blocks\.\d+\.attn\.qkv\.bias_mask", None),
    Rule(
        r"blocks\.(\d+)\.attn\.qkv\.bias",
        (r"model.layer.\1.attention.q_proj.bias", None, r"model.layer.\1.attention.v_proj.bias"),
        lambda stacked: stacked.chunk(3),
    ),
]


def translate_spa3r(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], with_teacher: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor], Spa3RConfig]:
    """Weights of a Spa3RModel and of its semantic teacher in our names, and the configuration of both.

    Args:
        tensors: Tensors with the released names, as in ``spa3r.ckpt``; or those of a whole Spa3-VLM, of which the
            Spa3R is used.
        fields: Configuration fields that shapes don't determine; the default is the released model's.
        with_teacher: False excludes the teacher.

    Raises:
        ValueError: Keys are missing or unknown.
    """
    if any(key.startswith(SPA3R_PREFIX) for key in tensors):
        tensors = {k.removeprefix(SPA3R_PREFIX): t for k, t in tensors.items() if k.startswith(SPA3R_PREFIX)}
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    rest, backbone, teacher = {}, {}, {}
    for key, tensor in tensors.items():
        if key.startswith(TEACHER_PREFIX):
            teacher[key.removeprefix(TEACHER_PREFIX)] = tensor
        else:
            (backbone if BACKBONE_KEY.fullmatch(key) else rest)[key] = tensor
    fields = dict(fields)
    backbone, backbone_config = translate_vggt(backbone, fields.pop("backbone_config", None) or {})
    teacher_fields = fields.pop("semantic_teacher_config", None) or {}
    teacher_config = None
    if teacher and with_teacher:
        teacher, teacher_config = translate_dinov3(teacher, teacher_fields)
    weights = translate(rest, SPA3R_RULES)
    require(weights, "encoder.query_tokens", "encoder.register_tokens", "semantic_head.fc2.weight")
    require(weights, "encoder.layers.0.attention.q_norm.weight", "encoder.layers.0.mlp.fc1.weight")
    _, num_latents, width = weights["encoder.query_tokens"].shape
    inferred: dict[str, Any] = {
        "hidden_size": width,
        "num_latents": num_latents,
        "num_register_tokens": weights["encoder.register_tokens"].shape[1],
        "num_encoder_layers": count_layers(weights, "encoder.layers"),
        "num_decoder_layers": count_layers(weights, "decoder.layers"),
        "num_attention_heads": width // weights["encoder.layers.0.attention.q_norm.weight"].shape[0],
        "mlp_ratio": weights["encoder.layers.0.mlp.fc1.weight"].shape[0] / width,
        "semantic_hidden_size": weights["semantic_head.fc2.weight"].shape[0],
    }
    config = Spa3RConfig(
        backbone_config=backbone_config, semantic_teacher_config=teacher_config, **(inferred | own_fields(fields))
    )
    weights |= {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    return weights, teacher if with_teacher else {}, config


def for_pretraining(weights: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Spa3RForPreTraining, from those of its parts."""
    whole = {f"spa3r.{key}": tensor for key, tensor in weights.items()}
    return whole | {f"semantic_teacher.{key}": tensor for key, tensor in teacher.items()}


def translate_dinov3(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | PreTrainedConfig
) -> tuple[dict[str, Tensor], DINOv3ViTConfig]:
    """Weights of transformers' DINOv3ViTModel in its names, and its configuration.

    Args:
        tensors: Tensors with the authors' names or those of transformers.
        fields: Configuration fields that shapes don't determine; the default is the released ViT-L/16's.

    Raises:
        ValueError: Keys are missing or unknown, or transformers doesn't support the rotary encoding.
    """
    derived: dict[str, Any] = {}
    if any(key.startswith(("blocks.", "patch_embed.")) for key in tensors):
        masked = any(key.endswith(".bias_mask") for key in tensors)
        weights = translate(tensors, MASKED_BIAS_RULES + DINOV3_RULES if masked else DINOV3_RULES)
        if PERIODS in tensors:
            derived = _rotary_fields(tensors[PERIODS], tensors.get("cls_token"))
    else:
        weights = {re.sub(r"^layer\.", "model.layer.", key): tensor for key, tensor in tensors.items()}
    require(weights, "embeddings.patch_embeddings.weight", "embeddings.register_tokens")
    require(weights, "model.layer.0.mlp.up_proj.weight")
    width, _, patch, _ = weights["embeddings.patch_embeddings.weight"].shape
    inferred: dict[str, Any] = {
        "hidden_size": width,
        "patch_size": patch,
        "intermediate_size": weights["model.layer.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": count_layers(weights, "model.layer"),
        "num_attention_heads": max(1, width // 64),
        "num_register_tokens": weights["embeddings.register_tokens"].shape[1],
        "use_gated_mlp": "model.layer.0.mlp.gate_proj.weight" in weights,
    }
    inferred |= {f"{part}_bias": f"model.layer.0.attention.{part[0]}_proj.bias" in weights for part in _BIASES}
    return weights, DINOv3ViTConfig(**(inferred | derived | own_fields(fields)))


_BIASES = ("query", "key", "value")


def _rotary_fields(periods: Tensor, cls_token: Tensor | None) -> dict[str, Any]:
    """Fields derived from the stored periods: a head is four times as wide as their number; the last gives the base."""
    count = len(periods)
    derived: dict[str, Any] = {}
    if cls_token is not None and cls_token.shape[-1] % (4 * count) == 0:
        derived["num_attention_heads"] = cls_token.shape[-1] // (4 * count)
    if periods.is_meta or count < 2:
        return derived
    periods = periods.double()
    base = periods[-1].item() ** (count / (count - 1))
    tolerance = 0.03  # bfloat16 may be 0.4 % off, which the power at most doubles
    theta = 100.0 if abs(base / 100.0 - 1) < tolerance else base
    wanted = theta ** (periods.new_tensor(range(count)) / count)
    if not ((periods / wanted - 1).abs() < tolerance).all():
        raise ValueError(
            f"The teacher's `{PERIODS}` must be powers of one base, as transformers' DINOv3 has them, got "
            f"{[round(period, 4) for period in periods.tolist()][:8]}. Such a teacher can't be loaded."
        )
    return derived | {"rope_theta": theta}
