"""Released research checkpoints -> ours: a table of key patterns, sizes read off the tensors.

Sources: VGGT-1B's ``model.safetensors`` or ``model.pt``, the released ``spa3r.ckpt`` and the released ``spa3_vlm``
folder. Pickles are read with ``weights_only=True``: nothing but tensors and plain values is ever unpickled. Every key
of a source is either translated, known to be unused, or refused by name.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    DINOv3ViTConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)
from transformers.utils import logging

from spa3r.models.modeling_base import quote_keys
from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RModel
from spa3r.models.vggt.configuration_vggt import VggtConfig
from spa3r.models.vggt.modeling_vggt import VggtModel

logger = logging.get_logger(__name__)

UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError)
"""What reading a pickle may raise: a file that is none makes the unpickler stumble over anything."""

Kind = Literal["vggt", "spa3r", "spa3-vlm"]


@dataclass(frozen=True)
class Rule:
    """One line of the table: keys that match `pattern` become `key`; None drops them.

    Args:
        pattern: A regular expression for whole keys.
        key: The replacement, as in ``re.sub``, or a function of the match.
        tensor: What happens to the tensor.
    """

    pattern: str
    key: str | Callable[[re.Match], str] | None
    tensor: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


def _layers(source: str, target: str) -> list[Rule]:
    """The rules of a stack of transformer layers."""
    return [
        Rule(rf"{source}\.(\d+)\.norm(1|2)\.(weight|bias)", rf"{target}.\1.norm\2.\3"),
        Rule(rf"{source}\.(\d+)\.attn\.(qkv|proj|q_norm|k_norm)\.(weight|bias)", rf"{target}.\1.attention.\2.\3"),
        Rule(rf"{source}\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)", rf"{target}.\1.mlp.\2.\3"),
        Rule(rf"{source}\.(\d+)\.ls(1|2)\.gamma", rf"{target}.\1.layer_scale\2"),
    ]


VGGT_RULES = [
    Rule(
        r"aggregator\.patch_embed\.patch_embed\.proj\.weight",
        "patch_embedding.projection.weight",
        lambda kernel: kernel.flatten(1),
    ),
    Rule(r"aggregator\.patch_embed\.patch_embed\.proj\.bias", "patch_embedding.projection.bias"),
    Rule(r"aggregator\.patch_embed\.pos_embed", "patch_embedding.position_embedding"),
    Rule(r"aggregator\.patch_embed\.(cls_token|register_tokens|norm\.weight|norm\.bias)", r"patch_embedding.\1"),
    Rule(r"aggregator\.patch_embed\.mask_token", None),  # of DINOv2's own pretraining
    *_layers(r"aggregator\.patch_embed\.blocks", "patch_embedding.layers"),
    *_layers(r"aggregator\.frame_blocks", "frame_layers"),
    *_layers(r"aggregator\.global_blocks", "global_layers"),
    Rule(r"aggregator\.(camera_token|register_token)", r"\1"),
    *_layers(r"camera_head\.trunk", "camera_head.layers"),
    Rule(r"camera_head\.trunk_norm\.(weight|bias)", r"camera_head.norm.\1"),
    Rule(r"camera_head\.token_norm\.(weight|bias)", r"camera_head.token_norm.\1"),
    Rule(r"camera_head\.empty_pose_tokens", "camera_head.empty_pose", lambda pose: pose[0]),
    Rule(r"camera_head\.embed_pose\.(weight|bias)", r"camera_head.pose_embedding.\1"),
    Rule(r"camera_head\.poseLN_modulation\.1\.(weight|bias)", r"camera_head.modulation.\1"),
    Rule(r"camera_head\.pose_branch\.(fc1|fc2)\.(weight|bias)", r"camera_head.output.\1.\2"),
    Rule(r"(depth|point)_head\.norm\.(weight|bias)", r"\1_head.norm.\2"),
    Rule(r"(depth|point)_head\.projects\.(\d)\.(weight|bias)", r"\1_head.projections.\2.\3"),
    Rule(r"(depth|point)_head\.resize_layers\.(\d)\.(weight|bias)", r"\1_head.resizers.\2.\3"),
    Rule(
        r"(depth|point)_head\.scratch\.layer([1-4])_rn\.weight",
        lambda m: f"{m[1]}_head.laterals.{int(m[2]) - 1}.weight",
    ),
    Rule(
        r"(depth|point)_head\.scratch\.refinenet([1-4])\.resConfUnit(1|2)\.(conv1|conv2)\.(weight|bias)",
        lambda m: f"{m[1]}_head.fusions.{int(m[2]) - 1}.{'skip_unit' if m[3] == '1' else 'unit'}.{m[4]}.{m[5]}",
    ),
    Rule(
        r"(depth|point)_head\.scratch\.refinenet([1-4])\.out_conv\.(weight|bias)",
        lambda m: f"{m[1]}_head.fusions.{int(m[2]) - 1}.projection.{m[3]}",
    ),
    Rule(r"(depth|point)_head\.scratch\.output_conv1\.(weight|bias)", r"\1_head.output_conv1.\2"),
    Rule(
        r"(depth|point)_head\.scratch\.output_conv2\.(0|2)\.(weight|bias)",
        lambda m: f"{m[1]}_head.output_conv{2 if m[2] == '0' else 3}.{m[3]}",
    ),
    Rule(r"track_head\..*", None),  # point tracking is no part of the method
]  # fmt: skip

SPA3R_RULES = [
    *_layers(r"encoder\.blocks", "encoder.layers"),
    *_layers(r"decoder\.blocks", "decoder.layers"),
    Rule(r"(encoder|decoder)\.(norm\.weight|norm\.bias|register_tokens)", r"\1.\2"),
    Rule(r"projection\.(weight|bias)", r"encoder.input_projection.\1"),
    Rule(r"query_embed\.weight", "encoder.query_tokens", lambda queries: queries[None]),
    Rule(r"pose_tokenizer\.(weight|bias)", r"decoder.ray_projection.\1"),
    Rule(r"heads\.geo\.(fc1|fc2)\.(weight|bias)", r"geometry_head.\1.\2"),
    Rule(r"heads\.sem\.(fc1|fc2)\.(weight|bias)", r"semantic_head.\1.\2"),
    Rule(r"depth_prob\.(fc1|fc2)\.(weight|bias)", r"depth_probe.\1.\2"),
]
BACKBONE_KEY = re.compile(r"(aggregator|camera_head|depth_head|point_head|track_head)\..*")

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
    Rule(r"visual\.(.*)", r"model.visual.\1"),
    Rule(r"model\.(.*)", r"model.language_model.\1"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
]
SPA3R_PREFIX = "geometry_encoder.spa3r."
RESEARCH_FIELDS = ("use_geometry_encoder", "spa3r_embed_dim", "spa3r_num_queries")
"""Fields that the research code added to Qwen2.5-VL's configuration; the tensors say the same."""


def translate(tensors: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Rename (and reshape) every tensor by the first rule whose pattern its whole key matches.

    Raises:
        ValueError: Keys that no rule knows; all are named.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    translated, unknown = {}, []
    for key, tensor in tensors.items():
        for pattern, rule in compiled:
            if match := pattern.fullmatch(key):
                if rule.key is not None:
                    name = rule.key(match) if callable(rule.key) else match.expand(rule.key)
                    translated[name] = rule.tensor(tensor)
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"The checkpoint has keys that the converter doesn't know: {quote_keys(unknown)}. It converts the released "
            "VGGT-1B, spa3r.ckpt and spa3_vlm files; check that `kind` names the right one."
        )
    return translated


def read_checkpoint(source: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder, from safetensors (sharded or not) or a pickle of tensors.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds no weights.
        ValueError: A file is truncated or damaged, or a pickle holds anything but tensors and plain values.
    """
    if not source.exists():
        raise FileNotFoundError(f"`source` must be a checkpoint file or folder, and {source} doesn't exist.")
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(
            path for path in source.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", ".bin")
        )
        if not files:
            raise FileNotFoundError(
                f"`source` must hold weights (*.safetensors, *.pt, *.pth, *.ckpt or *.bin), and {source} holds none."
            )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} can't be read as safetensors ({error}). It is truncated or damaged: download it again."
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UNREADABLE as error:
        raise ValueError(
            f"{file} can't be read: only pickles of tensors and plain values are loaded, and whole ones "
            f"({type(error).__name__}). If you trust it, save its state dict as safetensors and convert that."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors by name, got {type(content).__name__}.")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    kind: Kind,
    config: PreTrainedConfig | dict[str, Any] | None = None,
) -> Path:
    """Turn a released research checkpoint into one of ours: safetensors, configuration, processor files.

    Sizes come from the tensors' shapes, ``global_qk_norm`` from the checkpoint's own keys. What shapes don't tell (head
    counts, the layers that the dense heads read) is the released models', unless `config` says otherwise.

    Args:
        source: VGGT-1B's file or folder, ``spa3r.ckpt`` (or its tensors as safetensors), or the ``spa3_vlm`` folder.
        output_dir: Folder to write; made if missing.
        kind: ``"vggt"``, ``"spa3r"`` or ``"spa3-vlm"``.
        config: A whole configuration of ours (VggtConfig, Spa3RConfig), or a dictionary of the fields to set, with
            ``backbone_config`` for the backbone's.

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: `source` doesn't exist or holds no weights.
        ValueError: Keys are missing or unknown (all are named), a file is damaged, or `kind` is unknown.
    """
    converters = {"vggt": _convert_vggt, "spa3r": _convert_spa3r, "spa3-vlm": _convert_spa3_vlm}
    if kind not in converters:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, converters))}, got {kind!r}.")
    source, output_dir = Path(source), Path(output_dir)
    tensors = read_checkpoint(source)
    fields = config.to_diff_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    converters[kind](source, tensors, output_dir, fields)
    return output_dir


def _convert_vggt(source: Path, tensors: dict[str, Tensor], output_dir: Path, fields: dict[str, Any]) -> None:
    weights = translate(tensors, VGGT_RULES)
    config = vggt_config(weights, fields)
    with torch.device("meta"):
        model = VggtModel(config)
    _save(model, weights, output_dir)
    _image_processor(config).save_pretrained(output_dir)


def _convert_spa3r(source: Path, tensors: dict[str, Tensor], output_dir: Path, fields: dict[str, Any]) -> None:
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    teacher = {
        re.sub(r"^layer\.", "model.layer.", key.removeprefix("dino.")): tensors.pop(key)
        for key in list(tensors)
        if key.startswith("dino.")
    }
    weights, config = _translate_spa3r(tensors, fields, dinov3_config(teacher, fields) if teacher else None)
    with torch.device("meta"):
        model = Spa3RForPreTraining(config) if teacher else Spa3RModel(config)
    if teacher:
        weights = {f"spa3r.{key}": tensor for key, tensor in weights.items()}
        weights |= {f"semantic_teacher.{key}": tensor for key, tensor in teacher.items()}
    _save(model, weights, output_dir)
    _image_processor(config.backbone_config).save_pretrained(output_dir)


def _convert_spa3_vlm(source: Path, tensors: dict[str, Tensor], output_dir: Path, fields: dict[str, Any]) -> None:
    config_file = source / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"`source` must be the released spa3_vlm folder with its config.json, and {config_file} doesn't exist."
        )
    vlm_fields = json.loads(config_file.read_text(encoding="utf-8"))
    vlm_config = Qwen2_5_VLConfig.from_dict({k: v for k, v in vlm_fields.items() if k not in RESEARCH_FIELDS})

    spa3r = {key.removeprefix(SPA3R_PREFIX): tensors.pop(key) for key in list(tensors) if key.startswith(SPA3R_PREFIX)}
    spa3r = {key: tensor for key, tensor in spa3r.items() if not key.startswith("dino.")}  # only pretraining needs it
    vlm = {key: tensors.pop(key) for key in list(tensors) if re.match(r"(visual|model|lm_head)\.", key)}
    spa3r_weights, spa3r_config = _translate_spa3r(spa3r, _own(fields.get("spa3r_config") or {}), None)
    weights = {f"spa3r.{key}": tensor for key, tensor in spa3r_weights.items()}
    weights |= {f"vlm.{key}": tensor for key, tensor in translate(vlm, VLM_RULES).items()}
    weights |= {f"adapter.{key}": tensor for key, tensor in translate(tensors, ADAPTER_RULES).items()}
    if vlm_config.tie_word_embeddings:
        weights.setdefault("vlm.lm_head.weight", weights["vlm.model.language_model.embed_tokens.weight"])

    with torch.device("meta"):
        model = Spa3VLMForConditionalGeneration(Spa3VLMConfig(vlm_config=vlm_config, spa3r_config=spa3r_config))
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    _save(model, weights, output_dir)
    if (source / "tokenizer_config.json").is_file():
        Spa3VLMProcessor(
            AutoProcessor.from_pretrained(source),
            _image_processor(spa3r_config.backbone_config),
            image_token_id=vlm_config.image_token_id,
        ).save_pretrained(output_dir)
    else:
        logger.warning(
            f"{source} holds no tokenizer, so no processor was written. Make one with "
            "Spa3VLMProcessor.from_vlm_and_spa3r and save it beside the model."
        )


def _image_processor(config: VggtConfig) -> Spa3RImageProcessor:
    return Spa3RImageProcessor(size=config.image_size, patch_size=config.patch_size)


def _translate_spa3r(
    tensors: dict[str, Tensor], fields: dict[str, Any], teacher_config: PreTrainedConfig | None
) -> tuple[dict[str, Tensor], Spa3RConfig]:
    """Weights of a Spa3RModel in our names, and its configuration."""
    backbone = {key: tensor for key, tensor in tensors.items() if BACKBONE_KEY.fullmatch(key)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in backbone}
    backbone = translate(backbone, VGGT_RULES)
    weights = translate(rest, SPA3R_RULES)
    fields = dict(fields)
    backbone_config = vggt_config(backbone, fields.pop("backbone_config", {}))
    fields.pop("semantic_teacher_config", None)
    _require(weights, "encoder.query_tokens", "encoder.register_tokens", "semantic_head.fc2.weight")
    _require(weights, "encoder.layers.0.attention.q_norm.weight", "encoder.layers.0.mlp.fc1.weight")
    _, num_latents, width = weights["encoder.query_tokens"].shape
    inferred = {
        "hidden_size": width,
        "num_latents": num_latents,
        "num_register_tokens": weights["encoder.register_tokens"].shape[1],
        "num_encoder_layers": _count(weights, "encoder.layers"),
        "num_decoder_layers": _count(weights, "decoder.layers"),
        "num_attention_heads": width // weights["encoder.layers.0.attention.q_norm.weight"].shape[0],
        "mlp_ratio": weights["encoder.layers.0.mlp.fc1.weight"].shape[0] / width,
        "semantic_hidden_size": weights["semantic_head.fc2.weight"].shape[0],
    }
    config = Spa3RConfig(
        backbone_config=backbone_config, semantic_teacher_config=teacher_config, **(inferred | _own(fields))
    )
    return {f"backbone.{key}": tensor for key, tensor in backbone.items()} | weights, config


def vggt_config(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> VggtConfig:
    """The configuration of a VGGT in our key names: sizes from shapes, the rest from `fields` or VGGT-1B."""
    _require(weights, "patch_embedding.projection.weight", "patch_embedding.position_embedding", "register_token")
    width, pixels = weights["patch_embedding.projection.weight"].shape
    patch = math.isqrt(pixels // 3)
    grid = math.isqrt(weights["patch_embedding.position_embedding"].shape[1] - 1)
    _require(weights, "frame_layers.0.attention.q_norm.weight", "frame_layers.0.mlp.fc1.weight")
    inferred = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "num_hidden_layers": _count(weights, "frame_layers"),
        "num_attention_heads": width // weights["frame_layers.0.attention.q_norm.weight"].shape[0],
        "mlp_ratio": weights["frame_layers.0.mlp.fc1.weight"].shape[0] / width,
        "num_register_tokens": weights["register_token"].shape[2],
        "patch_embedding_num_layers": _count(weights, "patch_embedding.layers"),
        "heads": [head for head in ("camera", "depth", "point") if any(k.startswith(f"{head}_head.") for k in weights)],
    }
    if "camera" in inferred["heads"]:
        inferred["camera_num_layers"] = _count(weights, "camera_head.layers")
    for head in ("depth", "point"):
        if head in inferred["heads"]:
            laterals = [weights[key] for i in range(4) if (key := f"{head}_head.laterals.{i}.weight") in weights]
            inferred["dpt_channels"] = [lateral.shape[1] for lateral in laterals]
            inferred["dpt_features"] = laterals[0].shape[0] if laterals else 256
    # A property of the weights, whatever the caller says: the released Spa3R lacks these biases.
    has_bias = "global_layers.0.attention.q_norm.bias" in weights
    return VggtConfig(
        **(inferred | _own(fields) | {"global_qk_norm": "layer_norm" if has_bias else "rms_norm"})
    )  # fmt: skip


def dinov3_config(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> DINOv3ViTConfig:
    """The configuration of a DINOv3 ViT: sizes from shapes, the rest from `fields` or the released ViT-L/16."""
    _require(weights, "embeddings.patch_embeddings.weight", "embeddings.register_tokens")
    _require(weights, "model.layer.0.mlp.up_proj.weight")
    width, _, patch, _ = weights["embeddings.patch_embeddings.weight"].shape
    inferred = {
        "hidden_size": width,
        "patch_size": patch,
        "intermediate_size": weights["model.layer.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": _count(weights, "model.layer"),
        "num_attention_heads": max(1, width // 64),
        "num_register_tokens": weights["embeddings.register_tokens"].shape[1],
        "key_bias": "model.layer.0.attention.k_proj.bias" in weights,
        "use_gated_mlp": "model.layer.0.mlp.gate_proj.weight" in weights,
    }
    teacher = fields.get("semantic_teacher_config") or {}
    teacher = teacher.to_diff_dict() if isinstance(teacher, PreTrainedConfig) else teacher
    return DINOv3ViTConfig(**(inferred | _own(teacher)))


def _own(fields: Mapping[str, Any] | PreTrainedConfig) -> dict[str, Any]:
    """Fields of a configuration without the bookkeeping of its serialised form."""
    fields = fields.to_diff_dict() if isinstance(fields, PreTrainedConfig) else fields
    bookkeeping = ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype")
    return {key: value for key, value in fields.items() if key not in bookkeeping}


def _count(weights: Mapping[str, Tensor], stack: str) -> int:
    """Number of layers of a stack."""
    indices = [int(match[1]) for key in weights if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", key))]
    return max(indices, default=-1) + 1


def _require(weights: Mapping[str, Tensor], *keys: str) -> None:
    if missing := [key for key in keys if key not in weights]:
        raise ValueError(
            f"The checkpoint lacks keys (in our names): {quote_keys(missing)}. It is incomplete, or `kind` is wrong."
        )


def _save(model: PreTrainedModel, weights: Mapping[str, Tensor], output_dir: Path) -> None:
    """Check the weights against the model, name what is amiss, write them."""
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    _require(weights, *expected)
    if foreign := weights.keys() - expected.keys():
        raise ValueError(f"The checkpoint has keys that {type(model).__name__} lacks: {quote_keys(foreign)}.")
    if wrong := [
        f"{key} {tuple(weights[key].shape)}, wanted {tuple(shape)}"
        for key, shape in expected.items()
        if weights[key].shape != shape
    ]:
        raise ValueError(f"The checkpoint has tensors of other shapes: {quote_keys(wrong)}. Check `config`.")
    model.load_state_dict(dict(weights), assign=True)
    model.tie_weights()
    model.save_pretrained(output_dir)
