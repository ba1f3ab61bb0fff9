"""Prompts for vLLM hold the fused image tokens of the model, in the form that the engine of each family takes."""

import base64
import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from command_line import run, run_json, said
from media import noise, user
from safetensors.torch import load_file
from serving.vllm_models import SERVED, compose, pictures
from tiny_spa3_vlm import make
from transformers import AutoModelForImageTextToText, AutoProcessor

from spa3r.models.spa3_vlm.asking import conversation
from spa3r.serving import export_vlm, sglang_arguments, vllm_messages, vllm_prompt
from spa3r.serving.vllm import GRID_FAMILIES, fused_prompt, fused_scene, prompt_about

QUESTION = "How many chairs are in the room?"


@pytest.fixture(scope="module", params=SERVED)
def served(request):
    return request.param, compose(request.param)


@pytest.fixture(scope="module")
def qwen():
    return compose("qwen2_5_vl")


def tensors_of(prompt: dict) -> list[torch.Tensor]:
    """The image tokens of each picture."""
    data = prompt["multi_modal_data"]["image"]
    if isinstance(data, list):
        return data
    counts = (data["image_grid_thw"].prod(-1) // 4).tolist()
    return list(data["image_embeds"].split(counts))


def test_the_vlm_answers_alike_with_the_prompts_tokens(served):
    """The exported VLM with the prompt's tokens in place of the placeholders gives the logits of the whole model."""
    family, composed = served
    conversation_ = conversation(pictures(family), QUESTION)
    prompt = vllm_prompt(composed.model, composed.processor, conversation_)
    inputs = composed.processor.apply_chat_template(
        [conversation_], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    fused = tensors_of(prompt)
    width = composed.model.vlm.config.text_config.hidden_size
    is_image = inputs["input_ids"] == composed.model.vlm.config.image_token_id
    assert prompt["prompt_token_ids"].count(composed.model.vlm.config.image_token_id) == len(fused) == 3
    assert sum(map(len, fused)) == is_image.sum()
    layers = 2 if family == "qwen3_vl" else 0  # of deepstack
    assert {part.shape[1] for part in fused} == {width * (1 + layers)}
    caught = []

    def catch(module, args, kwargs):
        caught.append((kwargs["inputs_embeds"], kwargs.get("deepstack_visual_embeds")))

    language = composed.model.vlm.base_model.language_model
    hook = language.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        composed.model(**inputs)
    hook.remove()
    (embeddings, deepstack), *_ = caught
    tokens = torch.cat(fused)
    assert torch.equal(tokens[:, :width], embeddings[is_image])
    for index, layer in enumerate(deepstack or ()):
        assert torch.equal(tokens[:, (1 + index) * width :][:, :width], layer)
    assert not any(part.requires_grad for part in fused)


def test_digests_depend_on_all_pictures_of_a_scene(qwen):
    first, second, third = (noise(56, 56, seed) for seed in range(3))
    digests = [
        vllm_prompt(qwen.model, qwen.processor, conversation(scene, QUESTION))["multi_modal_uuids"]["image"]
        for scene in ([first, second], [first, second], [first, third])
    ]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_questions_about_a_scene_give_the_prompts_of_whole_conversations(served):
    family, composed = served
    scene = fused_scene(composed.model, composed.processor, pictures(family), "Be brief.")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    turns = [{"role": "assistant", "content": [{"type": "text", "text": "Two."}]}, *user("Where?")]
    whole = [*conversation(pictures(family), QUESTION, "Be brief."), *turns]
    prompt = prompt_about(composed.model, composed.processor, scene, [system, *user(QUESTION), *turns])
    want = fused_prompt(composed.model, composed.processor, whole)
    assert prompt.token_ids == want.token_ids
    assert prompt.num_tokens == want.num_tokens
    assert prompt.for_server() == want.for_server()
    short = fused_prompt(composed.model, composed.processor, conversation(pictures(family), "?", "Be brief."))
    tail = short.token_ids[::-1].index(composed.model.vlm.config.image_token_id)
    assert len(scene) == short.num_tokens - tail
    assert scene.num_bytes == sum(picture.tokens.numel() * 4 for picture in scene.pictures)


def test_arguments_for_sglang(qwen):
    """By its documentation: tokens of the whole prompt, and one item with the image tokens of all pictures."""
    asked = conversation(pictures("qwen2_5_vl"), QUESTION)
    arguments = sglang_arguments(qwen.model, qwen.processor, asked)
    data = vllm_prompt(qwen.model, qwen.processor, asked)["multi_modal_data"]["image"]
    inputs = qwen.processor.apply_chat_template([asked], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert arguments["input_ids"] == inputs["input_ids"][0].tolist()
    [item] = arguments["image_data"]
    assert item["format"] == "precomputed_embedding"
    assert torch.equal(item["feature"], data["image_embeds"])
    assert torch.equal(item["image_grid_thw"], inputs["image_grid_thw"])
    assert sglang_arguments(qwen.model, qwen.processor, user("Hello")).keys() == {"input_ids"}
    other = compose("qwen3_vl")
    with pytest.raises(ValueError, match=r"for qwen2_vl and qwen2_5_vl only, got .* 'qwen3_vl'.*vllm_prompt"):
        sglang_arguments(other.model, other.processor, user("Hello"))


def test_a_question_without_pictures(qwen):
    prompt = vllm_prompt(qwen.model, qwen.processor, user("What is two plus two?"))
    inputs = qwen.processor.apply_chat_template(
        [user("What is two plus two?")], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert prompt == {"prompt_token_ids": inputs["input_ids"][0].tolist()}


def test_frames_of_a_video_are_pictures(qwen):
    frames = [noise(56, 56, seed) for seed in range(4)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": QUESTION}]
    video = vllm_prompt(qwen.model, qwen.processor, [{"role": "user", "content": content}])
    images = vllm_prompt(qwen.model, qwen.processor, conversation(frames, QUESTION))
    assert video["prompt_token_ids"] == images["prompt_token_ids"]
    assert video["multi_modal_uuids"] == images["multi_modal_uuids"]


def test_messages_for_the_server(served):
    family, composed = served
    asked = conversation(pictures(family), QUESTION, system="Be brief.")
    prompt = vllm_prompt(composed.model, composed.processor, asked)
    uuids = prompt["multi_modal_uuids"]["image"]
    system, message = vllm_messages(composed.model, composed.processor, asked)
    assert json.loads(json.dumps(message)) == message
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    *parts, text = message["content"]
    assert text == {"type": "text", "text": QUESTION}
    assert [part["uuid"] for part in parts] == uuids
    for part, tokens in zip(parts, tensors_of(prompt), strict=True):
        sent = part["image_embeds"]
        if family in GRID_FAMILIES:
            grid = np.load(io.BytesIO(base64.b64decode(sent["image_grid_thw"])), allow_pickle=False)
            assert grid.shape == (3,) and grid.prod() == 4 * len(tokens)
            sent = sent["image_embeds"]
        assert torch.equal(torch.from_numpy(np.load(io.BytesIO(base64.b64decode(sent)), allow_pickle=False)), tokens)


def test_the_exported_vlm_is_the_models(served, tmp_path):
    family, composed = served
    export_vlm(composed.model, composed.processor, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    want = composed.model.vlm.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    assert type(processor) is type(composed.processor.vlm_processor)
    config = json.loads((tmp_path / "config.json").read_text())
    if family == "qwen3_vl":
        assert config["text_config"]["rope_parameters"]["mrope_interleaved"] is True
    assert "spa3r" not in json.dumps(config)


def test_what_vllm_can_not_serve_is_refused(tmp_path):
    appended = make(integration="append")
    with pytest.raises(ValueError, match=r"integration='append'.*no place for.*integration='cross_attention'"):
        vllm_prompt(appended.model, appended.processor, user(noise(56, 56, 0), QUESTION))
    other = make("gemma3")
    with pytest.raises(ValueError, match=r"VLM family 'gemma3'. Use one of qwen2_vl, .*model.generate"):
        export_vlm(other.model, other.processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`model` must be a Spa3VLMForConditionalGeneration, got Qwen2_5_VL"):
        export_vlm(appended.model.vlm, appended.processor, tmp_path / "out")


def test_adapters_must_be_merged_before(qwen, tmp_path):
    from peft import LoraConfig, get_peft_model

    composed = compose("qwen2_5_vl")
    adapted = get_peft_model(composed.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters of PEFT.*merge_and_unload\(\), or `spa3r merge`"):
        export_vlm(adapted, composed.processor, tmp_path / "out")


def test_pictures_of_different_sizes_are_refused_where_the_engine_would_stop():
    composed = compose("llava_onevision")
    scene = [noise(60, 40, 0), noise(28, 90, 1)]
    single = [vllm_prompt(composed.model, composed.processor, user(picture, QUESTION)) for picture in scene]
    assert len({len(prompt["multi_modal_data"]["image"][0]) for prompt in single}) == 2
    composed = compose("internvl")
    with pytest.raises(ValueError, match=r"different numbers of tokens, \[20, 12\].*'internvl'.*of one size"):
        vllm_prompt(composed.model, composed.processor, conversation([noise(98, 98, 0), noise(196, 98, 1)], QUESTION))


def test_export_command(tmp_path):
    """Weights keep their type, whatever this CPU is fast in."""
    qwen = compose("qwen2_5_vl")
    qwen.model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    qwen.processor.save_pretrained(tmp_path / "model")
    result = run_json("export", tmp_path / "model", tmp_path / "vlm")
    assert result["family"] == "qwen2_5_vl"
    saved = load_file(tmp_path / "vlm" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert "must be a new or an empty folder" in run("export", tmp_path / "model", tmp_path / "vlm", code=1).stderr


def test_what_is_no_engine_is_refused():
    wrong = run("serve", "--engine", "vlm", "--port", 0, code=1)
    assert "`--engine` must be 'transformers', 'vllm' or the address of a vLLM server, got 'vlm'" in said(wrong)
    nothing = run("serve", "--engine", "http://127.0.0.1:9", "--port", 0, code=1)
    assert "which does not list its models" in said(nothing) and "vllm serve FOLDER --enable-mm-embeds" in said(nothing)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_must_be_installed():
    missing = run("serve", "--engine", "vllm", "--port", 0, code=1)
    assert "`--engine vllm` needs vLLM in this environment" in said(missing)
