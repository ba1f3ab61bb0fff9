"""Runs: the same answers whoever asks and however often they are killed; what is missing is told; all is on record."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from media import counting_video
from tiny_benchmark import SETTINGS, build_composed, write_vsi_bench
from vlm_families import build

from spa3r import Spa3VLMProcessor
from spa3r.evaluation import (
    PRESETS,
    EvaluationRun,
    EvaluationSettings,
    VsiBench,
    aggregate,
    answer,
    make_prompt,
    run_benchmark,
    score_prediction,
)
from spa3r.evaluation.run_folder import weights_hash
from spa3r.evaluation.runner import _ahead, _deal, _waiting
from spa3r.vsi_bench.format import make_messages
from spa3r.vsi_bench.scoring import parse_prediction


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> VsiBench:
    return VsiBench(write_vsi_bench(tmp_path_factory.mktemp("vsi")))


@pytest.fixture(scope="module")
def whole(benchmark, tmp_path_factory) -> EvaluationRun:
    """A run that nothing disturbed."""
    return run_benchmark(*build_composed(), benchmark, tmp_path_factory.mktemp("runs") / "whole", SETTINGS)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


# What a run is --------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_as_if_asked_alone(benchmark, whole):
    model, processor = build_composed()
    assert [line["id"] for line in whole.answers] == [row["id"] for row in benchmark.rows]
    for row, line in zip(benchmark.rows, whole.answers):
        numbers, frames = benchmark.frames(f"{row['dataset']}/{row['scene_name']}", 2)
        (said,) = answer(model, processor, [{"messages": make_messages(row, frames)}], 1, max_new_tokens=4)
        assert line["prediction"].strip() == said and line["frames"] == numbers == [0, 5]
    assert len({line["prediction"] for line in whole.answers}) > 5


def test_a_line_holds_everything_about_its_question(benchmark, whole):
    for row, line in zip(benchmark.rows, whole.answers):
        assert {key: line[key] for key in row} == row
        assert line["prompt"] == make_prompt(row)
        assert line["parsed"] == parse_prediction(line["prediction"])
        assert line["score"] == score_prediction(row, line["prediction"])
    assert lines_of(whole.folder) == whole.answers
    assert whole.scores == whole.about["scores"] == aggregate(whole.answers)


def test_a_run_says_what_it_depends_on(benchmark, whole):
    model, _ = build_composed()
    about = json.loads((whole.folder / "run.json").read_text())
    assert about["benchmark"] == benchmark.about | {"questions": 11, "scenes": 4, "rows_sha256": benchmark.fingerprint}
    assert about["settings"] == dataclasses.asdict(SETTINGS) and about["settings"]["seed"] == 0
    assert about["model"]["weights_sha256"] == weights_hash(model)
    assert about["model"]["dtype"] == dict.fromkeys(("vlm", "spa3r", "adapter"), "torch.float32")
    assert about["model"]["attention"]["vlm"]["text"] == model.vlm.config.text_config._attn_implementation
    assert about["model"]["image_processor"]["patch_size"] == 14 and about["model"]["images"] == "aligned"
    assert about["model"]["views"]["size"] == 56 and about["model"]["asking"] == "a scene is encoded once"
    (environment,) = about["environments"]
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] and environment["device"] == "cpu"
    assert environment["processes"] == 1 and environment["seconds"] > 0
    assert about["missing"] == {"choice": "fail", "questions": 0, "scenes": {}}
    assert about["model"]["chat"].index("PROMPT") > about["model"]["chat"].index("<|image_pad|>")
    assert about["bootstrap"] == {"samples": 10_000, "seed": 0}


def test_the_table_has_intervals(whole):
    head, _, *rows = whole.table().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["percent", "questions", "score", "95 % interval"]
    low, high = whole.about["intervals"]["overall"]
    last = [cell.strip() for cell in rows[-1].strip("|").split("|")]
    assert last == ["overall", "11", f"{whole.scores['overall']:.1f}", f"{low:.1f} to {high:.1f}"]
    assert len(rows) == len(whole.scores)


def test_weights_have_a_hash(whole):
    model = torch.nn.Linear(2, 3).bfloat16()
    before = weights_hash(model)
    assert before == weights_hash(model) != weights_hash(model.float())
    with torch.no_grad():
        model.bias[0] += 1
    assert weights_hash(model) != before


# Other models and settings --------------------------------------------------------------------------------------------


def test_a_plain_vlm_is_asked_about_the_frames_as_they_are(benchmark, tmp_path):
    vlm, processor = build("qwen2_5_vl")
    run = run_benchmark(vlm, processor, benchmark, tmp_path / "plain", SETTINGS, "a name")
    assert run.about["model"]["name"] == "a name" and list(run.about["model"]["dtype"]) == ["vlm"]
    composed, composed_processor = build_composed()
    alone = dataclasses.replace(SETTINGS, use_spa3r=False, images="native")
    without = run_benchmark(composed, composed_processor, benchmark, tmp_path / "without", alone)
    assert [line["prediction"] for line in run.answers] == [line["prediction"] for line in without.answers]


def test_settings_reach_the_model_and_leave_the_processor_as_it_is(tmp_path):
    model, processor = build_composed()
    benchmark = VsiBench(write_vsi_bench(tmp_path, (2,)))
    before = processor.to_json_string(), processor.image_processor.to_json_string()
    texts = []
    for number, fields in enumerate(
        ({}, {"min_pixels": 112 * 112}, {"images": "native"}, {"system": "Be brief."}, {"num_frames": 3})
    ):
        settings = dataclasses.replace(SETTINGS, **fields)
        run = run_benchmark(model, processor, benchmark, tmp_path / str(number), settings)
        texts.append([line["prediction"] for line in run.answers])
    assert (processor.to_json_string(), processor.image_processor.to_json_string()) == before
    assert len(set(map(tuple, texts))) == 5
    sizes = json.loads((tmp_path / "1" / "run.json").read_text())["model"]["image_processor"]["size"]
    assert sizes["shortest_edge"] == 112 * 112


def test_presets_are_those_of_the_paper_and_of_the_released_model():
    official, released = PRESETS["official"], PRESETS["released"]
    assert (official.num_frames, official.max_new_tokens, official.min_pixels) == (32, 16, None)
    assert (released.num_frames, released.max_new_tokens, released.min_pixels) == (32, 16, 200_704)
    assert (released.images, released.system) == ("aligned", "You are a helpful assistant.")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_frames": 0}, r"`num_frames` must be a whole number from 1 to 1024, got 0"),
        ({"images": "small"}, r"`images` must be one of \('aligned', 'native', None\), got 'small'"),
        ({"missing": "guess"}, r"`missing` must be one of \('fail', 'skip', 'zero'\), got 'guess'"),
    ],
)
def test_settings_that_can_not_be(fields, words):
    with pytest.raises(ValueError, match=words):
        EvaluationSettings(**fields)


def test_settings_that_a_model_does_not_have(benchmark, tmp_path):
    vlm, processor = build("llava")
    with pytest.raises(ValueError, match=r"are for VLMs of free resolution, such as Qwen's, got them for a \w+. Leave"):
        run_benchmark(vlm, processor, benchmark, tmp_path, dataclasses.replace(SETTINGS, min_pixels=9))


def test_a_question_with_a_token_is_named_before_any_is_asked(tmp_path):
    folder = write_vsi_bench(tmp_path / "data", (2,))
    file = folder / "test.jsonl"
    file.write_text(file.read_text().replace("thing 1", "<|image_pad|>"))
    with pytest.raises(ValueError, match=r"^Question 101 can't be asked. .* must not contain '<\|image_pad\|>'"):
        run_benchmark(*build_composed(), VsiBench(folder), tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("family", "images"), [("paligemma", None), ("qwen2_5_vl", "aligned")])
def test_a_plain_vlm_of_any_family_is_asked(family, images, tmp_path):
    """PaliGemma's pictures look at the question: it is asked in whole prompts. Any VLM may see the views."""
    vlm, processor = build(family)
    benchmark = VsiBench(write_vsi_bench(tmp_path, (1,)))
    trained = [parameter.requires_grad for parameter in vlm.parameters()]
    run = run_benchmark(vlm, processor, benchmark, tmp_path / "run", dataclasses.replace(SETTINGS, images=images))
    way = run.about["model"]["asking"]
    assert way.startswith(
        "whole prompts: A scene can't be encoded once" if images is None else "a scene is encoded once"
    )
    (row,), frames = benchmark.rows, benchmark.frames("scannet/scene0", 2)[1]
    if images == "aligned":
        processor = Spa3VLMProcessor(processor)
    (said,) = answer(vlm, processor, [{"messages": make_messages(row, frames)}], 1, max_new_tokens=4)
    assert run.answers[0]["prediction"] == said
    assert [parameter.requires_grad for parameter in vlm.parameters()] == trained and all(trained)


# Stopped and gone on with ---------------------------------------------------------------------------------------------


def killed_after(count: int, benchmark, folder: Path, settings=SETTINGS) -> None:
    """Run in another process, which is killed as soon as so many questions are answered."""

    def kill(done: int, total: int) -> None:
        if done >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=run_benchmark, args=(*build_composed(), benchmark, folder, settings), kwargs={"progress": kill}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_run_goes_on_to_the_same_file(benchmark, whole, tmp_path):
    """Twice killed; the second time a line is cut in the middle as well."""
    killed_after(3, benchmark, tmp_path)
    part = tmp_path / "answers-00000.jsonl"
    written = [json.loads(line)["id"] for line in part.read_text().splitlines()]
    assert len(written) == 4 and not (tmp_path / "answers.jsonl").exists()  # by batches of two
    killed_after(2, benchmark, tmp_path)
    part.write_bytes(part.read_bytes()[:-40])
    cut = len([json.loads(line) for line in part.read_text().splitlines()[:-1] if line])
    asked = []
    run = run_benchmark(
        *build_composed(), benchmark, tmp_path, SETTINGS, progress=lambda done, total: asked.append((done, total))
    )
    assert cut == 5 and asked[-1] == (7, 7)  # the whole batch of the question that was cut
    assert (tmp_path / "answers.jsonl").read_bytes() == (whole.folder / "answers.jsonl").read_bytes()
    assert (tmp_path / "table.md").read_bytes() == (whole.folder / "table.md").read_bytes()
    assert len(run.about["environments"]) == 3 and list(tmp_path.glob("answers-*")) == []
    assert {k: v for k, v in run.about.items() if k != "environments"} == {
        k: v for k, v in whole.about.items() if k != "environments"
    }


def test_a_finished_run_asks_nothing_again(benchmark, whole, monkeypatch):
    before = (whole.folder / "answers.jsonl").read_bytes()
    monkeypatch.setattr(VsiBench, "frames", None)
    again = run_benchmark(*build_composed(), benchmark, whole.folder, SETTINGS)
    assert again.answers == whole.answers and (whole.folder / "answers.jsonl").read_bytes() == before


def test_another_run_in_the_folder_is_refused(benchmark, whole, tmp_path):
    model, processor = build_composed()
    other = VsiBench(write_vsi_bench(tmp_path, (1,)))
    for changed, words in (
        ((benchmark, {"num_frames": 3}), r"settings.num_frames was 2 and is 3"),
        ((other, {}), r"benchmark.questions was 11 and is 1.*benchmark.rows_sha256 was"),
    ):
        settings = dataclasses.replace(SETTINGS, **changed[1])
        with pytest.raises(ValueError, match=rf"`output` \S+whole holds another run \(.*{words}.*start over with"):
            run_benchmark(model, processor, changed[0], whole.folder, settings)
    moved = run_benchmark(model, processor, benchmark, whole.folder, dataclasses.replace(SETTINGS, workers=1), "moved")
    assert moved.answers == whole.answers


def test_fresh_starts_over(benchmark, tmp_path):
    small = VsiBench(write_vsi_bench(tmp_path / "data", (1, 1)))
    run_benchmark(*build_composed(), small, tmp_path / "run", SETTINGS)
    asked = []
    again = dataclasses.replace(SETTINGS, num_frames=1)
    run = run_benchmark(
        *build_composed(), small, tmp_path / "run", again, fresh=True, progress=lambda *done: asked.append(done)
    )
    assert asked[-1] == (2, 2) and len(run.about["environments"]) == 1 and run.answers[0]["frames"] == [0]


def test_what_is_no_finished_run_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"must be the folder of an evaluation, and holds no run.json"):
        EvaluationRun.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not finished: it has no answers.jsonl. The command that started it goes"):
        EvaluationRun.load(tmp_path)


# Missing and broken videos --------------------------------------------------------------------------------------------


def spoilt(folder: Path, kind: str) -> VsiBench:
    """Two scenes, of which the first (of two questions) can't be looked at."""
    benchmark = VsiBench(write_vsi_bench(folder, (2, 3)))
    video = folder / "scannet" / "scene0.mp4"
    video.unlink()
    if kind == "broken":
        video.write_bytes(b"no video")
    return benchmark


@pytest.mark.parametrize("kind", ("missing", "broken"))
def test_fail_stops_with_the_name_and_keeps_the_answers(kind, tmp_path):
    benchmark = spoilt(tmp_path / "data", kind)
    words = {
        "missing": r"Frames are missing of 1 of 2 scenes: scannet/scene0: The video \S+scene0.mp4 doesn't exist",
        "broken": r"Frames of the scene scannet/scene0 can't be read: The video \S+scene0.mp4 can't be decoded",
    }[kind]
    with pytest.raises(ValueError, match=words):
        run_benchmark(*build_composed(), benchmark, tmp_path / "run", SETTINGS)
    kept = list((tmp_path / "run").glob("answers-*"))
    assert sum(len(file.read_text().splitlines()) for file in kept) == (3 if kind == "broken" else 0)


@pytest.mark.parametrize("kind", ("missing", "broken"))
@pytest.mark.parametrize("choice", ("skip", "zero"))
def test_what_can_not_be_seen_is_named_counted_and_scored_as_chosen(kind, choice, tmp_path):
    benchmark = spoilt(tmp_path / "data", kind)
    settings = dataclasses.replace(SETTINGS, missing=choice)
    run = run_benchmark(*build_composed(), benchmark, tmp_path / "run", settings)
    unseen, seen = run.answers[:2], run.answers[2:]
    assert all(line["prediction"] is None and line["frames"] == [] for line in unseen)
    assert all("scene0.mp4" in line["missing"] for line in unseen) and not any("missing" in line for line in seen)
    score = {"skip": None, "zero": 0.0}[choice]
    assert [line["score"] for line in unseen] == [score, score]
    assert run.about["missing"]["questions"] == 2 and run.about["missing"]["choice"] == choice
    assert list(run.about["missing"]["scenes"]) == ["scannet/scene0"]
    assert run.scores == aggregate(seen if choice == "skip" else run.answers)
    total = run.table().splitlines()[-1].split("|")
    assert [total[1].strip(), int(total[2])] == ["overall", 3 if choice == "skip" else 5]


def test_a_repaired_video_is_asked_about_when_the_run_goes_on(tmp_path):
    """Whatever was chosen before, and another choice may be made."""
    benchmark = spoilt(tmp_path / "data", "broken")
    model, processor = build_composed()
    skipped = run_benchmark(
        model, processor, benchmark, tmp_path / "run", dataclasses.replace(SETTINGS, missing="skip")
    )
    zero = run_benchmark(model, processor, benchmark, tmp_path / "run", dataclasses.replace(SETTINGS, missing="zero"))
    assert [line["score"] for line in skipped.answers[:2] + zero.answers[:2]] == [None, None, 0.0, 0.0]
    counting_video(tmp_path / "data" / "scannet" / "scene0.mp4", 6)
    asked = []
    whole = run_benchmark(
        model, processor, benchmark, tmp_path / "run", SETTINGS, progress=lambda *done: asked.append(done)
    )
    assert asked == [(2, 2)] and whole.about["missing"]["questions"] == 0
    assert all(line["prediction"] and "missing" not in line for line in whole.answers)


def test_nothing_to_see_at_all_is_no_score(tmp_path):
    benchmark = VsiBench(write_vsi_bench(tmp_path / "data", (1,)))
    (tmp_path / "data" / "scannet" / "scene0.mp4").unlink()
    with pytest.raises(ValueError, match=r"At least one question must have frames to be scored, and none of 1 has"):
        run_benchmark(*build_composed(), benchmark, tmp_path, dataclasses.replace(SETTINGS, missing="skip"))


# Many processes, and reading ahead ------------------------------------------------------------------------------------


def test_scenes_are_dealt_by_size(benchmark):
    scenes = [(str(i), [[{"id": (i, q)} for q in range(count)]]) for i, count in enumerate((1, 30, 2, 3, 28, 4, 1, 1))]
    for processes in (1, 2, 3, 20):
        shares = _deal(scenes, processes)
        assert len(shares) == processes
        assert Counter(scene for share in shares for scene, _ in share) == Counter(scene for scene, _ in scenes)
        loads = [sum(8 + sum(map(len, batches)) for _, batches in share) for share in shares]
        assert max(loads) - min(loads) <= 8 + max(map(len, (batch for _, (batch,) in scenes)))
    one, two = _deal(scenes, 2)
    assert {scene for scene, _ in one} & {"1", "4"} and {scene for scene, _ in two} & {"1", "4"}


def test_batches_stay_as_they_are_when_some_are_done(benchmark):
    everything = _waiting(benchmark, {}, 2)
    assert [len(batches) for _, batches in everything] == [3, 1, 1, 2]
    first, second = everything[0][1][0], everything[0][1][1]
    rest = _waiting(benchmark, {row["id"]: {} for row in [*first, second[0]]}, 2)
    assert rest[0][1] == everything[0][1][1:] and rest[1:] == everything[1:]


def test_the_next_scenes_are_read_while_one_is_in_use():
    """So many and no more."""
    started, enough = [], threading.Event()

    def read(item: int) -> int:
        started.append(item)
        if len(started) >= 3:
            enough.set()
        return item * item

    reading = _ahead(read, range(10), 2)
    item, future = next(reading)
    assert (item, future.result()) == (0, 0) and enough.wait(10)
    assert sorted(started) == [0, 1, 2]
    assert [(item, future.result()) for item, future in reading] == [(i, i * i) for i in range(1, 10)]


def test_reading_ahead_ends_with_its_reader():
    reading = _ahead(lambda item: item, range(10), 2)
    next(reading)
    reading.close()
    assert not any(thread.name.startswith("frames") for thread in threading.enumerate())


@pytest.mark.slow
def test_two_processes_are_one(benchmark, whole, tmp_path):
    """By the command, which goes on with a run of one process that was killed: the same files to the byte."""
    killed_after(2, benchmark, tmp_path / "run")
    model, processor = build_composed()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["-m", "spa3r", "eval", "vsi-bench", "--model", tmp_path / "model", "--data", benchmark.root]
    command += ["--num-frames", 2, "--max-new-tokens", 4, "--batch-size", 2, "--output", tmp_path / "run", "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)  # one object, from the first process
    assert printed["official_scores"] == whole.scores
    for name in ("answers.jsonl", "table.md"):
        assert (tmp_path / "run" / name).read_bytes() == (whole.folder / name).read_bytes()
    run = EvaluationRun.load(tmp_path / "run")
    assert [e["processes"] for e in run.about["environments"]] == [1, 2] and list(
        (tmp_path / "run").glob("answers-*")
    ) == []
