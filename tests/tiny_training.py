"""Tiny pretrainings: parts on disk, scenes as small pictures of mixed sizes, configurations."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import PATCH, alive, pretraining_config, teacher_config, vggt_config
from transformers import DINOv3ViTModel, TrainerCallback

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor, VggtModel
from spa3r.data import FolderScenes, SceneBatches
from spa3r.training import PretrainingArguments, PretrainingTrainer

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "mlp_ratio": 2, "num_latents": 6, "num_register_tokens": 2}
SIZES |= {"num_encoder_layers": 1, "num_decoder_layers": 1}


class Kill(TrainerCallback):
    """Ends a run in the middle, as far as one process can do that to itself."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def write_parts(folder: Path) -> dict[str, str]:
    """A tiny VGGT and a tiny DINOv3 on disk."""
    alive(VggtModel(vggt_config())).save_pretrained(folder / "vggt")
    alive(DINOv3ViTModel(teacher_config())).save_pretrained(folder / "teacher")
    return {"backbone": str(folder / "vggt"), "semantic_teacher": str(folder / "teacher")}


def write_scenes(folder: Path, scenes: int = 12, frames: int = 6, seed: int = 0) -> Path:
    """Folders of noisy pictures; scenes differ in size and orientation."""
    rng = np.random.default_rng(seed)
    for scene in range(scenes):
        (folder / f"scene_{scene:02d}").mkdir(parents=True)
        height, width = ((20, 20), (12, 20), (24, 16))[scene % 3]
        for frame in range(frames):
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"scene_{scene:02d}" / f"{frame}.png")
    return folder


def folder_source(folder: Path, scenes: int = 12, **fields) -> dict:
    """Scenes on disk, as a configuration describes them."""
    root = write_scenes(folder / "scenes", scenes)
    return {"type": "folder", "root": str(root), "cache_dir": str(folder / "index")} | fields


def batches(folder: Path, cache: Path, **fields) -> SceneBatches:
    processor = Spa3RImageProcessor(patch_size=PATCH, size=5 * PATCH)
    fields = {"views": (2, 4), "pictures_per_batch": 8} | fields
    return SceneBatches(FolderScenes(folder, cache_dir=cache), processor, **fields)


def arguments(output_dir: Path, **fields) -> PretrainingArguments:
    defaults = {"max_steps": 6, "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True}
    defaults |= {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1}
    return PretrainingArguments(output_dir=str(output_dir), **(defaults | fields))


def trainer(
    output_dir: Path, scenes: Path, model=None, callbacks=(), data=None, eval_dataset=None, **fields
) -> PretrainingTrainer:
    torch.manual_seed(0)
    model = model or Spa3RForPreTraining(pretraining_config(**SIZES))
    train_batches = batches(scenes, output_dir.parent / "index", **(data or {}))
    return PretrainingTrainer(model, arguments(output_dir, **fields), train_batches, eval_dataset, callbacks=callbacks)


def write_config(file: Path, parts: dict, source: dict, **training) -> Path:
    """A configuration file for the command."""
    defaults = {"output_dir": str(file.parent / "run"), "max_steps": 6, "save_steps": 2, "logging_steps": 1}
    defaults |= {"use_cpu": True, "gradient_accumulation_steps": 1, "report_to": "none"}
    sections = {
        "model": parts | SIZES,
        "data": {"sources": [source], "views": [2, 4], "pictures_per_device": 8, "image_size": 20, "num_workers": 0},
        "training": defaults | training,
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def prepared(folder: Path, scenes: int = 12, **training) -> Path:
    """A configuration file with its parts and scenes, all in one folder."""
    return write_config(
        folder / "config.yaml", write_parts(folder / "parts"), folder_source(folder, scenes), **training
    )


def command(*arguments, processes: int = 1) -> list[str]:
    """The command line of `spa3r`, of several processes by torchrun."""
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    return [sys.executable, *launcher, "-m", "spa3r", *map(str, arguments)]


def environment(cache: Path, **variables: str) -> dict[str, str]:
    wanted = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)}
    return os.environ | wanted | variables


def run(*arguments, cache: Path, processes: int = 1, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run `spa3r` as a user would; what it has started ends with it, whatever happens."""
    started = subprocess.Popen(
        command(*arguments, processes=processes),
        env=environment(cache, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = started.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    done = subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def same_files(one: Path, other: Path, name: str = "model.safetensors") -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    ours, theirs = load_file(one / name), load_file(other / name)
    assert ours.keys() == theirs.keys() and ours
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
