"""Several processes by torchrun, on the CPU with gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_training import environment, folder_source, prepared, run, same_files, write_config, write_parts

from spa3r.training import read_log

TERMS = ("loss", "geometry_l1", "geometry_cosine", "semantic_l1", "semantic_cosine", "depth_probe", "grad_norm")


@pytest.mark.slow
def test_two_processes_with_half_the_pictures_each_are_one_with_all(tmp_path):
    """Loss by loss, with scenes of mixed sizes and accumulated batches; each evaluates its share."""
    parts, source = write_parts(tmp_path / "parts"), folder_source(tmp_path, scenes=24)
    logs, results = [], []
    for processes in (1, 2):
        config = write_config(
            tmp_path / f"{processes}.yaml",
            parts,
            source,
            output_dir=str(tmp_path / f"run-{processes}"),
            **{"max_steps": 20, "gradient_accumulation_steps": 2, "save_steps": 20},
        )
        sections = yaml.safe_load(config.read_text())
        sections["data"] |= {"pictures_per_device": 24 // processes, "views": [2, 4], "num_workers": 1}
        sections["evaluation"] = {"sources": [source], "scenes": 8, "views": 4, "every": 20}
        sections["training"]["learning_rate"] = 1e-3
        config.write_text(yaml.safe_dump(sections))
        done = run("pretrain", config, "--json", cache=tmp_path, processes=processes)
        results.append(json.loads(done.stdout))  # one object, from the first process
        logs.append(read_log(tmp_path / f"run-{processes}" / "log.jsonl"))
    one, two = ([line for line in log if "grad_norm" in line] for log in logs)
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 21))
    errors = {term: max(abs(a[term] - b[term]) for a, b in zip(one, two)) for term in TERMS}
    print(errors)
    assert all(error <= 1e-5 for term, error in errors.items() if term != "grad_norm") and errors["grad_norm"] <= 1e-4
    assert len({line["loss"] for line in one}) == 20
    assert results[0]["pictures"] == results[1]["pictures"] > 0
    for name, value in results[0]["evaluation"].items():
        assert results[1]["evaluation"][name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path):
    config = prepared(tmp_path, lr_scheduler_type="constant")
    run("pretrain", config, "--training.output_dir", tmp_path / "whole", cache=tmp_path, processes=2)
    halves = ("pretrain", config, "--training.output_dir", tmp_path / "halves")
    run(*halves, "--training.max_steps=3", cache=tmp_path, processes=2)
    run(*halves, cache=tmp_path, processes=2)
    for name in ("model.safetensors", "optimizer.safetensors"):
        same_files(tmp_path / "halves" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6", name)
    died = run(*halves, "--training.max_steps=7", "--json", cache=tmp_path, code=1)
    assert "was saved by 2 processes, and this run has 1" in json.loads(died.stdout)["error"]


WATCHED = """
import json, os, sys
from spa3r.training import PretrainingConfig, PretrainingTrainer, pretrain

rank, original = int(os.environ["RANK"]), PretrainingTrainer.get_batch_samples

def watched(self, iterator, num_batches, device):
    batches, patches = original(self, iterator, num_batches, device)
    with open(f"rank-{rank}.jsonl", "a") as file:
        for batch in batches:
            sizes = {key: len(batch[key]) for key in ("view_pixel_values", "view_grid_hw", "target_mask")}
            sizes["patches"] = int(batch["view_grid_hw"].prod(-1).sum())
            sizes["views"] = sum(batch["views_per_scene"].tolist())
            file.write(json.dumps({"epoch": self.loader.epoch, "scenes": batch["scenes"], **sizes}) + "\\n")
    if rank == 1 and self.state.global_step == 2:
        batches[0]["view_pixel_values"][:] = float("nan")
    return batches, patches

PretrainingTrainer.get_batch_samples = watched
result = pretrain(PretrainingConfig.from_yaml(sys.argv[1]))
assert result.nonfinite_steps == 1 and result.is_finished
"""


@pytest.mark.slow
def test_batches_stay_whole_scenes_are_not_shared_and_all_drop_the_same_step(tmp_path):
    """One process meets a scene whose loss is not finite: both leave the step out, and go on together."""
    config = prepared(tmp_path, scenes=24, max_steps=12, save_steps=1, save_total_limit=20)
    (tmp_path / "watched.py").write_text(WATCHED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "watched.py"), str(config)],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = [read_lines(tmp_path / f"rank-{rank}.jsonl") for rank in range(2)]
    for batch in seen[0] + seen[1]:
        assert batch["view_pixel_values"] == batch["patches"]
        assert batch["view_grid_hw"] == batch["target_mask"] == batch["views"]
    complete = max(batch["epoch"] for batch in seen[0])
    assert complete >= 1
    for epoch in range(complete):
        names = [name for rank in seen for batch in rank if batch["epoch"] == epoch for name in batch["scenes"]]
        assert len(names) == len(set(names)) == 24
    same_files(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-2")
    (dropped,) = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "nonfinite_scenes" in line]
    assert dropped["nonfinite_step"] == 3 and dropped["nonfinite_scenes"] == ", ".join(sorted(seen[1][2]["scenes"]))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
