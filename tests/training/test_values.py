"""Wrong values in configurations, from a file, from the command line and from Python; secrets that stay secret."""

import json
import time
from pathlib import Path

import pytest
import yaml
from tiny_training import prepared
from typer.testing import CliRunner

from spa3r.cli.main import app
from spa3r.secret import hide, is_secret, keep_secret, without_secrets
from spa3r.training import FinetuningArguments, FinetuningConfig, PretrainingArguments, PretrainingConfig
from spa3r.training.arguments import make_checked
from spa3r.training.sources import make_instructions, make_source

PRETRAINING = {
    "model": {"backbone": "vggt", "semantic_teacher": "dinov3"},
    "data": {"sources": [{"type": "rooms"}]},
    "training": {"output_dir": "run"},
}
FINETUNING = {
    "model": {"init_from": "embedded"},
    "data": {"train": {"data": "rows.json"}},
    "training": {"output_dir": "run"},
}


def write(file: Path, sections: dict) -> Path:
    file.write_text(yaml.safe_dump(sections))
    return file


# Types and ranges -----------------------------------------------------------------------------------------------------

WRONG = {  # of each argument, in YAML
    "save_total_limit": (".inf", "0", "2.5", "true", "'2'", "[2]", "{}"),
    "bf16": ("{}", "1", "'true'", "[]"),
    "learning_rate": (".nan", ".inf", "1e400", "-1", "fast", "true", "[1]"),
    "max_steps": ("1e3", "-2", "true", "10000000000000000000000", "many", "null"),
    "gradient_accumulation_steps": ("0", "1.5", "null"),
    "adam_beta1": ("1.5", "-0.1"),
    "seed": ("-1", "4294967296", "0.5"),
    "logging_steps": ("-1", "often"),
    "output_dir": ("3", "[a]", "{}", "true", "2020-01-01", "!!binary aGk="),
    "report_to": ("3", "{}", "[1]"),
    "lr_scheduler_type": ("3", "[]", "steep"),
    "lr_scheduler_kwargs": ("3", "[1]", "{1: 2}", "{steepness: 3}"),
    "optim": ("3", "best"),
    "save_strategy": ("epoch", "3", "never"),
    "max_nonfinite_steps": ("-1", ".5"),
    "muon_learning_rate": ("0", "x"),
    "accelerator_config": ("3", "{unknown: 1}"),
    "deepspeed": ("3",),
    "hub_token": ("[verysecret]", "{a: verysecret}"),
}


@pytest.mark.parametrize("config", (PretrainingConfig, FinetuningConfig))
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_argument(name, value, config, tmp_path):
    """The error names the key, whether the value stands in the file or on the command line."""
    sections = PRETRAINING if config is PretrainingConfig else FINETUNING
    file, bad = write(tmp_path / "config.yaml", sections), tmp_path / "bad.yaml"
    others = yaml.safe_dump({key: section for key, section in sections.items() if key != "training"})
    bad.write_text(f"{others}training:\n  {name}: {value}\n" + ("" if name == "output_dir" else "  output_dir: run\n"))
    for arguments in ((bad, []), (file, [f"--training.{name}", value])):
        with pytest.raises(ValueError, match=rf"training|{name}") as caught:
            resolved = config.from_yaml(*arguments)
            make_checked(config.ARGUMENTS, resolved.training | {"use_cpu": True, "output_dir": str(tmp_path)})
        assert len(str(caught.value)) < 900 and "verysecret" not in str(caught.value)


SECTIONS = [
    (PretrainingConfig, "data.pictures_per_device", 0),
    (PretrainingConfig, "data.pictures_per_device", True),
    (PretrainingConfig, "data.views", 0),
    (PretrainingConfig, "data.views", [2, 1.5]),
    (PretrainingConfig, "data.views", [0, 4]),
    (PretrainingConfig, "data.weights", [-1.0]),
    (PretrainingConfig, "data.weights", [float("nan")]),
    (PretrainingConfig, "data.max_bad_share", 1.5),
    (PretrainingConfig, "data.num_workers", -1),
    (PretrainingConfig, "data.image_size", 0),
    (PretrainingConfig, "data.image_mode", {}),
    (PretrainingConfig, "data.seed", -1),
    (PretrainingConfig, "data.sources", {"type": "rooms"}),
    (PretrainingConfig, "data.sources", [["rooms"]]),
    (PretrainingConfig, "evaluation.every", 0),
    (PretrainingConfig, "evaluation.scenes", 0),
    (PretrainingConfig, "evaluation.scenes", 1.0),
    (PretrainingConfig, "model.dtype", "float99"),
    (PretrainingConfig, "model.attn_implementation", "telepathy"),
    (PretrainingConfig, "model.num_latents", 0),
    (PretrainingConfig, "model.mask_ratio", "half"),
    (PretrainingConfig, "model.backbone", 3),
    (FinetuningConfig, "data.max_length", 0),
    (FinetuningConfig, "data.train", [1]),
    (FinetuningConfig, "data.group_by_length", 1),
    (FinetuningConfig, "evaluation.batch_size", 0),
    (FinetuningConfig, "evaluation.max_new_tokens", -1),
    (FinetuningConfig, "model.view_size", 0),
    (FinetuningConfig, "model.images", "both"),
    (FinetuningConfig, "training.policy", 3),
    (FinetuningConfig, "training.policy", "everything"),
    (FinetuningConfig, "training.lora_rank", 0),
    (FinetuningConfig, "training.lora_dropout", 2),
]


@pytest.mark.parametrize(("config", "path", "value"), SECTIONS)
def test_wrong_value_in_a_section(config, path, value, tmp_path):
    section, key = path.split(".")
    sections = PRETRAINING if config is PretrainingConfig else FINETUNING
    sections = sections | {section: sections.get(section, {}) | {key: value}}
    with pytest.raises(ValueError, match=key):
        resolved = config.from_dict(sections)
        make_checked(config.ARGUMENTS, resolved.training | {"use_cpu": True, "output_dir": str(tmp_path)})


@pytest.mark.parametrize("arguments", (PretrainingArguments, FinetuningArguments))
@pytest.mark.parametrize(
    "fields", [{"save_total_limit": float("inf")}, {"bf16": {}}, {"learning_rate": "1"}, {"seed": True}, {"use_cpu": 1}]
)
def test_wrong_argument_from_python(fields, arguments, tmp_path):
    (name,) = fields
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        arguments(**{"output_dir": tmp_path, "use_cpu": True} | fields)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rooms", r"A source must be a section such as \{type: folder, root: photos\}, got 'rooms'"),
        ({"type": ["rooms"]}, r"`type` of a source must be one of"),
        ({"type": "folder", "root": 3}, r"`folder\.root` must be a text or a Path, got 3"),
        (
            {"type": "folder", "root": "x", "stride": "1"},
            r"`folder\.stride` must be a list of which each entry is a whole",
        ),
        ({"type": "dataset", "data": "x", "streaming": "no"}, r"`dataset\.streaming` must be True or False, got 'no'"),
    ],
)
def test_wrong_source(source, words):
    with pytest.raises(ValueError, match=words):
        make_source(source)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rows.json", r"Instruction data must be a section such as"),
        ({"data": "rows.json", "streaming": 1}, r"`streaming` must be True or False, got 1"),
        ({"mixture": ["a"]}, r"`mixture` must be a dictionary, got \['a'\]"),
        ({"mixture": {"a": {"data": "x", "weight": "2"}}}, r"`a\.weight` must be a number, got '2'"),
        ({"type": {}}, r"`type` of instruction data must be instructions or room_questions, got \{\}"),
    ],
)
def test_wrong_instructions(spec, words):
    with pytest.raises(ValueError, match=words):
        make_instructions(spec)


# YAML -----------------------------------------------------------------------------------------------------------------

BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(
    ["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "stands for more than 100000 values"),
        (MERGES, "stands for more than 100000 values"),
        ("model: &m {a: *m}", "an alias stands for something that holds it"),
        ("model: " + "[" * 2000, "nested too deeply"),
        ("model: {a: 1, a: 2}", "the key 'a' stands twice in one section"),
        ("model: {[1]: 2}", "can't be read as YAML"),
        ("model: " + "1" * 5000, "can't be read as YAML"),
        ("model: 2020-13-45", "can't be read as YAML"),
        ("model: !!python/object:os.system {}", "could not determine a constructor"),
        ("model: *nobody", "undefined alias"),
        ("1: 2", "A key in `the configuration` must be a text, got 1"),
        ("model: {null: 2}", "A key in `model` must be a text, got None"),
        ("model: {backbone: 2020-01-01}", "`model.backbone` must be a text, .* got a date .*Put a text into quotes"),
        ("model: {backbone: .inf}", "`model.backbone` must be .*got a number that is not finite"),
        ("model: {backbone: !!set {a}}", "`model.backbone` must be .*got a set"),
        ("# " + "x" * 1_000_001, "must have at most 1000000 characters"),
    ],
    ids=range(16),
)
def test_odd_yaml(text, words, tmp_path):
    """In a file and on the command line, within a second and in one line."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    good = write(tmp_path / "good.yaml", PRETRAINING)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        PretrainingConfig.from_yaml(file)
    if "model: " in text and "`model" not in words:
        with pytest.raises(ValueError, match=words):
            PretrainingConfig.from_yaml(good, ["--model.backbone", text.removeprefix("model: ")])
    assert time.perf_counter() - start < 20  # of a busy machine


def test_aliases_and_merges_work_and_share_nothing(tmp_path):
    """An override of one branch leaves the other."""
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: {backbone: vggt, semantic_teacher: dinov3}\n"
        "data: {sources: &rooms [{type: rooms, seed: 1}]}\n"
        "evaluation: {sources: *rooms}\n"
        "training: {output_dir: run}\n"
    )
    config = PretrainingConfig.from_yaml(file, ["--data.sources.0.seed=2"])
    assert (config.data.sources[0]["seed"], config.evaluation.sources[0]["seed"]) == (2, 1)


# Secrets --------------------------------------------------------------------------------------------------------------

SECRET = "hf_verysecretverysecretverysecret12"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    return prepared(folder, scenes=3, max_steps=1, save_steps=1)


def pretrain(*arguments: object) -> str:
    """Everything that the command prints."""
    result = CliRunner().invoke(app, ["pretrain", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stdout + result.stderr


@pytest.mark.parametrize("secret", (SECRET, "hunter2.hunter2"))
def test_secret_is_in_no_file_and_on_no_screen(secret, config, tmp_path):
    out = tmp_path / "run"
    overrides = (f"--training.output_dir={out}", "--training.report_to=tensorboard")
    text = pretrain(config, f"--training.hub_token={secret}", *overrides)
    assert "1 of 1 steps" in text and "hub_token" not in text and secret not in text
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"config.yaml", "training_args.json", "log.jsonl"} < {file.name for file in files}
    assert [file.name for file in files if secret.encode() in file.read_bytes()] == []
    # The run goes on without it, or with another.
    assert "1 of 1 steps" in pretrain(out / "config.yaml")
    assert "1 of 1 steps" in pretrain(out / "config.yaml", "--training.hub_token=another.secret")


@pytest.mark.parametrize(
    "mistake",
    [
        [f"--training.hub_token=[{SECRET}]"],
        [f"--training.hub_token={SECRET}", "--training.max_steps=x"],
        [f"--hub_token={SECRET}"],
        [f"--training={SECRET}"],
        [f"--training.hub_token={SECRET}", "--training.hub_token.a=3"],
        [f"--training.hub_token={SECRET}: ["],
        [f"--training.seed={SECRET}"],
        ["--data.sources.0.root", f"https://user:{SECRET}@host/photos"],
    ],
)
def test_errors_show_no_secret(mistake, config, tmp_path):
    text = pretrain(config, f"--training.output_dir={tmp_path / 'run'}", *mistake)
    assert "error: " in text and SECRET not in text and "verysecret" not in text
    file = tmp_path / "bad.yaml"
    file.write_text(f"training:\n  hub_token: {SECRET}\n  max_steps: [\n")
    assert "verysecret" not in pretrain(file)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_abcdefghijklmnopqrstuvwxyz here", "token hf_*** here"),
        ("https://me:pass@host/a.jpg?x=1&token=abc&y=2", "https://***@host/a.jpg?x=1&token=***&y=2"),
        ("s3://b/k?X-Amz-Signature=ab12&X-Amz-Credential=q", "s3://b/k?X-Amz-Signature=***&X-Amz-Credential=***"),
        ("Illegal header value b'Bearer abcdefgh1234'", "Illegal header value b'Bearer ***'"),
        ("https://host/a@b.jpg hf_model me@host", "https://host/a@b.jpg hf_model me@host"),
    ],
)
def test_hide(text, shown):
    assert hide(text) == shown and json.loads(hide(json.dumps([text]))) == [shown]


def test_names_of_secrets(monkeypatch):
    secret = (
        "hub_token",
        "token",
        "training.hub_token",
        "password",
        "api_key",
        "client_secret",
        "HF_TOKEN",
        "access-token",
    )
    public = (
        "spatial_token_id",
        "max_new_tokens",
        "num_register_tokens",
        "image_token",
        "spatial_tokens",
        "key",
        "seed",
    )
    assert all(map(is_secret, secret)) and not any(map(is_secret, public))
    kept = keep_secret({"a": [{"password": "opensesame"}], "b": {"token": {"c": ["x"]}}, "d": 1})
    assert "opensesame" not in repr(kept) and kept["a"][0]["password"] == "opensesame"
    assert without_secrets(kept) == {"a": [{}], "b": {}, "d": 1} and hide("say opensesame") == "say ***"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert hide("key 0123456789abcdef") == "key ***"
