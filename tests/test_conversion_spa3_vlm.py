"""The released layout of Spa3-VLM becomes ours, tensor by tensor, and gives the recorded outputs."""

import json
from pathlib import Path

import pytest
import torch
from media import noise, user
from safetensors.torch import load_file, save_file
from tiny import GOLDEN_SPA3R_FIELDS, golden, golden_inputs, relative_error
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import logging
from vlm_families import build_config, build_processor

from spa3r import Spa3VLMForConditionalGeneration, Spa3VLMProcessor, convert_checkpoint

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


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The released folder, the plain VLM that is in it, and our folder."""
    root = tmp_path_factory.mktemp("spa3_vlm")
    source, vlm = write_released(root, processor=True)
    return source, vlm, convert_checkpoint(source, root / "ours", "spa3-vlm", FIELDS)


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForImageTextToText.from_pretrained(converted[2])


@torch.no_grad()
@pytest.mark.parametrize("back_end", ["eager", "sdpa", "xformers"])
def test_fused_tokens_are_the_recorded_ones(converted, back_end):
    """Two scenes of 37 and 21 image tokens, each alone and both packed."""
    adapter = Spa3VLMForConditionalGeneration.from_pretrained(converted[2], attn_implementation=back_end).adapter
    recorded = [golden("vlm_adapter", f"scene{scene}.") for scene in range(2)]
    for scene in recorded:
        fused = adapter(scene["image_embeds"], scene["latents"], [len(scene["image_embeds"])])
        assert relative_error(fused, scene["fused"]) <= 1e-5
        assert relative_error(scene["image_embeds"], scene["fused"]) > 1e-2
    tokens, latents, fused = (torch.cat([s[key] for s in recorded]) for key in ("image_embeds", "latents", "fused"))
    assert relative_error(adapter(tokens, latents, [37, 21]), fused) <= 1e-5
    assert relative_error(adapter(tokens, latents.flip(0), [37, 21]), fused) > 1e-4


@torch.no_grad()
def test_latents_are_the_recorded_ones(model):
    latents = model.spa3r.encode(**golden_inputs("spa3r_asymmetric"))
    assert relative_error(latents, golden("spa3r_asymmetric", "outputs.")["predict_latents"]) <= 1e-5


def test_every_tensor_arrives(converted, model):
    source, vlm, _ = converted
    ours = model.vlm.state_dict()
    assert type(model.vlm) is type(vlm) and ours.keys() == vlm.state_dict().keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in vlm.state_dict().items())
    # Of DINOv2's and DINOv3's pretraining, nothing is needed.
    released = [k for k in load_file(source / "model.safetensors") if ".dino." not in k and "mask_token" not in k]
    assert len(released) == len(model.state_dict())
    text = model.config.get_text_config()
    assert (text.hidden_size, text.num_key_value_heads, text.rope_parameters["mrope_section"]) == (40, 2, [1, 2, 2])
    assert (model.config.adapter_num_attention_heads, model.config.spa3r_config.num_latents) == (4, 8)
    assert model.config.spa3r_config.backbone_config.global_qk_norm == "rms_norm"
    assert model.config.spa3r_config.semantic_teacher_config is None
    assert model.generation_config.max_new_tokens == 3


@torch.no_grad()
def test_the_processor_comes_along_and_the_model_answers(converted, model):
    processor = AutoProcessor.from_pretrained(converted[2])
    assert type(processor) is Spa3VLMProcessor and processor.image_token_id == model.vlm.config.image_token_id
    assert processor.view_image_processor.patch_size == 14
    processor.view_image_processor.size = 70
    conversation = user(noise(70, 56, 0), noise(56, 70, 1), "How many chairs are there?")
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    logits = model(**inputs).logits
    plain = {key: value for key, value in inputs.items() if not key.startswith(("view", "image_tokens"))}
    assert relative_error(converted[1](**plain).logits, logits) > 1e-3  # the released adapter says something
    answer = model.generate(**inputs)
    assert answer.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert isinstance(processor.decode(answer[0, inputs["input_ids"].shape[1] :]), str)


@pytest.mark.parametrize(
    ("how", "kwargs"),
    [
        ("no research fields", {"research": {}}),
        ("use_geometry_encoder only", {"research": {"use_geometry_encoder": True}}),
        ("shards", {"shards": 3}),
        ("tied head", {"tied": True}),
    ],
)
def test_variants_of_the_layout_give_the_same_model(how, kwargs, model, tmp_path):
    source, vlm = write_released(tmp_path, **kwargs)
    ours = Spa3VLMForConditionalGeneration.from_pretrained(
        convert_checkpoint(source, tmp_path / "o", "spa3-vlm", FIELDS)
    )
    state, reference = ours.state_dict(), model.state_dict()
    if how == "tied head":
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
        reference = reference | {f"vlm.{key}": tensor for key, tensor in vlm.state_dict().items()}
    assert state.keys() == reference.keys() and all(torch.equal(state[key], reference[key]) for key in reference)


def test_a_folder_without_tokenizer_says_so(tmp_path, caplog, monkeypatch):
    source, _ = write_released(tmp_path)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("spa3r"), "propagate", True)
    ours = convert_checkpoint(source, tmp_path / "ours", "spa3-vlm", FIELDS)
    assert "holds no tokenizer, so no processor was written. Make one with" in caplog.text
    assert not (ours / "processor_config.json").exists()
    with pytest.raises(ValueError, match="holds no Spa3VLMProcessor"):
        Spa3VLMProcessor.from_pretrained(ours)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stranger.weight": 1, "geometry_gate.7.bias": 1}, "doesn't know: geometry_gate.7.bias, stranger.weight"),
        ({"geometry_encoder.spa3r.stranger": 1}, "keys that the converter doesn't know: stranger"),
        (
            {"model.layers.7.mlp.up_proj.weight": 1},
            "has keys that Spa3VLMForConditionalGeneration lacks: vlm.model.lang",
        ),
        ({"geometry_gate.0.weight": None}, r"lacks keys \(in our names\): adapter.gate.weight"),
        ({"geometry_encoder.spa3r.query_embed.weight": None}, r"lacks keys \(in our names\): encoder.query_tokens"),
        ({"visual.merger.ln_q.weight": None}, r"lacks keys \(in our names\): vlm.model.visual.merger.ln_q.weight"),
        ({"geometry_gate.0.weight": 3}, r"has tensors of other shapes: adapter.gate.weight \(3,\), wanted \(40, 40\)"),
    ],
    ids="unknown unknown_in_spa3r unknown_in_vlm no_adapter no_spa3r no_vision shape".split(),
)
def test_keys_that_are_amiss_are_named(tmp_path, change, words):
    source, _ = write_released(tmp_path)

    def apply(tensors):
        for key, size in change.items():
            tensors.pop(key, None)
            if size:
                tensors[key] = torch.ones(size)

    change_tensors(source, apply)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "ours", "spa3-vlm", FIELDS)


def test_damaged_and_missing_files_are_named(tmp_path):
    source, _ = write_released(tmp_path)
    file, content = source / "model.safetensors", (source / "model.safetensors").read_bytes()
    file.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read as safetensors .* truncated or damaged"):
        convert_checkpoint(source, tmp_path / "ours", "spa3-vlm", FIELDS)
    file.write_bytes(content)
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must be the released spa3_vlm folder with its config\.json"):
        convert_checkpoint(source, tmp_path / "ours", "spa3-vlm", FIELDS)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="`source` must hold weights"):
        convert_checkpoint(source, tmp_path / "ours", "spa3-vlm", FIELDS)
    with pytest.raises(ValueError, match="`kind` must be one of 'vggt', 'spa3r', 'spa3-vlm', got 'vlm'"):
        convert_checkpoint(source, tmp_path / "ours", "vlm", FIELDS)
