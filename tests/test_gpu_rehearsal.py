"""The GPU benchmarks are rehearsed on the CPU: steps run, and a failing one costs no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


def rehearse(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", SCRIPT, *options, folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_steps_run_with_a_tiny_model(tmp_path):
    """One of every kind; the others differ in an option."""
    names = ("tests", "encode_compiled", "pretrain_step", "prefill", "encode_merged", "fake")
    out = rehearse(tmp_path, "--rehearse", "--only", ",".join(names))
    assert out.returncode == 0, out.stdout + "".join(file.read_text()[-2000:] for file in tmp_path.glob("*.log"))
    steps = {line.split()[2]: line.split()[-1] for line in (tmp_path / "summary.txt").read_text().splitlines()}
    assert steps == dict.fromkeys(names, "ok")
    for name in ("encode_compiled", "encode_merged", "prefill"):
        table = [line for line in (tmp_path / f"{name}.txt").read_text().splitlines() if line.startswith("| 2 |")]
        assert len(table) == 1, name
    assert "4 views, merged: latents (1, 8, 32), torch.bfloat16, cuda:0" in (tmp_path / "fake.txt").read_text()
    assert "tests collected" in (tmp_path / "tests.txt").read_text()


def test_a_failing_step_costs_no_other(tmp_path):
    """With a Python that ends with an error, all steps are tried and named."""
    out = rehearse(tmp_path, "--rehearse", PYTHON="false")
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert out.returncode == 1 and len(lines) == 11 and all("failed with status 1" in line for line in lines)
    assert rehearse(tmp_path, "--fast").returncode == 2
