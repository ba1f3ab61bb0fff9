"""Checkpoints that are whole or not there: states without pickles, folders that appear at once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

UNFINISHED = ".unfinished"
"""Subfolder of a run in which files are written before they are moved to their places. Left over after a kill, it is
removed by the next run."""

LAST_FILE = "trainer_state.json"
"""What is written last into a checkpoint: a folder without it is none."""


def save_state(state: Any, file: str | Path) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings and None to one safetensors file.

    Tensors are stored as such; the rest is JSON in the file's metadata. Numbers and keys come back as they were.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [plain(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"A state may hold tensors, numbers, strings, None and containers of these, got {type(value)}.")

    text = json.dumps(plain(state))
    save_file(tensors, file, metadata={"state": text})


def load_state(file: str | Path) -> Any:
    """What :func:`save_state` wrote, on the CPU."""
    with safe_open(file, framework="pt") as content:

        def restored(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            ((kind, item),) = value.items()
            if kind == "tensor":
                return content.get_tensor(item)
            if kind == "dict":
                return {restored(key): restored(entry) for key, entry in item}
            return (list if kind == "list" else tuple)(restored(entry) for entry in item)

        return restored(json.loads(content.metadata()["state"]))


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators, of the accelerator at hand too."""
    _, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": ("MT19937", torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        state[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where :func:`random_state` saw them."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in state:
        torch.get_device_module(accelerator).set_rng_state(state[accelerator.type])


def unfinished_folder(output_dir: str | Path) -> Path:
    """Where what isn't whole yet is written, on the same file system as its place."""
    return Path(output_dir) / UNFINISHED


def publish(written: Path, place: Path) -> None:
    """Move a file or folder to its place at once, after all of it has reached the disk.

    What was there before is replaced. A kill or a loss of power at any moment leaves the old, the new, or, between a
    folder and its successor, neither; never a part.
    """
    for file in [written, *written.rglob("*")] if written.is_dir() else [written]:
        _sync(file)
    if place.is_dir():
        replaced = written.parent / f"replaced-{place.name}"
        os.replace(place, replaced)
        os.replace(written, place)
        shutil.rmtree(replaced)
    else:
        os.replace(written, place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems sync no folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if (path / LAST_FILE).is_file())
    numbered = ((path.name.removeprefix("checkpoint-"), path) for path in found)
    return [path for _, path in sorted((int(step), path) for step, path in numbered if step.isdecimal())]


def remove_unfinished(output_dir: str | Path) -> bool:
    """Delete what a killed run left half-written; False if there is nothing."""
    folder = unfinished_folder(output_dir)
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


@contextmanager
def writing_into(output_dir: str | Path) -> Iterator[Path]:
    """An empty folder for what is to be published into `output_dir`; gone afterwards."""
    folder = unfinished_folder(output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
