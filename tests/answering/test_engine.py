"""Answers of models with and without Spa3R, batched and alone, and their scores."""

import copy

import PIL.Image
import pytest
import torch
from media import noise
from peft import LoraConfig, get_peft_model
from tiny_benchmark import build_composed
from transformers.utils import logging

from spa3r.answering.engine import AnswerReport, answer, evaluate_answers, score_answer, score_table

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
