"""The tiny families of `vlm_families` hold what a wrapper of any vision-language model builds on.

That is: batches of samples with several pictures, one and none; picture features that can be taken out of the model
and handed back without a bit of difference; a save and load without a network; one feature row per placeholder, in
reading order.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import realigned
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm_families import FAMILIES, build, build_processor, image_features, without_pixels

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXTS = ("How many chairs are there?", "Où est la lampe ? 椅子が3脚 🪑\n\n\ttwo  spaces ", "", " <img>&amp;{{ x }}")


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise of a given size."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(*parts: Image.Image | str) -> list[dict]:
    """A user's message of pictures and words."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in kinds]}]


SAMPLES = {
    "three": conversation(picture(60, 40, 0), picture(33, 90, 1), "and", picture(28, 28, 2), "How many chairs?"),
    "none": conversation("What is two plus two?"),
    "one": conversation(picture(120, 50, 3), "Which object is closer?"),
}


def make_inputs(processor, conversations: list) -> dict:
    """A padded batch of prompts, as a user makes it."""
    return dict(
        processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
    )


def flat(features) -> torch.Tensor:
    """All feature rows, in order."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in features.pooler_output])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A family's model and processor, and a batch that mixes samples with and without pictures."""
    model, processor = build(request.param)
    return model, processor, make_inputs(processor, list(SAMPLES.values()))


def generate(model, inputs: dict, **kwargs) -> torch.Tensor:
    """Greedy words after the prompts."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return model.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False} | kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_gives_every_string_back(name):
    tokenizer = build_processor(name).tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_batch_is_padded_on_the_left(case, request):
    _, processor, inputs = case
    chats = FAMILIES[request.node.callspec.params["case"]].chats
    mask = inputs["attention_mask"]
    assert mask.shape[0] == len(SAMPLES) and not mask.all() and mask[:, -1].all()
    for row, sample in enumerate(("three", "none", "one")):
        if sample != "none" or chats:
            alone = make_inputs(processor, [SAMPLES[sample]])["input_ids"][0]
            assert torch.equal(inputs["input_ids"][row][mask[row].bool()], alone)


@torch.no_grad()
def test_features_handed_back_are_the_pictures(case):
    model, _, inputs = case
    logits = model(**inputs).logits
    features = image_features(model, inputs)
    assert torch.equal(model(**without_pixels(inputs), mm_encoder_outputs={"image": features}).logits, logits)

    words = generate(model, inputs)
    features = image_features(model, inputs)
    assert torch.equal(generate(model, without_pixels(inputs), mm_encoder_outputs={"image": features}), words)
    assert words.shape[1] > inputs["input_ids"].shape[1]


@torch.no_grad()
def test_pictures_matter_and_only_to_their_own_sample(case):
    model, _, inputs = case
    features = image_features(model, inputs)
    logits = model(**without_pixels(inputs), mm_encoder_outputs={"image": features}).logits
    rows = features.pooler_output
    features.pooler_output = rows.flip(1) if isinstance(rows, torch.Tensor) else [row.flip(0) for row in rows]
    changed = model(**without_pixels(inputs), mm_encoder_outputs={"image": features}).logits
    difference = (changed - logits)[:, -1].abs().amax(-1)
    assert difference[0] > 1e-3 and difference[2] > 1e-3 and difference[1] == 0


@torch.no_grad()
def test_placeholders_are_filled_in_reading_order(case):
    model, _, inputs = case
    rows = flat(image_features(model, inputs))
    placeholders = inputs["input_ids"] == model.config.image_token_id
    assert placeholders.sum() == len(rows) and (placeholders.sum(1) > 0).tolist() == [True, False, True]

    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    assert torch.equal(seen["inputs_embeds"][placeholders], rows)


@torch.no_grad()
def test_pictures_of_any_size(case):
    model, processor, _ = case
    pictures = (picture(width, height, 0) for width, height in ((5, 7), (640, 480), (20, 300), (1000, 90)))
    inputs = make_inputs(processor, [conversation(*pictures, "What is this?")])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == len(flat(image_features(model, inputs)))


@torch.no_grad()
@pytest.mark.parametrize("words", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_copies_of_a_sample_see_its_own_pictures(case, words):
    """One item per sample in a list of features: some families (GLM) shuffle the items of a sample that has many."""
    model, _, inputs = case
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    for kwargs in ({}, words):
        features = image_features(model, inputs)
        lengths = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
        if not isinstance(features.pooler_output, torch.Tensor):
            features.pooler_output = flat(features).split(lengths)
            if getattr(features, "deepstack_features", None) is not None:
                features.deepstack_features = [torch.cat(layer).split(lengths) for layer in features.deepstack_features]
        seen.append(None)
        generate(model, without_pixels(inputs), mm_encoder_outputs={"image": features}, **kwargs)
    hook.remove()
    once, twice = (seen[index + 1] for index, kwargs in enumerate(seen) if kwargs is None)
    assert torch.equal(twice["inputs_embeds"], once["inputs_embeds"].repeat_interleave(2, 0))
    for layer, copies in zip(*(kwargs.get("deepstack_visual_embeds") or () for kwargs in (once, twice)), strict=True):
        rows = layer.split(lengths)
        assert torch.equal(copies, torch.cat([row for row in rows for _ in range(2)]))


@torch.no_grad()
def test_save_and_load_without_network(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, processor, inputs = case
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info.values())
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    batch = make_inputs(again, list(SAMPLES.values()))
    assert batch.keys() == inputs.keys() and all(torch.equal(batch[name], inputs[name]) for name in inputs)
    ours, theirs = realigned((loaded, batch)), realigned((model, inputs))
    assert torch.equal(ours[0](**ours[1]).logits, theirs[0](**theirs[1]).logits)


def test_same_seed_same_weights_and_any_dtype():
    state = torch.random.get_rng_state()
    first, second, other = (build("llava", seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert build("gemma3", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.chats])
def test_template_marks_the_assistants_words(name):
    processor = build_processor(name)
    talk = [*SAMPLES["one"], {"role": "assistant", "content": [{"type": "text", "text": "The lamp."}]}]
    out = processor.apply_chat_template(
        [talk], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    marked = out["input_ids"][0][out["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(marked).startswith("The lamp.")
