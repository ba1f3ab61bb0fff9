"""Converts released research checkpoints to folders in our layout: safetensors, configuration, processor files.

``from_pretrained`` loads the released layouts directly (:mod:`spa3r.models.released`); a conversion saves the loaded
model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from spa3r.disk import read_json_object, writing_folder
from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.depth_anything_3.modeling_depth_anything_3 import DepthAnything3Model
from spa3r.models.depth_anything_3.released_depth_anything_3 import translate_depth_anything_3
from spa3r.models.model_card import CARD
from spa3r.models.released import Kind, quote_keys, read_checkpoint, require
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3_vlm.released_spa3_vlm import translate_spa3_vlm
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RModel
from spa3r.models.spa3r.released_spa3r import for_pretraining, translate_spa3r
from spa3r.models.vggt.modeling_vggt import VggtModel
from spa3r.models.vggt.released_vggt import translate_vggt

logger = logging.get_logger(__name__)


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    kind: Kind,
    config: PreTrainedConfig | dict[str, Any] | None = None,
) -> Path:
    """Convert a released research checkpoint to our layout: safetensors, configuration, processor files.

    Sizes are derived from the tensors' shapes, ``global_qk_norm`` from the checkpoint's keys. Values that shapes don't
    determine (head counts, the layers that the dense heads use) are the released models', unless `config` sets them.

    Args:
        source: File or folder of VGGT-1B or Depth Anything 3, ``spa3r.ckpt`` (or its tensors as safetensors), or the
            ``spa3_vlm`` folder.
        output_dir: Target folder; created if missing.
        kind: ``"vggt"``, ``"depth-anything-3"``, ``"spa3r"`` or ``"spa3-vlm"``.
        config: A complete configuration of ours (VggtConfig, DepthAnything3Config, Spa3RConfig), or a dictionary of
            fields to set, with ``backbone_config`` for the backbone's.

    Returns:
        `output_dir`.

    Raises:
        FileNotFoundError: `source` doesn't exist or contains no weights.
        ValueError: Keys are missing or unknown (all are named), a file is damaged, or `kind` is unknown.
        WriteError: The disk is full or the folder isn't writable; nothing is written.
    """
    converters = {
        "vggt": partial(_convert_backbone, VggtModel, translate_vggt),
        "depth-anything-3": partial(_convert_backbone, DepthAnything3Model, translate_depth_anything_3),
        "spa3r": _convert_spa3r,
        "spa3-vlm": _convert_spa3_vlm,
    }
    if kind not in converters:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, converters))}, got {kind!r}.")
    source, output_dir = Path(source), Path(output_dir)
    tensors = read_checkpoint(source)
    fields = config.to_diff_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    save_together(output_dir, *converters[kind](source, tensors, fields))
    return output_dir


def save_together(folder: str | Path, *parts: Any) -> None:
    """Save a model and its companions to a folder with ``save_pretrained``: either all of it or nothing.

    Args:
        folder: Target folder; existing files are replaced, except a model card written by a user.
        parts: A model and its processor, for example.

    Raises:
        WriteError: The folder can't be written.
    """
    folder = Path(folder)
    with writing_folder(folder) as unfinished:
        if (card := folder / CARD).is_file():
            shutil.copy(card, unfinished)
        for part in parts:
            part.save_pretrained(unfinished)
        for stale in folder.glob("model*.safetensors*"):  # from a save with another number of shards
            if not (unfinished / stale.name).exists():
                stale.unlink()


def _convert_backbone(
    model_class: type[PreTrainedModel],
    translate: Callable[..., tuple[dict[str, Tensor], BackboneConfig]],
    source: Path,
    tensors: dict[str, Tensor],
    fields: dict[str, Any],
) -> tuple[Any, ...]:
    weights, config = translate(tensors, fields)
    with torch.device("meta"):
        model = model_class(config)
    return _filled(model, weights), _image_processor(config)


def _convert_spa3r(source: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
    weights, teacher, config = translate_spa3r(tensors, fields)
    with torch.device("meta"):
        model = Spa3RForPreTraining(config) if teacher else Spa3RModel(config)
    model = _filled(model, for_pretraining(weights, teacher) if teacher else weights)
    return model, _image_processor(config.backbone_config)


def _convert_spa3_vlm(source: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
    config_file = source / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"`source` must be the released spa3_vlm folder with its config.json, and {config_file} doesn't exist."
        )
    vlm_fields = read_json_object(config_file, "the VLM's configuration", "Download it again.")
    weights, config = translate_spa3_vlm(tensors, vlm_fields, fields)
    with torch.device("meta"):
        model = Spa3VLMForConditionalGeneration(config)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    model = _filled(model, weights)
    if (source / "tokenizer_config.json").is_file():
        image_processor = _image_processor(config.spa3r_config.backbone_config)
        token_id = config.vlm_config.image_token_id
        return model, Spa3VLMProcessor(AutoProcessor.from_pretrained(source), image_processor, image_token_id=token_id)
    logger.warning(
        f"{source} holds no tokenizer, so no processor was written. Make one with "
        "Spa3VLMProcessor.from_vlm_and_spa3r and save it beside the model."
    )
    return (model,)


def _image_processor(config: BackboneConfig) -> Spa3RImageProcessor:
    return Spa3RImageProcessor(size=config.image_size, patch_size=config.patch_size)


def _filled(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with these weights, after checking them against it; errors name what doesn't match."""
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    require(weights, *expected)
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
    return model
