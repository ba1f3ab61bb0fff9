"""What may happen to a command: a full disk, a signal, another run, damage, a secret in an address."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading

import pytest
import torch
import typer
from command_line import run, run_json
from media import noise, served
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_benchmark import build_composed, write_vsi_bench

from spa3r import EncodedScene, Spa3VLMForConditionalGeneration, console
from spa3r.cli import encode
from spa3r.conversion import save_together
from spa3r.disk import WriteError, alone_in

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.fixture
def scenes(tmp_path):
    folders = [tmp_path / f"scene{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        folder.mkdir()
        noise(56, 42, index).save(folder / "0.png")
    return folders


def on_a_small_disk(size: int, act) -> str:
    """The error of what writes no file larger than this, which is refused as a full disk is; "" if there is none."""
    context = multiprocessing.get_context("fork")
    told = context.Queue()

    def limited() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            told.put(act() or "")
        except WriteError as error:
            told.put(str(error))
        except BaseException as error:
            told.put(f"not ours: {type(error).__name__}: {error}")

    process = context.Process(target=limited)
    process.start()
    try:
        return told.get(timeout=100)
    finally:
        process.join(10)


# Files ----------------------------------------------------------------------------------------------------------------


@forks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scene_is_saved_whole_or_not_at_all(tmp_path):
    model, processor = build_composed()
    scene = model.encode_scene(processor, [noise(56, 56)])
    file = tmp_path / "scene.safetensors"
    scene.save(file)
    before = file.read_bytes()
    words = on_a_small_disk(1000, lambda: scene.save(file))
    assert words.startswith(f"{file} can't be written: File too large. Free space")
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and file.read_bytes() == before
    assert len(EncodedScene.load(file, model, processor)) == len(scene)


@forks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_is_saved_whole_or_not_at_all(tmp_path):
    """As conversions and merged models are: into a new folder, an empty one, and one that holds another model."""
    model, processor = build_composed()
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        words = on_a_small_disk(100_000, lambda folder=folder: save_together(folder, model, processor))
        assert re.search(rf"^{folder} can't be written: .*File too large.* Free space", words), words
        assert not folder.exists() or not list(folder.iterdir())
        save_together(folder, model, processor)
        assert {"config.json", "model.safetensors", "processor_config.json"} <= {file.name for file in folder.iterdir()}
    used = tmp_path / "new"
    (used / "model-00001-of-00002.safetensors").write_bytes(b"of an older one")
    (used / "README.md").write_text("# Mine\n\nWritten by hand.\n")
    before = {file: file.read_bytes() for file in used.rglob("*") if file.is_file()}
    assert "can't be written" in on_a_small_disk(100_000, lambda: save_together(used, model, processor))
    assert {file: file.read_bytes() for file in used.rglob("*") if file.is_file()} == before
    save_together(used, model, processor)
    assert "Written by hand." in (used / "README.md").read_text()
    assert not (used / "model-00001-of-00002.safetensors").exists()
    assert isinstance(Spa3VLMForConditionalGeneration.from_pretrained(used), Spa3VLMForConditionalGeneration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


@forks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_latents_are_written_whole_or_not_at_all(scenes, tmp_path):
    out = tmp_path / "latents"
    command = ("encode", *scenes, "--scene-per-folder", "-o", out, "--batch-size", 1)

    def act() -> str:
        return run_json(*command, code=1)["error"]

    words = on_a_small_disk(1000, act)
    assert words.startswith(f"{out / 'scene0.safetensors'} can't be written: File too large. Free space"), words
    assert list(out.iterdir()) == []
    (tmp_path / "file").write_text("no folder")
    error = run_json("encode", scenes[0], "-o", tmp_path / "file" / "latents.safetensors", code=1)["error"]
    assert "latents.safetensors can't be written: " in error and "choose another place" in error


def test_page_that_can_not_be_written_is_named(tmp_path):
    folder, file = tmp_path / "run", tmp_path / "file"
    file.write_text("no folder")
    run("eval", "rooms", "--rooms", 1, "--num-frames", 2, "--max-new-tokens", 1, "-o", folder)
    error = run_json("eval", "report", folder, "-o", file / "page.html", code=1)["error"]
    assert "page.html can't be written: " in error
    error = run_json("eval", "rooms", "--rooms", 1, "--num-frames", 2, "-o", file / "run", code=1)["error"]
    assert f"{file / 'run'} can't be written: " in error
    error = run_json("demo", "-o", file / "demo", code=1)["error"]
    assert f"{file / 'demo'} can't be written: " in error
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "answers.jsonl").write_text("{")
    for command in (("compare", folder, copy), ("compare", copy, folder), ("report", copy)):
        assert "answers.jsonl is damaged: line 1 of 1 " in run_json("eval", *command, code=1)["error"]
    (copy / "run.json").write_text("{")
    for command in (("compare", folder, copy), ("report", copy), ("rooms", "-o", copy)):
        assert "run.json is damaged: " in run_json("eval", *command, code=1)["error"]


@pytest.mark.parametrize("text", ("{", "[]", ""), ids=("cut", "list", "empty"))
def test_conversion_of_a_damaged_configuration(text, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    error = run_json("convert", tmp_path, tmp_path / "out", "--kind", "spa3-vlm", code=1)["error"]
    assert "config.json is damaged: the VLM's configuration must be " in error and "Download it again" in error
    assert not (tmp_path / "out").exists()


# Other runs and signals -----------------------------------------------------------------------------------------------


def test_second_evaluation_is_refused_before_its_model_is_loaded(tmp_path):
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with alone_in(tmp_path / "run"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    (tmp_path / "empty").mkdir()
    error = run_json("eval", "rooms", "--model", tmp_path / "empty", "-o", tmp_path / "run", code=1)["error"]
    done.set()
    thread.join()
    assert "Another run is going on in " in error and "name another folder with `--output`" in error


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP), ids=lambda number: number.name)
def test_signal_ends_encoding_and_what_is_done_stays(number, scenes, tmp_path, monkeypatch):
    """It comes after the first scene."""
    out = tmp_path / "latents"
    command = ("encode", *scenes, "--scene-per-folder", "-o", out, "--batch-size", 1)
    write = encode._encode_and_save

    def written(*args):
        if out.exists():
            os.kill(os.getpid(), number)
        return write(*args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_encode_and_save", written)
        stopped = run(*command, code=130)
    assert f"stopped by {number.name}; what is finished stays, and this goes on: " in stopped.stderr
    assert [file.name for file in out.iterdir()] == ["scene0.safetensors"] and signal.getsignal(number) == before
    told = run_json(*command)
    assert (told["encoded"], told["skipped"]) == (2, 1)


# Secrets --------------------------------------------------------------------------------------------------------------


def test_secrets_in_addresses_reach_no_file_and_no_screen(tmp_path, monkeypatch):
    """Of a photo's address: neither the latents' metadata nor their name, nor what is said, nor an error."""
    monkeypatch.chdir(tmp_path)
    secret = "s3cr3t-of.mine"
    noise(56, 42).save(tmp_path / "photo.png")
    with served({f"/photo.png?X-Amz-Signature={secret}": (tmp_path / "photo.png").read_bytes()}) as address:
        url = f"{address}/photo.png?X-Amz-Signature={secret}"
        told = run("encode", url, "-o", tmp_path / "one.safetensors", "--json")
        many = run("encode", url, "--scene-per-folder", "-o", tmp_path / "many", "--json")
        again = run_json("encode", url, "--scene-per-folder", "-o", tmp_path / "many")
        gone = run("encode", f"{address}/gone.png?token={secret}", "--scene-per-folder", "--json", code=1)
    assert again["skipped"] == 1
    files = [tmp_path / "one.safetensors", *(tmp_path / "many").iterdir()]
    assert files[1].name == "photo.safetensors"
    texts = [told.output, many.output, gone.output]
    for file in files:
        with safe_open(file, framework="pt") as content:
            texts.append(json.dumps(content.metadata()))
    assert not [text for text in texts if secret in text] and "photo.png?X-Amz-Signature=***" in texts[-1]


def test_secrets_of_the_environment_are_masked_in_every_result(monkeypatch, capsys):
    """Also those that JSON writes otherwise, and JSON stays JSON."""
    monkeypatch.setenv("HF_TOKEN", 'päss"word\\9')
    url = 'https://me:pw12345@host/a?token=abc"'
    with console.reporting(as_json=True, verbose=False) as report:
        report.finish("", said='it is päss"word\\9', failed={url: [url]}, password="open")
    told = json.loads(capsys.readouterr().out)
    assert told["said"] == "it is ***" and told["password"] == "***"
    assert told["failed"] == {'https://***@host/a?token=***"': ['https://***@host/a?token=***"']}
    for as_json in (True, False):
        with pytest.raises(typer.Exit), console.reporting(as_json=as_json, verbose=False):
            raise ValueError(f'{url} päss"word\\9')
        captured = capsys.readouterr()
        assert "***@host" in captured.out + captured.err and "pw12345" not in captured.out + captured.err
        assert "word" not in captured.out + captured.err


def test_secrets_of_the_data_folder_are_masked_when_videos_are_missing(tmp_path):
    data = write_vsi_bench(tmp_path / ("hf_" + "A1b2" * 6), (1,))
    (data / "scannet" / "scene0.mp4").unlink()
    error = run_json("eval", "vsi-bench", "--model", "embedded", "--data", data, code=1)["error"]
    assert "hf_***/scannet/scene0.mp4 doesn't exist" in error
