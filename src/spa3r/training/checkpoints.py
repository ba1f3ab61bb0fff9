"""Atomic checkpoints: states without pickles, and folders that are complete or absent."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spa3r.disk import read_json_object, sha256_of, write_whole, writing

UNFINISHED = ".unfinished"
"""Subfolder of a run in which files are written before they are moved to their final place. The next run removes it
if a kill left it behind."""

LAST_FILE = "trainer_state.json"
"""The file that transformers writes last: a folder without it is not a checkpoint."""

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.safetensors"

CHECKSUMS_FILE = "checksums.json"
"""SHA-256 of every other file of a checkpoint, except the state, which has its own checksum."""

DAMAGED = "damaged-"
"""Prefix of a checkpoint that can't be resumed: such folders are neither searched nor deleted."""


def save_state(state: Any, file: str | Path) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings and None to one safetensors file.

    Tensors are stored as tensors; the rest is JSON in the file's metadata, with its checksum. Numbers and keys are
    restored exactly.

    Raises:
        OSError: The file can't be written.
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
    with writing(file):
        save_file(tensors, file, metadata={"state": text, "crc32": _crc32(text)})


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def load_state(file: str | Path) -> Any:
    """Load the state that :func:`save_state` wrote, on the CPU.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return _load_state(file)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Resume from another checkpoint.") from error


def _load_state(file: str | Path) -> Any:
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        text = metadata["state"]
        if metadata.get("crc32", checksum := _crc32(text)) != checksum:  # older files have no checksum
            raise ValueError("its checksum is another one")

        def restored(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            ((kind, item),) = value.items()
            if kind == "tensor":
                return content.get_tensor(item)
            if kind == "dict":
                return {restored(key): restored(entry) for key, entry in item}
            return (list if kind == "list" else tuple)(restored(entry) for entry in item)

        return restored(json.loads(text))


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, PyTorch, and the current accelerator."""
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state = {
        "python": random.getstate(),
        "numpy": ("MT19937", keys, numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]),
        "torch": torch.get_rng_state(),
    }
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        state[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators to the states that :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in state:
        torch.get_device_module(accelerator).set_rng_state(state[accelerator.type])


def publish(written: Path, place: Path) -> None:
    """Move a file or folder to its place atomically, after all of it has been flushed to disk.

    An existing file or folder is replaced. A kill or a power loss at any moment leaves the old one, the new one, or,
    while a folder is being replaced, neither; never a part.
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
    except OSError:  # Windows can't open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems can't sync folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; :func:`newest_intact` checks whether they are damaged."""
    return [path for path in _folders_in(output_dir) if (path / LAST_FILE).is_file()]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The last finished checkpoint of a run, or None."""
    return next(reversed(checkpoints_in(output_dir)), None)


def _folders_in(output_dir: str | Path) -> list[Path]:
    numbered = ((path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*"))
    return [path for _, path in sorted((int(step), path) for step, path in numbered if step.isdecimal())]


def write_checksums(checkpoint: Path) -> None:
    """Write the checksums of the files of a checkpoint, for :func:`fault_of`."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != STATE_FILE)
    sums = {file.relative_to(checkpoint).as_posix(): sha256_of(file) for file in files}
    write_whole(checkpoint / CHECKSUMS_FILE, json.dumps(sums, indent=1))


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be resumed, such as ``model.safetensors is missing``; None: it is intact.

    Checkpoints of older versions have no checksums: only the files themselves are checked.

    Raises:
        PermissionError: A file is not readable, which is not damage.
    """
    try:
        sums = checkpoint / CHECKSUMS_FILE
        wanted = read_json_object(sums, "checksums", "") if sums.is_file() else {}
        files = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
        # accelerate's formats: folders of shards, or complete FSDP states side by side
        is_sharded = any(path.is_dir() or path.name == "pytorch_model_fsdp.bin" for path in checkpoint.iterdir())
        needed = [LAST_FILE, STATE_FILE, *([] if is_sharded else [OPTIMIZER_FILE]), *wanted]
        if missing := next((name for name in needed if name not in files), None):
            return f"{missing} is missing"
        if not is_sharded and not any(name.endswith("model.safetensors") or "model-" in name for name in files):
            return "the weights are missing"
        for name in sorted(files):
            if name in wanted and wanted[name] != sha256_of(checkpoint / name):
                return f"{name} is cut or changed"
            if name not in wanted and name.endswith(".safetensors"):
                with safe_open(checkpoint / name, framework="pt") as content:
                    content.keys()
        read_json_object(checkpoint / LAST_FILE, "the state", "")["global_step"]
        load_state(checkpoint / STATE_FILE)
    except PermissionError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest_intact(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint, and the faults of the newer ones.

    Raises:
        ValueError: There are checkpoints, but none is intact.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(_folders_in(output_dir)):
        if (fault := fault_of(folder)) is None:
            return folder, damaged
        damaged[folder] = fault
    if damaged:
        faults = "; ".join(f"{folder.name}: {fault}" for folder, fault in damaged.items())
        raise ValueError(
            f"No checkpoint in {output_dir} is intact ({faults}). Put an undamaged copy back, or start over in another "
            "folder or with --fresh, which deletes the run."
        )
    return None, {}


def set_aside(checkpoint: Path, fault: str) -> str:
    """Rename a damaged checkpoint so that new ones can take its place; returns a message for the user."""
    place = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(checkpoint, place)
    return (
        f"{checkpoint.name} is damaged ({fault}) and was renamed to {place.name}; the run resumes from the newest "
        "intact checkpoint before it"
    )


def remove_unfinished(output_dir: str | Path) -> bool:
    """Delete the incomplete files of a killed run; False if there are none."""
    folder = Path(output_dir) / UNFINISHED
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


@contextmanager
def writing_into(output_dir: str | Path) -> Generator[Path]:
    """An empty folder for files that will be published into `output_dir`; it is removed afterwards."""
    folder = Path(output_dir) / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
