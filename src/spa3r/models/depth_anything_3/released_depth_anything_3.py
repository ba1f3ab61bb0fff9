"""Converts the released Depth Anything 3 to :class:`~spa3r.DepthAnything3Model`: a table of key patterns; sizes come
from the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spa3r.models.depth_anything_3.configuration_depth_anything_3 import DepthAnything3Config
from spa3r.models.released import Rule, count_layers, dense_head_rules, layer_rules, own_fields, require, translate

DEPTH_ANYTHING_3_RULES = [
    Rule(
        r"backbone\.pretrained\.patch_embed\.proj\.weight",
        "embedding.projection.weight",
        lambda kernel: kernel.flatten(1),
    ),
    Rule(r"backbone\.pretrained\.patch_embed\.proj\.bias", "embedding.projection.bias"),
    Rule(r"backbone\.pretrained\.pos_embed", "embedding.position_embedding"),
    Rule(r"backbone\.pretrained\.cls_token", "embedding.cls_token"),
    Rule(r"backbone\.pretrained\.camera_token", "camera_token"),
    *layer_rules(r"backbone\.pretrained\.blocks", "layers"),
    Rule(r"backbone\.pretrained\.blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
    Rule(r"backbone\.pretrained\.blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
    Rule(r"backbone\.pretrained\.norm\.(weight|bias)", r"norm.\1"),
    Rule(r"cam_dec\.backbone\.0\.(weight|bias)", r"camera_head.hidden1.\1"),
    Rule(r"cam_dec\.backbone\.2\.(weight|bias)", r"camera_head.hidden2.\1"),
    Rule(r"cam_dec\.fc_t\.(weight|bias)", r"camera_head.translation.\1"),
    Rule(r"cam_dec\.fc_qvec\.(weight|bias)", r"camera_head.quaternion.\1"),
    Rule(r"cam_dec\.fc_fov\.0\.(weight|bias)", r"camera_head.field_of_view.\1"),
    *layer_rules(r"cam_enc\.trunk", "camera_encoder.layers"),
    Rule(r"cam_enc\.pose_branch\.(fc1|fc2)\.(weight|bias)", r"camera_encoder.pose_embedding.\1.\2"),
    Rule(r"cam_enc\.token_norm\.(weight|bias)", r"camera_encoder.token_norm.\1"),
    Rule(r"cam_enc\.trunk_norm\.(weight|bias)", r"camera_encoder.norm.\1"),
    Rule(r"head\.scratch\.\w+_aux\..*", None),  # predicts rays, from which no output here is computed
    *dense_head_rules("head", "depth_head"),
    Rule(r"(gs_head|gs_adapter)\..*", None),  # Gaussian splats
]

DPT_LAYERS = {12: [5, 7, 9, 11], 24: [11, 15, 19, 23], 40: [19, 27, 33, 39]}
"""The layers that the released models' depth heads use, by the number of layers."""


def translate_depth_anything_3(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], DepthAnything3Config]:
    """Weights of a DepthAnything3Model in our names, and its configuration.

    Args:
        tensors: Tensors with the released names.
        fields: Configuration fields that shapes don't determine; the default is the released models'.

    Raises:
        ValueError: Keys are missing or unknown, or the model is a monocular one.
    """
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    if "backbone.pretrained.cls_token" in tensors and "backbone.pretrained.camera_token" not in tensors:
        raise ValueError(
            "The checkpoint must be a Depth Anything 3 for several views (Small, Base, Large, Giant), and this one has "
            "no camera token: it is one for single pictures (Metric, Mono). Take one of the others."
        )
    weights = translate(tensors, DEPTH_ANYTHING_3_RULES)
    return weights, depth_anything_3_config(weights, fields)


def depth_anything_3_config(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> DepthAnything3Config:
    """The configuration from weights in our names: sizes from shapes, the rest from `fields` or the released models."""
    require(weights, "embedding.projection.weight", "embedding.position_embedding", "layers.0.mlp.fc2.weight")
    width, pixels = weights["embedding.projection.weight"].shape
    patch = math.isqrt(pixels // 3)
    grid = math.isqrt(weights["embedding.position_embedding"].shape[1] - 1)
    layers = count_layers(weights, "layers")
    normed = [
        int(match[1]) for key in weights if (match := re.fullmatch(r"layers\.(\d+)\.attention\.q_norm\.weight", key))
    ]
    if not normed:
        require(weights, f"layers.{layers - 1}.attention.q_norm.weight")
    inferred: dict[str, Any] = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": layers,
        "num_attention_heads": width // weights[f"layers.{min(normed)}.attention.q_norm.weight"].shape[0],
        "intermediate_size": weights["layers.0.mlp.fc2.weight"].shape[1],
        "use_gated_mlp": weights["layers.0.mlp.fc1.weight"].shape[0] > weights["layers.0.mlp.fc2.weight"].shape[1],
        "alternating_start": min(normed),
        "heads": [head for head in ("camera", "depth") if any(key.startswith(f"{head}_head.") for key in weights)],
    }
    if "camera" in inferred["heads"]:
        inferred["camera_encoder_num_layers"] = count_layers(weights, "camera_encoder.layers")
    if "depth" in inferred["heads"]:
        laterals = [weights[key] for i in range(4) if (key := f"depth_head.laterals.{i}.weight") in weights]
        inferred["dpt_channels"] = [lateral.shape[1] for lateral in laterals]
        inferred["dpt_features"] = laterals[0].shape[0] if laterals else 256
        if layers in DPT_LAYERS:
            inferred["dpt_layers"] = DPT_LAYERS[layers]
        elif "dpt_layers" not in fields:
            raise ValueError(
                f"A Depth Anything 3 of {layers} layers must come with `dpt_layers`, the four layers that its depth "
                "head uses: only those of the released models (12, 24 and 40 layers) are known. Give it in `config`."
            )
    return DepthAnything3Config(**(inferred | own_fields(fields)))
