"""Answers of models with and without Spa3R, batched and alone, and their scores."""

import copy

import PIL.Image
import pytest
import torch
from media import noise
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_benchmark import build_composed
from tiny_spa3_vlm import QUESTIONS
from transformers.utils import logging
from vlm_families import FAMILIES, build

from spa3r import EncodedScene
from spa3r.answering.engine import AnsweringEngine
from spa3r.evaluation import AnswerReport, answer, evaluate_answers, score_answer, score_table

PICTURES = [noise(56, 56, seed) for seed in range(6)]


def example(question_type, question, truth, pictures=(), **fields) -> dict:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": truth}]},
    ]
    return {"messages": messages, "question_type": question_type, "row": question} | fields


EXAMPLES = [
    example("object_counting", "How many chairs?", "3", PICTURES[:3]),
    example(
        "route_planning", "Where do I turn, at the lamp or at the sofa in the corner of the room?", "A", PICTURES[3:4]
    ),
    example(None, "What stands on the table?", "a lamp", PICTURES[4:]),
    example("room_size_estimation", "How large is it?", "12.5", PICTURES[:1]),
]


@pytest.fixture(scope="module")
def composed():
    return build_composed("qwen2_5_vl")


def test_answers_are_those_of_generate_one_by_one(composed):
    model, processor = composed
    alone = []
    for one in EXAMPLES:
        inputs = processor.apply_chat_template(
            one["messages"][:1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        words = output[0, inputs["input_ids"].shape[1] :]
        assert len(words) <= 8
        alone.append(processor.decode(words, skip_special_tokens=True).strip())
    assert len(set(alone)) == len(EXAMPLES)
    for batch_size in (1, 3, 4):
        assert answer(model, processor, EXAMPLES, batch_size, max_new_tokens=8) == alone


@pytest.mark.parametrize("family", ("qwen3_vl", "internvl", "gemma3", "llava"))
def test_other_families_are_asked_alike(family):
    """With pictures in every row: some processors want that."""
    model, processor = build_composed(family)
    examples = [one for one in EXAMPLES if len(one["messages"][0]["content"]) > 1]
    for use_spa3r in (True, False):
        asked = {"max_new_tokens": 6, "use_spa3r": use_spa3r}
        assert answer(model, processor, examples, **asked) == answer(model, processor, examples, 1, **asked)


def test_appended_tokens_are_left_out_with_spa3r(composed):
    model, processor = build_composed("qwen2_5_vl", integration="append")
    processor.spatial_tokens = model.config.spatial_tokens
    appended = answer(model, processor, EXAMPLES)
    assert appended == answer(model, processor, EXAMPLES, batch_size=1)
    without = answer(model, processor, EXAMPLES, use_spa3r=False)
    assert without == answer(model.vlm, processor.vlm_processor, EXAMPLES) != appended
    assert processor.spatial_tokens == model.config.spatial_tokens is not None


def test_a_model_with_lora_is_asked_with_and_without_spa3r(composed):
    model, processor = composed
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for use_spa3r in (True, False):  # fresh LoRA changes nothing
        plain = answer(model, processor, EXAMPLES, use_spa3r=use_spa3r)
        assert answer(tuned, processor, EXAMPLES, use_spa3r=use_spa3r) == plain


def test_the_answer_is_not_shown_to_the_model(composed):
    questions = [{**one, "messages": one["messages"][:1]} for one in EXAMPLES]
    lies = [
        example(e["question_type"], e["row"], "a lie", [i["image"] for i in e["messages"][0]["content"][:-1]])
        for e in EXAMPLES
    ]
    assert answer(*composed, questions) == answer(*composed, EXAMPLES) == answer(*composed, lies)


def test_without_spa3r_it_is_the_plain_vlm(composed):
    model, processor = composed
    without = answer(model, processor, EXAMPLES, use_spa3r=False)
    assert without == answer(model.vlm, processor, EXAMPLES) == answer(model.vlm, processor.vlm_processor, EXAMPLES)
    assert without != answer(model, processor, EXAMPLES)


def test_modes_are_left_as_they_were(composed):
    model, processor = composed
    fresh = copy.deepcopy(model).train()
    before = {name: module.training for name, module in fresh.named_modules()}
    assert len(set(before.values())) == 2
    assert answer(fresh, processor, EXAMPLES[:1]) == answer(model, processor, EXAMPLES[:1])
    assert {name: module.training for name, module in fresh.named_modules()} == before


class EndlessRows(torch.utils.data.Dataset):
    """As a data set that replaces broken rows: it has a length and knows no IndexError."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return EXAMPLES[index % len(EXAMPLES)]


def test_data_sets_and_iterators_are_read(composed):
    answers = answer(*composed, EXAMPLES[:2])
    assert answer(*composed, EndlessRows()) == answer(*composed, iter(EXAMPLES[:2])) == answers
    assert answer(*composed, []) == []


def test_progress_is_shown(composed, capsys):
    try:
        answer(*composed, EXAMPLES[:2], batch_size=1)
        assert "Answering" in capsys.readouterr().err
        logging.disable_progress_bar()
        answer(*composed, EXAMPLES[:2], batch_size=1)
        assert capsys.readouterr().err == ""
    finally:
        logging.enable_progress_bar()


def test_a_report_scores_every_answer(composed):
    report = evaluate_answers(*composed, EXAMPLES, batch_size=2)
    assert [scored.answer for scored in report.answers] == answer(*composed, EXAMPLES)
    assert [scored.truth for scored in report.answers] == ["3", "A", "a lamp", "12.5"]
    assert [scored.question for scored in report.answers] == [one["row"] for one in EXAMPLES]
    assert report.scores["overall"] == 0.0 and len(report.scores) == 5  # random weights hit nothing
    assert report.to_dict()["answers"][0]["question_type"] == "object_counting"


def scored(*outcomes) -> AnswerReport:
    return AnswerReport([score_answer(example(kind, "?", truth), said) for kind, truth, said in outcomes])


def test_scores_are_those_of_vsi_bench_and_exact_match():
    report = scored(
        ("object_rel_direction_easy", "A", "A. left"),
        ("object_rel_direction_hard", "A", "B"),
        ("object_rel_direction_hard", "C", "d"),
        ("object_counting", "2", "3"),
        ("colour", "red", " Red\n"),
        (None, "A", "A."),
    )
    assert [outcome.score for outcome in report.answers] == [1.0, 0.0, 0.0, pytest.approx(0.1), 1.0, 0.0]
    assert report.scores == pytest.approx(
        {
            "overall": 30.0,
            "object_counting_MRA:.5:.95:.05": 10.0,
            "object_rel_direction_accuracy": 50.0,
            "exact_match": 50.0,
        }
    )
    assert report.counts == {
        "overall": 4,
        "object_counting_MRA:.5:.95:.05": 1,
        "object_rel_direction_accuracy": 3,
        "exact_match": 2,
    }


def test_a_table_puts_reports_side_by_side():
    questions = (("object_counting", "4"), ("object_rel_direction_easy", "B"))
    reports = {
        "with Spa3R": scored(*((kind, truth, truth) for kind, truth in questions)),
        "without": scored(*((kind, truth, "2") for kind, truth in questions)),
    }
    assert score_table(reports) == (
        "| percent              | questions | with Spa3R | without |\n"
        "|----------------------|-----------|------------|---------|\n"
        "| object counting      | 1         | 100.0      | 10.0    |\n"
        "| object rel direction | 1         | 100.0      | 0.0     |\n"
        "| overall              | 2         | 100.0      | 5.0     |"
    )


def test_what_can_not_be_asked_or_scored_is_refused(composed):
    question = {"messages": EXAMPLES[0]["messages"][:1], "row": "seventh"}
    with pytest.raises(
        ValueError, match=r"`messages` of example 'seventh' must end with .* the truth; got the roles \['user'\]"
    ):
        evaluate_answers(*composed, [question])
    with pytest.raises(ValueError, match=r"`messages` of example 'seventh' must hold a question, got none"):
        answer(*composed, [{"messages": EXAMPLES[0]["messages"][1:], "row": "seventh"}])
    with pytest.raises(ValueError, match=r"`examples` must hold at least one example, got none"):
        evaluate_answers(*composed, [])
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1, got 0"):
        answer(*composed, EXAMPLES, batch_size=0)
    for batch_size in (0, -1):
        for questions in (QUESTIONS[:1], QUESTIONS):
            with pytest.raises(ValueError, match=f"`batch_size` must be at least 1, got {batch_size}"):
                AnsweringEngine(*composed).answers(PICTURES, questions, batch_size=batch_size)


def test_what_can_not_be_asked_is_left_out_and_named(composed):
    """Wherever it stands in a batch, and whatever is wrong: the others are answered as without it."""
    (question, truth), tiny = EXAMPLES[0]["messages"], PIL.Image.new("RGB", (5, 5))
    bad = {
        "a token": [{"role": "user", "content": "What is <|image_pad|>?"}, truth],
        "a picture": [{"role": "user", "content": [{"type": "image", "image": tiny}]}, truth],
        "no truth": [question],
        "no question": [truth],
    }
    rows = [*EXAMPLES[:1], *({"messages": messages, "row": row} for row, messages in bad.items()), *EXAMPLES[1:2]]
    report = evaluate_answers(*composed, rows, batch_size=3, skip=True)
    assert {entry["row"] for entry in report.skipped} == set(bad)
    assert all(entry["reason"] for entry in report.skipped)
    assert report.answers == evaluate_answers(*composed, EXAMPLES[:2], batch_size=1).answers
    for row in rows[1:-1]:
        with pytest.raises(ValueError):
            evaluate_answers(*composed, [row])


# Any VLM --------------------------------------------------------------------------------------------------------------


def asked_about(engine: AnsweringEngine, monkeypatch) -> tuple[list[str], list[str], bool]:
    """Answers about pictures as the engine likes it, in whole prompts; and whether it encoded the scene."""
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", lambda *_, **__: encoded.append(False) or ["no answer"])
        words = {"suppress_tokens": sorted(engine.processor.tokenizer.get_added_vocab().values()), "max_new_tokens": 5}
        once = engine.about(PICTURES, "Look.")(QUESTIONS, batch_size=3, **words)
    return once, engine.whole_prompts(PICTURES, "Look.")(QUESTIONS, batch_size=1, **words), not encoded


FEW = ("qwen2_5_vl", "internvl", "qwen3_5")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in sorted(FAMILIES.keys() - {"paligemma"})
    ],
)
def test_a_plain_vlm_encodes_a_scene_once(family, monkeypatch):
    """With its own processor, and nothing of a Spa3-VLM around it; the weights keep their `requires_grad`."""
    for seed in range(8):
        model, processor = build(family, seed=seed)
        engine = AnsweringEngine(model, processor)
        once, whole, is_encoded = asked_about(engine, monkeypatch)
        assert once == whole and is_encoded and engine.needs_whole_prompts is None
        if len(set(once)) > 1:
            break
    assert len(set(once)) > 1
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plain_vlm_is_the_vlm_of_a_spa3_vlm(composed):
    """The same scene with its own processor and with that of the Spa3-VLM, whose pictures it gets as they are."""
    model, processor = composed
    native = copy.copy(processor)
    native.image_mode = "native"
    own = AnsweringEngine(model.vlm, processor.vlm_processor).encode(PICTURES)
    for engine in (AnsweringEngine(model, native, use_spa3r=False), AnsweringEngine(model.vlm, native)):
        scene = engine.encode(PICTURES)
        assert torch.equal(scene.image_tokens, own.image_tokens) and torch.equal(scene.input_ids, own.input_ids)
    fused = AnsweringEngine(model, native).encode(PICTURES)
    assert not torch.equal(fused.image_tokens, own.image_tokens)
    assert [view.size for view in own.views] == [picture.size for picture in PICTURES]


def test_a_scene_of_a_plain_vlm_is_saved(composed, tmp_path):
    engine = AnsweringEngine(composed[0].vlm, composed[1].vlm_processor)
    scene = engine.encode(PICTURES)
    scene.save(tmp_path / "scene.safetensors")
    loaded = EncodedScene.load(tmp_path / "scene.safetensors", engine.model, engine.processor)
    assert engine.ask(loaded, QUESTIONS) == engine.ask(scene, QUESTIONS)
    with pytest.raises(ValueError, match="`scene` must be a scene of this model"):
        AnsweringEngine(*composed).ask(scene, QUESTIONS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_can_not_be_encoded_once_is_asked_in_whole_prompts(composed):
    model, processor = build("paligemma")
    engine = AnsweringEngine(model, processor)
    assert "'paligemma': its pictures look at the question" in engine.needs_whole_prompts
    answers = engine.answers(PICTURES[:1], QUESTIONS, max_new_tokens=4)
    assert answers == engine.whole_prompts(PICTURES[:1])(QUESTIONS, batch_size=1, max_new_tokens=4)
    engine = AnsweringEngine(*composed)  # an argument that encoded scenes don't take
    whole = engine.whole_prompts(PICTURES)(QUESTIONS, max_new_tokens=4)
    assert engine.answers(PICTURES, QUESTIONS, max_new_tokens=4, use_cache=True) == whole
    scene = engine.encode(PICTURES)
    for name in ("use_cache", "max_length", "min_length"):
        with pytest.raises(ValueError, match=f"`ask` must decide itself about '{name}'"):
            engine.ask(scene, QUESTIONS, **{name: 1})


def test_prompt_tuning_is_asked_in_whole_prompts(composed):
    """Its tokens precede the whole prompt; a scene's prefix would lack them."""
    model, processor = build("qwen2_5_vl")
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    engine = AnsweringEngine(tuned, processor)
    assert "prompt tuning" in engine.needs_whole_prompts
    low_rank = get_peft_model(copy.deepcopy(composed[0].vlm), LoraConfig(target_modules=["q_proj"]))
    engine = AnsweringEngine(low_rank, composed[1].vlm_processor)
    assert engine.needs_whole_prompts is None
    assert engine.answers(PICTURES, QUESTIONS[:2]) == engine.whole_prompts(PICTURES)(QUESTIONS[:2])


def test_special_tokens_are_kept_out_of_the_questions_to_a_plain_vlm(composed):
    engine = AnsweringEngine(composed[0].vlm, composed[1].vlm_processor)
    words = r"must not contain '<\|image_pad\|>', which the VLM would read as a token"
    for questions in (["What is <|image_pad|>?"], ["What?", "What is <|image_pad|>?"]):
        with pytest.raises(ValueError, match=words):
            engine.answers(PICTURES, questions)
