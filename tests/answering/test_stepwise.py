"""Answers that are generated together, whoever joins and leaves: each has the tokens that it has alone."""

import pytest
import torch
from tiny_spa3_vlm import PICTURES, QUESTIONS, Composed, make
from vlm_families import FAMILIES

from spa3r.answering.stepwise import StepwiseAnswer, StepwiseBatch
from spa3r.models.spa3_vlm.asking import continuations, conversation, encode_prompt
from spa3r.models.spa3_vlm.prefix_cache import UNSHARED_PREFIXES

# Two processors of transformers still use an old protocol of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def composed() -> Composed:
    return make()


def begun(composed: Composed, scene, questions=QUESTIONS, **arguments) -> list[StepwiseAnswer]:
    tails = continuations(composed.model, scene, [conversation([], question) for question in questions])
    return [StepwiseAnswer(composed.model, scene, tail, **{"max_new_tokens": 12} | arguments) for tail in tails]


def finish(model, waiting: list[StepwiseAnswer], limit: int = 3) -> list[int]:
    """Generate answers that wait, a few joining before each step; the number of answers in each step."""
    batch, sizes = StepwiseBatch(model), []
    while waiting or batch.answers:
        if waiting:
            new = StepwiseBatch.together(waiting, limit)
            waiting = [answer for answer in waiting if answer not in new]
            batch.add(new)
        sizes.append(len(batch.answers))
        batch.step()
    return sizes


def text_of(composed: Composed, answer: StepwiseAnswer) -> str:
    return composed.processor.decode(answer.tokens, skip_special_tokens=True).strip()


def asked(composed: Composed, scene) -> list[str]:
    return composed.model.ask(scene, QUESTIONS, max_new_tokens=12)


def check_family(name: str, **kwargs) -> None:
    composed = make(name, seed=1, **kwargs)
    scenes = [composed.encode(), composed.encode(PICTURES[:1]), composed.encode(PICTURES[::-1])]
    wanted = [answer for scene in scenes for answer in asked(composed, scene)]
    answers = [answer for scene in scenes for answer in begun(composed, scene)]
    sizes = finish(composed.model, list(answers))
    assert [text_of(composed, answer) for answer in answers] == wanted
    assert max(sizes) > 3  # some generated while others joined


@pytest.mark.parametrize("name", ("qwen2_5_vl", "qwen3_vl", "qwen3_5"))
def test_answers_are_those_of_asking_alone(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - UNSHARED_PREFIXES.keys()))
def test_answers_are_those_of_asking_alone_in_every_family(name):
    check_family(name, integration="append")


def test_rows_that_stay_don_t_grow_with_those_that_come_and_go(composed):
    scene = composed.encode()
    batch = StepwiseBatch(composed.model)
    for _ in range(40):
        batch.add(begun(composed, scene, QUESTIONS[:1], max_new_tokens=3))
        batch.step()
        [rows] = batch._groups
        assert len(rows.answers) <= 3 and rows.mask.shape[1] < len(scene) + 40
        assert all(layer.keys.shape[2] == rows.mask.shape[1] for layer in rows.cache.layers)


def test_settings_of_the_model_act_as_alone(composed):
    """Released checkpoints have a repetition penalty, for example."""
    scene, config = composed.encode(), composed.model.vlm.generation_config
    plain = asked(composed, scene)
    config.repetition_penalty = 1.7
    try:
        wanted = asked(composed, scene)
        answers = begun(composed, scene)
    finally:
        config.repetition_penalty = None
    finish(composed.model, list(answers))
    assert [text_of(composed, answer) for answer in answers] == wanted != plain


def test_answers_end_where_they_end_alone(composed):
    scene = composed.encode()
    first = begun(composed, scene)
    finish(composed.model, list(first))
    end, config = first[0].tokens[3], composed.model.vlm.generation_config
    before, config.eos_token_id = config.eos_token_id, end
    try:
        answers, wanted = begun(composed, scene), asked(composed, scene)
    finally:
        config.eos_token_id = before
    finish(composed.model, list(answers))
    assert [text_of(composed, answer) for answer in answers] == wanted
    assert answers[0].tokens == first[0].tokens[: first[0].tokens.index(end) + 1]
    assert answers[0].finish_reason == "stop" and {a.finish_reason for a in first} == {"length"}


def test_a_seed_gives_the_same_answer_in_any_batch(composed):
    scene = composed.encode()

    def drawn(questions: list[str], **arguments) -> list[list[int]]:
        answers = begun(composed, scene, questions, temperature=1.5, **arguments)
        finish(composed.model, list(answers))
        return [answer.tokens for answer in answers]

    [alone] = drawn(QUESTIONS[:1], seed=7)
    assert drawn([*QUESTIONS, QUESTIONS[0]], seed=7)[0] == alone
    assert drawn(QUESTIONS[:1], seed=8) != [alone]
    assert drawn(QUESTIONS[:1]) != drawn(QUESTIONS[:1])
    greedy = begun(composed, scene, QUESTIONS[:1])
    finish(composed.model, list(greedy))
    assert drawn(QUESTIONS[:1], top_p=1e-6) == [greedy[0].tokens]


def test_whole_prompts_with_pictures_anywhere_or_none(composed):
    model, processor = composed.model, composed.processor
    look = [{"type": "text", "text": "Look:"}, *({"type": "image", "image": picture} for picture in PICTURES)]
    several = [
        {"role": "user", "content": [*look, {"type": "text", "text": "and tell."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A room."}]},
        {"role": "user", "content": [{"type": "text", "text": "How many chairs?"}]},
    ]
    for messages in (several, several[2:]):
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        scene, tail = encode_prompt(model, processor, messages)
        answer = StepwiseAnswer(model, scene, tail, max_new_tokens=12)
        others = begun(composed, composed.encode())
        finish(model, [others[0], answer, *others[1:]])
        assert answer.tokens == tokens.tolist()


def test_a_conversation_that_continues_about_a_scene(composed):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
    ]
    scene = composed.encode()
    [tail] = continuations(composed.model, scene, [messages])
    pictures = [{"type": "image", "image": picture} for picture in PICTURES]
    whole = [{"role": "user", "content": [*pictures, *messages[0]["content"]]}, *messages[1:]]
    inputs = composed.processor.apply_chat_template(whole, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == scene.input_ids.tolist() + tail
    with pytest.raises(ValueError, match=r"must hold one of the role 'user', got none"):
        continuations(composed.model, scene, [messages[1:2]])


def test_an_answer_whose_logits_are_wrong_ends_alone(composed):
    scene = composed.encode()
    fine, broken = begun(composed, scene, QUESTIONS[:2])
    [wanted] = begun(composed, scene, QUESTIONS[:1])
    finish(composed.model, [wanted])
    batch = StepwiseBatch(composed.model)
    batch.add([fine])
    bad = scene.to("cpu")
    for layer in bad.cache.layers:
        layer.values = torch.full_like(layer.values, torch.nan)
    broken.scene = bad
    batch.add([broken])
    assert broken.error is not None and "The logits must be finite" in str(broken.error)
    while batch.answers:
        batch.step()
    assert fine.tokens == wanted.tokens


def test_more_tokens_than_the_model_has_positions_are_refused(composed):
    scene = composed.encode()
    with pytest.raises(ValueError, match=r"must have at most 4096 tokens with this VLM, got \d+"):
        begun(composed, scene, QUESTIONS[:1], max_new_tokens=5000)
