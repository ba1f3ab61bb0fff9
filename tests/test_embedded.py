"""The embedded model: the same in every process, whole, and usable like any other checkpoint."""

import json

import pytest
import torch
from media import noise, user

from spa3r import (
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
    VggtModel,
    embedded,
)
from spa3r.checkpoints import FOLDERS
from spa3r.data import RoomScenes, SceneBatches
from spa3r.embedded import VIEW_SIZE, embedded_model, embedded_spa3r
from spa3r.evaluation import evaluate_field


def inputs_for(processor, *pictures):
    conversation = user(*pictures, "How many chairs?")
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)


def test_equal_seeds_give_equal_weights_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, other, another = (embedded_model(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first["vlm.lm_head.weight"], another["vlm.lm_head.weight"])
    assert torch.equal(first["spa3r.encoder.query_tokens"], another["spa3r.encoder.query_tokens"])  # trained


def test_the_tokenizer_is_trained_to_the_same_every_time():
    assert embedded._bpe.__wrapped__() == embedded._bpe.__wrapped__()


def test_the_tokenizer_knows_rooms_and_spells_the_rest():
    tokenizer = embedded_model()[1].tokenizer
    for text in ("How many chairs?", "Straße, 部屋, 🪑\n\t  two  spaces "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" chairs sofa table").input_ids) == 3
    assert len(tokenizer("<|im_start|><|image_pad|><|vision_end|>").input_ids) == 3


def test_chat_is_qwens():
    processor = embedded_model()[1]
    conversation = [{"role": "system", "content": "Be brief."}, *user(noise(112, 112), "Where?")]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_pictures_become_views_and_tokens():
    _, processor = embedded_model()
    inputs = inputs_for(processor, noise(300, 300), noise(224, 168, 1))
    assert inputs["view_grid_hw"].tolist() == [[8, 8], [6, 8]]
    assert inputs["views_per_scene"].tolist() == [2]
    assert inputs["image_tokens_per_scene"].tolist() == [4 * 4 + 3 * 4]
    assert VIEW_SIZE == 8 * processor.view_image_processor.patch_size


def test_all_parts_have_a_say():
    model, processor = embedded_model()
    inputs = inputs_for(processor, noise(112, 112))
    other_views = inputs | {"view_pixel_values": -inputs["view_pixel_values"]}
    other_pixels = inputs | {"pixel_values": -inputs["pixel_values"]}
    with torch.no_grad():
        logits, by_views, by_pixels = (model(**given).logits for given in (inputs, other_views, other_pixels))
    assert (logits - by_views).abs().max() > 0.01
    assert (logits - by_pixels).abs().max() > 0.01
    assert {"camera", "depth", "point"} == set(model.spa3r.backbone.config.heads)


def test_it_is_saved_and_loaded_as_any_other(tmp_path):
    model, processor = embedded_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        cls.from_pretrained(tmp_path) for cls in (Spa3VLMForConditionalGeneration, Spa3VLMProcessor)
    )
    inputs, again = inputs_for(processor, noise(112, 112)), inputs_for(loaded_processor, noise(112, 112))
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), loaded.generate(**again, max_new_tokens=8))


def test_its_attention_back_end_can_be_chosen():
    model, _ = embedded_model()
    model.set_attn_implementation("eager")
    parts = (model, model.vlm, model.vlm.get_decoder(), model.spa3r, model.spa3r.backbone)
    assert {part.config._attn_implementation for part in parts} == {"eager"}


def test_the_checkpoint_in_the_package_has_a_name_and_is_small():
    folder = FOLDERS["embedded"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    whole, model = (cls.from_pretrained("embedded") for cls in (Spa3RForPreTraining, Spa3RModel))
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert torch.equal(whole.spa3r.encoder.query_tokens, model.encoder.query_tokens)
    assert Spa3RImageProcessor.from_pretrained("embedded").size == VIEW_SIZE
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "/" not in json.dumps([config, config["backbone_config"]])  # where its parts came from is nobody's business
    with pytest.raises(ValueError, match="holds a model of type 'spa3r', and VggtModel loads 'vggt'"):
        VggtModel.from_pretrained("embedded")


def test_it_predicts_unseen_views_of_unseen_rooms_better_than_any_baseline():
    model, processor = embedded_spa3r()
    rooms = RoomScenes(level=0, first_seed=2_000_000, num_rooms=8, stride=(2, 2))
    batches = SceneBatches(rooms, processor, views=(8, 8), pictures_per_batch=8, cameras="given")
    report = evaluate_field(model, batches)
    for target, harm in (("geometry", 0.05), ("semantic", 0.02)):
        assert report.gap_closed[f"{target}_cosine"] > 0.4
        assert report.gap_closed_from_shuffles[f"{target}_error"] > 0.05
        predicted, *shuffled = (
            report.rows[row][f"{target}_cosine"].mean for row in ("model", "shuffled_latents", "shuffled_cameras")
        )
        assert all(other < predicted - harm for other in shuffled)
    assert report.rows["model"]["depth_error"].mean < 0.5 * report.rows["context_mean"]["depth_error"].mean
