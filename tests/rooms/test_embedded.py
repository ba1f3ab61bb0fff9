"""The embedded model: the same in every process, whole, and usable like any other checkpoint."""

import json
import re

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
)
from spa3r.checkpoints import EXAMPLE_QUESTIONS, SPA3_VLM, SPA3R, VLM
from spa3r.data import SceneBatches
from spa3r.evaluation import evaluate_field
from spa3r.rooms import COLORS, FURNITURE
from spa3r.rooms.embedded import VIEW_SIZE, embedded_model, embedded_spa3r, embedded_vlm
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.rooms.scenes import RoomScenes


def inputs_for(processor, *pictures):
    conversation = user(*pictures, "How many chairs?")
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)


def test_all_are_found_by_name():
    model, processor = embedded_model()
    by_name = Spa3VLMForConditionalGeneration.from_pretrained("embedded")
    assert all(torch.equal(tensor, by_name.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert Spa3VLMProcessor.from_pretrained("embedded").chat_template == processor.chat_template
    spa3r = embedded_spa3r()[0].spa3r
    for part in (model.spa3r, Spa3RModel.from_pretrained("embedded")):
        assert all(torch.equal(tensor, spa3r.state_dict()[key]) for key, tensor in part.state_dict().items())


def test_the_vlm_alone_looks_with_the_same_eyes():
    """Both started from one VLM; the layers above those that look were trained on with Spa3R, and as long without."""
    (model, processor), (alone, its_processor) = embedded_model(), embedded_vlm()
    assert alone.spa3r is None and alone.adapter is None and alone.config.spatial_source == "none"
    ours, its = model.vlm.state_dict(), alone.vlm.state_dict()
    assert ours.keys() == its.keys()
    for name, tensor in ours.items():
        learned = any(
            part in name for part in (*(f"language_model.layers.{i}." for i in range(2, 6)), "language_model.norm")
        )
        assert torch.equal(tensor, its[name]) is not learned, name
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_the_tokenizer_knows_rooms_and_spells_the_rest():
    tokenizer = embedded_model()[1].tokenizer
    for text in ("How many chairs?", "Straße, 部屋, 🪑\n\t  two  spaces "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for word in (*FURNITURE, *(f"{color} " for color in COLORS)):
        assert len(tokenizer(word).input_ids) == 1
    assert len(tokenizer("Is the gray table near the trash bin?").input_ids) < 25
    assert len(tokenizer("<|im_start|><|image_pad|><|vision_end|>").input_ids) == 3


@pytest.mark.parametrize("words", ["B", "2.3", "sofa", "1: chair. 2: none."])
def test_an_answer_is_spelled_as_it_is_generated(words):
    """The prompt's tokens begin the conversation's, or what training shows is not what generation writes."""
    tokenizer, question = embedded_model()[1].tokenizer, {"role": "user", "content": "Which one?\nOptions:\nB. left"}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([question, {"role": "assistant", "content": words}])["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == f"{words}<|im_end|>\n"


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
    assert (logits - by_views).abs().max() > 0.01  # the adapter has learned little
    assert (logits - by_pixels).abs().max() > 0.01
    assert {"camera", "depth"} == set(model.spa3r.backbone.config.heads)


def test_example_questions_are_answered_in_the_right_form():
    model, processor = embedded_model()
    forms = (r"\d+", "yes|no", r"\d+\.\d met(re|er)s", rf"({'|'.join(FURNITURE)})(, ({'|'.join(FURNITURE)}))*")
    rooms = RoomQuestions(FIRST_TEST_SEED, 3)
    for room in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 3):
        scene = model.encode_scene(processor, rooms.pictures(room))
        answers = model.ask(scene, list(EXAMPLE_QUESTIONS), max_new_tokens=32)
        assert all(re.fullmatch(form, answer) for form, answer in zip(forms, answers, strict=True)), answers


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


def test_the_checkpoints_in_the_package_are_small_and_say_what_they_are():
    sizes = {
        folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in (SPA3R, SPA3_VLM, VLM)
    }
    assert sizes[SPA3R] <= 8e6 and sum(sizes.values()) <= 25e6
    for folder in sizes:
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlicense: mit\n") and "level 0" in card and "Not trained on" in card
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert not re.search(r"[~/\\]", json.dumps(config)), "the configuration contains a path"


def test_half_precision_is_loaded_as_single_precision():
    whole, model = (cls.from_pretrained("embedded") for cls in (Spa3RForPreTraining, Spa3RModel))
    assert (
        {p.dtype for p in whole.parameters()} == {p.dtype for p in embedded_model()[0].parameters()} == {torch.float32}
    )
    assert torch.equal(whole.spa3r.encoder.query_tokens, model.encoder.query_tokens)
    assert Spa3RImageProcessor.from_pretrained("embedded").size == VIEW_SIZE
    with pytest.raises(ValueError, match="holds a model of type 'spa3r', and VggtModel loads 'vggt'"):
        VggtModel.from_pretrained("embedded")


def test_it_predicts_unseen_views_of_unseen_rooms_better_than_any_baseline():
    model, processor = embedded_spa3r()
    rooms = RoomScenes(level=0, first_seed=2_000_000, num_rooms=8, stride=(2, 2))
    batches = SceneBatches(rooms, processor, views=(8, 8), pictures_per_batch=8, cameras="given")
    report = evaluate_field(model, batches)
    for target, gap, gap_from_shuffles, harm in (("geometry", 0.7, 0.6, 0.15), ("semantic", 0.5, 0.4, 0.06)):
        assert report.gap_closed[f"{target}_cosine"] > gap
        assert report.gap_closed_from_shuffles[f"{target}_cosine"] > gap_from_shuffles
        predicted, *shuffled = (
            report.rows[row][f"{target}_cosine"].mean for row in ("model", "shuffled_latents", "shuffled_cameras")
        )
        assert all(other < predicted - harm for other in shuffled)
    assert report.rows["model"]["depth_error"].mean < 0.5 * report.rows["context_mean"]["depth_error"].mean
