"""What may happen to a run: damage, a second run, a full disk, a terminal that closes, weights that overflow."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file
from tiny_training import batches, environment, prepared, same_files, trainer, write_scenes
from transformers import TrainerCallback

from spa3r.disk import alone_in, write_whole
from spa3r.training import PretrainingConfig, pretrain, read_log
from spa3r.training.base import nonfinite_tensors
from spa3r.training.checkpoints import checkpoints_in, fault_of, load_state, newest_intact, save_state

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reliability")
    return prepared(folder)


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """A run of six steps with the checkpoints of steps 4 and 6."""
    command(config)
    return config.parent / "run"


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """The same run, ready to resume."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def command(config: Path, *overrides: object, code: int = 0) -> dict:
    result = run("pretrain", config, *overrides, "--json", code=code)
    return json.loads(result.stdout) | {"stderr": result.stderr}


def go_on(config: Path, run: Path, code: int = 0) -> dict:
    return command(config, "--training.output_dir", run, "--training.max_steps=7", code=code)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 16
    file.write_bytes(content)


DAMAGES = {"cut": cut, "emptied": lambda file: os.truncate(file, 0), "changed": flip_a_bit, "missing": Path.unlink}
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "training_state.safetensors",
    "trainer_state.json",
    "config.json",
)


# Damaged checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_checksums", (True, False), ids=("with checksums", "of an older version"))
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_seen(file, damage, has_checksums, stopped):
    checkpoint = stopped / "checkpoint-6"
    if not has_checksums:
        (checkpoint / "checksums.json").unlink()
    assert fault_of(checkpoint) is None
    DAMAGES[damage](checkpoint / file)
    if not has_checksums and (damage == "changed" or file == "config.json"):
        return  # nothing shows it
    if damage == "changed" and file.startswith("training_state"):
        return  # of its tensors, which are random numbers' states; its numbers have a checksum
    found, damaged = newest_intact(stopped)
    assert found == stopped / "checkpoint-4" and list(damaged) == [checkpoint]
    assert file in damaged[checkpoint] or "weights are missing" in damaged[checkpoint] or "Safetensor" in str(damaged)


def test_numbers_of_a_state_have_a_checksum(tmp_path):
    save_state({"batch": 117, "tensor": torch.ones(3)}, tmp_path / "state.safetensors")
    content = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(content.replace(b"117", b"118"))
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged \(its checksum"):
        load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize(("file", "damage"), [("model.safetensors", "changed"), ("trainer_state.json", "missing")])
def test_goes_on_from_the_newest_intact_checkpoint_and_says_so(file, damage, config, whole, stopped):
    DAMAGES[damage](stopped / "checkpoint-6" / file)
    result = command(config, "--training.output_dir", stopped)
    assert result["resumed_from"] == str(stopped / "checkpoint-4") and result["finished"]
    assert f"checkpoint-6 is damaged ({file} is " in result["stderr"]
    assert (stopped / "damaged-checkpoint-6").is_dir()
    same_files(stopped, whole)
    assert [line["step"] for line in read_log(stopped / "log.jsonl") if "loss" in line] == [*range(1, 7)]
    command(config, "--training.output_dir", stopped, "--training.max_steps=1", "--fresh")
    assert not (stopped / "damaged-checkpoint-6").exists()


def test_no_whole_checkpoint_is_an_error_and_nothing_is_deleted(config, stopped):
    for checkpoint in checkpoints_in(stopped):
        cut(checkpoint / "optimizer.safetensors")
    words = go_on(config, stopped, code=1)["error"]
    assert "is intact (checkpoint-6: optimizer.safetensors is cut or changed; checkpoint-4: opt" in words
    assert "--fresh" in words and len(checkpoints_in(stopped)) == 2


def test_trainer_refuses_a_damaged_checkpoint_and_finds_a_whole_one(tmp_path):
    scenes, fields = write_scenes(tmp_path / "scenes", scenes=6), {"max_steps": 3, "save_steps": 1}
    trainer(tmp_path / "run", scenes, **fields).train()
    cut(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    ours = trainer(tmp_path / "run", scenes, **fields)
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged \(model\.safetensors is cut .*Resume from an older"):
        ours.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    ours.train(resume_from_checkpoint=True)
    assert fault_of(tmp_path / "run" / "checkpoint-3") is None
    assert (tmp_path / "run" / "damaged-checkpoint-3").is_dir()
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` needs a checkpoint in .*empty, got none"):
        trainer(tmp_path / "empty", scenes, **fields).train(resume_from_checkpoint=True)


def test_damaged_best_checkpoint_gives_way_to_the_last(tmp_path, caplog):
    scenes = write_scenes(tmp_path / "scenes", scenes=6)
    held_out = batches(scenes, tmp_path / "index", views=(4, 4), seed=5)
    fields = {"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1}
    fields |= {"learning_rate": 10.0, "max_grad_norm": 0.0, "load_best_model_at_end": True}

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                cut(Path(state.best_model_checkpoint) / "model.safetensors")

    ours = trainer(tmp_path / "run", scenes, eval_dataset=held_out, callbacks=[Damage()], **fields)
    ours.train()
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    assert "is damaged (model.safetensors is cut or changed): the last one takes its place" in caplog.text
    assert all(torch.equal(value, saved[key]) for key, value in ours.model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"config\.yaml is missing, though .* holds checkpoints"),
        ("", r"config\.yaml is damaged, .*it lacks data\.cameras, .* and \d+ more"),
        ("model: [", r"config\.yaml is damaged: .*can't be read as YAML: .* in line 1"),
        ("- 1", r"config\.yaml is damaged: .*must hold sections"),
        ("a\0b", r"config\.yaml is damaged: .*a character that is not allowed"),
        (b"model: \xff", r"config\.yaml is damaged: .*must be text in UTF-8, "),
    ],
    ids=("missing", "empty", "cut", "list", "zeros", "bytes"),
)
def test_damaged_configuration_of_the_run(content, words, config, stopped):
    file = stopped / "config.yaml"
    file.unlink() if content is None else file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = go_on(config, stopped, code=1)["error"]
    assert re.search(words, error), error
    assert "Put an undamaged copy back" in error and "None ->" not in error


def test_cut_configuration_of_the_run(config, stopped):
    """At the end of a line, where it still is YAML."""
    file = stopped / "config.yaml"
    file.write_text(file.read_text().partition("  learning_rate")[0])
    assert "it lacks training.gradient_accumulation" not in (error := go_on(config, stopped, code=1)["error"])
    assert "config.yaml is damaged, or was written by another version: it lacks training." in error


@pytest.mark.parametrize("line", ("{", "3", '{"loss": 1}', '{"step": "a"}', "\0\0", "[" * 5000), ids=range(6))
def test_damaged_log(line, config, stopped):
    file = stopped / "log.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, line]))
    assert len(read_log(file)) == len(lines)  # a kill
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    error = go_on(config, stopped, code=1)["error"]
    assert re.search(
        rf"log\.jsonl is damaged: line 3 of {len(lines) + 1} \(.+\) can't be read\. Delete that line", error
    )
    file.unlink()
    assert go_on(config, stopped)["finished"]


# Weights that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", (1.0, 0.0))
def test_weights_that_overflow_end_the_run_and_are_never_saved(clipping, config, tmp_path):
    overrides = ("--training.output_dir", tmp_path / "run", "--training.max_grad_norm", clipping)
    overrides += ("--training.save_steps=1", "--training.warmup_steps=3", "--training.lr_scheduler_type=linear")
    error = command(config, *overrides, "--training.learning_rate", "3e38", code=1)["error"]
    assert "weights of the model are not finite (" in error and "Lower `learning_rate`" in error
    (checkpoint,) = checkpoints_in(tmp_path / "run")[-1:]  # of the step with a learning rate of 0
    assert f"the last finite ones are in {checkpoint}" in error
    assert nonfinite_tensors(load_file(checkpoint / "model.safetensors").items()) == []
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_run_that_learned_nothing_fails_whenever_it_is_asked(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", scenes=6)
    ours = trainer(tmp_path / "run", scenes, max_steps=2, save_steps=1)
    original = ours.get_batch_samples

    def poisoned(*args):
        samples, patches = original(*args)
        for batch in samples:
            batch["view_pixel_values"][:] = math.nan
        return samples, patches

    ours.get_batch_samples = poisoned
    words = r"All 2 steps were dropped because their gradient is not finite: nothing was learned, and no model is saved"
    with pytest.raises(ValueError, match=words):
        ours.train()
    again = trainer(tmp_path / "run", scenes, max_steps=2)
    again.restore(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=words):
        again.check_learned()


def test_nonfinite_weights_are_not_trained_nor_saved(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", scenes=6)
    ours = trainer(tmp_path / "run", scenes, max_steps=1)
    next(ours.model.spa3r.backbone.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"must be finite before it is trained, and spa3r\.backbone\..* are not"):
        ours.train()
    ours = trainer(tmp_path / "run", scenes, max_steps=1)
    ours.model.spa3r.encoder.query_tokens.data[0] = math.inf
    with pytest.raises(ValueError, match=r"not finite \(spa3r\.encoder\.query_tokens\)"):
        ours.save_model()
    assert not list((tmp_path / "run").glob("*.safetensors"))


# One run at a time ----------------------------------------------------------------------------------------------------


class During(TrainerCallback):
    """Does something while a run goes on, in another thread; keeps what went wrong."""

    def __init__(self, act):
        self.act, self.error = act, None

    def on_step_end(self, args, state, control, **kwargs):
        def act():
            try:
                self.act()
            except ValueError as error:
                self.error = str(error)

        if state.global_step == 1:
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()


def test_run_has_its_folder_to_itself(config, tmp_path):
    settings = PretrainingConfig.from_yaml(config, [f"--training.output_dir={tmp_path / 'run'}"])

    def come_in():
        with alone_in(tmp_path / "run"):
            pass

    during = During(come_in)
    assert pretrain(settings, callbacks=[during]).is_finished
    assert "Another run is going on in " in during.error and not (tmp_path / "run" / ".lock").exists()
    during = During(come_in)
    trainer(tmp_path / "run", config.parent / "scenes", max_steps=1, callbacks=[during]).train()
    assert "Another run is going on in " in during.error


HOLD = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(99)
"""


def test_second_run_is_refused_until_the_first_is_killed(config, stopped):
    """And it changes nothing: --fresh deletes no other run's checkpoints."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, stopped / ".lock"], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    for more in ((), ("--fresh",), ("--training.seed=3", "--fresh")):
        error = command(config, f"--training.output_dir={stopped}", *more, code=1)["error"]
        assert re.search(
            r"Another run is going on in .*run \(it holds \.lock\)\. Wait .* in `training\.output_dir`", error
        )
    with pytest.raises(ValueError, match="Another run is going on in"):
        trainer(stopped, config.parent / "scenes", max_steps=1).train()
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
    holder.kill()
    holder.wait()
    assert go_on(config, stopped)["finished"] and not (stopped / ".lock").exists()


# The disk and the terminal --------------------------------------------------------------------------------------------

SMALL_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from spa3r.cli.main import app
app()
"""


@pytest.mark.slow
def test_full_disk_is_reported_and_leaves_nothing_half_written(config, whole, tmp_path):
    """A limit on the size of files is refused as a full disk is."""
    size = (whole / "checkpoint-6" / "optimizer.safetensors").stat().st_size
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            SMALL_FILES,
            str(size - 1000),
            "pretrain",
            str(config),
            f"--training.output_dir={tmp_path}",
        ],
        env=environment(config.parent),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert f"error: {tmp_path / 'checkpoint-2'} can't be written: " in ran.stderr and "Free space; " in ran.stderr
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / ".unfinished").exists()


def test_whole_files(tmp_path):
    write_whole(tmp_path / "a" / "file", "one")
    write_whole(tmp_path / "a" / "file", b"two")
    assert (tmp_path / "a" / "file").read_text() == "two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder can't be written: Is a directory\. Free space, or choose another"):
        write_whole(tmp_path / "folder", "text")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["file"]


class Send(TrainerCallback):
    def __init__(self, number: int):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("is_ignored", (False, True), ids=("plain", "nohup"))
def test_closed_terminal_saves_a_checkpoint(is_ignored, config, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        settings = PretrainingConfig.from_yaml(config, [f"--training.output_dir={tmp_path / 'run'}"])
        result = pretrain(settings, callbacks=[Send(signal.SIGHUP)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.interrupted_by, result.is_finished) == ((None, True) if is_ignored else ("SIGHUP", False))
    assert result.checkpoint == str(tmp_path / "run" / f"checkpoint-{result.step}")
    assert is_ignored or 2 < result.step < 6


@pytest.mark.slow
def test_progress_that_nobody_sees_ends_nothing(config, tmp_path):
    """Standard error is a pipe whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "spa3r", "pretrain", str(config), f"--training.output_dir={tmp_path}", "--json"],
        env=environment(config.parent),
        stdout=subprocess.PIPE,
        stderr=write,
        text=True,
        timeout=200,
    )
    os.close(write)
    assert ran.returncode == 0 and json.loads(ran.stdout)["finished"]
