"""`spa3r eval`: the commands, what they print and what they refuse."""

import json

import pytest
from command_line import run, run_json
from tiny_benchmark import write_vsi_bench
from vlm_families import build

from spa3r.evaluation import EvaluationRun

QUICK = ("--num-frames", 2, "--max-new-tokens", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_vsi_bench(tmp_path_factory.mktemp("vsi"), (2, 1), pruned=True)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of the embedded model, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "embedded"
    return folder, run_json("eval", "vsi-bench", "--model", "embedded", "--data", data, *QUICK, "-o", folder)


def test_vsi_bench_prints_its_table(data, finished):
    folder, told = finished
    loaded = EvaluationRun.load(folder)
    assert told["official_scores"] == loaded.scores and list(loaded.scores)[1:] == ["object_rel_direction_accuracy"]
    assert told["scores"].keys() == told["intervals"].keys() == {"overall", "object rel direction"}
    assert list(told["scores"].values()) == list(loaded.scores.values()) and told["output"] == str(folder)
    assert told["benchmark"]["questions"] == len(loaded.answers) == 3
    again = run("eval", "vsi-bench", "--model", "embedded", "--data", data, *QUICK, "-o", folder)
    assert loaded.table() in again.stdout and f"{folder}: 3 questions about 2 scenes" in again.stdout
    assert "rendered rooms only" in again.stderr


def test_presets_are_overridden_by_options(data, tmp_path):
    options = ("--preset", "released", *QUICK, "--system", "Be brief.", "--max-pixels", 300_000, "--subset", "debiased")
    told = run_json("eval", "vsi-bench", "--model", "embedded", "--data", data, *options, "-o", tmp_path)
    settings = told["settings"]
    assert (settings["min_pixels"], settings["max_pixels"], settings["images"]) == (200_704, 300_000, "aligned")
    assert (settings["system"], settings["num_frames"], settings["max_new_tokens"]) == ("Be brief.", 2, 2)
    assert told["benchmark"]["subset"] == "debiased" and told["benchmark"]["questions"] == 2


def test_a_plain_vlm_and_a_composed_without_spa3r(data, checkpoint, tmp_path, monkeypatch):
    vlm, processor = build("qwen2_5_vl")
    vlm.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    told = run_json("eval", "vsi-bench", "--model", tmp_path / "plain", "--data", data, *QUICK, "--attn", "eager")
    assert told["output"] == "runs/vsi-bench-full-plain"
    about = EvaluationRun.load(told["output"]).about["model"]
    assert about["attention"]["vlm"]["text"] == "eager" and about["asking"] == "a scene is encoded once"
    told = run_json("eval", "vsi-bench", "--model", checkpoint, "--data", data, *QUICK, "--without-spa3r")
    assert told["settings"]["use_spa3r"] is False


def test_rooms_need_nothing(tmp_path):
    options = ("--rooms", 1, "--num-frames", 2, "--max-new-tokens", 2)
    told = run_json("eval", "rooms", *options, "-o", tmp_path)
    assert told["benchmark"]["name"] == "rooms" and told["benchmark"]["first_seed"] == 1_000_000
    assert told["scores"]["overall"] >= 0
    page = run_json("eval", "report", tmp_path)["report"]
    assert page == str(tmp_path / "report.html") and "rooms/1000000" in (tmp_path / "report.html").read_text()


def test_missing_videos_stop_before_the_model_is_loaded_or_are_named(tmp_path):
    data = write_vsi_bench(tmp_path / "data", (2, 1))
    (data / "arkitscenes" / "scene1.mp4").unlink()
    command = ("eval", "vsi-bench", "--model", "embedded", "--data", data, *QUICK, "-o", tmp_path / "run")
    error = run_json(*command, code=1)["error"]
    assert error.startswith("Frames are missing of 1 of 2 scenes: arkitscenes/scene1: The video ")
    assert not (tmp_path / "run").exists()
    text = run(*command, "--missing", "zero").stdout
    assert "Questions without frames to look at: 1, scored 0." in text and "  arkitscenes/scene1: The video" in text


def test_compare_names_what_differs_and_what_flipped(finished, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    about = json.loads((finished[0] / "run.json").read_text())
    lines = [json.loads(line) for line in (finished[0] / "answers.jsonl").read_text().splitlines()]
    for folder, frames, said in (
        (before, about["settings"]["num_frames"], {"prediction": "B", "score": 0.0}),
        (after, 3, {"prediction": "A\x1b[31m", "score": 1.0}),
    ):
        folder.mkdir()
        changed = about | {"settings": about["settings"] | {"num_frames": frames}}
        (folder / "run.json").write_text(json.dumps(changed))
        answers = [lines[0] | said, *lines[1:]]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    told = run_json("eval", "compare", before, after)
    assert told["changed"] == ["settings.num_frames was 2 and is 3"]
    assert [flip["id"] for flip in told["flips"]] == [100] and told["flips"][0]["score_b"] == 1.0
    text = run("eval", "compare", before, after).stdout
    assert "1 question flipped: 1 to right, 0 to wrong" in text and "settings.num_frames was 2 and is 3" in text
    assert "+ 100 scannet/scene0 object_rel_direction_easy: What of thing 0?" in text and "\x1b" not in text


def test_a_report_finds_videos_that_have_moved(finished, tmp_path):
    folder, _ = finished
    moved = write_vsi_bench(tmp_path / "moved", (2, 1), pruned=True)
    run("eval", "report", folder, "-o", tmp_path / "page.html", "--data", moved, "--scenes", 1, "--frames", 1)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 1 and "rendered rooms only" in page


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("compare", "{tmp}", "{tmp}"), "must be the folder of an evaluation, and holds no run.json"),
        (("report", "{tmp}"), "must be the folder of an evaluation, and holds no run.json"),
        (("vsi-bench", "--model", "embedded", "--data", "{tmp}/no"), "`data` must be a folder in VSI-Bench's layout"),
        (("vsi-bench", "--model", "{tmp}/no", "--data", "{data}", "-o", "{tmp}/r"), "There is no model folder"),
    ],
)
def test_errors_are_one_line(command, words, data, tmp_path):
    command = [part.format(tmp=tmp_path, data=data) for part in command]
    assert words in run_json("eval", *command, code=1)["error"]
