"""Converts the released VGGT-1B to :class:`~spa3r.VggtModel`: a table of key patterns; sizes come from the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spa3r.models.released import Rule, count_layers, dense_head_rules, layer_rules, own_fields, require, translate
from spa3r.models.vggt.configuration_vggt import VggtConfig

VGGT_RULES = [
    Rule(
        r"aggregator\.patch_embed\.patch_embed\.proj\.weight",
        "patch_embedding.projection.weight",
        lambda kernel: kernel.flatten(1),
    ),
    Rule(r"aggregator\.patch_embed\.patch_embed\.proj\.bias", "patch_embedding.projection.bias"),
    Rule(r"aggregator\.patch_embed\.pos_embed", "patch_embedding.position_embedding"),
    Rule(r"aggregator\.patch_embed\.(cls_token|register_tokens|norm\.weight|norm\.bias)", r"patch_embedding.\1"),
    Rule(r"aggregator\.patch_embed\.mask_token", None),  # from DINOv2's pretraining
    *layer_rules(r"aggregator\.patch_embed\.blocks", "patch_embedding.layers"),
    *layer_rules(r"aggregator\.frame_blocks", "frame_layers"),
    *layer_rules(r"aggregator\.global_blocks", "global_layers"),
    Rule(r"aggregator\.(camera_token|register_token)", r"\1"),
    *layer_rules(r"camera_head\.trunk", "camera_head.layers"),
    Rule(r"camera_head\.trunk_norm\.(weight|bias)", r"camera_head.norm.\1"),
    Rule(r"camera_head\.token_norm\.(weight|bias)", r"camera_head.token_norm.\1"),
    Rule(r"camera_head\.empty_pose_tokens", "camera_head.empty_pose", lambda pose: pose[0]),
    Rule(r"camera_head\.embed_pose\.(weight|bias)", r"camera_head.pose_embedding.\1"),
    Rule(r"camera_head\.poseLN_modulation\.1\.(weight|bias)", r"camera_head.modulation.\1"),
    Rule(r"camera_head\.pose_branch\.(fc1|fc2)\.(weight|bias)", r"camera_head.output.\1.\2"),
    *dense_head_rules("depth_head", "depth_head"),
    *dense_head_rules("point_head", "point_head"),
    Rule(r"track_head\..*", None),  # point tracking is not used by the method
]


def translate_vggt(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[dict[str, Tensor], VggtConfig]:
    """Weights of a VggtModel in our names, and its configuration.

    Args:
        tensors: Tensors with the released names.
        fields: Configuration fields that shapes don't determine; the default is VGGT-1B's.

    Raises:
        ValueError: Keys are missing or unknown.
    """
    weights = translate(tensors, VGGT_RULES)
    return weights, vggt_config(weights, fields)


def vggt_config(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> VggtConfig:
    """The configuration of a VGGT from weights in our names: sizes from shapes, the rest from `fields` or VGGT-1B."""
    require(weights, "patch_embedding.projection.weight", "patch_embedding.position_embedding", "register_token")
    width, pixels = weights["patch_embedding.projection.weight"].shape
    patch = math.isqrt(pixels // 3)
    grid = math.isqrt(weights["patch_embedding.position_embedding"].shape[1] - 1)
    require(weights, "frame_layers.0.attention.q_norm.weight", "frame_layers.0.mlp.fc1.weight")
    inferred: dict[str, Any] = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": count_layers(weights, "frame_layers"),
        "num_attention_heads": width // weights["frame_layers.0.attention.q_norm.weight"].shape[0],
        "mlp_ratio": weights["frame_layers.0.mlp.fc1.weight"].shape[0] / width,
        "num_register_tokens": weights["register_token"].shape[2],
        "patch_embedding_num_layers": count_layers(weights, "patch_embedding.layers"),
        "heads": [head for head in ("camera", "depth", "point") if any(k.startswith(f"{head}_head.") for k in weights)],
    }
    if "camera" in inferred["heads"]:
        inferred["camera_num_layers"] = count_layers(weights, "camera_head.layers")
    for head in ("depth", "point"):
        if head in inferred["heads"]:
            laterals = [weights[key] for i in range(4) if (key := f"{head}_head.laterals.{i}.weight") in weights]
            inferred["dpt_channels"] = [lateral.shape[1] for lateral in laterals]
            inferred["dpt_features"] = laterals[0].shape[0] if laterals else 256
    # A property of the weights, regardless of `fields`: the released Spa3R lacks these biases.
    has_bias = "global_layers.0.attention.q_norm.bias" in weights
    inferred |= own_fields(fields) | {"global_qk_norm": "layer_norm" if has_bias else "rms_norm"}
    return VggtConfig(**inferred)
