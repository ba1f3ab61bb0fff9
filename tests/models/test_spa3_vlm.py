"""Spa3-VLM on a tiny Qwen2.5-VL: packed scenes, saving, training as users do it, and what is refused."""

import json
import re
import resource
import shutil

import pytest
import torch
import transformers
from media import noise, user
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import BACK_ENDS, alive, back_ends_in_use, golden, relative_error, spa3r_config, vggt_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from vlm_families import build

from spa3r import (
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLM,
    Spa3VLMConfig,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
)

# Three scenes of 2, 5 and 7 views, in three sizes and two orientations: (width, height).
WIDE, TALL, SMALL = (70, 56), (50, 70), (70, 28)
SCENES = ((WIDE, WIDE), (TALL, WIDE, TALL, SMALL, WIDE), (SMALL, WIDE, TALL, TALL, SMALL, WIDE, SMALL))


def make_spa3r(**fields) -> Spa3RModel:
    return alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=70), **fields)))


def make(attn_implementation=None, **kwargs) -> Spa3VLMForConditionalGeneration:
    """A composed whose adapter has been trained, so to speak."""
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(build("qwen2_5_vl")[0], make_spa3r(), **kwargs)
    alive(model.adapter)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def make_processor() -> Spa3VLMProcessor:
    vlm, vlm_processor = build("qwen2_5_vl")
    return Spa3VLMProcessor(vlm_processor, Spa3RImageProcessor(size=70), image_token_id=vlm.config.image_token_id)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def inputs_of(processor, conversations, **kwargs) -> dict:
    return dict(
        processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, **({"add_generation_prompt": True} | kwargs)
        )
    )


def scenes(seed: int = 0) -> list:
    return [
        user(*(noise(*size, seed=seed + 10 * scene + view) for view, size in enumerate(sizes)), "What do you see?")
        for scene, sizes in enumerate(SCENES)
    ]


@pytest.fixture(scope="module")
def batch(processor):
    return inputs_of(processor, scenes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A saved composed with its processor."""
    path = tmp_path_factory.mktemp("composed")
    make().save_pretrained(path)
    processor.save_pretrained(path)
    return path


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


# Packed scenes --------------------------------------------------------------------------------------------------------


def parts_in_use(model) -> dict:
    """The back ends that Spa3R, the adapter and the VLM's parts look up."""
    used = back_ends_in_use(model)
    return {
        "spa3r": used["spa3r"],
        "adapter": {model.adapter.cross_attention.config._attn_implementation},
        "vlm": {module.config._attn_implementation for module in model.vlm.modules() if hasattr(module, "q_proj")},
        "vision": {model.vlm.model.visual.config._attn_implementation},
    }


CHOICES = {name: name for name in BACK_ENDS} | {
    "mixed": {"vlm_config": "eager", "spa3r_config": "sdpa"},
    "mixed2": {"vlm_config": "sdpa", "spa3r_config": "eager", "": "eager"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_scenes_packed_are_the_scenes_alone(choice, folder, batch, processor):
    """2, 5 and 7 views in three sizes and two orientations, in every back end."""
    choice = CHOICES[choice]
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=choice)
    used = parts_in_use(model)
    if isinstance(choice, str):
        assert set.union(*used.values()) == {choice}
    else:
        assert used["vlm"] == used["vision"] == {choice["vlm_config"]} and used["spa3r"] == {choice["spa3r_config"]}
        assert used["adapter"] == {choice.get("", "xformers")}

    logits = logits_of(model, batch)
    assert batch["views_per_scene"].tolist() == [2, 5, 7] and len(set(map(tuple, batch["view_grid_hw"].tolist()))) == 3
    for row, conversation in enumerate(scenes()):
        alone = logits_of(model, inputs_of(processor, [conversation]))[0]
        assert relative_error(logits[row][batch["attention_mask"][row].bool()], alone) <= 1e-5
    reference = logits_of(AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa"), batch)
    mask = batch["attention_mask"].bool()
    assert relative_error(logits[mask], reference[mask]) <= 1e-5


@pytest.mark.parametrize("choice", CHOICES)
def test_back_ends_are_chosen_when_combined_too(choice, tmp_path):
    choice = CHOICES[choice]
    build("qwen2_5_vl")[0].save_pretrained(tmp_path / "vlm")
    make_spa3r().save_pretrained(tmp_path / "spa3r")
    model = Spa3VLM.from_vlm_and_spa3r(tmp_path / "vlm", str(tmp_path / "spa3r"), attn_implementation=choice)
    by_part = choice if isinstance(choice, dict) else {"vlm_config": choice, "spa3r_config": choice, "": choice}
    used = parts_in_use(model)
    assert used["vlm"] == used["vision"] == {by_part["vlm_config"]} and used["spa3r"] == {by_part["spa3r_config"]}
    assert used["adapter"] == {by_part.get("", "xformers")}


def test_the_first_view_is_the_frame_of_its_scene_only(batch):
    """Another view first: another world for this row, and for no other."""
    model, counts = make(), batch["view_grid_hw"].prod(-1).tolist()
    views = batch["view_pixel_values"].split(counts)
    logits = logits_of(model, batch)
    other = torch.cat([views[1], views[0], *views[2:]])  # of equal size, in the first row
    changed = logits_of(model, batch | {"view_pixel_values": other})
    assert relative_error(changed[0], logits[0]) > 1e-4 and torch.equal(changed[1:], logits[1:])


def test_layout_may_be_lists_and_counts_may_be_missing(batch):
    model, logits = make(), None
    for keys in ((), ("view_grid_hw", "views_per_scene", "image_tokens_per_scene")):
        inputs = batch | {key: batch[key].tolist() for key in keys}
        logits = logits_of(model, inputs) if logits is None else logits
        assert torch.equal(logits_of(model, inputs), logits)
    inputs = {key: value for key, value in batch.items() if key != "image_tokens_per_scene"}
    assert torch.equal(logits_of(model, inputs), logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), model.generate(**batch, max_new_tokens=2))


def test_sixty_four_views_and_one(processor):
    conversations = [user(*[noise(*SMALL, seed=i) for i in range(64)], "?"), user(noise(*SMALL), "?")]
    assert logits_of(make(), inputs_of(processor, conversations)).isfinite().all()


# The adapter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_adapter_is_the_formula(back_end):
    """fused = tokens + bottleneck(x) * sigmoid(gate(x)), x = LN(cross-attention of tokens and projected latents)."""
    model = make(attn_implementation=back_end)
    adapter, width = model.adapter, 64
    tokens, latents = torch.randn(9, width), torch.randn(1, 6, 32)
    attention = adapter.cross_attention
    keys = adapter.projector.fc2(torch.nn.functional.gelu(adapter.projector.fc1(latents[0])))
    heads = [
        projection(x).view(len(x), 4, 16)
        for projection, x in ((attention.q_proj, tokens), (attention.k_proj, keys), (attention.v_proj, keys))
    ]
    query, key, value = attention.q_norm(heads[0]), attention.k_norm(heads[1]), heads[2]
    weights = (torch.einsum("qhd,khd->hqk", query, key) / 4).softmax(-1)
    x = adapter.norm(attention.proj(torch.einsum("hqk,khd->qhd", weights, value).reshape(9, width)))
    residual = adapter.bottleneck.fc2(torch.nn.functional.gelu(adapter.bottleneck.fc1(x))) * adapter.gate(x).sigmoid()
    assert relative_error(adapter(tokens, latents, [9]), tokens + residual) <= 1e-6


def test_a_fresh_adapter_is_the_identity():
    model = Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], make_spa3r())
    assert not model.adapter.bottleneck.fc2.weight.any() and not model.adapter.bottleneck.fc2.bias.any()
    assert all(p.any() for n, p in model.adapter.named_parameters() if n.endswith("weight") and "fc2" not in n)
    tokens = torch.randn(9, 64)
    assert torch.equal(model.adapter(tokens, torch.randn(2, 6, 32), [4, 5]), tokens)


# Saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "shards", "device_map", "bf16"])
def test_saved_and_loaded_is_the_same(how, batch, tmp_path):
    model = make()
    if how == "bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if how == "shards" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (how == "shards")
    kwargs = {"device_map": {"device_map": "cpu"}, "bf16": {"dtype": torch.bfloat16}}.get(how, {})
    loaded = Spa3VLM.from_pretrained(tmp_path, **kwargs)
    assert not loaded.training and type(AutoConfig.from_pretrained(tmp_path)) is Spa3VLMConfig
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value.float(), state[key].float()) for key, value in loaded.state_dict().items())
    if how != "bf16":
        assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_without_the_backbone_it_is_fetched_where_it_came_from(batch, tmp_path):
    spa3r = make_spa3r()
    spa3r.backbone.save_pretrained(tmp_path / "backbone")
    spa3r.save_pretrained(tmp_path / "spa3r")
    spa3r = Spa3RModel.from_pretrained(tmp_path / "spa3r")
    spa3r.config.backbone_name_or_path = str(tmp_path / "backbone")
    model = Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], spa3r)
    alive(model.adapter)
    model.save_pretrained(tmp_path / "light", include_backbone=False)
    model.save_pretrained(tmp_path / "whole")
    keys, whole = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("light", "whole"))
    assert whole - keys == {key for key in whole if key.startswith("spa3r.backbone.")} != set()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "light")
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    assert not any(parameter.requires_grad for parameter in loaded.spa3r.parameters())


def test_generation_config_is_the_vlms(folder, tmp_path):
    model = make()
    assert model.generation_config is model.vlm.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=3, eos_token_id=model.vlm.config.get_text_config().eos_token_id
    )
    assert model.vlm.generation_config.max_new_tokens == 3
    model.save_pretrained(tmp_path)
    assert Spa3VLM.from_pretrained(tmp_path).vlm.generation_config.max_new_tokens == 3


def test_the_parts_of_the_language_model_are_the_vlms():
    model = make()
    vlm = model.vlm
    assert model.get_input_embeddings() is vlm.get_input_embeddings() and model.get_decoder() is vlm.get_decoder()
    assert model.get_output_embeddings() is vlm.get_output_embeddings()
    assert model.config.get_text_config() is vlm.config.get_text_config()
    model.resize_token_embeddings(400)
    assert vlm.get_input_embeddings().num_embeddings == vlm.get_output_embeddings().out_features == 400


def test_the_configuration_holds_the_parts_own():
    """What is set on a part's configuration is what the composed saves."""
    vlm, spa3r = build("qwen2_5_vl")[0], make_spa3r()
    copied = Spa3VLMConfig(vlm_config=vlm.config.to_dict(), spa3r_config=spa3r.config)
    for model in (make(), Spa3VLM(Spa3VLMConfig(**make().config.to_dict())), Spa3VLM(copied, vlm=vlm, spa3r=spa3r)):
        assert model.config.vlm_config is model.vlm.config and model.config.spa3r_config is model.spa3r.config
        assert model.adapter.cross_attention.config is model.config


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied(tied, tmp_path, batch):
    vlm = build("qwen2_5_vl")[0]
    vlm.config.tie_word_embeddings = vlm.config.get_text_config().tie_word_embeddings = tied
    vlm = type(vlm)(vlm.config)
    model = Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r())
    model.save_pretrained(tmp_path)
    loaded, info = Spa3VLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    shared = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert shared == tied and ("vlm.lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert torch.equal(logits_of(loaded, batch), logits_of(model.eval(), batch))


# Training -------------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(batch):
    results = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            on = {n.split(".")[0] for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)}
            assert {"vlm"} <= on
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
    assert {key for key in results[0] if key.startswith("adapter.")} and results[0].keys() == results[1].keys()
    assert all(relative_error(results[1][key], results[0][key]) <= 1e-6 for key in results[0])


def test_unfrozen_parts_learn(batch):
    """Freezing is a default: what is given `requires_grad_(True)` gets gradients, through the adapter."""
    model = make()
    model.spa3r.encoder.requires_grad_(True)
    model.vlm.model.visual.requires_grad_(True)
    model.train()
    assert model.spa3r.training and model.vlm.model.visual.training
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for part in (model.spa3r.encoder, model.vlm.model.visual):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in model.spa3r.backbone.parameters())


class Collator:
    """What a user would write: conversations -> a batch with labels."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict:
        inputs = inputs_of(
            self.processor,
            [row["messages"] for row in rows],
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
        )
        marked = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        return inputs | {"labels": inputs["input_ids"].masked_fill(~marked, -100)}


def answered(conversation: list, answer: str) -> dict:
    return {"messages": [*conversation, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_trainer_trains_it(checkpointing, processor, tmp_path):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [answered(conversation, "A chair.") for conversation in scenes()] + [answered(user("Hello"), "Hi.")]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(model, arguments, data_collator=Collator(processor), train_dataset=rows)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and losses[1] < losses[0]
    frozen = {id(parameter) for parameter in (*model.spa3r.parameters(), *model.vision_parameters())}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in frozen), name
    assert {*load_file(tmp_path / "checkpoint-2" / "model.safetensors")} <= model.state_dict().keys()
    resumed = make()
    arguments.max_steps = 3
    again = Trainer(resumed, arguments, data_collator=Collator(processor), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.log_history[-2]["loss"] < losses[1]  # goes on from where it was, not from fresh weights
    loaded = Spa3VLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_lora_on_the_language_model(batch):
    model = make()
    target = r"vlm\.model\.language_model\..*\.(q_proj|v_proj|up_proj)"
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=target, modules_to_save=["adapter"]))
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or ".adapter." in name for name in trained)
    assert any("lora_" in name for name in trained) and any(".adapter." in name for name in trained)
    peft_model.train()
    before = {name: parameter.clone() for name, parameter in peft_model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    loss = peft_model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    changed = {name for name, parameter in peft_model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= trained and any("lora_B" in name for name in changed) and any(".adapter." in n for n in changed)
    assert peft_model(**batch, labels=batch["input_ids"]).loss < loss
    assert peft_model.eval().generate(**batch, max_new_tokens=2).shape[0] == 3


# Other ways to use it -------------------------------------------------------------------------------------------------


def test_pipeline(folder, processor):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    pipe = pipeline("image-text-to-text", model=model, processor=AutoProcessor.from_pretrained(folder))
    conversation = scenes()[0]
    (answer,) = pipe(text=conversation, max_new_tokens=4, do_sample=False, return_full_text=False)
    inputs = inputs_of(processor, conversation)
    words = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.batch_decode(words, skip_special_tokens=True)[0]


def test_a_batch_of_text_alone_gives_the_adapter_a_gradient_of_zero(processor):
    """Processes of distributed training wait for one another's gradients."""
    model = make().train()
    inputs = inputs_of(processor, [user("Hello."), user("How are you?")])
    labels = inputs["input_ids"]
    output = model(**inputs, labels=labels)
    plain = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(output.loss, model.vlm(**plain, labels=labels).loss)
    output.loss.backward()
    assert all(not parameter.grad.any() for parameter in model.adapter.parameters())
    tuple_loss = model(**inputs, labels=labels, return_dict=False)[0]
    assert torch.equal(tuple_loss, output.loss) and tuple_loss.requires_grad


def test_under_autocast_it_trains(batch):
    model = make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    reference = model(**batch, labels=batch["input_ids"]).loss
    assert relative_error(output.loss, reference) < 2e-2
    assert all(parameter.grad.isfinite().all() for parameter in model.adapter.parameters())


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_casting_leaves_the_camera_head_in_float32(cast):
    model = make()
    before = [parameter.clone() for parameter in model.spa3r.backbone.camera_head.parameters()]
    cast(model)
    after = list(model.spa3r.backbone.camera_head.parameters())
    assert model.spa3r.encoder.norm.weight.dtype != torch.float32
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(after, before))


def test_parts_of_another_configuration_are_what_is_saved(tmp_path):
    vlm, spa3r = build("qwen2_5_vl")[0], make_spa3r()
    spa3r.backbone.save_pretrained(tmp_path / "vggt")
    spa3r.config.backbone_name_or_path = str(tmp_path / "vggt")
    config = Spa3VLMConfig(vlm_config=vlm.config.to_dict(), spa3r_config=spa3r.config.to_dict())
    model = Spa3VLMForConditionalGeneration(config, vlm=vlm, spa3r=spa3r)
    assert model.config.spa3r_config is spa3r.config and model.config.vlm_config is vlm.config
    model.save_pretrained(tmp_path / "composed", include_backbone=False)
    loaded = Spa3VLM.from_pretrained(tmp_path / "composed")
    assert torch.equal(loaded.spa3r.backbone.camera_token, spa3r.backbone.camera_token)


def test_generate_takes_its_configuration_in_second_place(model, batch):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    words = model.generate(batch["input_ids"], config, **inputs)
    assert torch.equal(words, model.generate(**batch, generation_config=config))
    assert words.shape[1] == batch["input_ids"].shape[1] + 3


def test_automodel_knows_the_composed(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is Spa3VLMForConditionalGeneration


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"view_pixel_values": None, "view_grid_hw": None, "views_per_scene": None},
            "`pixel_values` came without `view_pixel_values`, `view_grid_hw` and `views_per_scene`. Make the inputs",
        ),
        (
            {"pixel_values": None},
            "`view_pixel_values` came without the VLM's own `pixel_values`, so there are no image",
        ),
        ({"views_per_scene": [2, 5]}, r"must have one entry for each of the 3 rows of `input_ids` \(0 for a text-only"),
        ({"views_per_scene": [2, 5, 7, 1]}, "must have one entry for each of the 3 rows of `input_ids`.*got 4"),
        (
            {"views_per_scene": [2, 6, 7]},
            r"must add up to the number of views, 14 .*got \[2, 6, 7\], which adds up to 15",
        ),
        (
            {"views_per_scene": [7, 7, 0]},
            "Row 2 has 0 views and .* image tokens; a row has both or neither. Don't trunc",
        ),
        (
            {"view_grid_hw": [[4, 5]] * 14},
            "`view_pixel_values` must have 280 rows, one for each patch of `view_grid_hw`",
        ),
        (
            {"image_tokens_per_scene": [4, 4, 4]},
            r"`image_tokens_per_scene` must say how many image placeholders each row of `input_ids` has, .* got \[4, 4",
        ),
        ({"image_grid_thw": None}, "`pixel_values` must come with `image_grid_thw`, got None: without, the VLM can't"),
    ],
    ids="no_views no_pictures few many sum_of_views row_without_views grids token_counts no_grids".split(),
)
def test_inputs_that_contradict_one_another(model, batch, call, change, words):
    with pytest.raises(ValueError, match=words):
        getattr(model, call)(**(batch | change))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_ids_are_those_of_the_tokenizer(model, batch, monkeypatch, call):
    monkeypatch.setattr(model.spa3r, "_encode", None)  # to call it would be an error of another kind
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.float32):
        with pytest.raises(
            ValueError, match=rf"`input_ids` must be .* type torch.int64, got .* and type {dtype}\. Pass"
        ):
            getattr(model, call)(**batch | {"input_ids": batch["input_ids"].to(dtype)})
    last = len(model.get_input_embeddings().weight) - 1
    for wrong in (-100, -1, last + 1, 2**40):
        ids = batch["input_ids"].clone()
        ids[1, -2] = wrong
        words = f"from 0 to {last}, the VLM's tokens, got {wrong} at place {ids.shape[1] - 2} of row 1. Pass what"
        with pytest.raises(ValueError, match=words):
            getattr(model, call)(**batch | {"input_ids": ids})


@pytest.mark.parametrize(
    ("call", "keywords", "words"),
    [
        ("forward", {"view_grid": 3}, r"takes `view_grid`\. Did you mean `view_grid_hw`.* it would have no effect"),
        ("forward", {"label": 3}, r"takes `label`\. Did you mean `labels`"),
        ("forward", {"hidden_states": 3, "zzz": False}, r"takes `hidden_states`, `zzz`\.(?! Did you mean `zzz`)"),
        ("forward", {"max_new_tokens": 3}, "takes `max_new_tokens`"),
        ("base_model", {"output_attention": True}, r"takes `output_attention`\. Did you mean `output_attentions`"),
        ("generate", {"max_new_token": 3}, r"takes `max_new_token`\. Did you mean `max_new_tokens`"),
        ("generate", {"views_per_scenes": [2, 5, 7]}, r"takes `views_per_scenes`\. Did you mean `views_per_scene`"),
        ("generate", {"x" * 10**6: 3}, r"takes `x{10,60}\.\.\.x{10,60}`\. Correct the name, or leave it out"),
    ],
)
def test_unknown_keywords_are_refused_before_pictures_are_encoded(model, batch, monkeypatch, call, keywords, words):
    monkeypatch.setattr(model.spa3r, "_encode", None)  # to call it would be an error of another kind
    start = "Neither Spa3VLMForConditionalGeneration nor its VLM, Qwen2_5_VLForConditionalGeneration, "
    with pytest.raises(TypeError, match=start + words) as refused:
        getattr(model, call)(**batch, **keywords)
    assert len(str(refused.value)) < 500


@torch.no_grad()
def test_keywords_of_every_layer_are_known(model, batch):
    plain = model(**batch)
    known = {"output_hidden_states": True, "output_attentions": False, "use_cache": False, "return_dict": True}
    known |= {"logits_to_keep": 1, "is_causal": True, "past_key_values": None, "inputs_embeds": None, "anything": None}
    known |= {"num_items_in_batch": torch.tensor(3), "ignore_index": -100, "output_router_logits": False}
    torch.testing.assert_close(model(**batch, **known).logits, plain.logits[:, -1:])
    for settings in ({"synced_gpus": False, "tokenizer": None}, {"generation_config": model.generation_config}):
        assert model.generate(**batch, max_new_tokens=2, do_sample=False, num_rows=3, **settings).shape[0] == 3


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("left", "words"),
    [
        (8, "Row 0 has 2 views and 0 image tokens; a row has both or neither. Don't truncate image placeholders"),
        (None, "The pictures give (\\d+) image tokens and `input_ids` has (\\d+) image placeholders. Don't truncate"),
    ],
)
def test_truncated_placeholders(model, batch, counted, left, words):
    marks = batch["input_ids"] == model.vlm.config.image_token_id
    # None: the first placeholder of the longest row goes, and no other.
    left = left or marks.shape[1] - 1 - int(marks[2].int().argmax())
    inputs = {key: value[:, -left:] if value.shape == marks.shape else value for key, value in batch.items()}
    inputs["image_tokens_per_scene"] = marks[:, -left:].sum(-1) if counted else None
    with pytest.raises(ValueError, match=words) as refused:
        model(**inputs)
    if left != 8:
        assert re.search(words, str(refused.value)).groups() == (str(int(marks.sum())), str(int(marks.sum()) - 1))


def test_embeddings_need_counts(model, batch):
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key not in ("input_ids", "image_tokens_per_scene")}
    with pytest.raises(ValueError, match="`image_tokens_per_scene` must be given where `input_ids` is not"):
        model(inputs_embeds=embeddings, **inputs)


def llama4() -> transformers.PreTrainedModel:
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28}
    return transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision | {"patch_size": 14})
    )


def fuyu() -> transformers.PreTrainedModel:
    text = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2}
    sizes = {key: value for key, value in text.items() if key != "model_type"}
    return transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text, patch_size=4, **sizes))


def language_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def blip() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 32, "encoder_hidden_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14})
    return transformers.BlipForConditionalGeneration(config)


def blip2() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"model_type": "opt", "vocab_size": 32, "ffn_dim": 16, "word_embed_proj_dim": 16}
    config = transformers.Blip2Config(
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        qformer_config=sizes | {"vocab_size": 32, "encoder_hidden_size": 16},
        text_config=text,
    )
    return transformers.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make_vlm", "words"),
    [
        (blip2, "The VLM family 'blip-2' can't be combined with a Spa3R: its generate takes pixels only"),
        (
            llama4,
            "The VLM family 'llama4' can't be combined with a Spa3R: it projects image features inside its forward",
        ),
        (fuyu, "The VLM family 'fuyu' can't be combined with a Spa3R: "),
        (blip, "The VLM family 'blip' can't be combined with a Spa3R: its forward takes no `mm_encoder_outputs`"),
        (
            language_model,
            "The VLM family 'llama' can't be combined with a Spa3R: its forward takes no `mm_encoder_outputs`",
        ),
    ],
)
def test_families_without_the_door_are_refused(make_vlm, words):
    with pytest.raises(ValueError, match=words + ".*Use a family whose fused image tokens"):
        Spa3VLM.from_vlm_and_spa3r(make_vlm(), make_spa3r())


@pytest.mark.parametrize("make_vlm", [llama4, blip, language_model])
def test_a_folder_of_a_family_without_the_door_is_refused_before_weights_are_read(make_vlm, tmp_path):
    vlm = make_vlm()
    vlm.config.save_pretrained(tmp_path)  # no weights: reading them would fail with other words
    with pytest.raises(ValueError, match=f"The VLM family '{vlm.config.model_type}' can't be combined"):
        Spa3VLM.from_vlm_and_spa3r(tmp_path, make_spa3r())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adapter_num_attention_heads": 5}, "must divide the language model's width 64, got 5"),
        ({"vlm_config": {"hidden_size": 16}}, "`vlm_config` must name its family, as in {'model_type': 'qwen2_5_vl'"),
    ],
)
def test_configurations_that_contradict_themselves(fields, words):
    with pytest.raises(ValueError, match=words):
        Spa3VLMConfig(**({"vlm_config": build("qwen2_5_vl")[0].config} | fields))


def test_latents_of_another_width():
    config = Spa3VLMConfig(vlm_config=build("qwen2_5_vl")[0].config, spa3r_config=spa3r_config(hidden_size=48))
    with pytest.raises(ValueError, match="`spa3r` must make latents of width 48, as `spa3r_config` says, got 32"):
        Spa3VLM(config, spa3r=make_spa3r())


@pytest.fixture
def checkpoint(folder, tmp_path):
    """A copy of a saved composed that may be spoilt."""
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_of_another_width_is_refused(checkpoint):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["spa3r_config"]["hidden_size"] = 64
    file.write_text(json.dumps(config))
    words = r"has tensors of other shapes than .*: adapter\.projector\.fc1\.weight \(64, 32\), wanted \(64, 64\)"
    with pytest.raises(ValueError, match=words):
        Spa3VLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("part", "fields", "words"),
    [
        (
            "text_config",
            {"hidden_size": 64_000},
            r"has tensors of other shapes than .*, wanted \(16000, 64000\).* Take both from the same place",
        ),
        ("text_config", {"vocab_size": 50_000_000}, r"embed_tokens\.weight \(\d+, \d+\), wanted \(50000000, \d+\)"),
        ("vision_config", {"out_hidden_size": 10**9}, r"visual\.merger.*, wanted \(1000000000,\)"),
        ("vision_config", {"depth": 200}, r"must hold the [\d,]+ parameters of .*, got [\d,]+ in \d+ tensors"),
    ],
)
def test_a_configuration_of_a_far_larger_model_is_refused_before_the_model_has_memory(
    folder, tmp_path, sharded, part, fields, words
):
    if sharded:
        weights = load_file(folder / "model.safetensors")
        index = {key: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, key in enumerate(weights)}
        for file in set(index.values()):
            part_of = {key: value for key, value in weights.items() if index[key] == file}
            save_file(part_of, tmp_path / file, {"format": "pt"})
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vlm_config"][part] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words) as refused:
        Spa3VLM.from_pretrained(tmp_path)
    assert len(str(refused.value)) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("adapter.gate.weight"), "lacks keys of Spa3VLMForConditionalGeneration: adapter.gate.weight"),
        (
            lambda w: [w.pop(k) for k in list(w) if k.startswith("adapter.")],
            r"lacks keys of .*adapter\..* and \d+ more",
        ),
        (lambda w: w.pop("spa3r.encoder.query_tokens"), "lacks keys of .*: spa3r.encoder.query_tokens"),
        (lambda w: w.pop("vlm.lm_head.weight"), "lacks keys of .*: vlm.lm_head.weight"),
        (lambda w: w.update({"stranger": torch.ones(1)}), "has unexpected keys of .*: stranger"),
    ],
    ids="key adapter spa3r vlm foreign".split(),
)
def test_loading_is_strict(checkpoint, change, words):
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=words + ".*Load it with the class that saved it"):
        AutoModelForImageTextToText.from_pretrained(checkpoint)


@pytest.mark.parametrize("size", [4, 1000, -100])
def test_truncated_files_are_named(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read as safetensors .* truncated or damaged"):
        Spa3VLM.from_pretrained(checkpoint)


# Pinned ---------------------------------------------------------------------------------------------------------------


def test_the_adapters_sizes_follow_the_vlm_and_the_spa3r():
    shapes = {name: tuple(p.shape) for name, p in make().adapter.named_parameters() if p.ndim > 1}
    assert shapes["projector.fc1.weight"] == (64, 32) and shapes["bottleneck.fc1.weight"] == (16, 64)
    assert len(golden("vlm_adapter", "weights.")) == len(make().adapter.state_dict())


@pytest.mark.parametrize("wrong", [{"subfolder": "vlm"}, {"hidden_size": 3}])
def test_keywords_that_nothing_would_hear_are_refused(wrong):
    """A configuration would keep and save them."""
    with pytest.raises(TypeError, match=f"Unknown keywords '{next(iter(wrong))}': wanted fields of Spa3VLMConfig or"):
        Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], make_spa3r(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"revision": "main"},
        {"revision": {"spa3r_config": "main"}},
        {"quantization_config": {"load_in_4bit": True}},
        {"trust_remote_code": True},
    ],
)
def test_keywords_about_loading_a_part_that_is_loaded_are_refused(wrong):
    with pytest.raises(TypeError, match=f"'{next(iter(wrong))}' must be left out where `(vlm|spa3r)` is a model"):
        Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], make_spa3r(), **wrong)


def test_parts_that_are_no_models_are_refused():
    vlm = get_peft_model(build("qwen2_5_vl")[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"`vlm` must be a folder, .*got PeftModel. Pass `vlm.get_base_model\(\)`"):
        Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r())
    with pytest.raises(TypeError, match="`spa3r` must be a folder, a hub id or a model of transformers, got int"):
        Spa3VLM.from_vlm_and_spa3r(build("qwen2_5_vl")[0], 3)
    with pytest.raises(ValueError, match="`revision` must have the keys 'vlm_config' and 'spa3r_config'"):
        Spa3VLM.from_vlm_and_spa3r("a", "b", revision={"vlm": "main"})


def test_revisions_go_to_their_repositories(tmp_path):
    """Folders as the hub's cache keeps them, without a network."""
    vlm, spa3r = build("qwen2_5_vl")[0], make_spa3r()
    for name, model in (("vlm", vlm), ("spa3r", spa3r)):
        home = tmp_path / f"models--somebody--{name}"
        for number, commit in enumerate((f"{name}-new", f"{name}-old")):
            with torch.no_grad():
                next(model.parameters()).fill_(number)
            model.save_pretrained(home / "snapshots" / commit)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(f"{name}-new")
    names, where = ("somebody/vlm", "somebody/spa3r"), {"cache_dir": tmp_path, "local_files_only": True}

    def versions(**kwargs) -> list[float]:
        model = Spa3VLM.from_vlm_and_spa3r(*names, **where, **kwargs)
        return [next(part.parameters()).flatten()[0].item() for part in (model.vlm, model.spa3r)]

    assert versions() == [0, 0]
    assert versions(revision="vlm-old") == [1, 0]
    assert versions(revision={"vlm_config": "vlm-old", "spa3r_config": "spa3r-old"}) == [1, 1]


def test_a_token_goes_to_the_hub_and_not_into_the_configuration(tmp_path):
    vlm, spa3r = build("qwen2_5_vl")[0], make_spa3r()
    vlm.save_pretrained(tmp_path / "vlm")
    spa3r.save_pretrained(tmp_path / "spa3r")
    model = Spa3VLM.from_vlm_and_spa3r(tmp_path / "vlm", tmp_path / "spa3r", token="a_secret", local_files_only=True)
    assert "a_secret" not in model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_what_is_by_token_has_the_shape_of_the_tokens(batch, name):
    model, ids = make(), batch["input_ids"]
    words = rf"`{name}` must have the shape of `input_ids`, \({len(ids)}, {ids.shape[1]}\), got \({len(ids)}, 3\)"
    with pytest.raises(ValueError, match=words):
        model(**{**batch, name: torch.ones(len(ids), 3, dtype=torch.long)})
