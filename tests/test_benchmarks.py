"""The programs in `benchmarks/`: the plain formulation equals the library, and the guard finds what got worse."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import WIDE, alive, assert_close, pretraining_config, spa3r_config, view_inputs

from spa3r import Spa3RForPreTraining, Spa3RModel
from spa3r.rooms.embedded import embedded_model

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """Loads a program without running it. Other folders have programs of the same names: imports are forgotten."""
    names = {file.stem for file in FOLDER.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(FOLDER)
    yield lambda name: SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def reference(program):
    return program("reference")


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_a_program_imports_what_exists(name, program):
    program(name)


# The plain formulation -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_encoding_equals_the_library(reference):
    model = alive(Spa3RModel(spa3r_config()))
    inputs = view_inputs(scenes=[[WIDE] * 4])
    plain = reference.encode(model, inputs["view_pixel_values"], 4, WIDE)
    assert_close({"latents": model.encode(**inputs)}, {"latents": plain}, 1e-5)


@pytest.mark.parametrize("checkpointing", (False, True), ids=("", "checkpointing"))
@pytest.mark.parametrize("masking", ("separate", "asymmetric"))
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_plain_pretraining_equals_the_library_forward_and_backward(reference, masking, checkpointing):
    model = alive(Spa3RForPreTraining(pretraining_config(view_masking=masking))).train()
    inputs = view_inputs(scenes=[[WIDE] * 5], targets=[[0, 0, 1, 1, 1]])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = reference.pretraining_losses(model, inputs["view_pixel_values"], 5, WIDE, 2)
    wanted = dict(zip(trained, torch.autograd.grad(sum(plain.values()), trained.values())))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    out = model(**inputs)
    assert_close(out.losses, plain, 1e-5)
    out.loss.backward()
    assert_close({name: p.grad for name, p in trained.items()}, wanted, 2e-4)


@torch.no_grad()
def test_plain_prefill_equals_the_library(reference, program):
    vlm_prefill = program("vlm_prefill")
    model, processor = embedded_model()
    inputs = vlm_prefill.prompt(processor, 2, (224, 168), "cpu")
    plain, ours = reference.prefill(model, inputs)[:, -1], vlm_prefill.ours(model, inputs)[:, -1]
    assert ours.shape == plain.shape
    assert_close({"logits": ours}, {"logits": plain}, 1e-4)
    model.adapter.bottleneck.fc2.weight.mul_(0)
    without = reference.prefill(model, inputs)[:, -1]
    assert (without - plain).norm() / plain.norm() > 1e-2, "the latents make no difference"


# The guard -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"": "reference", "views": 8, "s": 10.0, "time ratio": 1.0, "time / floor": 2.0},
    {"": "spa3r", "views": 8, "s": 6.0, "time ratio": 0.6, "time / floor": 1.2},
]


def guard(folder: Path, new: dict, *options: str) -> tuple[int, list[str]]:
    """Exit status and lines of the guard, for tables with the rows of a new run, against :data:`ROWS`."""
    files = {"known": {"a table": {"rows": ROWS}}, "new": new}
    for name, tables in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tables))
    command = [sys.executable, FOLDER / "guard.py", folder / "new.json", "--known", folder / "known.json", *options]
    out = subprocess.run(command, capture_output=True, text=True)
    assert not out.stderr, out.stderr
    return out.returncode, out.stdout.splitlines()


def with_ratio(value: float, **fields) -> dict:
    return {"a table": {"rows": [ROWS[0], ROWS[1] | {"time ratio": value} | fields]}}


def test_the_guard_compares_ratios_and_not_times(tmp_path):
    assert guard(tmp_path, with_ratio(0.6, s=600.0)) == (0, ["4 ratios compared, 0 worse by more than 15 %"])
    assert guard(tmp_path, with_ratio(0.2))[0] == 0  # better
    assert guard(tmp_path, with_ratio(0.68))[0] == 0  # within the tolerance


def test_the_guard_names_what_got_worse(tmp_path):
    status, lines = guard(tmp_path, with_ratio(0.72))
    assert status == 1
    assert lines == [
        "worse: a table: spa3r, views 8: time ratio: 0.6 -> 0.72 (+20 %)",
        "4 ratios compared, 1 worse by more than 15 %",
    ]
    assert guard(tmp_path, with_ratio(0.72), "--tolerance", "0.25")[0] == 0
    assert guard(tmp_path, with_ratio(0.64), "--tolerance", "0.05")[0] == 1


def test_the_guard_names_what_it_can_not_compare(tmp_path):
    status, lines = guard(tmp_path, with_ratio(0.6, views=9) | {"another": {"rows": ROWS}})
    assert status == 0 and lines[-1].startswith("2 ratios compared")
    assert "not compared: another: no committed table has this title" in lines
    assert "not compared: a table: spa3r, views 9: time ratio: not in the committed table" in lines
    assert "not compared: a table: spa3r, views 8: time ratio: not in the new run" in lines
    status, lines = guard(tmp_path, {"another": {"rows": ROWS}})
    assert status == 1 and lines[-1].startswith("0 ratios compared"), "nothing was compared: no success"


def test_the_committed_tables_have_ratios(program):
    """Each table that benchmarks wrote as JSON can be compared with a new run."""
    ratios = program("guard").ratios
    files = sorted((FOLDER / "results").glob("*.json"))
    assert files
    for file in files:
        for title, table in json.loads(file.read_text()).items():
            assert ratios(table), f"{file.name}: {title}"
