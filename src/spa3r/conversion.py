"""Released research checkpoints -> folders of ours: safetensors, configuration, processor files.

``from_pretrained`` loads the released layouts as they are (:mod:`spa3r.models.released`); a conversion writes what it
would load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from spa3r.models.released import Kind, quote_keys, read_checkpoint, require
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3_vlm.released_spa3_vlm import translate_spa3_vlm
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RModel
from spa3r.models.spa3r.released_spa3r import for_pretraining, translate_spa3r
from spa3r.models.vggt.configuration_vggt import VggtConfig
from spa3r.models.vggt.modeling_vggt import VggtModel
from spa3r.models.vggt.released_vggt import translate_vggt

logger = logging.get_logger(__name__)


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
    weights, config = translate_vggt(tensors, fields)
    with torch.device("meta"):
        model = VggtModel(config)
    _save(model, weights, output_dir)
    _image_processor(config).save_pretrained(output_dir)


def _convert_spa3r(source: Path, tensors: dict[str, Tensor], output_dir: Path, fields: dict[str, Any]) -> None:
    weights, teacher, config = translate_spa3r(tensors, fields)
    with torch.device("meta"):
        model = Spa3RForPreTraining(config) if teacher else Spa3RModel(config)
    _save(model, for_pretraining(weights, teacher) if teacher else weights, output_dir)
    _image_processor(config.backbone_config).save_pretrained(output_dir)


def _convert_spa3_vlm(source: Path, tensors: dict[str, Tensor], output_dir: Path, fields: dict[str, Any]) -> None:
    config_file = source / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"`source` must be the released spa3_vlm folder with its config.json, and {config_file} doesn't exist."
        )
    weights, config = translate_spa3_vlm(tensors, json.loads(config_file.read_text(encoding="utf-8")), fields)
    with torch.device("meta"):
        model = Spa3VLMForConditionalGeneration(config)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    _save(model, weights, output_dir)
    if (source / "tokenizer_config.json").is_file():
        Spa3VLMProcessor(
            AutoProcessor.from_pretrained(source),
            _image_processor(config.spa3r_config.backbone_config),
            image_token_id=config.vlm_config.image_token_id,
        ).save_pretrained(output_dir)
    else:
        logger.warning(
            f"{source} holds no tokenizer, so no processor was written. Make one with "
            "Spa3VLMProcessor.from_vlm_and_spa3r and save it beside the model."
        )


def _image_processor(config: VggtConfig) -> Spa3RImageProcessor:
    return Spa3RImageProcessor(size=config.image_size, patch_size=config.patch_size)


def _save(model: PreTrainedModel, weights: Mapping[str, Tensor], output_dir: Path) -> None:
    """Check the weights against the model, name what is amiss, write them."""
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
    model.save_pretrained(output_dir)
