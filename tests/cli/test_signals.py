"""Ctrl-C at any time, in a process of its own: one line, exit code 130, and what goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from media import noise
from tiny_training import write_config, write_parts, write_scenes

MAIN = "import sys; from spa3r.cli import run; print('started', file=sys.stderr, flush=True); run()"


@contextmanager
def started(*arguments):
    """The command line in a process that has reached its first line of code; a shell's default for Ctrl-C."""
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr.readline() == "started\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupted(process) -> str:
    """What it says of Ctrl-C."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    return err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("seconds", (0, 0.1, 0.3, 1, 3))
def test_ctrl_c_gives_one_line(seconds, tmp_path):
    """While the command line is imported, then torch, then the model is loaded."""
    with started("demo", "-o", tmp_path / "demo") as process:
        time.sleep(seconds)
        assert interrupted(process) == "note: stopped by SIGINT\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(
    "command", ("encode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eval", "pretrain")))
)
def test_commands_that_go_on_say_how(command, tmp_path, monkeypatch):
    """And not with --fresh, which would start over."""
    for name in ("a", "b c"):
        (tmp_path / name).mkdir()
        noise(56, 42).save(tmp_path / name / "0.png")
    arguments, mark = {
        "encode": (["encode", "a", "b c", "--scene-per-folder"], "the embedded models"),
        "eval": (["eval", "rooms", "--rooms", "2", "--fresh", "-o", "run"], "the embedded models"),
        "pretrain": (["pretrain", "--fresh", "pretrain.yaml"], "output_dir"),
    }[command]
    if command == "pretrain":
        source = {"type": "folders", "root": str(write_scenes(tmp_path / "scenes", 2))}
        write_config(tmp_path / "pretrain.yaml", write_parts(tmp_path), source)
    monkeypatch.chdir(tmp_path)
    with started(*arguments) as process:
        while mark not in process.stderr.readline():
            assert process.poll() is None
        lines = interrupted(process).splitlines()
    words = {
        "encode": "encode a 'b c' --scene-per-folder",
        "eval": "eval rooms --rooms 2 -o run",
        "pretrain": "pretrain pretrain.yaml",
    }[command]
    assert lines[-1] == f"note: stopped by SIGINT; what is finished stays, and this goes on: spa3r {words}"
    assert "Traceback" not in "".join(lines)
