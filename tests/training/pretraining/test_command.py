"""`spa3r pretrain` as a user runs it: real files of every layout, broken ones, kills, signals."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from command_line import run as run_here
from command_line import run_json
from scene_files import look_around, write_folders, write_scannet, write_scannetpp, write_videos
from tiny_training import command, environment, folder_source, run, same_files, write_config, write_parts, write_scenes
from training_processes import started, wait_for_step

from spa3r import Spa3RForPreTraining, Spa3RModel
from spa3r.training import (
    DataSection,
    EvaluationSection,
    ModelSection,
    PretrainingArguments,
    PretrainingConfig,
    read_log,
)
from spa3r.training.base import STOP_SIGNALS
from spa3r.training.checkpoints import checkpoints_in
from spa3r.training.sources import SOURCES

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "pretrain.md"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def source(tmp_path) -> dict:
    return folder_source(tmp_path)


@pytest.fixture
def config(tmp_path, parts, source) -> Path:
    return write_config(tmp_path / "config.yaml", parts, source)


pretrain, pretrain_json = partial(run_here, "pretrain"), partial(run_json, "pretrain")


def error_of(*arguments) -> str:
    return pretrain_json(*arguments, code=1)["error"]


# One command ----------------------------------------------------------------------------------------------------------


def test_trains_evaluates_and_leaves_a_model(config, source, tmp_path):
    result = pretrain_json(config, "--evaluation.sources", json.dumps([source]), "--evaluation.every=4")
    assert (result["step"], result["max_steps"], result["finished"], result["resumed_from"]) == (6, 6, True, None)
    assert result["evaluation"]["eval_loss"] > 0 and "eval_field_geometry_cosine" in result["evaluation"]
    assert result["skipped"] == [] and result["pictures"] > 0
    out = tmp_path / "run"
    assert Spa3RModel.from_pretrained(out).config.num_latents == 6
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["training"]["learning_rate"] == 2e-3 and resolved["evaluation"]["every"] == 4
    assert resolved["data"]["cameras"] == "predicted"
    assert [line["step"] for line in read_log(out / "log.jsonl") if "eval_loss" in line] == [4, 6]
    same_files(out, out / "checkpoint-6")
    # The resolved configuration is one itself, and says the same. A model that a kill kept from being saved is saved.
    (out / "model.safetensors").unlink()
    again = pretrain_json(out / "config.yaml")
    assert (again["step"], again["resumed_from"]) == (6, str(out / "checkpoint-6"))
    assert (again["evaluation"], again["pictures"]) == (result["evaluation"], result["pictures"])
    same_files(out, out / "checkpoint-6")


def test_tensorboard_has_every_term_and_a_resumed_run_hides_what_it_repeats(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(config, "--training.report_to", "tensorboard", "--training.max_steps=2")
    pretrain(config, "--training.report_to", "tensorboard", "--training.max_steps=4")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    terms = {"geometry_l1", "semantic_cosine", "depth_probe", "loss", "grad_norm", "learning_rate", "views_per_second"}
    assert {f"train/{term}" for term in terms} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_text_for_people(config, tmp_path):
    result = pretrain(config, "--training.max_steps=1")
    assert result.stdout.startswith(f"{tmp_path / 'run'}: 1 of 1 steps\n")
    assert "Nothing was skipped" in result.stdout
    assert "step 1/1  loss " in result.stderr and "semantic_teacher: " in result.stderr


def test_changed_configuration_is_refused(config, tmp_path):
    pretrain(config, "--training.max_steps=2")
    words = error_of(config, "--training.learning_rate", "1e-4")
    assert re.search(r"holds a run of another configuration \(training\.learning_rate: 0\.002 -> 0\.0001\)", words)
    assert "--fresh" in words
    longer = pretrain_json(config, "--training.max_steps=4", "--training.logging_steps=2")
    assert (longer["step"], longer["resumed_from"]) == (4, str(tmp_path / "run" / "checkpoint-2"))
    fresh = pretrain_json(config, "--training.learning_rate", "1e-4", "--fresh", "--training.max_steps=2")
    assert (fresh["step"], fresh["resumed_from"]) == (2, None)
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 2]


def test_goes_on_from_a_pretrained_model(config, tmp_path):
    pretrain(config)
    file = tmp_path / "second.yaml"
    sections = yaml.safe_load(config.read_text())
    sections["model"] = {"init_from": str(tmp_path / "run"), "mask_ratio": 0.75}
    sections["data"] |= {"image_size": None}
    sections["training"] |= {"output_dir": str(tmp_path / "second"), "learning_rate": 1e-12, "weight_decay": 0.0}
    file.write_text(yaml.safe_dump(sections))
    pretrain(file)
    first, second = (Spa3RForPreTraining.from_pretrained(tmp_path / name) for name in ("run", "second"))
    assert second.config.mask_ratio == 0.75
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())["size"] == 20
    words = error_of(file, "--model.init_from", tmp_path / "second")
    assert "must be another folder than those of the model's parts" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"modell": {}},
            r"`modell` is unknown: did you mean `model`\? Known sections: data, evaluation, ",
        ),
        (
            {"model": {"num_latent": 3}},
            r"`model\.num_latent` is unknown: did you mean `model\.num_latents`\? Known",
        ),
        ({"model": {"backbone_config": {}}}, r"`model\.backbone_config` is unknown"),
        ({"data": {"picture": 3}}, r"`data\.picture` is unknown.* Known keys: cameras, image_mode"),
        ({"data": {"sources": []}}, r"`data\.sources` must list at least one source"),
        ({"data": {"sources": ["photos"]}}, r"`sources` must be a list of sections such as"),
        ({"training": {"lr": 1}}, r"`training\.lr` is unknown.* Known keys: .*learning_rate"),
        (
            {"training": {"num_train_epochs": 3}},
            r"`training\.num_train_epochs` is set in another place: training",
        ),
        ({"training": {"output_dir": None}}, r"`training\.output_dir` must name the folder"),
        ({"model": {"backbone": None}}, r"`model\.backbone` must say where the frozen backbone is"),
        ({"data": {"pictures_per_device": "many"}}, r"`data`: .*'pictures_per_device' expected int, got str"),
        ({"evaluation": {"sources": [{"type": "rooms"}], "scenes": None}}, r"`evaluation\.scenes` must say how many"),
        ({"model": 3}, r"`model` must be a section with keys of its own, got 3"),
        ({"data": {"sources": [{"type": "folders"}]}}, r"`type` of a source must be one of folder"),
    ],
)
def test_mistakes_in_the_file(change, words, config):
    sections = yaml.safe_load(config.read_text())
    for name, section in change.items():
        sections[name] = sections.get(name, {}) | section if isinstance(section, dict) else section
    config.write_text(yaml.safe_dump(sections))
    assert re.search(words, error_of(config))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--learning_rate", "1"],
            r"must read --section\.key value, such as --training\.max_steps 100, got '--lear",
        ),
        (["--training.max_steps"], r"`--training\.max_steps` must be followed by a value"),
        (["--training.maxsteps=3"], r"`training\.maxsteps` is unknown: did you mean `training\.max_steps`"),
        (["--data.sources.3.root=x"], r"`data\.sources\.3\.root`: wanted a number below 1"),
        (["--data.views.0.a=x"], r"`data\.views\.0\.a` leads into 2, which has no keys"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, config):
    assert re.search(words, error_of(config, *arguments))


def test_no_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    assert re.search(r"bad\.yaml can't be read as YAML", error_of(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    assert re.search(r"list\.yaml must hold sections", error_of(tmp_path / "list.yaml"))
    assert re.search(r"There is no configuration file .*none\.yaml\. Check the path", error_of(tmp_path / "none.yaml"))


def test_missing_package_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = error_of(config, "--training.report_to=tensorboard")
    assert re.search(r"tensorboard, which is not installed\. pip install 'spa3r\[train\]'", words)


def test_the_guide_is_true(tmp_path):
    """Its configuration is one, its overrides can be given, and it says what every key is for."""
    page = GUIDE.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "scannet.yaml").write_text(block)
    overrides = shlex.split(re.search(r"^spa3r pretrain scannet.yaml (--.*)$", page, re.MULTILINE)[1])
    config = PretrainingConfig.from_yaml(tmp_path / "scannet.yaml", overrides)
    assert {source["type"] for source in config.data.sources + config.evaluation.sources} <= SOURCES.keys()
    assert (config.training["learning_rate"], config.data.views) == (1e-3, [4, 8])
    assert config.data.sources[0]["root"] == "/data/scannet"
    sections = page.partition("## The sections")[2].partition("\n## ")[0]
    for section in (ModelSection, DataSection, EvaluationSection):
        names = {field.name for field in dataclasses.fields(section)} - {"fields", "seed"}
        assert not {name for name in names if f"`{name}" not in sections}
    args = PretrainingArguments(output_dir="run", use_cpu=True)
    assert f"steps | {args.max_steps:,}".replace(",", " ") in sections and f"every {args.save_steps} steps" in sections
    assert f"last {args.save_total_limit} are kept" in sections and f"every {args.logging_steps} steps" in sections
    assert f"`max_nonfinite_steps` ({args.max_nonfinite_steps})" in page


# Data of every kind ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rooms():
    return [look_around(seed, frames=5, size=(48, 64)) for seed in range(3)]


def write_parquet(folder: Path, rooms) -> Path:
    """A picture a row, with the scene's name, as `datasets` writes it."""
    import datasets
    from PIL import Image

    rows = {
        "image": [Image.fromarray(image) for room in rooms for image in room.images],
        "scene": [f"room_{number}" for number, room in enumerate(rooms) for _ in room.images],
    }
    features = datasets.Features({"image": datasets.Image(), "scene": datasets.Value("string")})
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "rooms.parquet"))
    return folder / "rooms.parquet"


@pytest.mark.parametrize("kind", ("scannet", "scannetpp", "video", "streamed", "given"))
def test_every_kind_of_source_trains_end_to_end(kind, rooms, parts, tmp_path):
    root, cache = tmp_path / "data", {"cache_dir": str(tmp_path / "index")}
    if kind == "scannet":
        source = {"type": "scannet", "root": str(write_scannet(root, rooms)), "stride": [1, 2]} | cache
    elif kind == "scannetpp":
        source = {"type": "scannetpp", "root": str(write_scannetpp(root, rooms)), "stride": [1, 2]} | cache
    elif kind == "video":
        source = {"type": "video", "root": str(write_videos(root, rooms))} | cache
    elif kind == "given":
        source = {"type": "folder", "root": str(write_folders(root, rooms))} | cache
    else:
        file = write_parquet(root, rooms)
        source = {"type": "dataset", "dataset": "parquet", "data_files": str(file), "streaming": True}
        source |= {"images_column": "image", "scene_column": "scene"}
    config = write_config(tmp_path / "config.yaml", parts, source)
    result = pretrain_json(
        config, f"--data.cameras={'given' if kind == 'given' else 'predicted'}", "--training.max_steps=3"
    )
    assert result["finished"] and result["skipped"] == []
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


def test_scenes_of_few_pictures_and_mixed_sizes(parts, tmp_path):
    """A scene of 1 picture, of 3 where 8 are asked for, and one of pictures of three sizes."""
    scenes = write_scenes(tmp_path / "scenes", scenes=3, frames=3)
    for extra in (scenes / "scene_00" / "1.png", scenes / "scene_00" / "2.png"):
        extra.unlink()
    for number in range(3):
        shutil.copy(scenes / f"scene_0{number}" / "0.png", scenes / "scene_02" / f"{number + 3}.png")
    source = {"type": "folder", "root": str(scenes), "cache_dir": str(tmp_path / "index")}
    config = write_config(tmp_path / "config.yaml", parts, source)
    result = pretrain_json(config, "--data.views=[8, 8]", "--training.max_steps=3")
    assert result["finished"] and result["skipped"] == []
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line)


def test_corrupted_files_are_skipped_counted_and_named(parts, tmp_path):
    """5 % of the pictures are broken in different ways; the training ends, and names them."""
    scenes = write_scenes(tmp_path / "scenes", scenes=12, frames=10)
    files = sorted(scenes.rglob("*.png"))
    broken = random.Random(0).sample(files, len(files) // 20)
    for number, file in enumerate(broken):
        content = file.read_bytes()
        file.write_bytes((b"", content[: len(content) // 2], b"no picture")[number % 3])
    source = {"type": "folder", "root": str(scenes), "cache_dir": str(tmp_path / "index"), "stride": [1, 1]}
    config = write_config(tmp_path / "config.yaml", parts, source)
    result = pretrain_json(config, "--training.max_steps=30", "--training.save_steps=30", "--training.logging_steps=10")
    assert result["finished"] and 0 < result["skipped_pictures"] < 0.1 * result["pictures"]
    named = {f"{entry['scene']}/{entry['picture']}" for entry in result["skipped"]}
    assert named <= {f"{file.parent.name}/{file.name}" for file in broken} and len(named) >= len(broken) - 2
    logged = sum(line.get("skipped_pictures", 0) for line in read_log(tmp_path / "run" / "log.jsonl"))
    assert logged == result["skipped_pictures"]
    # What was found before a stop is reported at the end, too.
    again = pretrain_json(config, "--training.max_steps=31")
    assert again["skipped_pictures"] >= result["skipped_pictures"] and again["pictures"] > result["pictures"]
    for file in files[::2]:
        file.write_bytes(b"no picture")
    words = error_of(config, "--fresh", "--training.max_steps=60", "--data.num_workers=1")
    assert re.match(r"`max_bad_share` = 0\.05 of the pictures may be bad, got \d+ of \d+", words)


def test_unreadable_held_out_pictures_are_reported(config, parts, tmp_path):
    scenes = write_scenes(tmp_path / "held-out", scenes=3, frames=8)
    broken = scenes / "scene_01" / "3.png"
    broken.write_bytes(b"no picture")
    held_out = {"type": "folder", "root": str(scenes), "cache_dir": str(tmp_path / "index"), "stride": [1, 1]}
    evaluation = ("--evaluation.sources", json.dumps([held_out]), "--evaluation.views=8")
    result = pretrain(config, *evaluation, "--training.max_steps=1", "--data.views=4", "--training.report_to=null")
    assert re.search(r"Of the held-out scenes: Skipped: 1 of \d+ pictures .*scene_01/3\.png", result.stdout, re.DOTALL)


# Kills ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 2))
def test_killed_and_resumed_run_ends_in_the_same_weights(config, tmp_path, workers):
    """SIGKILL at random steps, again and again, until the run gets through."""
    fields = ("--training.max_steps=30", "--training.save_steps=3", f"--data.num_workers={workers}")
    whole = ("pretrain", config, *fields, "--training.output_dir", tmp_path / "whole")
    run(*whole, cache=tmp_path)
    rng, kills = random.Random(workers), 0
    for step in sorted(rng.sample(range(2, 28), 1 + workers // 2)):
        process = started("pretrain", config, *fields, cache=tmp_path)
        wait_for_step(process, tmp_path / "run" / "log.jsonl", step)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    result = json.loads(run("pretrain", config, *fields, "--json", cache=tmp_path).stdout)
    assert kills == 1 + workers // 2 and result["resumed_from"] is not None and result["finished"]
    same_files(tmp_path / "run", tmp_path / "whole")
    same_files(tmp_path / "run" / "checkpoint-30", tmp_path / "whole" / "checkpoint-30", "optimizer.safetensors")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    ours, theirs = ([(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs)
    assert ours == theirs and [step for step, _ in ours] == list(range(1, 31))


KILL_AT = """
import builtins, os, signal, sys
import spa3r.cli.main, spa3r.training.checkpoints as checkpoints, spa3r.training.base as trainer
name, count = sys.argv.pop(1), int(sys.argv.pop(1))
module = {"publish": trainer, "save_state": trainer, "_sync": checkpoints}.get(name, os)
original, calls = getattr(module, name), 0
def deadly(*arguments, **keywords):
    global calls
    if any("checkpoint-4" in str(argument) for argument in arguments):
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(module, name, deadly)
spa3r.cli.main.app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "call"),
    [("save_state", 1), ("save_state", 2), ("publish", 1), ("_sync", 4), ("replace", 1)],
    ids=(
        "before the optimizer",
        "before the state",
        "before it is flushed",
        "while it is flushed",
        "before it is moved",
    ),
)
def test_kill_during_a_write_loses_at_most_the_last_interval(function, call, config, tmp_path):
    """Killed from within while checkpoint-4 is written: checkpoint-2 stands, the rest goes, the result is the same."""
    arguments = [sys.executable, "-c", KILL_AT, function, str(call), "pretrain", str(config)]
    died = subprocess.run(arguments, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["checkpoint-2"]
    assert (tmp_path / "run" / ".unfinished" / "checkpoint-4").is_dir()
    result = pretrain_json(config)
    assert (result["resumed_from"], result["finished"]) == (str(tmp_path / "run" / "checkpoint-2"), True)
    assert not (tmp_path / "run" / ".unfinished").exists()
    pretrain(config, "--training.output_dir", tmp_path / "whole")
    same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_signal_saves_a_checkpoint_and_says_how_to_resume(number, config, tmp_path):
    """Sent to the workers as well, as terminals and schedulers do."""
    fields = ("--training.max_steps=2000", "--training.save_steps=2000", "--data.num_workers=2")
    process = subprocess.Popen(
        command("pretrain", config, *fields, "--json"),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(process, tmp_path / "run" / "log.jsonl", 3)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    result = json.loads(out)
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert result["checkpoint"] == str(checkpoint) and checkpoint.name == f"checkpoint-{result['step']}"
    assert (result["finished"], result["interrupted_by"]) == (False, number.name) and 3 <= result["step"] < 2000
    assert "saving a checkpoint at the end of this step" in err
    again = pretrain_json(config, f"--training.max_steps={result['step'] + 1}", *fields[1:])
    assert again["resumed_from"] == str(checkpoint) and again["finished"]
