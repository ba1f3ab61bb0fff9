"""The paper's ablations of the VLM: tokens appended to the prompt, VGGT's features in place of latents, the VLM alone.

Tolerances are relative, ||ours - reference|| / ||reference||.
"""

import copy
import json
import re
import threading

import pytest
import torch
from media import noise, user
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import BACK_ENDS, realigned, relative_error
from tiny_spa3_vlm import CONVERSATIONS, ComposedFamily, inputs_of, make_family, make_spa3r, without_views
from tiny_spa3_vlm import FAMILY_SIZE as SIZE
from tiny_spa3_vlm import FAMILY_WORDS as WORDS
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments
from vlm_families import FAMILIES, build, build_processor

from spa3r import Spa3RConfig, Spa3RImageProcessor, Spa3VLM, Spa3VLMConfig, Spa3VLMProcessor
from spa3r.data.collator import Spa3VLMCollator
from spa3r.models.packing import ViewLayout

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PATCHES = [2 * 3 + 3 * 3 + 3 * 3, 1 * 3, 0]  # of each row's views, 42 pixels wide
COMBINATIONS = [
    ("cross_attention", "spa3r"),
    ("cross_attention", "backbone"),
    ("append", "spa3r"),
    ("append", "backbone"),
]
APPENDED = [combination for combination in COMBINATIONS if combination[0] == "append"]


def make(integration="append", spatial_source="spa3r", name="qwen2_5_vl", **kwargs) -> ComposedFamily:
    return make_family(name, integration=integration, spatial_source=spatial_source, **kwargs)


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def labels_of(composed: ComposedFamily) -> torch.Tensor:
    """Every word of the prompts, and no place or padding."""
    ids, processor = composed.batch["input_ids"], composed.processor
    return ids.masked_fill((ids == processor.spatial_token_id) | (ids == processor.image_token_id), -100)


# Appended tokens, in every family -------------------------------------------------------------------------------------


# Of families whose prompts, positions and features differ most; the slow tests have all of them.
QUICK = ("qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3", "paligemma", "glm4v", "smolvlm")


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def composed(request) -> ComposedFamily:
    return make(name=request.param)


def test_appended_tokens_reach_the_words_of_their_own_row(composed):
    """Alone and in a batch with a text; with gradients for all that is trained, and for nothing else."""
    model, batch, rows = composed.model, composed.batch, len(composed.conversations)
    assert batch["spatial_tokens_per_scene"].tolist() == [6, 6, 0][:rows]
    logits, mask = logits_of(model, batch), batch["attention_mask"].bool()
    assert not mask.all()
    for row, inputs in enumerate(composed.alone):
        assert relative_error(logits[row][mask[row]], logits_of(model, inputs)[0]) <= 1e-5, row
    changed = batch["view_pixel_values"].clone()
    changed[: PATCHES[0]] = changed[: PATCHES[0]].flip(0)
    seen = (logits_of(model, batch | {"view_pixel_values": changed}) - logits)[:, -1].abs().amax(-1)
    assert seen[0] > 1e-3 and (seen[1:] == 0).all()
    # What precedes a scene's places can't have seen them, and is the plain VLM's.
    place = (composed.alone[1]["input_ids"][0] == composed.processor.spatial_token_id).int().argmax()
    plain = logits_of(model.vlm, without_views(composed.alone[1]))[0]
    ours = logits_of(model, composed.alone[1])[0]
    if composed.name != "paligemma":  # a prompt of its own sees itself both ways
        assert place and relative_error(ours[:place], plain[:place]) <= 1e-6
    assert relative_error(ours[place:], plain[place:]) > 1e-3

    labels = labels_of(composed)
    model.train()(**batch, labels=labels).loss.backward()
    model.eval()
    frozen = {id(parameter) for parameter in (*model.spa3r.parameters(), *model.vision_parameters())}
    silent = [n for n, p in model.named_parameters() if id(p) not in frozen and (p.grad is None or not p.grad.any())]
    touched = [n for n, p in model.named_parameters() if id(p) in frozen and (p.requires_grad or p.grad is not None)]
    model.zero_grad()
    assert (silent, touched) == ([], [])
    assert {n for n, _ in model.adapter.named_parameters()} == {
        f"projector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }


@torch.no_grad()
def test_greedy_words_with_appended_tokens_are_the_definitions(composed):
    """The best next token, again and again, each time from the whole row; and one step with a cache."""
    together = composed.generate(composed.batch)
    for row, inputs in enumerate(composed.alone):
        ids, inputs = inputs["input_ids"], dict(inputs)
        per_token = [key for key, value in inputs.items() if torch.is_tensor(value) and value.shape == ids.shape]
        for step in range(WORDS):
            logits = composed.model(**inputs).logits[:, -1]
            assert relative_error(together.logits[step][row], logits[0]) <= 1e-5, (row, step)
            allowed = logits.clone()
            allowed[:, composed.special_tokens] = -torch.inf
            ids = torch.cat([ids, allowed.argmax(-1, keepdim=True)], 1)
            for key in per_token:
                # (PaliGemma) what follows the prompt is causal and of type 1.
                one = key == "attention_mask" or (composed.name == "paligemma" and key == "token_type_ids")
                more = ids[:, -1:] if key == "input_ids" else torch.full_like(ids[:, -1:], one)
                inputs[key] = torch.cat([inputs[key], more], 1)
        assert torch.equal(together.words[row], ids[0, -WORDS:]), row


def test_beams_of_appended_rows_are_their_own(composed):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = composed.generate(composed.batch, **beams).words.split(2)
    for row, inputs in enumerate(composed.alone):
        assert torch.equal(together[row], composed.generate(inputs, **beams).words), row


# What is appended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen2_5_vl", "spa3r"),
        ("qwen2_5_vl", "backbone"),
        ("qwen3_vl", "spa3r"),
        ("internvl", "spa3r"),
        ("llava", "backbone"),
    ],
)
def test_appended_tokens_are_words_with_these_embeddings(name, source):
    """The plain VLM, with a vocabulary in which the projected tokens are words, reads the same prompt."""
    composed = make(name=name, spatial_source=source)
    inputs, model = composed.alone[0], composed.model
    views = [inputs[key] for key in ("view_pixel_values", "view_grid_hw", "views_per_scene")]
    with torch.no_grad():
        if source == "spa3r":
            spatial = model.spa3r.encode(*views)[0]
        else:
            spatial = model.spa3r.backbone_features(*views)
        fc1, fc2 = model.adapter.projector.fc1, model.adapter.projector.fc2
        projected = fc2(torch.nn.functional.gelu(fc1(spatial)))
        vlm = copy.deepcopy(model.vlm)
        words = torch.arange(100, 100 + len(projected))  # of bytes that the prompt doesn't contain
        assert not torch.isin(inputs["input_ids"], words).any()
        vlm.get_input_embeddings().weight[words] = projected
    places = inputs["input_ids"] == composed.processor.spatial_token_id
    spelled = inputs["input_ids"].clone()
    spelled[places] = words
    end_of_pictures = (inputs["input_ids"][0] == composed.processor.image_token_id).nonzero().max()
    assert (places[0].nonzero() - end_of_pictures).min() in (1, 2, 3)  # an end of image, a line break
    ours, reference = logits_of(model, inputs), logits_of(vlm, without_views(inputs) | {"input_ids": spelled})
    others = ~torch.isin(torch.arange(ours.shape[-1]), words)  # heads may be tied to the embeddings
    assert relative_error(ours[..., others], reference[..., others]) <= 1e-6


@torch.no_grad()
def test_vggt_tokens_are_the_backbones_features_of_all_views():
    """The scenes' own, one after the other, with the views of a scene having seen one another."""
    composed = make("cross_attention", "backbone")
    model, batch, heard = composed.model, composed.batch, {}
    model.adapter.register_forward_pre_hook(lambda module, args: heard.update(args=args))
    logits = logits_of(model, batch)
    _, tokens, tokens_per_scene, per_scene = heard["args"]
    counts = batch["image_tokens_per_scene"].tolist()
    assert (tokens_per_scene, per_scene) == (counts[:2], PATCHES[:2])
    backbone = model.spa3r.backbone
    for row, scene_tokens in enumerate(tokens.split(PATCHES[:2])):
        views = {key: composed.alone[row][key] for key in ("view_pixel_values", "view_grid_hw", "views_per_scene")}
        layout = ViewLayout.from_inputs(views["view_grid_hw"], views["views_per_scene"])
        features = backbone.patch_tokens(backbone(**views, output_layers=[-1]).tokens[0], layout)
        assert scene_tokens.shape == features.shape == (PATCHES[row], 2 * backbone.config.hidden_size)
        assert relative_error(scene_tokens, features) <= 1e-5
    assert model.adapter.projector.fc1.in_features == 2 * backbone.config.hidden_size

    model.spa3r.encoder.apply(lambda module: [p.zero_() for p in module.parameters(recurse=False)])
    assert torch.equal(logits_of(model, batch), logits)  # no latent has a part in it


def test_a_mask_of_who_sees_whom_finds_the_same_places():
    composed = make("append", "spa3r")
    model, batch = composed.model, composed.batch
    is_text, ids = batch["attention_mask"].bool(), batch["input_ids"]
    sees = (is_text[:, None, :] & torch.ones(ids.shape[1], ids.shape[1]).tril().bool())[:, None]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    kinds, grids = batch["mm_token_type_ids"], batch["image_grid_thw"]
    places = model.vlm.base_model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=is_text)[0]
    ours = logits_of(model, batch | {"attention_mask": mask, "position_ids": places})
    assert not is_text.all() and relative_error(ours[is_text], logits_of(model, batch)[is_text]) <= 1e-6
    with pytest.raises(ValueError, match="Each row of `input_ids` must hold a place for each token"):
        model(**batch | {"attention_mask": torch.zeros_like(mask), "position_ids": places})  # padding holds none


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_scenes_of_different_lengths_are_the_scenes_alone(back_end):
    composed = make("cross_attention", "backbone")
    composed.model.set_attn_implementation(back_end)
    logits, mask = logits_of(composed.model, composed.batch), composed.batch["attention_mask"].bool()
    for row, inputs in enumerate(composed.alone):
        assert relative_error(logits[row][mask[row]], logits_of(composed.model, inputs)[0]) <= 1e-5
    moved = logits - logits_of(composed.model.vlm, without_views(composed.batch))
    assert (moved[:, -1].abs().amax(-1) > 1e-3).tolist() == [True, True, False]


def test_a_fresh_adapter_on_vggt_tokens_is_the_identity():
    composed = make("cross_attention", "backbone")
    fresh = Spa3VLM.from_vlm_and_spa3r(composed.model.vlm, composed.model.spa3r, spatial_source="backbone")
    assert torch.equal(logits_of(fresh, composed.batch), logits_of(fresh.vlm, without_views(composed.batch)))


# The VLM alone --------------------------------------------------------------------------------------------------------


def test_the_vlm_alone_is_the_vlm(tmp_path):
    vlm, _ = build("qwen2_5_vl")
    composed = make("cross_attention", "none")
    model = Spa3VLM.from_vlm_and_spa3r(vlm, tmp_path / "never_looked_for", spatial_source="none")
    assert model.spa3r is None and model.adapter is None
    assert Spa3VLM.from_vlm_and_spa3r(vlm, spatial_source="none").spa3r is None
    plain, labels = without_views(composed.batch), labels_of(composed)
    for inputs in (composed.batch, plain):  # of a Spa3VLMProcessor, or of the VLM's own
        output, reference = model(**inputs, labels=labels), vlm(**plain, labels=labels)
        assert torch.equal(output.logits, reference.logits) and torch.equal(output.loss, reference.loss)
        assert torch.equal(composed.generate(inputs, model).words, composed.generate(plain, vlm).words)
    text = composed.alone[2]
    model.train()(**text, labels=text["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    vision = {id(parameter) for parameter in model.vision_parameters()}
    assert trained == {n for n, p in model.named_parameters() if id(p) not in vision} != set()
    assert not any(module.training for part in model.vision_modules() for module in part.modules())

    model.eval().save_pretrained(tmp_path / "alone", include_backbone=False)
    assert all(key.startswith("vlm.") for key in load_file(tmp_path / "alone" / "model.safetensors"))
    loaded = realigned(AutoModelForImageTextToText.from_pretrained(tmp_path / "alone"))
    assert loaded.spa3r is None and torch.equal(logits_of(loaded, composed.batch), logits_of(vlm, plain))


# Saving, training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("integration", "source"), COMBINATIONS[1:])
def test_saved_and_loaded_is_the_same(integration, source, tmp_path):
    composed = make(integration, source)
    composed.model.save_pretrained(tmp_path)
    composed.processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert not any(info.values()) and (loaded.config.integration, loaded.config.spatial_source) == (integration, source)
    wanted = {"cross_attention": None, "append": 6 if source == "spa3r" else "patches"}[integration]
    assert processor.spatial_tokens == loaded.config.spatial_tokens == wanted
    again = inputs_of(processor, CONVERSATIONS)
    assert again.keys() == composed.batch.keys()
    assert all(torch.equal(again[key], value) for key, value in composed.batch.items())
    again = realigned(again)
    assert torch.equal(logits_of(realigned(loaded), again), logits_of(composed.model, composed.batch))

    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = {key: value.bfloat16() if torch.is_floating_point(value) else value for key, value in again.items()}
    mask = again["attention_mask"].bool()
    error = relative_error(logits_of(half, inputs)[mask], logits_of(composed.model, composed.batch)[mask])
    assert 0 < error < 0.1


def test_a_folder_saved_before_there_were_ablations_is_cross_attention_on_latents(tmp_path):
    composed = make("cross_attention", "spa3r")
    composed.model.save_pretrained(tmp_path)
    composed.processor.save_pretrained(tmp_path)
    for name, new in (
        ("config.json", ("integration", "spatial_source", "spatial_token_id")),
        ("processor_config.json", ("spatial_tokens", "spatial_token")),
    ):
        fields = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({key: value for key, value in fields.items() if key not in new}))
    loaded, processor = Spa3VLM.from_pretrained(tmp_path), Spa3VLMProcessor.from_pretrained(tmp_path)
    assert (loaded.config.integration, loaded.config.spatial_source) == ("cross_attention", "spa3r")
    assert processor.spatial_tokens is None and "spatial_tokens_per_scene" not in inputs_of(processor, CONVERSATIONS)
    assert Spa3VLMProcessor.from_pretrained(tmp_path, spatial_tokens="patches").spatial_tokens == "patches"
    assert torch.equal(logits_of(realigned(loaded), composed.batch), logits_of(composed.model, composed.batch))


@pytest.mark.parametrize(
    ("integration", "source"),
    [
        ("append", "spa3r"),
        pytest.param("append", "backbone", marks=pytest.mark.slow),
        pytest.param("cross_attention", "backbone", marks=pytest.mark.slow),
    ],
)
def test_the_plain_trainer_trains_it(integration, source, tmp_path):
    composed = make(integration, source)
    model, before = composed.model, {k: v.clone() for k, v in composed.model.state_dict().items()}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A chair."}]}

    def collate(rows: list) -> dict:
        inputs = inputs_of(
            composed.processor,
            rows,
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding_side": "right"},
        )
        marked = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        return inputs | {"labels": inputs["input_ids"].masked_fill(~marked, -100)}

    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [[*conversation, answer] for conversation in CONVERSATIONS]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[2] < losses[1] < losses[0]
    frozen = {id(parameter) for parameter in (*model.spa3r.parameters(), *model.vision_parameters())}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in frozen), name
    loaded = Spa3VLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_projector_of_appended_tokens_learns_what_a_frozen_vlm_needs():
    """With the projector alone trained, two scenes with the same question come to have two answers."""
    composed = make(initializer_range=0.2)
    model, processor = composed.model, composed.processor
    model.requires_grad_(False)
    model.adapter.requires_grad_(True)
    picture = noise(42, 42, 0)  # the VLM sees the same; only the views differ
    inputs = inputs_of(processor, [user(picture, "Left or right?")] * 2)
    other = Spa3RImageProcessor(size=SIZE)([[noise(42, 42, 5)]])["view_pixel_values"]
    inputs["view_pixel_values"] = torch.cat([inputs["view_pixel_values"][: len(other)], other])
    answers = torch.tensor(processor.tokenizer.convert_tokens_to_ids(["l", "r"]))
    optimizer = torch.optim.Adam(model.adapter.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(logits_of(model, inputs)[:, -1].argmax(-1), answers)
    assert torch.equal(composed.generate(inputs, max_new_tokens=1).words[:, 0], answers)


@pytest.mark.parametrize(("integration", "source"), APPENDED)
def test_lora_with_appended_tokens(integration, source, tmp_path):
    composed = make(integration, source)
    target = r"vlm\.model\.language_model\..*\.(q_proj|v_proj)"
    peft_model = get_peft_model(composed.model, LoraConfig(r=4, target_modules=target, modules_to_save=["adapter"]))
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or ".adapter." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    for _ in range(2):  # a LoRA's first matrix has no gradient while the second is zero
        optimizer.zero_grad()
        peft_model(**composed.batch, labels=labels_of(composed)).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in peft_model.named_parameters() if n in before)
    peft_model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(integration, source).model, tmp_path).eval()
    assert torch.equal(logits_of(loaded, composed.batch), logits_of(peft_model, composed.batch))
    merged = loaded.merge_and_unload()
    assert relative_error(logits_of(merged, composed.batch), logits_of(peft_model, composed.batch)) <= 1e-5


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        composed = make()
        if checkpointing:
            composed.model.gradient_checkpointing_enable()
        loss = composed.model.train()(**composed.batch, labels=labels_of(composed)).loss
        loss.backward()
        results.append({n: p.grad for n, p in composed.model.named_parameters() if p.requires_grad} | {"loss": loss})
    assert all(relative_error(results[1][key], results[0][key]) <= 1e-6 for key in results[0])


def test_a_spa3r_that_is_trained_gets_gradients_through_appended_tokens():
    composed = make()
    composed.model.spa3r.encoder.requires_grad_(True)
    composed.model.train()(**composed.batch, labels=labels_of(composed)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in composed.model.spa3r.encoder.parameters())


@pytest.mark.parametrize(("integration", "source"), COMBINATIONS[1:])
def test_a_batch_of_text_alone_gives_the_adapter_a_gradient_of_zero(integration, source):
    composed = make(integration, source)
    inputs = composed.alone[2]
    composed.model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(not parameter.grad.any() for parameter in composed.model.adapter.parameters())


# How it enters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def appended() -> ComposedFamily:
    return make()


def hooks_of(composed: ComposedFamily) -> int:
    return len(composed.model.get_input_embeddings()._forward_hooks)


def test_counts_may_be_missing_and_masks_too(appended):
    logits = logits_of(appended.model, appended.batch)
    inputs = {
        k: v for k, v in appended.batch.items() if k not in ("spatial_tokens_per_scene", "image_tokens_per_scene")
    }
    assert torch.equal(logits_of(appended.model, inputs), logits)
    lists = {key: appended.batch[key].tolist() for key in ("spatial_tokens_per_scene", "views_per_scene")}
    assert torch.equal(logits_of(appended.model, appended.batch | lists), logits)
    row = appended.alone[0]
    bare = {key: value for key, value in row.items() if key != "attention_mask"}
    assert torch.equal(logits_of(appended.model, bare), logits_of(appended.model, row))


def test_without_a_cache_and_as_samples(appended):
    greedy = appended.generate(appended.batch)
    assert torch.equal(appended.generate(appended.batch, use_cache=False).words, greedy.words)
    best = appended.generate(appended.batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(best.words, greedy.words.repeat_interleave(2, 0))
    assert relative_error(best.logits[0], greedy.logits[0].repeat_interleave(2, 0)) <= 1e-5


def test_a_second_question_reads_the_cache(appended):
    """What has been said stands in the cache; new words bring no views."""
    inputs, model = appended.alone[0], appended.model
    with torch.no_grad():
        cached = model(**inputs, use_cache=True)
        more = torch.tensor([[40, 41, 42]])
        ours = model(input_ids=more, past_key_values=cached.past_key_values).logits
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
    ids = torch.cat([inputs["input_ids"], more], 1)
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 3))
    whole = logits_of(model, inputs | {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types})
    assert relative_error(ours, whole[:, -3:]) <= 1e-5


def test_threads_have_their_own_scenes(appended):
    """Two prompts of one length, both on their way into the model before either is looked up."""
    prompts = [inputs_of(appended.processor, [user(noise(42, 42, seed), "Where?")]) for seed in (0, 5)]
    alone = [logits_of(appended.model, prompt) for prompt in prompts]
    assert not torch.equal(*alone)
    barrier, results = threading.Barrier(2), [None, None]

    def meet(*args) -> None:
        barrier.wait(timeout=20)

    handle = appended.model.vlm.register_forward_pre_hook(meet)

    def run(index: int) -> None:
        results[index] = logits_of(appended.model, prompts[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        handle.remove()
    assert all(torch.equal(ours, reference) for ours, reference in zip(results, alone))


def test_nothing_stays_behind(appended):
    before = hooks_of(appended)
    logits_of(appended.model, appended.batch)
    appended.generate(appended.batch)
    with pytest.raises(ValueError):
        appended.model(**appended.batch, labels=torch.zeros(1, 1, dtype=torch.long))
    assert hooks_of(appended) == before
    plain = logits_of(appended.model.vlm, without_views(appended.batch))
    assert torch.equal(plain, logits_of(build("qwen2_5_vl")[0], without_views(appended.batch)))


def test_a_prompt_in_pieces_is_refused(appended):
    with pytest.raises(
        ValueError, match=r"need the whole prompt, \d+ tokens, in one forward pass, got 8 of them. Leave"
    ):
        appended.model.generate(**appended.batch, max_new_tokens=2, prefill_chunk_size=8)


def test_a_vlm_that_looks_nothing_up_is_noticed(appended, monkeypatch):
    monkeypatch.setattr(appended.model, "get_input_embeddings", lambda: torch.nn.Embedding(2, 2))
    with pytest.raises(RuntimeError, match="never looked its prompt up in its input embeddings: nothing was appended"):
        appended.model(**appended.batch)


# The processor --------------------------------------------------------------------------------------------------------


def runs_of(ids, token_id: int) -> list[int]:
    """Lengths of the runs of a token."""
    return [len(run) for run in re.findall("x+", "".join("x" if i == token_id else "." for i in ids))]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("source", ["spa3r", "backbone"])
def test_places_follow_the_last_picture(source, padding_side):
    processor = make(spatial_source=source).processor
    later = [*user("Hello."), {"role": "assistant", "content": "Hi."}, *CONVERSATIONS[1]]
    conversations = [*CONVERSATIONS, later]
    inputs = inputs_of(processor, conversations, processor_kwargs={"padding_side": padding_side})
    counts = [6, 6, 0, 6] if source == "spa3r" else [*PATCHES, PATCHES[1]]
    assert inputs["spatial_tokens_per_scene"].tolist() == counts
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool())):
        ids = ids[mask].tolist()
        assert runs_of(ids, processor.spatial_token_id) == [count for count in counts[row : row + 1] if count]
        bare = copy.copy(processor)
        bare.spatial_tokens = None
        plain = inputs_of(bare, conversations[row])["input_ids"][0].tolist()
        assert [token for token in ids if token != processor.spatial_token_id] == plain
        if counts[row]:
            last = max(i for i, token in enumerate(ids) if token == processor.image_token_id)
            assert ids.index(processor.spatial_token_id) == last + 2  # after <|vision_end|>
    assert "spatial_tokens_per_scene" in processor.model_input_names
    moved = processor.apply_chat_template(conversations, tokenize=True, return_dict=True).to("meta")
    assert moved["spatial_tokens_per_scene"].device.type == "cpu"


@pytest.mark.parametrize("source", ["spa3r", "backbone"])
def test_text_and_pictures_are_the_conversation(source):
    """The text holds one place; all of them are there once the pictures are."""
    composed = make(spatial_source=source)
    processor = composed.processor
    texts = processor.apply_chat_template(CONVERSATIONS, add_generation_prompt=True)
    assert [text.count(processor.spatial_token) for text in texts] == [1, 1, 0]
    pictures = [
        [item["image"] for item in conversation[0]["content"] if item["type"] == "image"]
        for conversation in CONVERSATIONS
    ]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left")
    assert inputs.keys() == composed.batch.keys()
    assert all(torch.equal(inputs[key], value) for key, value in composed.batch.items())
    single = processor(images=pictures[1], text=texts[1])
    assert all(torch.equal(single[key], value) for key, value in composed.alone[1].items())
    lists = processor.apply_chat_template(CONVERSATIONS, tokenize=True, return_dict=True, return_tensors=None)
    assert list(lists["spatial_tokens_per_scene"]) == composed.batch["spatial_tokens_per_scene"].tolist()


@pytest.mark.parametrize("source", ["spa3r", "backbone"])
def test_places_that_a_message_has_are_widened(source):
    """So says the collator, which writes the template's words itself; words of users have none."""
    composed = make(spatial_source=source)
    processor = composed.processor
    for conversation, reference in zip(CONVERSATIONS, composed.alone):
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        pictures = [item for item in conversation[0]["content"] if item["type"] == "image"]
        written = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
        texts_alone = (
            "{%- for item in messages[0]['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}"
        )
        inputs = processor._write(written, chat_template=texts_alone, tokenize=True, return_dict=True)
        assert all(torch.equal(inputs[key], value) for key, value in reference.items())
        with pytest.raises(ValueError, match="must not contain"):
            inputs_of(processor, written, chat_template=texts_alone)


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Three chairs."}]}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("source", ["spa3r", "backbone"])
def test_places_are_the_same_in_training(name, source):
    """The collator writes the template's words itself, and must put the places where the processor does."""
    composed = make(name=name, spatial_source=source)
    processor, rows = composed.processor, [[*conversation, ANSWER] for conversation in CONVERSATIONS]
    batch = Spa3VLMCollator(processor)([{"messages": row} for row in rows])
    right = {"padding": True, "padding_side": "right"}
    reference = inputs_of(processor, rows, add_generation_prompt=False, processor_kwargs=right)
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], reference["input_ids"][:, :length])
    for key in ("spatial_tokens_per_scene", "image_tokens_per_scene", "view_pixel_values"):
        assert torch.equal(batch[key], reference[key])
    assert batch["skipped"] == [] and not (batch["labels"] == processor.spatial_token_id).any()
    model_inputs = {key: value for key, value in batch.items() if key not in ("skipped", "num_rows")}
    assert composed.model(**model_inputs).loss.isfinite()

    # Cut in the answer; never among the places.
    start = int((batch["labels"][1] != -100).int().argmax())
    places = (batch["input_ids"][1] == processor.spatial_token_id) & batch["attention_mask"][1].bool()
    assert 0 < places.nonzero().max() < start
    cut = Spa3VLMCollator(processor, max_length=start + 1)([{"messages": rows[1]}])
    assert cut["input_ids"].shape[1] == start + 1 and cut["skipped"] == []
    too_short = Spa3VLMCollator(processor, max_length=int(places.nonzero().max()))([{"messages": rows[1]}])
    assert "its pictures end at token" in too_short["skipped"][0]["reason"]


def test_a_text_without_a_place_is_refused(appended):
    text = appended.processor.apply_chat_template(CONVERSATIONS[1])
    token = appended.processor.spatial_token
    picture = CONVERSATIONS[1][0]["content"][0]["image"]
    for wrong, times in ((text.replace(token, ""), 0), (text + token, 2)):
        with pytest.raises(ValueError, match=rf"must have places for appended tokens, .*, once .*, got {times} times"):
            appended.processor(images=picture, text=wrong)


@pytest.mark.parametrize("value", [0, -1, "views", 2.5])
def test_numbers_of_places_that_make_no_sense(appended, value):
    with pytest.raises(
        ValueError, match=f"`spatial_tokens` must be a positive number, 'patches' or None, got {value!r}"
    ):
        copy.copy(appended.processor).spatial_tokens = value


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "the cat", None])
def test_tokens_that_can_hold_no_place(token):
    vlm_processor = build_processor("qwen2_5_vl")
    if token is None:
        vlm_processor.tokenizer.pad_token = vlm_processor.tokenizer.eos_token
    got = "'<\\|im_end\\|>' \\(the padding token\\)" if token is None else re.escape(f"{token!r} (as given)")
    with pytest.raises(ValueError, match=f"`spatial_token` must be a special token .*, got {got}. Give the name"):
        Spa3VLMProcessor(vlm_processor, spatial_tokens=6, spatial_token=token)
    Spa3VLMProcessor(vlm_processor, spatial_token=token)  # nothing is appended


def test_another_token_may_hold_the_places(tmp_path):
    vlm, vlm_processor = build("qwen2_5_vl")
    token_id = vlm_processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    reference = make()
    model = Spa3VLM.from_vlm_and_spa3r(
        vlm, reference.model.spa3r, integration="append", spatial_token_id=vlm.config.vision_start_token_id
    )
    assert model.config.spatial_token_id != token_id
    vlm_processor.tokenizer.add_special_tokens({"additional_special_tokens": []})
    vlm_processor.tokenizer.pad_token = vlm_processor.tokenizer.eos_token
    other = Spa3VLMProcessor(
        vlm_processor,
        Spa3RImageProcessor(size=SIZE),
        image_token_id=vlm.config.image_token_id,
        spatial_tokens=6,
        spatial_token="<|endoftext|>",
    )
    model.config.spatial_token_id = other.spatial_token_id
    model.adapter.load_state_dict(reference.model.adapter.state_dict())
    other.save_pretrained(tmp_path)
    again = Spa3VLMProcessor.from_pretrained(tmp_path)
    assert again.spatial_token == "<|endoftext|>" != again.tokenizer.pad_token
    inputs = inputs_of(again, CONVERSATIONS)
    mask = inputs["attention_mask"].bool()
    assert relative_error(logits_of(model, inputs)[mask], logits_of(reference.model, reference.batch)[mask]) <= 1e-6


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_processor_and_model_must_agree(call, appended):
    attending = make("cross_attention", "spa3r")
    for model, inputs, words in (
        (
            attending.model,
            appended.batch,
            "made places for appended tokens .*`integration` is 'cross_attention' and its `spatial_source` 'spa3r'. "
            "Set `processor.spatial_tokens = model.config.spatial_tokens`",
        ),
        (
            appended.model,
            attending.batch,
            r"must hold a place for each token that is appended to its scene, \[6, 6, 0\], got \[0, 0, 0\] of token "
            rf"{appended.model.config.spatial_token_id}. Set `processor.spatial_tokens = .* \(here 6\)",
        ),
        (
            make("append", "backbone").model,
            appended.batch,
            r"\[24, 3, 0\], got \[6, 6, 0\] of token .*\(here 'patches'\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            getattr(model, call)(**inputs)


def test_truncated_places_are_refused(appended):
    row = appended.alone[1]
    first = int((row["input_ids"][0] == appended.processor.spatial_token_id).int().argmax())
    ids = row["input_ids"]
    cut = {k: v[:, : first + 2] if torch.is_tensor(v) and v.shape == ids.shape else v for k, v in row.items()}
    with pytest.raises(ValueError, match=r"\[6\], got \[2\] of token .* don't truncate these tokens"):
        appended.model(**cut)


def test_appending_needs_ids_and_a_plain_mask(appended):
    row = appended.alone[0]
    wide = row["attention_mask"][:, None, None].bool()
    with pytest.raises(ValueError, match="must have `input_ids` and an `attention_mask` of the same shape"):
        appended.model(**row | {"attention_mask": wide})
    embeddings = appended.model.get_input_embeddings()(row["input_ids"])
    with pytest.raises(ValueError, match=r"must have `input_ids` and .*, got None and \(1, \d+\)"):
        appended.model(**{key: value for key, value in row.items() if key != "input_ids"}, inputs_embeds=embeddings)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"integration": "append", "spatial_source": "none"},
            "must have tokens to append, got `spatial_source='none'`",
        ),
        ({"integration": "prepend"}, "integration"),
        ({"spatial_source": "dust3r"}, "spatial_source"),
    ],
)
def test_configurations_that_are_impossible(fields, words):
    with pytest.raises(Exception, match=words) as refused:
        Spa3VLMConfig(vlm_config=build("qwen2_5_vl")[0].config, **fields)
    if len(fields) == 1:
        assert "Literal" in str(refused.value) or "one of" in str(refused.value)


def test_a_spa3r_must_be_given_where_it_is_used():
    for source in ("spa3r", "backbone"):
        with pytest.raises(ValueError, match="`spa3r` must be the folder, hub id or model of a Spa3R, got None"):
            Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], spatial_source=source)


def test_without_a_padding_token_the_places_must_be_named():
    vlm: PreTrainedModel = build("qwen2_5_vl")[0]
    for config in (vlm.config, vlm.config.get_text_config(), vlm.generation_config):
        config.pad_token_id = None
    with pytest.raises(ValueError, match="`spatial_token_id` must be given with `integration='append'`, since"):
        Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r(), integration="append")
    vlm.generation_config.pad_token_id = 7
    assert Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r(), integration="append").config.spatial_token_id == 7


def test_heads_matter_to_cross_attention_only():
    vlm = build("qwen2_5_vl")[0]
    with pytest.raises(ValueError, match="must divide the language model's width 64, got 5"):
        Spa3VLMConfig(vlm_config=vlm.config, adapter_num_attention_heads=5)
    for fields in ({"integration": "append"}, {"spatial_source": "none"}):
        Spa3VLMConfig(vlm_config=vlm.config, adapter_num_attention_heads=5, **fields)


def test_the_configuration_tells_what_is_appended():
    spa3r = Spa3RConfig(num_latents=24, hidden_size=96)
    sizes = {(i, s): Spa3VLMConfig(spa3r_config=spa3r, integration=i, spatial_source=s) for i, s in COMBINATIONS}
    assert {key: (config.spatial_tokens, config.spatial_hidden_size) for key, config in sizes.items()} == {
        ("cross_attention", "spa3r"): (None, 96),
        ("cross_attention", "backbone"): (None, 2048),
        ("append", "spa3r"): (24, 96),
        ("append", "backbone"): ("patches", 2048),
    }
