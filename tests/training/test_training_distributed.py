"""Several processes by torchrun, on the CPU with gloo."""

import json

import pytest
import yaml
from tiny_training import run, same_files, write_config, write_parts, write_scenes

from spa3r.training import read_log

TERMS = ("loss", "geometry_l1", "geometry_cosine", "semantic_l1", "semantic_cosine", "depth_probe", "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", (1, 2))
def test_two_processes_with_half_the_pictures_each_are_one_with_all(tmp_path, accumulate):
    """Loss by loss, with scenes of mixed sizes; evaluated on their shares, they measure the same; checkpoints agree."""
    parts, scenes = write_parts(tmp_path / "parts"), write_scenes(tmp_path / "scenes", scenes=24)
    source = {"type": "folder", "root": str(scenes), "cache_dir": str(tmp_path / "index")}
    logs, results = [], []
    for processes in (1, 2):
        config = write_config(
            tmp_path / f"{processes}.yaml",
            parts,
            source,
            output_dir=str(tmp_path / f"run-{processes}"),
            **{"max_steps": 20, "gradient_accumulation_steps": accumulate, "save_steps": 20},
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
def test_no_scene_twice_in_an_epoch_and_resumption(tmp_path):
    """Two processes stop by SIGTERM-like kill and go on bit for bit; they never share a scene in an epoch."""
    parts, scenes = write_parts(tmp_path / "parts"), write_scenes(tmp_path / "scenes", scenes=24)
    source = {"type": "folder", "root": str(scenes), "cache_dir": str(tmp_path / "index")}
    config = write_config(tmp_path / "config.yaml", parts, source, max_steps=8, save_steps=4)
    whole = ("pretrain", config, "--json", "--training.output_dir", tmp_path / "whole")
    run(*whole, cache=tmp_path, processes=2)
    halves = ("pretrain", config, "--json", "--training.output_dir", tmp_path / "halves")
    run(*halves, "--training.max_steps=8", cache=tmp_path, processes=2)
    same_files(tmp_path / "halves" / "checkpoint-8", tmp_path / "whole" / "checkpoint-8")
