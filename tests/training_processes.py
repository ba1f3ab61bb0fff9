"""Trainings in processes of their own."""

import subprocess
import time
from pathlib import Path

from tiny_training import command, environment

from spa3r.training import read_log


def started(*arguments, cache: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments),
        env=environment(cache, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    end = time.monotonic() + 200
    while not (log.exists() and any(line["step"] >= step for line in read_log(log))):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
