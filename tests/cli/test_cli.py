"""The command line, run for real: every command, its JSON, its exit codes and the words of its errors."""

import html
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run, run_json, said
from media import counting_frames, counting_video, data_url, encoded, noise, smooth, write_video
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import PATCH, alive, pretraining_config, relative_error

import spa3r
from spa3r import (
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3VLMForConditionalGeneration,
    VggtModel,
    console,
)
from spa3r.checkpoints import EXAMPLE_QUESTIONS, QUESTIONS_NOTE, SCORES
from spa3r.cli import demo, encode, info
from spa3r.evaluation import EvaluationRun, compare_runs, evaluate_field, score_prediction
from spa3r.evaluation.run_folder import weights_hash
from spa3r.models import attention as attention_module
from spa3r.rooms import embedded, generate_room, look_around, new_cameras, render
from spa3r.rooms.demo import DemoScores
from spa3r.rooms.embedded import embedded_model, embedded_vlm
from spa3r.rooms.questions import QUESTION_TYPES

# As VSI-Bench asks: to other words the small model may say nothing.
QUESTION = "How many chair(s) are in this room?\nPlease answer the question using a single word or phrase."


@pytest.fixture
def scene(tmp_path) -> Path:
    """A folder of two pictures, whose names sort by number, a video and a text."""
    folder = tmp_path / "room"
    folder.mkdir()
    noise(60, 45, 1).save(folder / "view2.png")
    noise(60, 45, 2).save(folder / "view10.jpg")
    counting_video(folder / "walk.mp4", 6)
    (folder / "notes.txt").write_text("not a view")
    (folder / ".hidden.png").write_text("not a view either")
    return folder


# ask


def test_ask_prints_the_answer_and_says_what_the_model_knows(scene):
    result = run("ask", scene / "view2.png", QUESTION, "--max-new-tokens", 4)
    assert result.stdout.strip()
    assert "note: the embedded models were trained on rendered rooms only" in result.stderr


def test_frames_by_coverage_leave_a_pause_out(tmp_path):
    """The latents are those of the pictures before and after the pause."""
    pictures = counting_frames(29)
    video = write_video(tmp_path / "pause.mp4", [pictures[i] for i in [0] * 10 + [14, 28]])
    assert run_json("ask", video, QUESTION, "--num-frames", 3, "--frames", "coverage")["num_views"] == 3
    latents = []
    for choice in ("uniform", "coverage"):
        run("encode", video, "--num-frames", 3, "--frames", choice, "-o", tmp_path / "z.safetensors")
        latents.append(load_file(tmp_path / "z.safetensors")["latents"])
    model, processor = embedded.embedded_spa3r()
    with torch.no_grad():
        wanted = model.spa3r.encode(**processor([[pictures[i] for i in (0, 14, 28)]], return_tensors="pt"))
    near, far = (relative_error(ours, wanted) for ours in reversed(latents))
    assert near < 0.1 * far


def test_ask_takes_a_folder_a_video_and_a_picture_together(scene, tmp_path):
    noise(80, 60, 3).save(tmp_path / "extra.webp")
    video = counting_video(tmp_path / "second.avi", 8)
    sources = (scene, video, tmp_path / "extra.webp")
    answer = run_json("ask", *sources, QUESTION, "--num-frames", 2, "--max-new-tokens", 4)
    assert answer["views"] == [
        f"{scene}/view2.png",
        f"{scene}/view10.jpg",
        *(f"{scene}/walk.mp4#{index}" for index in (0, 1)),
        *(f"{video}#{index}" for index in (0, 1)),
        f"{tmp_path}/extra.webp",
    ]
    assert answer["num_views"] == 7
    assert answer["model"] == "embedded"
    assert answer["question"] == QUESTION and isinstance(answer["answer"], str)
    assert 0 < answer["seconds"] < 60


def test_ask_many_questions_about_a_scene_that_is_encoded_once(scene):
    questions = ("How many chairs are there?", "Where is the lamp?", "What is the size of this room?")
    more = [part for question in questions[1:] for part in ("--question", question)]
    told = run_json("ask", scene, questions[0], *more, "--max-new-tokens", 5)
    assert [answer["question"] for answer in told["answers"]] == list(questions)
    for asked in told["answers"]:
        alone = run_json("ask", scene, asked["question"], "--max-new-tokens", 5)
        assert alone["answer"] == asked["answer"] and alone["answers"] == [asked]
    command = run("ask", scene, questions[0], *more, "--max-new-tokens", 5)
    assert f"{embedded.ROOMS_NOTE}. {QUESTIONS_NOTE}" in " ".join(command.stderr.split())
    assert all(question in QUESTIONS_NOTE for question in EXAMPLE_QUESTIONS)
    text = command.stdout
    assert text.splitlines()[::2] == list(questions)
    assert [line.strip() for line in text.splitlines()[1::2]] == [a["answer"] for a in told["answers"]]
    wrong = run("ask", scene, QUESTION, "-q", " ", code=1)
    assert "`questions` must be texts that are not empty" in wrong.stderr


def test_ask_a_checkpoint_of_ones_own(scene, checkpoint):
    options = ("--max-new-tokens", 4, "--images", "native", "--attn", "eager", "--device", "cpu", "--dtype", "float32")
    answer = run_json("ask", scene / "view2.png", QUESTION, "--model", checkpoint, *options)
    assert answer["model"] == str(checkpoint)
    assert answer["answer"] == run_json("ask", scene / "view2.png", QUESTION, *options)["answer"]


def test_ask_in_half_precision(scene):
    assert run_json("ask", scene / "view2.png", QUESTION, "--dtype", "bfloat16", "--max-new-tokens", 2)["answer"]


def test_control_characters_stay_out_of_the_terminal():
    assert console.printable("a\x1b[31mb\n\tc\x18é🪑") == "a�[31mb\n\tc�é🪑"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{tmp}/nothing.jpg", QUESTION), "error: The picture {tmp}/nothing.jpg doesn't exist. Check the path."),
        (("{tmp}/broken.png", QUESTION), "{tmp}/broken.png"),
        (("{tmp}/broken.mp4", QUESTION), "error: The video {tmp}/broken.mp4 can't be decoded"),
        (("{tmp}/empty", QUESTION), "error: The folder {tmp}/empty holds no pictures and no videos"),
        (("http://127.0.0.1:9/a.png", QUESTION), "error: The picture http://127.0.0.1:9/a.png can't be downloaded"),
        (("{tmp}/ok.png", "What is <|image_pad|>?"), "must not contain '<|image_pad|>', which the VLM would read as"),
        (("{tmp}/ok.png", QUESTION, "--attn", "magic"), "error: `attn_implementation` must be one of"),
        (("{tmp}/ok.png", QUESTION, "--attn", "flash_attention_2"), "can't be used here"),
        (("{tmp}/ok.png", QUESTION, "--device", "tpu"), "error: `--device` must be auto or a device that is here"),
        (("{tmp}/ok.png", QUESTION, "--device", "cpu:"), "error: `--device` must be auto or a device that is here"),
        (("{tmp}/ok.png", QUESTION, "--model", "{tmp}/none"), "error: There is no model folder {tmp}/none."),
        (("{tmp}/ok.png", QUESTION, "--model", "{tmp}/ok.png"), "error: There is no model folder {tmp}/ok.png."),
        (("{tmp}/ok.png", QUESTION, "--model", "{tmp}/empty"), "holds no Spa3VLMProcessor"),
    ],
)
def test_errors_of_ask_are_one_line(arguments, words, tmp_path):
    noise(30, 30).save(tmp_path / "ok.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "flash_attention_2" in arguments and torch.cuda.is_available():
        pytest.skip("it may be usable here")
    result = run("ask", *arguments, code=1)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert result.stdout == "" and len(lines) == 1 and words.format(tmp=tmp_path) in lines[0]
    error = run_json("ask", *arguments, code=1)
    assert error == {"error": lines[0].removeprefix("error: ")}


def test_a_missing_question_is_a_usage_error(scene, monkeypatch):
    result = run("ask", scene / "view2.png", code=2)
    assert result.stdout == "" and "The last argument must be the question, after at least one photo" in said(result)
    monkeypatch.chdir(scene)  # long paths are shortened
    result = run("ask", "view2.png", "view10.jpg", code=2)
    assert "got 'view10.jpg'" in said(result)


@pytest.mark.parametrize(
    "option", [("--images", "small"), ("--frames", "best"), ("--dtype", "int4"), ("--max-new-tokens", "0"), ("--what",)]
)
def test_usage_errors(option, scene):
    result = run("ask", scene / "view2.png", QUESTION, *option, code=2)
    assert result.stdout == "" and option[0] in said(result)


# encode


def test_encode_a_scene(scene, tmp_path):
    file = tmp_path / "out" / "room.safetensors"
    report = run_json("encode", scene, "--output", file, "--num-frames", 3)
    latents = load_file(file)["latents"]
    assert report["output"] == str(file)
    assert report["latents_shape"] == list(latents.shape) == [1, 64, 128]
    assert report["num_views"] == len(report["views"]) == 5
    with safe_open(file, framework="pt") as content:
        about = content.metadata()
    assert about["model"] == "embedded"
    assert json.loads(about["views"]) == report["views"]
    assert json.loads(about["versions"])["torch"] == torch.__version__.partition("+")[0]


def test_encode_with_a_spa3r_and_with_a_spa3_vlm(scene, checkpoint, tmp_path):
    model, processor = embedded.embedded_model()
    model.spa3r.save_pretrained(tmp_path / "spa3r")
    processor.view_image_processor.save_pretrained(tmp_path / "spa3r")
    latents = []
    for name in ("embedded", tmp_path / "spa3r", checkpoint):
        run("encode", scene / "view2.png", "--model", name, "--output", tmp_path / "z.safetensors")
        latents.append(load_file(tmp_path / "z.safetensors")["latents"])
    torch.testing.assert_close(latents[1], latents[0])
    torch.testing.assert_close(latents[2], latents[0])


def test_encode_refuses_other_models(scene, tmp_path):
    embedded.embedded_model()[0].spa3r.backbone.save_pretrained(tmp_path / "vggt")
    result = run("encode", scene, "--model", tmp_path / "vggt", code=1)
    assert f"`--model` must be a Spa3R or a Spa3-VLM to encode with, and {tmp_path}/vggt is a vggt." in said(result)


@pytest.fixture
def scenes(tmp_path) -> list[Path]:
    folders = [tmp_path / f"scene{index}" for index in range(5)]
    for index, folder in enumerate(folders):
        folder.mkdir()
        for view in range(1 + index % 3):
            noise(56, 42, 10 * index + view).save(folder / f"{view}.png")
    return folders


def test_encode_many_scenes_and_again_after_an_interruption(scenes, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    arguments = ("encode", *scenes, "--scene-per-folder", "--output", out, "--batch-size", 2)
    write = encode._encode_and_save
    calls = []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode_and_save", interrupted)
        run(*arguments, code=130)
    assert sorted(file.name for file in out.iterdir()) == ["scene0.safetensors", "scene1.safetensors"]
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}

    report = run_json(*arguments)
    assert (report["num_scenes"], report["encoded"], report["skipped"], report["failed"]) == (5, 3, 2, {})
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert sorted(file.name for file in out.iterdir()) == [f"scene{index}.safetensors" for index in range(5)]

    report = run_json(*arguments)
    assert (report["encoded"], report["skipped"]) == (0, 5)
    run("encode", scenes[2], "--output", tmp_path / "alone.safetensors")
    alone, packed = load_file(tmp_path / "alone.safetensors"), load_file(out / "scene2.safetensors")
    torch.testing.assert_close(packed["latents"], alone["latents"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_scenes_are_dealt_to_processes(scenes, tmp_path):
    """Two processes encode the folders in a folder, each its own; then one more scene, and a broken one is named."""
    folder, out = scenes[0].parent, tmp_path / "latents"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spa3r"]
    command = [sys.executable, *launcher, "encode", "--scenes", folder, "--output", out, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launched(code: int = 0) -> dict:
        result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert (result.returncode != 0) == bool(code), result.stderr
        return json.loads(result.stdout)

    report = launched()
    assert (report["num_scenes"], report["encoded"], report["skipped"]) == (5, 5, 0)
    run("encode", *scenes, "--scene-per-folder", "--output", out / "alone", "--batch-size", 1)
    for file in (out / "alone").iterdir():
        alone, dealt = load_file(file)["latents"], load_file(out / file.name)["latents"]
        torch.testing.assert_close(dealt, alone, atol=1e-4, rtol=1e-4)
    (scenes[1] / "0.png").write_bytes(b"no picture")
    report = launched(code=1)
    assert (report["encoded"], report["skipped"], list(report["failed"])) == (0, 4, [str(scenes[1])])


def test_scenes_in_a_folder(tmp_path):
    assert "must be a folder, and" in said(run("encode", "--scenes", tmp_path / "none", code=1))
    (tmp_path / "a.txt").write_text("no scene")
    assert "has neither" in said(run("encode", "--scenes", tmp_path, code=1))
    both = run("encode", "photo.png", "--scenes", tmp_path, code=2)
    assert "Give either photos or a folder of scenes" in said(both)


def test_a_scene_of_another_model_or_a_damaged_file_is_encoded_again(scenes, checkpoint, tmp_path):
    out = tmp_path / "latents"
    arguments = ("encode", *scenes[:2], "--scene-per-folder", "--output", out)
    run(*arguments)
    assert run_json(*arguments, "--model", checkpoint)["encoded"] == 2
    (out / "scene0.safetensors").write_bytes(b"half a fi")
    report = run_json(*arguments, "--model", checkpoint)
    assert (report["encoded"], report["skipped"]) == (1, 1)


def test_failed_scenes_are_named_and_all_others_done(scenes, tmp_path):
    (scenes[1] / "0.png").write_bytes(b"no picture")
    noise(5, 5).save(scenes[3] / "0.png")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "latents"
    arguments = ("encode", *scenes, tmp_path / "empty", tmp_path / "gone", "--scene-per-folder", "--output", out)
    report = run_json(*arguments, "--batch-size", 2, code=1)
    assert (report["num_scenes"], report["encoded"], report["skipped"]) == (7, 3, 0)
    assert set(report["failed"]) == {
        str(path) for path in (scenes[1], scenes[3], tmp_path / "empty", tmp_path / "gone")
    }
    assert "can't be decoded" in report["failed"][str(scenes[1])]
    assert "must be at least one patch" in report["failed"][str(scenes[3])]
    assert sorted(file.stem for file in out.iterdir()) == ["scene0", "scene2", "scene4"]
    result = run(*arguments, code=1)
    assert "0 scenes encoded, 3 already done, 4 failed" in result.stdout
    assert result.stderr.count("error: ") == 4


def test_a_damaged_avif_or_a_pipe_does_not_end_the_other_scenes(scenes, tmp_path):
    """libavif fails with an error of its own, and a pipe would be waited for without end."""
    content = bytearray(encoded(smooth(64, 48), "AVIF"))
    content[-len(content) // 3 :] = bytes(len(content[-len(content) // 3 :]))
    (scenes[1] / "0.png").write_bytes(content)
    (scenes[3] / "0.png").unlink()
    os.mkfifo(scenes[3] / "0.png")
    out = tmp_path / "latents"
    report = run_json("encode", *scenes, "--scene-per-folder", "--output", out, code=1)
    assert set(report["failed"]) == {str(scenes[1]), str(scenes[3])} and report["encoded"] == len(scenes) - 2
    assert f"can't be decoded: {scenes[1] / '0.png'}" in report["failed"][str(scenes[1])]
    assert "it is a pipe, socket or device" in report["failed"][str(scenes[3])]


def test_photos_by_url_of_a_file_and_as_text(tmp_path):
    noise(60, 45).save(tmp_path / "a b.png")
    by_path = run_json("ask", tmp_path / "a b.png", QUESTION)
    for source in (f"file://{tmp_path}/a b.png", (tmp_path / "a b.png").as_uri(), data_url(noise(60, 45))):
        report = run_json("ask", source, QUESTION)
        assert report["answer"] == by_path["answer"] and len(report["views"][0]) < 200
    error = run_json("ask", "A" * 100_000, QUESTION, code=1)["error"]
    assert "doesn't exist" in error and len(error) < 300


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_of_another_code_page_loses_no_answer(encoding, monkeypatch):
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding=encoding))
    with console.reporting(as_json=False, verbose=False) as report:
        report.finish("Zwölf 椅子 \udc80")
    with console.reporting(as_json=True, verbose=False) as report:
        report.finish("", answer="椅子")
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert lines[0].endswith(r"\u6905\u5b50 \udc80") and lines[0].startswith("Zw")
    assert json.loads(lines[1])["answer"] == "椅子"


def test_other_photos_or_options_are_encoded_again(scenes, tmp_path):
    folder, arguments = scenes[0].parent, ("encode", *scenes, "--scene-per-folder", "--output", tmp_path)
    run_json(*arguments)
    assert run_json(*arguments)["encoded"] == 0
    photo = next(file for file in sorted(scenes[0].iterdir()) if file.suffix == ".png")
    added = photo.with_name("zz_added.png")
    added.write_bytes(photo.read_bytes())
    try:
        assert run_json(*arguments)["encoded"] == 1
    finally:
        added.unlink()
    assert run_json(*arguments, "--dtype", "bfloat16")["encoded"] == len(scenes), folder


def test_an_empty_question_and_a_folder_for_a_file_are_refused(scene, tmp_path):
    assert "must be the question" in said(run("ask", scene, " ", code=2))
    wanted = f"`--output` must be a file, and {tmp_path} is a folder: give {tmp_path / 'latents.safetensors'}."
    assert run_json("encode", scene, "--output", tmp_path, code=1)["error"] == wanted


def test_a_text_file_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.ckpt").write_text("Remember the milk.")
    error = run_json("convert", tmp_path / "notes.ckpt", tmp_path / "out", "--kind", "spa3r", code=1)["error"]
    assert "notes.ckpt can't be read: only pickles of tensors and plain values are loaded" in error


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "spa3r", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"spa3r {spa3r.__version__}\n"


def test_scenes_of_one_name_are_refused(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "room").mkdir(parents=True)
    result = run("encode", tmp_path / "a/room", tmp_path / "b/room", "--scene-per-folder", code=1)
    assert "Scenes must have different names" in said(result)


def test_a_file_that_can_not_be_written_leaves_nothing_behind(scene, tmp_path):
    (tmp_path / "taken").mkdir()
    assert "error: " in run("encode", scene / "view2.png", "--output", tmp_path / "taken", code=1).stderr
    assert list((tmp_path).glob(".taken*")) == []


# convert


def test_convert_reports_what_the_library_says(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    result = run("convert", tmp_path / "other.pt", tmp_path / "out", "--kind", "vggt", code=1)
    assert "keys that the converter doesn't know: weight" in said(result)
    assert (
        "doesn't exist" in run_json("convert", tmp_path / "no.pt", tmp_path / "out", "--kind", "spa3r", code=1)["error"]
    )


def test_convert_an_unknown_kind(tmp_path):
    result = run("convert", tmp_path / "a.pt", tmp_path / "out", "--kind", "dust3r", code=2)
    assert "'dust3r' is not one of 'vggt', 'depth-anything-3', 'spa3r', 'spa3-vlm'" in said(result)
    assert "Missing option '--kind'" in said(run("convert", tmp_path / "a.pt", tmp_path / "out", code=2))


@pytest.mark.parametrize("config", ['{"rope_theta": }', "[1]", "missing.json"])
def test_convert_with_a_bad_config(config, tmp_path):
    result = run("convert", tmp_path / "a.pt", tmp_path / "out", "--kind", "vggt", "--config", config, code=1)
    assert f"`--config` must be a JSON object or a file of one, got {config}: " in said(result)


def test_convert_hands_source_kind_and_config_to_the_library(tmp_path, monkeypatch):
    calls = []

    def convert(source, output, kind, config):
        calls.append((source, output, kind, config))
        embedded.embedded_model()[0].spa3r.backbone.save_pretrained(output)

    monkeypatch.setattr(spa3r, "convert_checkpoint", convert)
    (tmp_path / "fields.json").write_text('{"rope_theta": 10}')
    for config in ('{"rope_theta": 10}', tmp_path / "fields.json"):
        report = run_json("convert", tmp_path / "a.pt", tmp_path / "out", "--kind", "spa3-vlm", "--config", config)
    assert calls == [(tmp_path / "a.pt", tmp_path / "out", "spa3-vlm", {"rope_theta": 10})] * 2
    assert report["kind"] == "spa3-vlm" and report["files"] == ["README.md", "config.json", "model.safetensors"]
    assert isinstance(VggtModel.from_pretrained(tmp_path / "out"), VggtModel)


# info, demo


def test_info_tells_what_works():
    report = run_json("info")
    assert report["versions"]["spa3r"] == spa3r.__version__ and report["versions"]["torch"]
    assert "cpu" in report["devices"] and report["dtypes"]["float32"]["works"]
    attention = report["attention"]
    assert set(attention) == {"xformers", "sdpa", "eager", "flash_attention_2"}
    assert attention["sdpa"]["works"] and attention["eager"]["works"]
    assert sum("(the default)" in entry["note"] for entry in attention.values()) == 1
    text = run("info").stdout
    for words in ("Versions", "Devices", f"Attention on {report['device']}", *attention):
        assert words in text


@pytest.mark.slow
def test_info_tells_what_a_scene_costs_before_it_is_tried():
    report = run_json("info", "--views", "1000")
    assert report["tokens"] == 1000 * (37 * 24 + 5) and report["dtype"] == "bfloat16"
    assert 3.0e9 < report["weights_bytes"] < 3.1e9
    assert report["memory_bytes"] == report["weights_bytes"] + report["activations_bytes"] < 40e9
    assert 1000 < report["largest_scenes"]["40 GB"] < report["largest_scenes"]["80 GB"]


@pytest.mark.parametrize(
    "options, words",
    (
        (["--size", "518"], "`--size` must be the width and height of a view, multiples of 14"),
        (["--size", "500x336"], "multiples of 14 such as 518x336, got 500x336"),
        (["--dtype", "auto"], "`--dtype` must be float32, bfloat16 or float16 with `--views`, got auto"),
    ),
)
def test_info_refuses_a_scene_that_it_cannot_count(options, words):
    assert words in said(run("info", "--views", "8", *options, code=1))


def test_info_says_why_a_back_end_does_not_work(monkeypatch):
    asked = attention_module.why_unusable
    monkeypatch.setattr(
        attention_module, "why_unusable", lambda name: "it is away" if name == "xformers" else asked(name)
    )
    attention = run_json("info")["attention"]
    assert attention["xformers"] == {"works": False, "note": "it is away"}
    assert "(the default)" in attention["sdpa"]["note"]
    if not torch.cuda.is_available():
        assert attention["flash_attention_2"]["works"] is False


QUESTION_KEYS = {
    *("question_type", "question", "answer", "truth", "score"),
    *("answer_without_spa3r", "score_without_spa3r"),
}


def test_demo_shows_everything(tmp_path):
    arguments = ("demo", "--seed", 3, "--rooms", 3, "--level", 3, "--views", 7, "--output", tmp_path / "pictures")
    report = run_json(*arguments)
    assert (report["seed"], report["level"], report["num_views"]) == (3, 3, 7)
    assert report["rooms"] == [1_000_300, 1_000_301, 1_000_302] and report["room"] in report["rooms"]
    assert report["cameras"] == "given" and report["held_out"] == [1, 3, 5]
    assert report["latents_shape"][0] == 1 and len(report["latents_shape"]) == 3
    assert report["pictures"] == [
        str(tmp_path / "pictures" / f"{name}.png") for name in ("views", "new_cameras", "field")
    ]
    field = report["field"]
    assert (field["num_scenes"], field["num_views"], field["skipped"]) == (3, 9, 0)
    for row in ("model", "context_mean", "nearest_view", "shuffled_latents", "shuffled_cameras"):
        assert -1 <= field["rows"][row]["geometry_cosine"]["mean"] <= 1
        assert field["rows"][row]["semantic_error"]["scenes"] == 3
    assert field["gap_closed"]["geometry_cosine"] <= 1
    for file in report["pictures"]:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 20
    assert len(list(Path(report["photos"]).glob("*.png"))) == 7
    room = generate_room(report["room"], 3)
    np.testing.assert_allclose(report["new_cameras"], new_cameras(room, 7).extrinsics, atol=1e-6)

    assert [asked["question_type"] for asked in report["questions"]] == list(QUESTION_TYPES)
    runs = [EvaluationRun.load(folder) for folder in report["answers"]]
    for asked in report["questions"]:
        assert asked.keys() == QUESTION_KEYS
        row = {"question_type": asked["question_type"], "ground_truth": asked["truth"]}
        assert asked["score"] == score_prediction(row, asked["answer"])
        assert asked["score_without_spa3r"] == score_prediction(row, asked["answer_without_spa3r"])
        name = asked["question"].partition("\nOptions")[0]
        lines = [next(line for line in run.answers if line["question"] == name) for run in runs]
        assert [line["prediction"] for line in lines] == [asked["answer"], asked["answer_without_spa3r"]]
        assert lines[0]["scene_name"] == str(report["room"])
    scores = report["scores"]
    assert scores == DemoScores.from_answers(*(run.answers for run in runs)).to_dict()
    for name, kept in zip(("with_spa3r", "without_spa3r"), runs):
        assert scores[name]["value"] == pytest.approx(kept.scores["overall"])
        assert [scores[name]["low"], scores[name]["high"]] == pytest.approx(kept.about["intervals"]["overall"])
    compared = compare_runs(*runs[::-1])
    assert [scores["difference"][end] for end in ("low", "high")] == pytest.approx(compared.intervals["overall"])

    page = Path(report["report"]).read_text(encoding="utf-8")
    assert Path(report["report"]) == tmp_path / "pictures" / "report.html"
    assert "3 rooms from seed 1000300 on, level 3; 7 views of each" in page
    assert "spa3r demo --seed 3 --rooms 3 --level 3 --views 7" in page
    assert page.count("data:image/png;base64,") == 9  # the views and two fields

    text = run(*arguments).stdout
    assert "trained on rendered rooms only" in text and "cameras: given" in text and "not asked" not in text
    mean, error = (field["rows"]["nearest_view"]["geometry_cosine"][key] for key in ("mean", "standard_error"))
    assert f"| nearest context view    | {mean:.3f} ± {error:.3f}" in text
    assert str(DemoScores.from_dict(scores)) in text
    for asked in report["questions"]:
        question, _, options = asked["question"].partition("\nOptions:\n")
        assert f"{asked['question_type']}: {question}\n" in text and "   ".join(options.splitlines()) in text
        assert f"truth {asked['truth']!r}, with Spa3R {console.one_line(console.printable(asked['answer']))!r}" in text
        for told in (question, *options.splitlines()):
            assert told in html.unescape(page)
    # What the models in the package score on many rooms stands beside what these few rooms give.
    kept = json.loads(SCORES.read_text(encoding="utf-8"))["scores"]
    assert report["measured"] == kept and kept["rooms"] == 500 and kept["questions"] > 4000
    measured = DemoScores.from_dict(kept)
    assert str(measured) in text and "measured on 500 unseen rooms" in text
    assert f"{measured.with_spa3r.value:.1f}" in page and "500 rooms of level 0" in page
    assert report["table"] == "docs/guides/rooms_recipe.md; again: spa3r eval rooms --rooms 500" in page
    assert report["table"] in text and (Path(__file__).parents[2] / "docs/guides/rooms_recipe.md").is_file()


def test_the_scores_in_the_package_are_of_the_models_in_it(tmp_path):
    """After new models: examples/rooms/run.sh measures them, and package.py scores keeps the result."""
    kept = json.loads(SCORES.read_text(encoding="utf-8"))
    assert kept["weights_sha256"] == {
        "with_spa3r": weights_hash(embedded_model()[0]),
        "without_spa3r": weights_hash(embedded_vlm()[0]),
    }


def test_scores_of_other_weights_are_not_shown():
    runs = [SimpleNamespace(about={"model": {"weights_sha256": name}}) for name in ("other", "ones")]
    assert demo._measured(*runs) == (None, "these weights were not measured; spa3r eval rooms --rooms 500 does it")


def test_the_demo_shows_the_room_of_most_types_of_questions():
    scenes = {"a": ["x", "y", "y", "y"], "b": ["x", "y", "z"], "c": ["x", "z", "y"]}
    scenes = {scene: [{"question_type": name} for name in names] for scene, names in scenes.items()}
    assert demo._most_types(scenes) == "b"


def test_the_demo_says_which_types_it_could_not_ask(tmp_path):
    arguments = ("demo", "--rooms", 2, "--views", 2, "--output", tmp_path)
    text = run(*arguments).stdout
    told = re.search(r"^not asked +(.*): 2 views of none of the rooms allow every type$", text, re.MULTILINE)[1].split(
        ", "
    )
    asked = re.findall(r"^([a-z_]+): ", text, re.MULTILINE)
    assert "obj_appearance_order" in told and "room_size_estimation" in asked
    assert sorted(told + asked) == sorted(QUESTION_TYPES)


def test_the_vlm_with_spa3r_is_compared_with_one_trained_without():
    composed, other, note = demo._embedded_vlms()
    assert "trained on the same questions without Spa3R" in note
    assert composed[0].config.spatial_source == "spa3r" and other[0].config.spatial_source == "none"


def noise_file(folder: Path) -> Path:
    noise(56, 56, 0).save(folder / "noise.png")
    return folder / "noise.png"


def test_the_demos_numbers_are_the_librarys():
    """With a model of one's own, and the pictures at the size at which it takes them."""
    model = alive(Spa3RForPreTraining(pretraining_config()))
    processor = Spa3RImageProcessor(size=5 * PATCH, patch_size=PATCH)
    rooms = [generate_room(seed, 0) for seed in (7, 8)]
    rooms = [render(room, look_around(room, 4, (140, 140))) for room in rooms]
    inputs, output, metrics = demo._predict_held_out(model, processor, rooms)
    assert output.target_mask.tolist() == [False, True, False, True]
    assert inputs["intrinsics"][0, 0, 0] == pytest.approx(rooms[0].intrinsics[0, 0, 0] * 5 * PATCH / 140)
    report = evaluate_field(model, [inputs]).to_dict()["rows"]
    both = metrics.to_dict()["rows"]
    assert both["model"]["geometry_cosine"]["scenes"] == 2
    assert both["model"]["geometry_cosine"]["mean"] != report["model"]["geometry_cosine"]["mean"]
    true, predicted = (
        torch.cat([values.split(25)[view] for view in (1, 3)])
        for values in (output.geometry_targets, output.geometry_features)
    )
    cosine = torch.nn.functional.cosine_similarity(predicted, true).mean().item()
    assert report["model"]["geometry_cosine"]["mean"] == pytest.approx(cosine, rel=1e-4)


def test_demo_refuses_what_it_can_not_do(tmp_path):
    for views in (1, 17):
        assert "--views" in said(run("demo", "--views", views, code=2))
    for option in ("--level", "--seed"):
        assert option in said(run("demo", option, -1, code=2))
    for rooms in (1, 101):
        assert "--rooms" in said(run("demo", "--rooms", rooms, code=2))
    assert "--level" in said(run("demo", "--level", 9, code=2))


# What all commands share


def test_version_and_help():
    assert run("--version").stdout == f"spa3r {spa3r.__version__}\n"
    text = " ".join(run("--help").stdout.split())
    assert all(command in text for command in ("ask", "encode", "convert", "info", "demo", "eval"))
    assert "rendered rooms only" in text
    assert "\x1b" not in text


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(info, "_devices", lambda: {}["lost"])
    with pytest.raises(KeyError, match="lost"):
        run("info")


@pytest.mark.filterwarnings("ignore:more chatter")
def test_standard_output_and_logs_are_left_as_they_were(monkeypatch):
    levels = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub", "spa3r.models.attention")]

    def noisy():
        print("chatter")
        warnings.warn("more chatter", stacklevel=1)
        return {"cpu": "one"}

    monkeypatch.setattr(info, "_devices", noisy)
    result = run("info", "--json")
    assert json.loads(result.stdout)["devices"] == {"cpu": "one"}
    assert "chatter" in result.stderr and "more chatter" not in result.stderr
    assert "chatter" not in run("info", "--verbose").stdout
    assert [logging.getLogger(n).level for n in ("transformers", "huggingface_hub", "spa3r.models.attention")] == levels


def test_the_installed_command_prints_json_alone(scene):
    """In a process of its own: the answer is the same, and nothing else is on either stream but the note."""
    command = [Path(sys.executable).parent / "spa3r", "ask", scene, QUESTION, "--max-new-tokens", "6", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TERM": "dumb"})
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert done.stderr == (
        f"note: the embedded models were trained on rendered rooms only, not on photographs. {QUESTIONS_NOTE}\n"
    )
    assert answer["answer"] == run_json("ask", scene, QUESTION, "--max-new-tokens", 6)["answer"]


WITHOUT_COMMAND_LINE = """
import logging, sys, PIL.Image
from spa3r import Spa3VLM, Spa3VLMProcessor

model, processor = Spa3VLM.from_pretrained("embedded"), Spa3VLMProcessor.from_pretrained("embedded")
print(model.ask(model.encode_scene(processor, [PIL.Image.new("RGB", (112, 112))]), ["How many chairs?"]))
kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", ImportError("kernels"))
kernels.warning("Something else.")
"""


def test_cpus_need_no_hints_about_kernels():
    """Of xformers, and of bitsandbytes, which PEFT imports; other warnings are shown."""
    if torch.cuda.is_available():
        pytest.skip("of a machine without CUDA")
    command = [sys.executable, "-c", WITHOUT_COMMAND_LINE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout and "Something else." in done.stderr
    assert not re.search("xformers|gemm", done.stderr, re.IGNORECASE)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """Of a file and of names on the hub, which can't be reached."""
    monkeypatch.chdir(tmp_path)
    noise(30, 30).save("a.png")
    name = "nobody/nothing-here"
    (tmp_path / "pretrain.yaml").write_text(
        f"model: {{backbone: {name}}}\ndata: {{sources: [{{type: rooms, num_rooms: 2}}]}}\n"
        "training: {output_dir: run, max_steps: 1, use_cpu: true}"
    )
    for words in (("ask", "a.png", "What?"), ("encode", "a.png"), ("eval", "rooms", "--rooms", 1)):
        error = run_json(*words, "--model", name, code=1)["error"]
        assert error == (
            f"{name} can't be loaded: there is no such folder, no such model in the cache, and HF_HUB_OFFLINE is set. "
            "Check the name, or download the model first."
        )
    error = run_json("eval", "vsi-bench", "--model", "embedded", "--data", name, code=1)["error"]
    assert error.startswith(f"{name} can't be loaded: there is no such folder, no such dataset in the cache, and ")
    assert run_json("pretrain", "pretrain.yaml", code=1)["error"].startswith(f"{name} can't be loaded: ")
    for command in ("pretrain", "finetune"):
        error = run_json(command, "nofile.yaml", code=1)["error"]
        assert error == "There is no configuration file nofile.yaml. Check the path."


def test_a_spa3_vlm_is_what_ask_loads(checkpoint):
    model, _ = console.load_vlm(str(checkpoint), "cpu", console.Dtype.auto, "sdpa")
    assert isinstance(model, Spa3VLMForConditionalGeneration) and not model.training
    assert model.spa3r.config._attn_implementation == model.vlm.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [
        [("ask", "photo.png", "How many chairs?"), ("encode", "photo.png", "--output", "scene.safetensors")],
        [
            ("demo", "--rooms", "2", "--views", "4", "--output", "demo"),
            ("eval", "rooms", "--rooms", "1", "--output", "run"),
        ],
    ],
)
def test_embedded_models_are_not_looked_for_on_the_hub(commands, tmp_path):
    """A network that does not answer would delay every command by a minute."""
    requests = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    noise(60, 40, 0).save(tmp_path / "photo.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        code = f"""
from huggingface_hub.utils import get_session
from spa3r.cli.main import app
get_session().get("{hub}/counted")
for arguments in {commands!r}:
    app(arguments, standalone_mode=False)
"""
        variables = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert requests == ["/counted"]
