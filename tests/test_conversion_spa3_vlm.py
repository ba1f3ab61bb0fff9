"""The released layout of Spa3-VLM becomes ours, tensor by tensor, and gives the recorded outputs."""

from pathlib import Path

import pytest
import torch
from media import noise, user
from released_spa3_vlm import FIELDS, write_released
from safetensors.torch import load_file, save_file
from tiny import golden, golden_inputs, relative_error
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils import logging

from spa3r import Spa3VLMForConditionalGeneration, Spa3VLMProcessor, convert_checkpoint


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
    with pytest.raises(
        ValueError, match="`kind` must be one of 'vggt', 'depth-anything-3', 'spa3r', 'spa3-vlm', got 'vlm'"
    ):
        convert_checkpoint(source, tmp_path / "ours", "vlm", FIELDS)
