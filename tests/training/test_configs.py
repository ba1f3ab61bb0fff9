"""The files of examples/configs: accelerate's own loader reads them, and what they say is what is done.

Without GPUs, FSDP2 and DeepSpeed run on the CPU by `cpu_launch.py`.
"""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny import pretraining_config, relative_error
from tiny_training import environment, prepared

from spa3r import Spa3RForPreTraining
from spa3r.models.layers import TransformerLayer
from spa3r.training import PretrainingConfig, read_log
from spa3r.training.arguments import PretrainingArguments

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS.parent / "examples" / "configs"
LAUNCHERS = {  # what each says
    "one_gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "ddp_nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "zero2": (DistributedType.DEEPSPEED, 1, 8),
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; it is no part of spa3r[train]"
)


# Reading --------------------------------------------------------------------------------------------------------------


def test_every_file_is_known():
    assert {file.stem for file in CONFIGS.iterdir()} == {
        *LAUNCHERS,
        "pretrain_paper",
        "pretrain_depth_anything_3_base",
        "finetune_paper",
    }


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys, but not nested ones
    assert (config.distributed_type, config.num_machines, config.num_processes) == LAUNCHERS[name]
    assert config.mixed_precision == "bf16" and not config.use_cpu
    nested = {*config.fsdp_config, *config.deepspeed_config}
    assert nested <= {action.dest for action in launch_command_parser()._actions}
    assert bool(config.fsdp_config) == (name == "fsdp2") and bool(config.deepspeed_config) == (name == "zero2")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_comment_on_top_is_the_command(name):
    """Its first lines say how to launch it, in words that accelerate's parser takes."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines if line.startswith("#"))
    command = comment[comment.index("accelerate launch ") :].split("CONFIG.yaml")[0].split()[2:]
    assert command[:2] == ["--config_file", f"examples/configs/{name}.yaml"]
    numbers = ["0" if word == "N" else word for word in command]
    args = launch_command_parser().parse_args([str(TESTS.parent / word) if "/" in word else word for word in numbers])
    args, _, _ = _validate_launch_command(args)
    assert (args.training_script, args.training_script_args, args.module) == ("spa3r", ["pretrain"], True)
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name == "zero2")
    if name == "ddp_nodes":
        assert (args.machine_rank, args.main_process_ip) == (0, "ADDRESS_OF_0")


def test_fsdp2_wraps_the_one_layer():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    assert config["fsdp_transformer_layer_cls_to_wrap"] == TransformerLayer.__name__
    model = Spa3RForPreTraining(pretraining_config())
    layers = [name for name, part in model.named_modules() if isinstance(part, TransformerLayer)]
    wrapped = {name.partition(".layers")[0] for name in layers}
    assert {"spa3r.encoder", "spa3r.decoder"} < wrapped
    assert model.get_input_embeddings() is None  # accelerate asks


@needs_deepspeed
def test_deepspeed_reads_its_section():
    from accelerate.utils import DeepSpeedPlugin

    section = dict(load_config_from_file(str(CONFIGS / "zero2.yaml")).deepspeed_config)
    plugin = DeepSpeedPlugin(**section)
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"  # the trainer fills in its own


def test_the_papers_recipe_is_the_default_on_the_papers_data():
    file = CONFIGS / "pretrain_paper.yaml"
    config = PretrainingConfig.from_yaml(file)
    assert [source["type"] for source in config.data.sources] == ["scannet", "scannetpp"]
    assert [source["stride"] for source in config.data.sources] == [[2, 6], [20, 60]]
    assert (list(config.data.views), config.data.pictures_per_device, config.data.cameras) == ([4, 12], 24, "predicted")
    assert config.data.image_mode == "pretraining" and config.data.image_size in (None, 518)
    assert config.model.fields == {} and config.model.dtype == "bfloat16"
    assert set(config.training) == {"output_dir", "bf16"}  # the rest is the recipe
    args = PretrainingArguments(output_dir="runs", use_cpu=True)
    assert (args.max_steps, args.gradient_accumulation_steps, args.learning_rate) == (80_000, 2, 2e-3)
    assert yaml.safe_load(config.to_yaml())["training"]["max_steps"] == 80_000


def test_the_recipe_on_depth_anything_3_differs_in_the_backbone_alone():
    ours, paper = (
        PretrainingConfig.from_yaml(CONFIGS / f"{name}.yaml")
        for name in ("pretrain_depth_anything_3_base", "pretrain_paper")
    )
    assert ours.model.backbone == "depth-anything/DA3-BASE"
    changed = yaml.safe_load(ours.to_yaml())
    changed["model"]["backbone"] = paper.model.backbone
    changed["training"]["output_dir"] = paper.training["output_dir"]
    assert changed == yaml.safe_load(paper.to_yaml())


# Running --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    return prepared(folder, scenes=24, max_steps=2, save_steps=2, learning_rate=1e-3)


def start(
    launcher: str, config: Path, run: str, *options: str, pictures: int = 4, on_cpu: bool = True, **training
) -> subprocess.Popen:
    """A launched training; for what accelerate doesn't do on a CPU by itself, by way of `cpu_launch.py`."""
    is_sharded = launcher in ("fsdp2", "zero2")
    program = [str(TESTS / "cpu_launch.py")] if on_cpu and is_sharded else ["-m", "spa3r"]
    training = {"output_dir": config.parent / run, "use_cpu": on_cpu and not is_sharded} | training
    overrides = [f"--training.{name}={value}" for name, value in training.items()]
    overrides.append(f"--data.pictures_per_device={pictures}")
    python = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{launcher}.yaml")]
    variables = {"CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"} | (
        {"DS_ACCELERATOR": "cpu"} if is_sharded else {"ACCELERATE_USE_CPU": "true"}
    )
    return subprocess.Popen(
        [*python, *options, *program, "pretrain", str(config), "--json", *overrides],
        env=environment(config.parent, **(variables if on_cpu else {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=900)  # many processes on few cores
    assert process.returncode == 0, errors[-8000:]
    return out


def losses(config: Path, run: str) -> list[float]:
    return [line["loss"] for line in read_log(config.parent / run / "log.jsonl") if "grad_norm" in line]


def assert_same_training(config: Path, run: str, reference: str, tolerance: float) -> None:
    """The same losses and weights, and a checkpoint that loads."""
    ours, wanted = (load_file(config.parent / name / "model.safetensors") for name in (run, reference))
    assert ours.keys() == wanted.keys() and len(ours) > 50
    assert not any(key.startswith(("spa3r.backbone.", "semantic_teacher.")) for key in ours)
    errors = {key: relative_error(ours[key], wanted[key]) for key in ours}
    assert max(errors.values()) <= tolerance, errors
    assert losses(config, run) == pytest.approx(losses(config, reference), rel=tolerance)
    loaded = Spa3RForPreTraining.from_pretrained(config.parent / run)
    assert torch.equal(loaded.spa3r.encoder.query_tokens, ours["spa3r.encoder.query_tokens"])


@pytest.fixture(scope="module")
def one_process(config) -> str:
    """One process with all pictures of a step."""
    out = finish(start("one_gpu", config, "one", "--mixed_precision", "no", pictures=8))
    assert json.loads(out)["finished"] and len(losses(config, "one")) == 2
    return "one"


@pytest.fixture(scope="module")
def ddp(config) -> str:
    """Two processes with half the pictures each; the others have to end in the same weights."""
    finish(start("ddp", config, "ddp", "--num_processes", "2", "--mixed_precision", "no"))
    return "ddp"


@pytest.mark.slow
def test_ddp_is_one_process_with_all_pictures(config, one_process, ddp):
    """By its losses: Adam makes full steps of gradients that are 0 but for rounding, such as those of key biases."""
    assert losses(config, ddp) == pytest.approx(losses(config, one_process), rel=1e-5)
    assert_same_training(config, ddp, ddp, 0)


@pytest.mark.slow
def test_two_nodes(config, ddp):
    """Two launchers that meet at an address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    nodes = [
        start("ddp_nodes", config, "nodes", *options, "--machine_rank", rank, "--mixed_precision", "no")
        for rank in ("0", "1")
    ]
    for node in nodes:
        finish(node)
    assert_same_training(config, "nodes", ddp, 1e-6)


@pytest.mark.slow
def test_fsdp2(config, ddp):
    """Frozen and trained parameters are sharded side by side; what is saved is whole, and a run goes on from it."""
    options = ("--num_processes", "2", "--mixed_precision", "no")
    finish(start("fsdp2", config, "fsdp2", *options))
    assert_same_training(config, "fsdp2", ddp, 1e-5)
    out = finish(start("fsdp2", config, "fsdp2", *options, max_steps=3))
    assert json.loads(out)["resumed_from"].endswith("checkpoint-2") and len(losses(config, "fsdp2")) == 3


@pytest.mark.slow
def test_fsdp2_in_bfloat16_is_ddp_in_bfloat16(config, ddp):
    """Autocast does the casting in both: cameras, poses and the loss stay float32."""
    for launcher in ("ddp", "fsdp2"):
        finish(start(launcher, config, f"{launcher}-bf16", "--num_processes", "2", bf16="true"))
    assert_same_training(config, "fsdp2-bf16", "ddp-bf16", 1e-6)
    assert losses(config, "ddp-bf16") == pytest.approx(losses(config, ddp), rel=1e-2)
    assert losses(config, "ddp-bf16") != pytest.approx(losses(config, ddp), rel=1e-6)


@pytest.mark.slow
@needs_deepspeed
def test_zero2(config, ddp):
    options = ("--num_processes", "2", "--mixed_precision", "no")
    finish(start("zero2", config, "zero2", *options))
    assert_same_training(config, "zero2", ddp, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("launcher", "devices"),
    [("one_gpu", 1), ("ddp", 2), ("fsdp2", 2), pytest.param("zero2", 2, marks=needs_deepspeed)],
)
def test_on_gpus_in_bfloat16(config, one_process, launcher, devices):
    """As launched by users: close to the float32 training on the CPU, and its memory is logged."""
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices")
    run, options = f"{launcher}-gpu", ("--num_processes", str(devices))
    finish(start(launcher, config, run, *options, pictures=8 // devices, on_cpu=False, bf16="true"))
    assert losses(config, run) == pytest.approx(losses(config, one_process), rel=2e-2)
    assert all(line["memory_gib"] > 0 for line in read_log(config.parent / run / "log.jsonl") if "grad_norm" in line)
    Spa3RForPreTraining.from_pretrained(config.parent / run)
