"""A tiny Spa3-VLM in the released layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import GOLDEN_SPA3R_FIELDS, golden
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from vlm_families import build_config, build_processor

FIELDS = {"spa3r_config": GOLDEN_SPA3R_FIELDS}


RESEARCH = {"use_geometry_encoder": True, "spa3r_embed_dim": 48, "spa3r_num_queries": 8}


def flat_config() -> dict:
    """config.json as transformers 4.50 wrote it for Qwen2.5-VL: the language model's fields at the top."""
    config = build_config("qwen2_5_vl", build_processor("qwen2_5_vl"))
    tokens = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id")}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 40}
    vision |= {"patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1], "in_chans": 3, "tokens_per_second": 2}
    text = config.get_text_config()
    return tokens | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "transformers_version": "4.50.0",
        "torch_dtype": "float32",
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": text.vocab_size,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]},
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vision_config": vision,
    }


def make_vlm(tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig.from_dict(flat_config() | {"tie_word_embeddings": tied})
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def released_tensors(vlm, tied: bool = False) -> dict[str, torch.Tensor]:
    """`visual.*`, `model.*`, `lm_head.*`, the geometry encoder and the adapter, in the released names."""
    tensors = {}
    for key, tensor in vlm.state_dict().items():
        name = key.removeprefix("model.") if key.startswith("model.visual.") else key
        tensors[name.replace("model.language_model.", "model.")] = tensor
    if tied:
        del tensors["lm_head.weight"]
    spa3r = golden("spa3r_asymmetric", "weights.")
    spa3r |= {f"dino.{key}": tensor for key, tensor in golden("spa3r_asymmetric", "teacher.").items()}
    tensors |= {f"geometry_encoder.spa3r.{key}": tensor for key, tensor in spa3r.items()}
    return {key: tensor.clone().contiguous() for key, tensor in (tensors | golden("vlm_adapter", "weights.")).items()}


def write_released(
    folder: Path, research: dict = RESEARCH, processor: bool = False, tied: bool = False, shards: int = 1
):
    """A folder `spa3_vlm` as it was released; returns it and the VLM inside."""
    folder = folder / "spa3_vlm"
    folder.mkdir()
    vlm = make_vlm(tied)
    tensors = released_tensors(vlm, tied)
    for shard in range(shards):
        part = {key: tensor for index, (key, tensor) in enumerate(tensors.items()) if index % shards == shard}
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
    config = flat_config() | {"tie_word_embeddings": tied} | research
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "do_sample": False}))
    if processor:
        build_processor("qwen2_5_vl").save_pretrained(folder)
    return folder, vlm
