"""Encode a scene once and ask many: the same answers as asking each question alone, whatever the family and the batch.

Special tokens are kept out of the answers: an image token among the words would ask for one more picture.
"""

import copy
import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_spa3_vlm import PICTURES, QUESTIONS, WORDS, Composed, make
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, LogitsProcessorList
from vlm_families import FAMILIES

from spa3r import Spa3RImageProcessor
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint, processor_fingerprint
from spa3r.models.spa3_vlm.prefix_cache import UNSHARED_PREFIXES, PrefixLayer
from spa3r.models.spa3_vlm.scenes import EncodedScene, SceneCache

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl")


def make_talkative(name, **kwargs) -> tuple[Composed, list[str]]:
    """A composed that answers questions differently, and its answers: that some say the same to all proves nothing."""
    for seed in range(8):
        composed = make(name, seed=seed, **kwargs)
        alone = composed.alone()
        if len(set(alone)) > 1:
            return composed, alone
    raise AssertionError("No seed gives a VLM that answers questions differently.")


@pytest.fixture(scope="module")
def composed() -> Composed:
    return make()


@pytest.fixture(scope="module")
def scene(composed) -> EncodedScene:
    return composed.encode()


# The same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("integration", "source"), [("cross_attention", "spa3r"), ("cross_attention", "none"), ("append", "backbone")]
)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_asking_alone(name, integration, source):
    composed, alone = make_talkative(name, integration=integration, spatial_source=source)
    scene = composed.encode()
    assert composed.ask(scene) == alone
    assert scene.rope_delta is None if name == "internvl" else scene.rope_delta < -3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - UNSHARED_PREFIXES.keys()))
def test_answers_are_those_of_asking_alone_in_every_family(name):
    """Sliding windows, linear attention and convolutions among them; with tokens appended."""
    composed, alone = make_talkative(name, integration="append")
    assert composed.ask(composed.encode()) == alone
    assert composed.ask(composed.encode(PICTURES[::-1])) == composed.alone(pictures=PICTURES[::-1])


@pytest.mark.parametrize("name", ("gemma3", "qwen3_5"))
def test_caches_that_take_no_padding_are_asked_by_length(name, tmp_path):
    """A window (32 tokens here, fewer than the prefix and a question have) counts padding; a state swallows it."""
    composed = make(name)
    scene, alone = composed.encode(), composed.alone()
    assert {type(layer).__name__ for layer in scene.cache.layers} - {"DynamicLayer"}
    batches = []
    hook = composed.model.vlm.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert composed.ask(scene) == alone
    hook.remove()
    rows = [rows for rows, tokens in batches if tokens > 1]
    assert sorted(rows) == [1, 1, 1, 2]  # two questions are equally long
    scene.save(tmp_path / "scene.safetensors")
    assert composed.ask(EncodedScene.load(tmp_path / "scene.safetensors", composed.model, composed.processor)) == alone


def test_with_the_systems_words(composed, scene):
    system = "Answer in one word."
    with_system = composed.encode(system=system)
    assert len(with_system) > len(scene)
    assert composed.ask(with_system) == composed.alone(system=system) != composed.ask(scene)


@pytest.mark.parametrize("batch_size", (1, 2, 3))
def test_batches_of_any_size(composed, scene, batch_size):
    rows = []
    hook = composed.model.vlm.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = composed.ask(scene, batch_size=batch_size)
    hook.remove()
    assert answers == composed.ask(scene) and max(rows) == batch_size


def test_one_question_has_one_answer(composed, scene):
    many = composed.ask(scene)
    assert composed.ask(scene, QUESTIONS[2]) == many[2] and composed.ask(scene, QUESTIONS[2:3]) == many[2:3]
    assert composed.ask(scene, []) == []
    assert composed.ask(composed.encode(PICTURES[0]), "What?") == composed.alone(["What?"], PICTURES[:1])[0]


def test_answers_end_where_they_end_alone(composed, scene):
    """With different lengths in a batch, and not a step after the last has ended."""
    tokens = composed.processor.tokenizer(composed.ask(scene, max_new_tokens=8), add_special_tokens=False)["input_ids"]
    steps = []
    for end in dict.fromkeys(token for answer in tokens for token in answer):
        hook = composed.model.vlm.register_forward_pre_hook(lambda *_: steps.append(0))
        answers = composed.ask(scene, max_new_tokens=8, eos_token_id=end)
        hook.remove()
        assert answers == composed.alone(max_new_tokens=8, eos_token_id=end)
        steps.append(len(set(map(len, answers))))
        if steps[-1] > 2:
            break
    assert steps[-1] > 2
    assert composed.ask(scene, max_new_tokens=1) == composed.alone(max_new_tokens=1)


def test_everything_else_that_generate_offers(composed, scene):
    few = QUESTIONS[1:3]  # of different lengths
    for choice in ({"num_beams": 3}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}):
        assert composed.ask(scene, few, **choice) == composed.alone(few, **choice), choice
    seen: list[torch.Tensor] = []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return scores

    composed.ask(scene, few, max_new_tokens=1, logits_processor=LogitsProcessorList([watch]))
    for question in few:
        composed.alone([question], max_new_tokens=1, logits_processor=LogitsProcessorList([watch]))
    batch, *alone = ([set(row.tolist()) for row in ids] for ids in seen)
    assert batch == sorted((words for (words,) in alone), key=len)  # padding adds no word that a penalty would see
    torch.manual_seed(0)
    sampled = composed.ask(scene, do_sample=True, temperature=5.0, top_k=0)
    assert sampled != composed.ask(scene)


def test_long_answers_outgrow_the_store(composed, scene):
    """The copies of a prefix have room for 64 tokens, and are copied again for more."""
    answers = composed.ask(scene, QUESTIONS[:2], max_new_tokens=70)
    assert answers == composed.alone(QUESTIONS[:2], max_new_tokens=70)


# What is done once, and what is left alone ----------------------------------------------------------------------------


def test_a_scene_is_looked_at_once(composed):
    looks = []
    parts = (composed.model.spa3r.encoder, composed.model.adapter, *composed.model.vision_modules())
    hooks = [part.register_forward_hook(lambda *_: looks.append(1)) for part in parts]
    scene = composed.encode()
    first = len(looks)
    composed.ask(scene)
    composed.ask(scene, "What?")
    for hook in hooks:
        hook.remove()
    assert first == len(looks) == len(parts)


def test_asking_changes_no_scene_and_nothing_else_changes_answers(composed, scene):
    """Whatever the model does in between: families keep the offset of the last prompt's positions."""
    kept, answers = [(layer.keys.clone(), layer.values.clone()) for layer in scene.cache.layers], composed.ask(scene)
    other = composed.encode(PICTURES[:1])
    composed.alone(["What?"], [PICTURES[1]] * 4)
    assert composed.ask(scene) == answers != composed.ask(other)
    for layer, (keys, values) in zip(scene.cache.layers, kept):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_scene_holds_views_fused_tokens_and_the_cache(composed, scene):
    views = [composed.processor.view_image_processor.process_view(picture) for picture in PICTURES]
    assert len(scene.views) == 3
    for ours, view in zip(scene.views, views):
        assert ours.size == view.size and np.abs(np.asarray(ours, int) - np.asarray(view, int)).max() <= 1
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture} for picture in PICTURES]}]
    inputs = composed.processor.apply_chat_template([conversation], tokenize=True, return_dict=True)
    fused, _ = composed.model._fuse(inputs.pop("input_ids"), inputs.pop("attention_mask"), dict(inputs))
    assert torch.equal(scene.image_tokens, torch.cat(fused["mm_encoder_outputs"]["image"].pooler_output))
    assert scene.cache.get_seq_length() == len(scene) == len(scene.input_ids)
    tensors = [t for layer in scene.cache.layers for t in (layer.keys, layer.values)]
    assert scene.cache_num_bytes == sum(t.nbytes for t in tensors)
    assert scene.num_bytes > scene.cache_num_bytes + scene.image_tokens.nbytes
    assert f"3 views, {len(scene.image_tokens)} image tokens" in repr(scene)


def test_modes_are_left_as_they_were_and_dropout_is_off(composed, scene):
    answers, model = composed.ask(scene), composed.model
    model.train()
    model.adapter.eval()
    modes = [module.training for module in model.modules()]
    try:
        again = composed.encode()
        assert composed.ask(again) == answers and [module.training for module in model.modules()] == modes
        assert any(modes) and not all(modes)
        with pytest.raises(ValueError):
            composed.model.ask(again, "What?", max_new_tokens=-1)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_low_rank_updates_ask_too():
    composed = make()
    peft = get_peft_model(composed.model, LoraConfig(target_modules=r"vlm.*\.(q_proj|v_proj)", init_lora_weights=False))
    scene = peft.encode_scene(composed.processor, PICTURES)
    answers = peft.ask(scene, QUESTIONS, max_new_tokens=WORDS, **composed.words)
    assert answers == composed.alone()
    with peft.disable_adapter():
        assert composed.alone() != answers


def test_a_scene_kept_elsewhere(composed, scene):
    moved = scene.to("cpu")
    assert composed.ask(moved) == composed.ask(scene) and moved.cache is not scene.cache
    assert scene.to("meta").cache.layers[0].keys.device.type == "meta" != scene.cache.layers[0].keys.device.type


def test_half_precision(composed):
    half = Composed(copy.deepcopy(composed.model).bfloat16(), composed.processor)
    scene = half.encode()
    assert scene.cache.layers[0].keys.dtype == torch.bfloat16 and all(half.ask(scene))


def test_the_store_of_copies_is_a_cache_layer():
    """Against transformers' own: growing, copied rows, beams that change places, words taken back."""
    generator = torch.Generator().manual_seed(0)
    prefix, ours, theirs = DynamicCache(), DynamicCache(), DynamicCache()
    draw = lambda rows, tokens: [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]  # noqa: E731
    prefix.update(*draw(1, 7), 0)
    ours.layers, theirs.layers = [PrefixLayer(prefix.layers[0])], copy.deepcopy(prefix).layers
    theirs.batch_repeat_interleave(3)
    assert ours.get_seq_length() == 7
    for step, tokens in enumerate((5, 1, 1, 80, 1, 1)):
        new = draw(3, tokens)
        for a, b in zip(ours.update(*new, 0), theirs.update(*new, 0)):
            assert torch.equal(a, b)
        for cache in (ours, theirs):
            if step == 1:
                cache.reorder_cache(torch.tensor([2, 0, 0]))
            if step == 3:
                cache.crop(-2)
    assert prefix.get_seq_length() == 7 and prefix.layers[0].keys.shape[0] == 1


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_saved_scene_gives_the_same_answers(composed, scene, tmp_path):
    file = tmp_path / "scenes" / "room.safetensors"
    scene.save(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = EncodedScene.load(file, composed.model, composed.processor)
    assert composed.ask(loaded) == composed.ask(scene)
    assert torch.equal(loaded.image_tokens, scene.image_tokens) and torch.equal(loaded.input_ids, scene.input_ids)
    assert [view.tobytes() for view in loaded.views] == [view.tobytes() for view in scene.views]
    assert loaded.num_bytes == scene.num_bytes and loaded.rope_delta == scene.rope_delta
    with safe_open(file, framework="pt") as content:
        assert json.loads(content.metadata()["scene"])["model_fingerprint"] == scene.model_fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_loaded_again_takes_its_scenes(name, tmp_path):
    composed = make(name)
    scene = composed.encode(system="You see.")
    scene.save(tmp_path / "scene.safetensors")
    composed.model.save_pretrained(tmp_path / "model")
    composed.processor.save_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", attn_implementation="eager")
    again = Composed(model, AutoProcessor.from_pretrained(tmp_path / "model"))
    loaded = EncodedScene.load(tmp_path / "scene.safetensors", again.model, again.processor)
    assert loaded.system == "You see." and again.ask(loaded) == composed.ask(scene)


def test_a_scene_of_another_model_or_processor_is_refused(composed, scene, tmp_path):
    file = tmp_path / "scene.safetensors"
    scene.save(file)
    trained = Composed(copy.deepcopy(composed.model), composed.processor)
    with torch.no_grad():  # a step of training, however small
        for parameter in trained.model.adapter.parameters():
            parameter.mul_(1.001)
    words = r"must be a scene of this model \(fingerprint [0-9a-f]{32}\), got one of another model .*encode the scene"
    with pytest.raises(ValueError, match=words):
        EncodedScene.load(file, trained.model, composed.processor)
    with pytest.raises(ValueError, match="`scene` " + words):
        trained.ask(scene)
    with pytest.raises(ValueError, match=words):
        make("qwen3_vl").ask(scene)
    other = copy.copy(composed.processor)
    other.image_mode = "native"
    with pytest.raises(ValueError, match=r"must be a scene of this processor .* got one of another processor"):
        EncodedScene.load(file, composed.model, other)


def test_fingerprints_tell_what_matters(composed):
    model, processor = composed.model, composed.processor
    before = model_fingerprint(model)
    model.set_attn_implementation("eager")
    assert model_fingerprint(model) == before
    model.set_attn_implementation("sdpa")
    assert model_fingerprint(copy.deepcopy(model).bfloat16()) != before
    turned = copy.deepcopy(model)
    turned.config.vlm_config.text_config.rope_parameters["rope_theta"] = 1e5
    assert model_fingerprint(turned) != before
    before = processor_fingerprint(processor)
    for change in ({"chat_template": "{{ messages }}"}, {"image_mode": "native"}, {"view_image_processor": None}):
        other = copy.deepcopy(processor)
        for key, value in change.items():
            setattr(other, key, value or Spa3RImageProcessor(size=28))
        assert processor_fingerprint(other) != before, change


def test_files_that_are_no_scenes(composed, scene, tmp_path):
    file = tmp_path / "scene.safetensors"
    save_file({"latents": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"must be a scene as `EncodedScene.save` writes it .*, got None"):
        EncodedScene.load(file, composed.model, composed.processor)
    scene.save(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"can't be read as safetensors .* encode the scene again"):
        EncodedScene.load(file, composed.model, composed.processor)
    with pytest.raises(FileNotFoundError):
        EncodedScene.load(tmp_path / "none.safetensors", composed.model, composed.processor)


def test_changed_files_are_refused_in_words(composed, scene, tmp_path):
    """Some of each kind; the fuzz test among the slow tests has many."""
    scene.save(tmp_path / "whole.safetensors")
    tensors, file = load_file(tmp_path / "whole.safetensors"), tmp_path / "changed.safetensors"
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as content:
        metadata = content.metadata()
    about, keys, length = json.loads(metadata["scene"]), tensors["cache.0.keys"], len(scene)
    entries = "what it says about its scene must be the entries digest, layers, .* each of its type"
    shared = r"layer 0 of its cache must have keys and values \(1, heads, tokens, width\) of equal shape"
    shorter = {f"cache.0.{name}": tensors[f"cache.0.{name}"][:, :, 1:].contiguous() for name in ("keys", "values")}
    zero = torch.zeros(1)
    for tensors_of, said, words in (
        ({"input_ids": None}, {}, "it lacks tensors of its prompt or of its 3 views"),
        ({"views.2": None}, {}, "it lacks tensors of its prompt or of its 3 views"),
        ({"input_ids": tensors["input_ids"].double()}, {}, "`input_ids` must be a row of tokens below"),
        ({"input_ids": tensors["input_ids"] + 10**6}, {}, "`input_ids` must be a row of tokens below"),
        (
            {"image_tokens": tensors["image_tokens"][1:].clone()},
            {},
            "`image_tokens` must be .*, one for each placehold",
        ),
        ({"views.0": tensors["views.0"].float()}, {}, r"`views.0` must be \(height, width, 3\) bytes, got Tensor of"),
        ({"cache.0.keys": None}, {}, shared),
        ({"cache.0.keys": keys[:, :, 1:].contiguous()}, {}, shared),
        (shorter, {}, f"layer 0 of its cache must hold the {length} tokens of the prompt, got {length - 1}"),
        ({"cache.0.update": zero}, {}, "layer 0 of its cache has 'update', which none has"),
        ({"cache.0.keys.x": zero}, {}, "layer 0 of its cache has 'keys.x', which none has"),
        ({"cache.9.keys": zero}, {}, "it holds 'cache.9.keys', which no scene has"),
        ({"stranger": zero}, {}, "it holds 'stranger', which no scene has"),
        ({"cache.0.keys": keys + 1}, {}, "it is not what was saved"),
        ({}, {"rope_delta": 7}, "it is not what was saved"),
        ({}, {"digest": "0"}, "it is not what was saved"),
        ({}, {"num_bytes": 3}, entries),
        ({}, {"views": "3"}, entries),
        ({}, {"views": True}, entries),
        ({}, {"layers": [[3, {}]]}, entries),
        ({}, {"views": 4}, "it lacks tensors of its prompt or of its 4 views"),
        ({}, {"views": -1}, "it lacks tensors of its prompt or of its -1 views"),
        ({}, {"layers": []}, "was written with another version of transformers, whose caches are of another kind"),
    ):
        kept = {name: tensor for name, tensor in (tensors | tensors_of).items() if tensor is not None}
        save_file(kept, file, metadata | {"scene": json.dumps(about | said)})
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} .*{words}.*[eE]ncode the scene again") as refused:
            EncodedScene.load(file, composed.model, composed.processor)
        assert len(str(refused.value)) < 600
    for more, words in (({"scene": "{"}, entries), ({"scene": "[" * 10**5}, entries), ({"format": "0"}, "got '0'")):
        save_file(tensors, file, metadata | more)
        with pytest.raises(ValueError, match=words):
            EncodedScene.load(file, composed.model, composed.processor)
    save_file(tensors, file, metadata)
    assert composed.ask(EncodedScene.load(file, composed.model, composed.processor), "What?") == composed.ask(
        scene, "What?"
    )


# Many scenes ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_scenes_leave(scene):
    size = scene.num_bytes
    scenes = SceneCache(max_bytes=3 * size)
    for name in "abc":
        scenes[name] = scene
    assert list(scenes) == ["a", "b", "c"] and scenes.num_bytes == 3 * size
    assert scenes["a"] is scene and "b" in scenes  # the first is a use, the second is not
    scenes["d"] = scene
    assert list(scenes) == ["c", "a", "d"] and len(scenes) == 3 and "b" not in scenes and scenes.get("b") is None
    scenes["c"] = scene  # a place is not counted twice
    assert list(scenes) == ["a", "d", "c"]
    del scenes["d"]
    assert list(scenes) == ["a", "c"] and scenes.num_bytes == 2 * size
    tokens = scene.image_tokens.nbytes
    scenes["d"] = replace(scene, image_tokens=torch.zeros(size + tokens, dtype=torch.uint8))  # as large as two
    assert list(scenes) == ["c", "d"] and scenes.num_bytes == 3 * size
    scenes["e"] = replace(scene, image_tokens=torch.zeros(3 * size, dtype=torch.uint8))
    assert list(scenes) == ["c", "d"]  # larger than all together: not kept, and nothing leaves for it
    with pytest.raises(ValueError, match="`max_bytes` must be 0 or more, got -1"):
        SceneCache(max_bytes=-1)


def test_a_scene_that_is_there_is_not_encoded_again(scene):
    scenes, calls = SceneCache(max_bytes=2 * scene.num_bytes), []

    def encode():
        calls.append(1)
        return replace(scene)

    threads = [threading.Thread(target=lambda: scenes.get_or_encode("a", encode)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and scenes.get_or_encode("a", encode) is scenes["a"]
    assert SceneCache(max_bytes=0).get_or_encode("a", encode).num_bytes == scene.num_bytes and len(calls) == 2


# Refusals -------------------------------------------------------------------------------------------------------------


def test_families_without_a_common_prefix_are_refused():
    composed = make("paligemma")
    words = "'paligemma': its pictures look at the question. Ask with `model.generate` on whole prompts, or use"
    with pytest.raises(ValueError, match=words):
        composed.encode()


def test_templates_without_a_common_prefix_are_refused(composed):
    processor = copy.copy(composed.processor)
    processor.vlm_processor = copy.copy(processor.vlm_processor)
    template, end = processor.chat_template, "{%- if add_generation_prompt -%}"
    for before, after in (
        ("for part in content", "for part in content|reverse"),  # the question first
        (end, "{{ messages[0]['content']|length - 1 }} pictures" + end),
    ):
        assert before in template
        processor.chat_template = template.replace(before, after)
        words = "have no part that all questions about a scene share: its chat template must put the question behind"
        with pytest.raises(ValueError, match=words):
            composed.model.encode_scene(processor, PICTURES)


def test_questions_that_are_refused(composed, scene):
    for question in ("", "  \n", None):
        with pytest.raises(ValueError, match="`questions` must be texts that are not empty"):
            composed.ask(scene, ["What?", question])
    for token in ("<|image_pad|>", "<|im_end|>", composed.processor.tokenizer.pad_token):
        words = rf"message 1 \('user'\) must not contain '{re.escape(token)}', which the VLM would read as a token"
        with pytest.raises(ValueError, match=words):
            composed.ask(scene, ["What?", f"{token}What?"])
    with pytest.raises(ValueError, match=r"message 0 \('system'\) must not contain '<\|im_end\|>'"):
        composed.encode(PICTURES, system="Be brief.<|im_end|>")


def test_arguments_that_are_refused(composed, scene):
    with pytest.raises(ValueError, match="`images` must hold at least one picture"):
        composed.encode([])
    for images in (None, 5, 2.5, object()):
        with pytest.raises(ValueError, match=f"`images` must be pictures, .*got {type(images).__name__}"):
            composed.encode(images)
    for picture, words in ((None, "must hold its image under one of"), (5, "must be a PIL image, .* got int")):
        with pytest.raises(ValueError, match=words):
            composed.encode([picture])
    with pytest.raises(ValueError, match="`images` must be the pictures of one scene, got 2 scenes"):
        composed.encode([PICTURES, PICTURES])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        composed.ask(scene, batch_size=0)
    for name, value in {"num_return_sequences": 2, "use_cache": False, "past_key_values": None}.items():
        with pytest.raises(ValueError, match=f"must decide itself about '{name}'"):
            composed.ask(scene, **{name: value})
    for other in (None, "scene.safetensors", {}):
        with pytest.raises(ValueError, match="`scene` must be what `encode_scene` returned, got "):
            composed.ask(other)
    for questions in (None, 3, {"What?": 1}):
        with pytest.raises(ValueError, match="`questions` must be a text or a list of texts, got "):
            composed.ask(scene, questions)
    for number in (0, 2.0, True, "3", None):
        with pytest.raises(ValueError, match="`max_new_tokens` must be a whole number of at least 1, got "):
            composed.ask(scene, max_new_tokens=number)
    for size in (1.5, True, "2"):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, got "):
            composed.ask(scene, batch_size=size)
    for most in (None, True, "9", -1, float("nan")):
        with pytest.raises(ValueError, match="`max_bytes` must be 0 or more, got "):
            SceneCache(max_bytes=most)
    with pytest.raises(TypeError, match=r"takes `temprature`\. Did you mean `temperature`"):
        composed.ask(scene, temprature=2.0)
    wrong = make(integration="append")
    wrong.processor.spatial_tokens = None
    with pytest.raises(ValueError, match="must hold a place for each token that is appended"):
        wrong.encode()
