"""Spa3-VLM in the real lmms-eval: its own tasks, on videos and pictures made here, asked by its own command."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from media import noise
from tiny import alive, spa3r_config, vggt_config
from vlm_families import build

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.evaluation import (
    EvaluationSettings,
    VsiBench,
    aggregate,
    answer,
    parse_prediction,
    run_benchmark,
    score_prediction,
)
from spa3r.media.videos import sample_frames
from spa3r.rooms.export import export_rooms
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.vsi_bench.format import is_choice, make_messages

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip(
        "lmms-eval is not installed; in an environment of its own: pip install -e '.[test,lmms-eval]'",
        allow_module_level=True,
    )

import datasets
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.vsibench.utils import extract_number, vsibench_process_results

# What lmms-eval imports and asks of its libraries is none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent
TASKS = Path(evaluator.__file__).parent / "tasks"
FRAMES = 3
WORDS = [*"0123456789ABCD", ".", " ", "\n", "<|im_end|>"]
"""All that the tiny models can say, so that parsers find letters and numbers in their noise."""

VSI_BENCH, VIEW_SPATIAL, CV_BENCH, SPAR_BENCH, TEXT = ("rooms", "viewspatial_", "cv_bench_", "sparbench_", "words")
TEXT_FUNCTIONS = """
def to_text(doc):
    return doc["question"]

def process_results(doc, results):
    return {"length": len(results[0])}
"""
TEXT_TASK = """
output_type: generate_until
doc_to_text: !function utils.to_text
doc_to_target: question
process_results: !function utils.process_results
generation_kwargs: {max_new_tokens: 30}
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
"""


def make_composed(family):
    """A tiny composed whose short answers depend on every picture."""
    vlm, vlm_processor = build(family, seed=2)
    tokenizer = vlm_processor.tokenizer
    allowed = set(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("".join(WORDS))))
    vlm.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - allowed)
    vlm.generation_config.exponential_decay_length_penalty = (1, 1.5)
    spa3r = alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=70))))
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spa3r)
    alive(model.adapter)
    views = Spa3RImageProcessor(size=42)
    return model, Spa3VLMProcessor(vlm_processor, views, image_token_id=vlm.config.image_token_id)


@pytest.fixture(scope="module")
def composed():
    return make_composed("qwen2_5_vl")


@pytest.fixture(scope="module")
def folder(composed, tmp_path_factory):
    """Of everything: a model, videos of rooms where lmms-eval's vsibench looks for them, and tasks."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    for part in composed:
        part.save_pretrained(folder / "model")
    videos = folder / "home" / "vsibench"
    export_rooms(RoomQuestions(FIRST_TEST_SEED, num_rooms=2, frames=4), videos, "vsi_bench")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "utils.py").write_text(TEXT_FUNCTIONS)
    rows = with_truths_that_are_met(composed, rows_of(videos), videos)
    rows = [row | {"id": number} for number, row in enumerate(rows)]  # a room may lend another a question
    (videos / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (videos / "test.parquet").unlink()  # with the truths as they were
    write_task(folder, VSI_BENCH, datasets.Dataset.from_list(rows), "vsibench/_default_template_yaml")
    write_task(folder, VIEW_SPATIAL, view_spatial(), "viewspatial/viewspatial.yaml")
    write_task(folder, CV_BENCH, cv_bench(), "cv_bench/_default_template_yaml")
    write_task(folder, SPAR_BENCH, spar_bench(), "sparbench/_default_template_yaml")
    write_task(folder, TEXT, datasets.Dataset.from_dict({"question": ["What is two plus two?", "And three?"]}))
    return folder


def rows_of(videos):
    return [json.loads(line) for line in (videos / "test.jsonl").read_text().splitlines()]


def with_truths_that_are_met(composed, rows, videos):
    """The rows of the first room with truths that the model meets, or nearly: scores of 0 alone would tell little."""
    half = rows[: len(rows) // 2]
    frames = [sample_frames(videos / row["dataset"] / f"{row['scene_name']}.mp4", FRAMES) for row in half]
    said_of_half = answer(*composed, [{"messages": make_messages(*pair)} for pair in zip(half, frames)])
    for row, said in zip(half, said_of_half):
        if is_choice(row["question_type"]):
            row["ground_truth"] = parse_prediction(said)
        elif (number := extract_number(said)) is not None:
            row["ground_truth"] = str(1.2 * number)
    return rows


def write_task(folder, name, rows, included=None):
    """A task of lmms-eval's own code, on our rows."""
    rows.to_parquet(folder / f"{name}.parquet")
    task = {"task": name, "dataset_path": "parquet", "dataset_name": None, "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.parquet")}}}
    task |= {"include": str(TASKS / included)} if included else {}
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task) + ("" if included else TEXT_TASK))


def view_spatial():
    """One picture, two, three."""
    kinds = ("Camera perspective - Relative Direction", "Person perspective - Object View Orientation")
    rows = [
        {
            "images": [noise(60 + 8 * i, 50, 10 * row + i) for i in range(row % 3 + 1)],
            "question": f"Where is the lamp, seen from chair {row}?",
            "choices": "A. left\nB. right\nC. in front\nD. behind",
            "answer": "ABCD"[row % 4] + ". left",
            "question_type": kinds[row % 2],
        }
        for row in range(4)
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", [datasets.Image()])


def cv_bench():
    rows = [
        {
            "idx": row,
            "image": noise(70, 50 + 20 * row, 100 + row),
            "prompt": f"Which is closer, chair {row} or the lamp? (A) the chair (B) the lamp",
            "choices": ["the chair", "the lamp"],
            "answer": "(A)",
            "type": "3D",
            "task": "Depth",
            "source": "Omni3D",
        }
        for row in range(3)
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def spar_bench():
    rows = [
        {
            "id": str(row),
            "image": [noise(60, 44, 200 + 10 * row + i) for i in range(row + 1)],
            "question": f"How far is chair {row} from the lamp, in metres?",
            "task": task,
            "answer": truth,
            "img_type": "multi_view",
        }
        for row, (task, truth) in enumerate((("distance_prediction_oo_mv", "1.5"), ("position_matching", "B")))
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", [datasets.Image()])


def command(folder, output, *launcher, batch_size):
    """`python -m lmms_eval` on the rooms in a process of its own; its samples in order, and its results."""
    model_args = f"pretrained={folder / 'model'},num_frames={FRAMES},dtype=float32"
    words = [*(launcher or (sys.executable,)), "-m", "lmms_eval", "--model", "spa3r", "--model_args", model_args]
    words += ["--batch_size", str(batch_size), "--include_path", folder / "tasks", "--tasks", VSI_BENCH]
    words += ["--log_samples", "--output_path", output, *(() if launcher else ("--device", "cpu"))]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    samples = [json.loads(line) for line in next(output.rglob("*_samples_*.jsonl")).read_text().splitlines()]
    results = json.loads(next(output.rglob("*_results.json")).read_text())["results"][VSI_BENCH]
    return sorted(samples, key=lambda sample: sample["doc_id"]), results


@pytest.fixture(scope="module")
def asked_by_command(folder, tmp_path_factory):
    return command(folder, tmp_path_factory.mktemp("output"), batch_size=4)


@pytest.fixture(scope="module")
def evaluate(folder):
    """lmms-eval's evaluator in this process, on all tasks; samples by task."""
    manager = TaskManager("ERROR", include_path=str(folder / "tasks"), model_name="spa3r")
    model_args = f"pretrained={folder / 'model'},num_frames={FRAMES},dtype=float32"

    def run(**arguments):
        return evaluator.simple_evaluate(
            "spa3r",
            tasks=[VSI_BENCH, VIEW_SPATIAL, CV_BENCH, SPAR_BENCH, TEXT],
            model_args=model_args,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs="min_new_tokens=24",  # short answers would be alike
            **arguments,
        )["samples"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield run


def answers_in(samples):
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.fixture(scope="module")
def alone(evaluate):
    """Every question asked alone."""
    return evaluate(batch_size=1)


@pytest.fixture(scope="module")
def lm(folder):
    return get_model("spa3r").create_from_arg_string(f"pretrained={folder / 'model'},num_frames={FRAMES},device=cpu")


def ask(lm, *contents, **generation_kwargs):
    """Answers to questions of the given contents, as lmms-eval asks them."""
    lm.task_dict = {"task": {"test": contents}}

    def request(doc_id):
        arguments = ("", lambda doc: [{"role": "user", "content": doc}], generation_kwargs, doc_id, "task", "test")
        return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": doc_id, "repeats": 1})

    return lm.generate_until([request(doc_id) for doc_id in range(len(contents))])


def generated(composed, content, **arguments):
    """What transformers' `generate` gives, white space and all."""
    model, processor = composed
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    output = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True)


def words(said):
    return {"type": "text", "text": said}


def picture(seed):
    return {"type": "image", "url": noise(60, 44, seed)}


QUESTION = [picture(0), picture(1), words("How many chairs?")]


# Registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("spa3r", "spa3_vlm"))
def test_lmms_eval_finds_the_model_by_the_entry_point(name):
    manifest = get_model_manifest(name)
    assert (manifest.model_id, manifest.simple_class_path) == ("spa3r", None)
    model_class = get_model(name, force_simple=True)  # there is no simple interface to force
    assert f"{model_class.__module__}.{model_class.__name__}" == manifest.chat_class_path
    assert not model_class.is_simple


# The same answers and scores as ours ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def our_run(folder, composed):
    """The same folder through our own runner."""
    settings = EvaluationSettings(num_frames=FRAMES, batch_size=3)
    return run_benchmark(*composed, VsiBench(folder / "home" / "vsibench"), folder / "run", settings)


def test_the_command_gives_the_answers_of_our_runner(asked_by_command, our_run):
    ours = [line["prediction"] for line in our_run.answers]
    assert [sample["filtered_resps"] for sample in asked_by_command[0]] == ours
    assert [sample["input"] for sample in asked_by_command[0]] == [line["prompt"] for line in our_run.answers]
    assert len(set(ours)) > 10


def test_the_command_gives_the_scores_of_our_runner_where_both_read_the_same_number(asked_by_command, our_run):
    samples, results = asked_by_command
    docs = [sample["vsibench_overall"] for sample in samples]
    theirs = [doc["accuracy" if is_choice(doc["question_type"]) else "MRA:.5:.95:.05"] for doc in docs]
    ours = [line["score"] for line in our_run.answers]
    alike = [
        is_choice(doc["question_type"]) or number_in(doc["prediction"]) == extract_number(doc["prediction"])
        for doc in docs
    ]
    assert [score for score, same in zip(theirs, alike) if same] == [s for s, same in zip(ours, alike) if same]
    assert {0.0, 1.0} < {score for score, same in zip(ours, alike) if same}, "choices and numbers both score"
    assert not all(alike)
    table = aggregate(doc | {"score": score} for doc, score in zip(docs, theirs))
    assert 100 * results["vsibench_overall,none"] == pytest.approx(table["overall"], abs=1e-4)


def number_in(said):
    try:
        return float(parse_prediction(said))
    except ValueError:
        return None


def differences():
    """The rows of the guide's table: an answer, a truth, our score, lmms-eval's."""
    page = (ROOT / "docs" / "guides" / "lmms_eval.md").read_text(encoding="utf-8")
    table = page.partition("\n## Differences in scores\n")[2].partition("\n| answer |")[2].partition("\n\n")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(said.replace("\\n", "\n"), *rest) for said, *rest in rows]


@pytest.mark.parametrize(("said", "truth", "ours", "theirs"), differences())
def test_where_the_parsers_differ_is_named(said, truth, ours, theirs):
    kind = "object_rel_distance" if truth in "ABCD" else "object_counting"
    row = {"question_type": kind, "ground_truth": truth}
    assert score_prediction(row, said) == float(ours)
    if theirs == "error":
        with pytest.raises(ZeroDivisionError):
            vsibench_process_results(dict(row), [said])
    else:
        scored = vsibench_process_results(dict(row), [said])["vsibench_overall"]
        assert scored.get("accuracy", scored.get("MRA:.5:.95:.05")) == float(theirs)


@pytest.mark.parametrize("name", (VIEW_SPATIAL, CV_BENCH, SPAR_BENCH, TEXT))
def test_tasks_of_pictures_and_of_text_get_what_generate_gives(name, alone, folder, composed):
    docs = datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "cache"))
    length = {VIEW_SPATIAL: 128, CV_BENCH: 1024, SPAR_BENCH: 100, TEXT: 30}[name]
    said = []
    for doc, sample in zip(docs, alone[name]):
        pictures = doc.get("images") or doc.get("image") or []
        pictures = pictures if isinstance(pictures, list) else [pictures]
        content = [*({"type": "image", "image": picture} for picture in pictures), words(sample["arguments"][0])]
        said.append(generated(composed, content, do_sample=False, min_new_tokens=24, max_new_tokens=length).strip())
    assert answers_in(alone[name]) == said
    assert len(set(said)) == len(said)


# Batches and processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", (2, "7"))
def test_batches_change_no_answer(batch_size, alone, evaluate):
    batched = evaluate(batch_size=batch_size)
    assert {name: answers_in(samples) for name, samples in batched.items()} == {
        name: answers_in(samples) for name, samples in alone.items()
    }


@pytest.mark.parametrize("family", ("qwen2_5_vl", "internvl"))
def test_a_batch_may_mix_pictures_videos_and_text(family, folder, tmp_path):
    for part in make_composed(family):
        part.save_pretrained(tmp_path)
    video = {"type": "video", "url": str(next((folder / "home").rglob("*.mp4")))}
    contents = ["What is two plus two?", QUESTION, [words("And three?")], [video, words("Where is the lamp?")]]
    batched = get_model("spa3r")(str(tmp_path), batch_size=4, device="cpu", num_frames=FRAMES)
    one_by_one = get_model("spa3r")(str(tmp_path), batch_size=1, device="cpu", num_frames=FRAMES)
    said = ask(batched, *contents, max_new_tokens=8)
    assert said == ask(one_by_one, *contents, max_new_tokens=8)
    assert len(set(said)) == 4


@pytest.mark.slow
def test_two_processes_give_what_one_gives(asked_by_command, folder, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launcher += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    samples, results = command(folder, tmp_path, *launcher, batch_size=3)
    told = ("doc_id", "filtered_resps", "vsibench_overall")
    assert [[sample[key] for key in told] for sample in samples] == [
        [sample[key] for key in told] for sample in asked_by_command[0]
    ]
    assert results == asked_by_command[1]


# What tasks may ask for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "means"),
    (
        ({"max_new_tokens": 3}, {"max_new_tokens": 3}),
        ({}, {"max_new_tokens": 128}),
        ({"min_new_tokens": 128, "until": ["\n\n"]}, {"max_new_tokens": 128, "min_new_tokens": 128}),
        ({"max_length": 60}, {"max_length": 60}),
        ({"max_new_tokens": 8, "num_beams": 3}, {"max_new_tokens": 8, "num_beams": 3}),
        ({"max_new_tokens": 8, "repetition_penalty": 3.0}, {"max_new_tokens": 8, "repetition_penalty": 3.0}),
        ({"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "do_sample": False}, {"max_new_tokens": 8}),
        ({"max_new_tokens": 8, "temperature": 0.0, "do_sample": True}, {"max_new_tokens": 8}),
        ({"max_new_tokens": 8, "temperature": 2.0, "do_sample": False}, {"max_new_tokens": 8}),
        ({"max_new_tokens": 8, "temperature": None, "top_p": None, "num_beams": None}, {"max_new_tokens": 8}),
        (
            {"max_new_tokens": 8, "temperature": 5.0, "top_k": 5},
            {"max_new_tokens": 8, "do_sample": True, "temperature": 5.0, "top_k": 5},
        ),
        ({"max_new_tokens": 8, "do_sample": True}, {"max_new_tokens": 8, "do_sample": True}),
    ),
    ids=str,
)
def test_generation_kwargs_are_those_of_generate(asked, means, lm, composed):
    torch.manual_seed(3)
    said = ask(lm, QUESTION, **asked)
    content = [item if item["type"] == "text" else {"type": "image", "image": item["url"]} for item in QUESTION]
    torch.manual_seed(3)
    assert said == [generated(composed, content, **({"do_sample": False} | means)).strip()]


def test_a_scene_is_encoded_once_for_all_that_is_asked_about_it(lm, folder):
    first, second = ({"type": "video", "url": str(file)} for file in sorted((folder / "home").rglob("*.mp4")))
    contents = [
        [video, words(f"How many {kind}?")] for kind in ("chairs", "lamps", "beds") for video in (first, second)
    ]
    contents += [[second, first, words("Are these one room?")], [words("And here: "), first, words("what is it?")]]
    looks = []
    hook = lm.model.vlm.base_model.visual.register_forward_hook(lambda *_: looks.append(1))
    shared = ask(lm, *contents, max_new_tokens=8)
    assert len(looks) == 4
    looks.clear()
    whole = ask(lm, *contents, max_new_tokens=8, until=["</s>"])  # needs the words as they came
    assert len(looks) == 8
    assert shared == whole == ask(lm, *contents, max_new_tokens=8, use_cache=True)  # which `ask` leaves to nobody
    assert len(looks) == 8 + 10 and len(set(shared)) > 4
    hook.remove()


def test_a_warm_model_says_several_things(lm):
    assert len({*ask(lm, *[QUESTION] * 8, max_new_tokens=8, temperature=5.0)}) > 1


def test_an_answer_ends_before_the_first_stop_string(lm):
    (whole,) = ask(lm, QUESTION, min_new_tokens=60, max_new_tokens=60)
    first, second = whole[10:12], whole[4:6]
    stops = {stop: whole.index(stop) for stop in (first, second)}
    assert ask(lm, QUESTION, min_new_tokens=60, max_new_tokens=60, until=[first, "", second]) == [
        whole[: min(stops.values())].strip()
    ]
    assert ask(lm, QUESTION, min_new_tokens=60, max_new_tokens=60, until=first) == [whole[: stops[first]].strip()]


def test_an_empty_line_is_a_stop_only_where_a_task_says_so(lm):
    tokenizer = lm.processor.tokenizer
    lines = set(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("A\n")))
    others = [token for token in range(len(tokenizer)) if token not in lines]
    kwargs = {"suppress_tokens": others, "min_new_tokens": 30, "max_new_tokens": 30, "temperature": 50.0}

    def said(**until):
        torch.manual_seed(0)
        return ask(lm, QUESTION, **kwargs, **until)

    (whole,) = said()
    assert "\n\n" in whole
    assert said(until=["\n\n"]) == [whole]  # what lmms-eval gives to a task that names none
    assert said(until=["\n\n", "</s>"]) == [whole.split("\n\n")[0].strip()]


def test_unknown_generation_kwargs_are_named(lm, caplog):
    with caplog.at_level(logging.WARNING):
        said = ask(lm, QUESTION, max_new_tokens=4, image_aspect_ratio="pad", modality="video")
    assert "and leaves out image_aspect_ratio, modality." in caplog.text
    assert said == ask(lm, QUESTION, max_new_tokens=4)


def test_the_embedded_model_says_what_it_is(caplog):
    with caplog.at_level(logging.WARNING):
        lm = get_model("spa3r")("embedded", device="cpu")
    assert "the embedded models were trained on rendered rooms only" in caplog.text
    assert len(ask(lm, QUESTION, max_new_tokens=2)) == 1


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("max_num_frames=8", r"`--model_args` must be of pretrained, .* and num_frames, got max_num_frames"),
        ("num_frames=0", r"`num_frames` must be a whole number of at least 1, got 0"),
        ("dtype=half", r"`dtype` must be one of auto, float32, bfloat16, float16, got 'half'"),
        ("batch_size=auto", r"`batch_size` must be a whole number of at least 1, got 'auto'"),
        ("device=npu", r"must be auto or a device that is here"),
        ("attn_implementation=magic", r"magic"),
    ),
)
def test_model_args_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model("spa3r").create_from_arg_string(f"pretrained=embedded,{arguments}")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no model folder .*nowhere"):
        get_model("spa3r").create_from_arg_string(f"pretrained={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("item", "message"),
    (
        ({"type": "audio", "url": "a.wav"}, r"Question 1 of task task must be of text, .* whole videos, got audio\."),
        ({"type": "video", "url": "a.mp4", "start_time": 2.0}, "got a part of a video. Leave the task out"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 2.0}}, "got a part of a video. Leave the task out"),
        ({"type": "video", "url": "nowhere.mp4"}, r"The video nowhere\.mp4 doesn't exist"),
    ),
)
def test_what_the_model_cannot_see_is_refused(item, message, lm):
    with pytest.raises(ValueError, match=message):
        ask(lm, QUESTION, [item, words("What is it?")])


def test_other_kinds_of_requests_are_refused(lm):
    with pytest.raises(NotImplementedError, match=r"output_type generate_until, got one of loglikelihood"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match=r"output_type generate_until, got one of generate_until_multi_round"):
        lm.generate_until_multi_round([])
