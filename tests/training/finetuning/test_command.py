"""`spa3r finetune` as a user runs it: one command, mistakes, kills, several processes."""

import json
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from command_line import run as run_here
from command_line import run_json
from media import asked
from safetensors.torch import load_file
from tiny_finetuning import ROOMS, write_config
from tiny_training import run, same_files
from training_processes import started, wait_for_step

from spa3r import Spa3VLMForConditionalGeneration
from spa3r.rooms.embedded import embedded_model
from spa3r.training import FinetuningArguments, FinetuningConfig, merge_lora, read_log
from spa3r.training.finetuning.run import make_arguments, make_model, make_questions

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:.*is_gradient_checkpointing")


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path / "config.yaml")


finetune, finetune_json = partial(run_here, "finetune"), partial(run_json, "finetune")


def test_trains_scores_answers_and_leaves_a_model(config, tmp_path):
    evaluation = ("--evaluation.questions", json.dumps(ROOMS), "--evaluation.examples=2", "--evaluation.every=4")
    result = finetune_json(config, *evaluation, "--evaluation.max_new_tokens=2")
    assert (result["step"], result["max_steps"], result["finished"], result["resumed_from"]) == (4, 4, True, None)
    assert 0 <= result["evaluation"]["eval_overall"] <= 100
    assert (result["rows"], result["skipped_rows"], result["skipped"]) == (8, 0, [])
    frozen = {group["part"] for group in result["parameters"] if group["learning_rate"] is None}
    assert frozen == {"vision tower and merger", "Spa3R's encoder", "rest of Spa3R"}
    out = tmp_path / "run"
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["training"]["policy"] == "paper" and resolved["data"]["max_bad_share"] == 0.05
    Spa3VLMForConditionalGeneration.from_pretrained(out)
    # A model that a kill kept from being saved is saved.
    (out / "model.safetensors").unlink()
    again = finetune_json(out / "config.yaml")
    assert (again["step"], again["resumed_from"]) == (4, str(out / "checkpoint-4"))
    assert again["evaluation"] == result["evaluation"]
    last, whole = (load_file(folder / "model.safetensors") for folder in (out / "checkpoint-4", out))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in last.items())
    assert whole.keys() == last.keys()  # no part of a Spa3-VLM from one folder is stored elsewhere
    words = finetune_json(config, "--training.learning_rate=1e-4", code=1)["error"]
    assert "training.learning_rate: 0.001 -> 0.0001" in words


def test_rows_of_files_are_read_and_broken_ones_reported(config, tmp_path):
    """The layout of VSI-590K with real pictures; rows of like length together."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        picture = PIL.Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{number}.jpg")
        said = [("human", f"<image>\nHow many chairs are in room {number}?"), ("gpt", str(number))]
        rows.append({"conversations": [{"from": who, "value": words} for who, words in said], "image": f"{number}.jpg"})
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"annotations": str(tmp_path / "rows.jsonl"), "media_root": str(tmp_path), "name": "files"}
    fields = ("--training.max_steps=-1", "--training.per_device_train_batch_size=4", "--data.group_by_length=true")
    result = finetune_json(config, "--data.train", json.dumps(train), *fields, "--data.max_bad_share=0.2")
    assert result["finished"] and result["step"] == result["max_steps"] == 6  # one epoch
    (entry,) = result["skipped"]
    assert (entry["source"], entry["picture"]) == ("files", "3.jpg") and result["rows"] >= 24


def test_text_for_people(config, tmp_path):
    result = finetune(config, "--training.policy=adapter_only", "--training.max_steps=1")
    assert result.stdout.startswith(f"{tmp_path / 'run'}: 1 of 1 steps\n") and "Nothing was skipped" in result.stdout
    table = result.stderr.index("parameters of the")
    assert table < result.stderr.index("step 1/1  loss ")  # before the first step
    assert re.search(r"adapter +[\d,]+ +0\.001 +0\.01\n", result.stderr)


def test_lora_run_is_merged(config, tmp_path):
    finetune(config, "--training.policy=lora", "--training.max_steps=1", "--training.lora_rank=2")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "Adapters (PEFT)" in card and "room questions" in card and str(tmp_path) not in card
    model, processor = merge_lora(tmp_path / "run")
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert processor.view_image_processor.size == 56
    with pytest.raises(ValueError, match=r"`run_folder` must hold the peft checkpoint of a run"):
        merge_lora(tmp_path)


def test_a_spa3_vlm_is_combined_from_its_parts(tmp_path):
    model, processor = embedded_model()
    model.vlm.save_pretrained(tmp_path / "vlm")
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    section = {"vlm": str(tmp_path / "vlm"), "spa3r": "embedded", "integration": "append"}
    training = {"output_dir": str(tmp_path / "run"), "policy": "end_to_end", "psfm_weight": 0.1, "use_cpu": True}
    sections = {"model": section, "data": {"train": ROOMS, "num_workers": 0}, "training": training}
    config = FinetuningConfig.from_dict(sections)
    model, processor, psfm = make_model(config, make_arguments(config))
    assert model.config.integration == "append" and processor.spatial_tokens == model.config.spatial_tokens
    assert psfm.spa3r is model.spa3r and psfm.semantic_teacher is not None


def test_a_backbone_that_has_a_home_stays_out_of_checkpoints(tmp_path):
    model, processor = embedded_model()
    model.vlm.save_pretrained(tmp_path / "vlm")
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    sections = {
        "model": {"vlm": str(tmp_path / "vlm"), "spa3r": "embedded", "view_size": 56},
        "data": {"train": ROOMS, "num_workers": 0},
        "training": {"output_dir": str(tmp_path / "run"), "policy": "adapter_only", "use_cpu": True, "max_steps": 1},
    }
    sections["training"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    file = tmp_path / "combined.yaml"
    file.write_text(yaml.safe_dump(sections))
    assert finetune_json(file)["finished"]
    folders = (tmp_path / "run" / "checkpoint-1", tmp_path / "run")
    last, whole = (load_file(folder / "model.safetensors") for folder in folders)
    assert {name.rpartition("backbone.")[0] for name in whole.keys() - last.keys()} == {"spa3r."}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"vlmm": "x"}}, r"`model\.vlmm` is unknown: did you mean `model\.vlm`\? Known keys: .*integration"),
        ({"model": {"vlm": "x"}}, r"`model\.vlm` .* or `model\.init_from` .* got both"),
        ({"model": {"init_from": None}}, r"got neither"),
        ({"model": {"init_from": None, "vlm": "x"}}, r"`model\.spa3r` must name the Spa3R"),
        ({"model": {"integration": "append"}}, r"`model\.integration` can be chosen where a VLM is combined"),
        ({"data": {"train": {}}}, r"`data\.train` must say which instructions"),
        ({"data": {"max_length": "long"}}, r"`data`: .*'max_length'"),
        ({"training": {"policy": "all"}}, r"`policy` must be one of paper, adapter_only"),
        ({"training": {"train_sampling_strategy": "x"}}, r"is set in another place: data\.group_by_length"),
        ({"training": {"output_dir": None}}, r"`training\.output_dir` must name the folder"),
        (
            {"training": {"policy": "qlora"}},
            r"'qlora' quantizes a VLM where .* are combined: .* not `init_from`",
        ),
        ({"data": {"group_by_length": True}}, r"`group_by_length` needs a data set with `lengths`"),
    ],
)
def test_mistakes_in_the_file(change, words, config):
    sections = yaml.safe_load(config.read_text())
    for name, section in change.items():
        sections[name] = sections.get(name, {}) | section
    config.write_text(yaml.safe_dump(sections))
    assert re.search(words, finetune_json(config, code=1)["error"])


def test_the_papers_recipe_is_the_default():
    config = FinetuningConfig.from_yaml(CONFIGS / "finetune_paper.yaml")
    assert set(config.training) == {"output_dir", "gradient_checkpointing"}  # the rest is the recipe
    assert config.model.fields == {} and "Qwen2.5-VL-3B" in config.model.vlm
    args = FinetuningArguments(output_dir="runs", use_cpu=True)
    assert config.to_dict()["training"]["learning_rate"] == args.learning_rate == 1e-5


def test_held_out_questions_need_random_access(tmp_path):
    row = {"conversations": asked("How many chairs are there?")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    questions = {"annotations": str(tmp_path / "rows.jsonl")}
    sections = {"model": {"init_from": "embedded"}, "data": {"train": ROOMS}, "training": {"output_dir": "run"}}
    config = FinetuningConfig.from_dict(sections | {"evaluation": {"questions": questions | {"streaming": True}}})
    with pytest.raises(ValueError, match=r"`evaluation\.questions` must have random access, got `streaming: true`"):
        make_questions(config)
    config = FinetuningConfig.from_dict(sections | {"evaluation": {"questions": questions}})
    assert len(make_questions(config)) == 1


@pytest.mark.slow
def test_qlora_trains_around_a_language_model_of_4_bits(tmp_path):
    """With an evaluation and a restart on the way, after which gradients have to pass as before."""
    from bitsandbytes.nn import Linear4bit

    model, processor = embedded_model()
    whole = model.vlm
    whole.save_pretrained(tmp_path / "vlm")
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    training = {"policy": "qlora", "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "lora_rank": 2}
    training |= {
        "output_dir": str(tmp_path / "run"),
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
        "save_total_limit": 3,
    }
    sections = {
        "model": {"vlm": str(tmp_path / "vlm"), "spa3r": "embedded", "view_size": 56},
        "data": {"train": ROOMS, "num_workers": 0},
        "training": training | {"logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        "evaluation": {"questions": ROOMS, "examples": 2, "every": 1, "max_new_tokens": 2},
    }
    config = FinetuningConfig.from_dict(sections)
    vlm = make_model(config, make_arguments(config))[0].vlm
    for name, module in vlm.get_decoder().named_modules():
        assert not isinstance(module, torch.nn.Linear) or isinstance(module, Linear4bit), name
    assert not any(isinstance(module, Linear4bit) for module in [*vlm.model.visual.modules(), vlm.lm_head])

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    finetune_json(file)
    assert finetune_json(file, "--training.max_steps=3")["resumed_from"] == str(tmp_path / "run" / "checkpoint-2")
    sections["training"] |= {"output_dir": str(tmp_path / "plain"), "max_steps": 3}
    file.write_text(yaml.safe_dump(sections | {"evaluation": {}}))
    finetune_json(file)
    learned, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "plain"))
    assert {name.split(".")[2] for name in learned} == {"adapter", "vlm"} and learned.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in learned.items())
    assert all(tensor.any() for name, tensor in learned.items() if "lora_B" in name)

    merged = merge_lora(tmp_path / "run")[0].vlm.state_dict()
    name = "model.language_model.layers.1.mlp.down_proj"
    low, high = (learned[f"base_model.model.vlm.{name}.lora_{part}.weight"] for part in "AB")
    added = merged[f"{name}.weight"] - whole.state_dict()[f"{name}.weight"]
    scale = FinetuningArguments(output_dir="runs", use_cpu=True).lora_alpha / 2
    assert torch.allclose(added, scale * high @ low, atol=1e-6) and added.abs().max() > 0


# Kills and processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ("paper", "lora"))
def test_killed_and_resumed_run_ends_in_the_same_weights(policy, config, tmp_path):
    fields = (f"--training.policy={policy}", "--training.max_steps=12", "--data.num_workers=1")
    run("finetune", config, *fields, "--training.output_dir", tmp_path / "whole", cache=tmp_path)
    process = started("finetune", config, *fields, cache=tmp_path)
    wait_for_step(process, tmp_path / "run" / "log.jsonl", random.Random(policy).randrange(3, 10))
    process.kill()
    process.communicate()
    result = json.loads(run("finetune", config, *fields, "--json", cache=tmp_path).stdout)
    assert result["resumed_from"] is not None and result["finished"]
    weights = "adapter_model.safetensors" if policy == "lora" else "model.safetensors"
    same_files(tmp_path / "run", tmp_path / "whole", weights)
    same_files(tmp_path / "run" / "checkpoint-12", tmp_path / "whole" / "checkpoint-12", "optimizer.safetensors")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    ours, theirs = ([(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs)
    assert ours == theirs and [step for step, _ in ours] == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_with_half_the_rows_each_are_one_with_all(config, tmp_path):
    """Loss by loss, and the scores of answers; the processes share the questions."""
    logs, results = [], []
    questions = ("--evaluation.questions", json.dumps(ROOMS), "--evaluation.examples=3", "--evaluation.every=6")
    for processes in (1, 2):
        fields = (f"--training.output_dir={tmp_path / str(processes)}", "--training.max_steps=6")
        size = f"--training.per_device_train_batch_size={4 // processes}"
        accumulate = "--training.gradient_accumulation_steps=2"
        result = run(
            *("finetune", config, *fields, size, accumulate, *questions, "--evaluation.max_new_tokens=2", "--json"),
            cache=tmp_path,
            processes=processes,
        )
        results.append(json.loads(result.stdout))
        logs.append([line for line in read_log(tmp_path / str(processes) / "log.jsonl") if "grad_norm" in line])
    one, two = logs
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 7))
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert results[0]["evaluation"] == results[1]["evaluation"] and results[0]["rows"] == results[1]["rows"]
