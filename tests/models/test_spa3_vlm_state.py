"""No result depends on what a model of transformers keeps between calls: of other prompts, threads, lengths, modes."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_spa3_vlm import PICTURES, QUESTIONS, WORDS, Composed, make, prompt
from torch import nn

from spa3r.models.spa3_vlm.state import cache_name

KEEPERS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
"""Families that keep the offset of the last prompt's positions."""


@pytest.fixture(scope="module", params=KEEPERS)
def composed(request) -> Composed:
    return make(request.param)


def interrupted(model: nn.Module, call, between):
    """`call` in another thread, stopped behind its first pass through the language model while `between` runs here."""
    reached, go_on, got = threading.Event(), threading.Event(), []

    def stop(*_):
        if threading.current_thread() is thread and not reached.is_set():
            reached.set()
            assert go_on.wait(60)

    hook = model.vlm.get_decoder().register_forward_hook(stop)
    thread = threading.Thread(target=lambda: got.append(call()))
    thread.start()
    try:
        assert reached.wait(60)
        between()
    finally:
        go_on.set()
        thread.join(60)
        hook.remove()
    return got[0]


def test_scenes_that_are_encoded_at_the_same_time(composed):
    alone, answers = composed.encode(), composed.alone()
    scene = interrupted(composed.model, composed.encode, lambda: composed.encode(PICTURES[:1]))
    assert scene.rope_delta == alone.rope_delta != composed.encode(PICTURES[:1]).rope_delta
    assert composed.ask(scene) == answers
    others = interrupted(
        composed.model, lambda: composed.ask(alone), lambda: composed.alone(["What?"], [PICTURES[1]] * 4)
    )
    assert others == answers


def test_generating_at_the_same_time(composed):
    other = lambda: (composed.alone(["What?"], PICTURES[:1]), composed.encode(PICTURES[:2]))  # noqa: E731
    assert interrupted(composed.model, lambda: composed.alone(QUESTIONS[:1]), other) == composed.alone(QUESTIONS[:1])


@torch.no_grad()
def test_going_on_from_a_cache_after_another_prompt(composed):
    model, inputs = composed.model, prompt(composed)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    name = cache_name(model.vlm)
    end = 3  # tokens of the question that come later
    first = {
        key: value[:, :-end] if torch.is_tensor(value) and value.shape == ids.shape else value
        for key, value in inputs.items()
    }
    wanted = model(**inputs).logits[:, -end:]
    output = model(**first, use_cache=True)
    caches = [copy.deepcopy(output[name]) for _ in range(3)]
    for between in (lambda: None, lambda: model(**prompt(composed, PICTURES[:1], "What is it?"))):
        between()
        got = model(input_ids=ids[:, -end:], attention_mask=mask, **{name: caches.pop()}).logits
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    words = {"do_sample": False, "max_new_tokens": WORDS} | composed.words
    answer = model.generate(**inputs, **words)
    model(**prompt(composed, PICTURES[:1]))
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **{name: caches.pop()}, **words), answer)
    with pytest.raises(ValueError, match=r"Pictures must come with the first tokens of a prompt, got some behind the"):
        model(**inputs, **{name: output[name]})
    plain = model.vlm(input_ids=ids[:, :3], use_cache=True)[name]
    with pytest.raises(ValueError, match=r"must come from a call of this Spa3-VLM .* Pass `position_ids`, or"):
        model(input_ids=ids[:, -end:], **{name: plain})


@torch.no_grad()
def test_going_on_from_a_generated_answer(composed):
    model, inputs = composed.model, prompt(composed)
    words = {"do_sample": False} | composed.words
    name = cache_name(model.vlm)
    whole = model.generate(**inputs, max_new_tokens=2 * WORDS, min_new_tokens=2 * WORDS, **words)
    part = model.generate(
        **inputs, max_new_tokens=WORDS, min_new_tokens=WORDS, return_dict_in_generate=True, use_cache=True, **words
    )
    composed.alone(["What?"], PICTURES[:1])
    rest = model.generate(
        input_ids=part.sequences,
        attention_mask=torch.ones_like(part.sequences),
        **{name: part[name]},
        max_new_tokens=WORDS,
        min_new_tokens=WORDS,
        **words,
    )
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_embeddings_of_text_after_a_prompt_with_pictures(composed):
    fresh = Composed(copy.deepcopy(composed.model), composed.processor)
    fresh.model.vlm.base_model.rope_deltas = None
    embeddings = composed.model.get_input_embeddings()(torch.arange(5)[None])
    wanted = fresh.model(inputs_embeds=embeddings, image_tokens_per_scene=[0]).logits
    composed.model(**prompt(composed))
    got = composed.model(inputs_embeds=embeddings, image_tokens_per_scene=[0]).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def with_changing_rope(kind: str) -> Composed:
    composed = make("qwen2_5_vl")
    text = composed.model.vlm.config.text_config
    half = text.hidden_size // text.num_attention_heads // 2
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "mrope_section": text.rope_parameters["mrope_section"]}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 80, "short_factor": [1.0] * half, "long_factor": [3.0] * half}
    text.rope_parameters, text.max_position_embeddings = rope, 80
    decoder = composed.model.vlm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(text)
    return composed


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_of_a_longer_prompt(kind):
    """RoPE that adapts to the longest prompt so far, or the last one."""
    composed = with_changing_rope(kind)
    long, longer = PICTURES * 3, PICTURES * 6
    assert prompt(composed, long)["input_ids"].shape[1] > 80 > prompt(composed, [])["input_ids"].shape[1]
    wanted = composed.alone(pictures=long)
    logits = composed.model(**prompt(composed, long)).logits
    composed.alone(["What?"], longer)
    assert torch.equal(composed.model(**prompt(composed, long)).logits, logits)
    assert composed.alone(pictures=long) == wanted
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda pictures: composed.alone(QUESTIONS[:1], pictures), [long, longer] * 4))
    assert answers[::2] == [wanted[:1]] * 4
    with pytest.raises(ValueError, match=r"must have at most 80 tokens with this VLM, whose RoPE changes .* got \d+"):
        composed.encode(long)
    short = composed.encode(PICTURES[2:])
    with pytest.raises(ValueError, match="must have at most 80 tokens"):
        composed.ask(short, max_new_tokens=80)
    few = {"max_new_tokens": 2}
    assert composed.ask(short, QUESTIONS[1:2], **few) == composed.alone(QUESTIONS[1:2], PICTURES[2:], **few)


def test_modes_of_a_model_that_is_asked_by_several_threads():
    composed = make("qwen2_5_vl")
    model = composed.model
    scene = composed.encode()
    model.train()
    modes = [module.training for module in model.modules()]
    inside: list[bool] = []

    def other():  # it begins later and would end earlier
        composed.ask(scene, "What?")
        inside.append(any(module.training for module in model.modules()))

    interrupted(model, lambda: composed.ask(scene), other)
    assert inside == [False] and [module.training for module in model.modules()] == modes and any(modes)


def test_prompts_that_are_made_by_several_threads():
    """Fast tokenizers keep how the last batch was padded."""
    processor = make("qwen2_5_vl").processor
    batches = [[question[: 4 * i + n] for i in range(1, n + 1)] for n in range(1, 5) for question in QUESTIONS[::2]]
    chats = [[[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in batch] for batch in batches]
    make_ids = lambda chat: processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]  # noqa: E731
    single = lambda chat: processor.apply_chat_template(chat[0], tokenize=True, return_dict=True)["input_ids"]  # noqa: E731
    jobs = [(call, chat) for chat in chats for call in (make_ids, single)] * 8
    wanted = [call(chat) for call, chat in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda job: job[0](job[1]), jobs))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, got, wanted))
