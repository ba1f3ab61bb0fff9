"""What the steps of the rooms recipe share: rendered rooms in memory, batches of them, the training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from render import ARRAYS, SIZE, VIEWS, object_classes
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.walk import WALK_STEPS, walk_steps
from spa3r.training.checkpoints import load_state, save_state
from spa3r.training.optimizers import MuonAndAdamW, layer_matrices

FIRST_HELD_OUT = 1_000_000
"""Seed of the first room that no step of the recipe trains on."""


@dataclass
class RenderedRooms:
    """Rendered rooms of 16 views each.

    Attributes:
        seeds: Seed of every room.
        images: (R, 16, H, W, 3) uint8.
        depth: (R, 16, H, W) float16, meters.
        instance_ids: (R, 16, H, W) uint8.
        extrinsics: (R, 16, 4, 4) float32, camera-from-room.
        intrinsics: (R, 16, 3, 3) float32, pixels.
        facts: `object_classes` (R, 256) uint8, the class of every instance id, and `heights` (R,) float32, meters; None
            until they are needed.
        ready: (R,) uint8, which rooms are complete while others are being rendered; None: all.
    """

    seeds: np.ndarray
    images: np.ndarray
    depth: np.ndarray
    instance_ids: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray
    facts: tuple[np.ndarray, np.ndarray] | None = None
    ready: np.ndarray | None = None

    @classmethod
    def read(cls, root: Path, limit: int | None = None) -> RenderedRooms:
        """Read the output of `render.py`: the scene folders, or the arrays, which are memory-mapped."""
        if (root / "ready.npy").exists():
            arrays = {name: np.load(root / f"{name}.npy", mmap_mode="r")[:limit] for name in ARRAYS}
            return cls(facts=(arrays.pop("object_classes"), arrays.pop("heights")), **arrays)
        folders = sorted(path for path in root.glob("[0-9]*") if path.is_dir())[:limit]

        def read_one(folder: Path) -> tuple[np.ndarray, ...]:
            cameras = json.loads((folder / "cameras.json").read_text())
            with np.load(folder / "truth.npz") as truth:
                depth, ids = truth["depth"], truth["instance_ids"]
            images = np.stack([np.asarray(PIL.Image.open(folder / name)) for name in cameras])
            poses = (
                np.array([row[key] for row in cameras.values()], np.float32) for key in ("extrinsics", "intrinsics")
            )
            return images, depth, ids, *poses

        columns = [np.empty((len(folders), *part.shape), part.dtype) for part in read_one(folders[0])]
        with ThreadPoolExecutor(2) as pool:
            for index in range(0, len(folders), 100):  # a few at a time: all at once would need twice the memory
                for room, parts in enumerate(pool.map(read_one, folders[index : index + 100]), start=index):
                    for column, part in zip(columns, parts):
                        column[room] = part
        return cls(np.array([int(folder.name) for folder in folders]), *columns)

    @classmethod
    def render(cls, first: int, count: int, level: int = 0, steps: Sequence[int] | None = None) -> RenderedRooms:
        """Render the rooms of so many seeds from `first` on.

        Args:
            first: Seed of the first room.
            count: Number of rooms.
            level: Their level.
            steps: Steps of the walk to render; None: those of the 16 pictures of a room.
        """
        seeds = np.arange(first, first + count)
        rooms = [generate_room(int(seed), level) for seed in seeds]
        views = []
        for room in rooms:
            walk = camera_walk(room, WALK_STEPS, (SIZE, SIZE))
            views.append(render(room, walk[walk_steps(VIEWS) if steps is None else np.array(steps)]))
        names = ("images", "depth", "instance_ids", "extrinsics", "intrinsics")
        arrays = (np.stack([getattr(view, name) for view in views]) for name in names)
        facts = np.stack([object_classes(room) for room in rooms]), np.array([r.size[2] for r in rooms], np.float32)
        return cls(seeds, *arrays, facts=facts)

    @classmethod
    def held_out(cls, count: int, level: int = 0) -> RenderedRooms:
        """Render rooms that are in no training set."""
        return cls.render(FIRST_HELD_OUT, count, level)

    @property
    def num_ready(self) -> int:
        """Number of complete rooms, counted from the first."""
        return len(self.seeds) if self.ready is None else int(np.logical_and.accumulate(self.ready).sum())

    def wait_for(self, rooms: int) -> None:
        """Wait until this many rooms are complete, or all."""
        while self.num_ready < min(rooms, len(self.seeds)):
            time.sleep(0.1)

    def room_facts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `facts`, computed from the rooms' seeds if they are not known."""
        if self.facts is None:
            rooms = [generate_room(int(seed), 0) for seed in self.seeds]
            heights = np.array([room.size[2] for room in rooms], np.float32)
            self.facts = np.stack([object_classes(room) for room in rooms]), heights
        return self.facts

    def draw(self, rng: np.random.Generator, scenes: int, views: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw rooms (scenes,) and frames (scenes, views): a segment of each walk in equal steps, either way."""
        rooms = rng.choice(self.num_ready, scenes, replace=False)
        frames = []
        for _ in range(scenes):
            stride = rng.integers(1, max(1, (VIEWS - 1) // max(1, views - 1)) + 1)
            first = rng.integers(0, VIEWS - stride * (views - 1))
            walk = first + stride * np.arange(views)
            frames.append(walk[::-1] if rng.random() < 0.5 else walk)
        return rooms, np.array(frames)


def pack(images: np.ndarray, patch: int = 14, device: torch.device | str = "cpu") -> dict:
    """Pictures (scenes, views, H, W, 3) uint8 -> the image processor's output for them."""
    scenes, views, height, width, _ = images.shape
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels = (torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255 - mean) / std
    grid = (height // patch, width // patch)
    pixels = pixels.view(scenes * views, grid[0], patch, grid[1], patch, 3).permute(0, 1, 3, 5, 2, 4)
    return {
        "view_pixel_values": pixels.reshape(-1, 3 * patch * patch),
        "view_grid_hw": torch.tensor([grid] * (scenes * views)),
        "views_per_scene": torch.tensor([views] * scenes),
    }


def reduced_precision() -> torch.autocast:
    """Context with matrices in bfloat16, on CPUs that multiply them faster than in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())


def first_camera_world(extrinsics: np.ndarray) -> Tensor:
    """Cameras (scenes, views, 4, 4) in any world frame -> (scenes * views, 4, 4), world = each scene's first camera."""
    extrinsics = extrinsics.astype(np.float64)
    return torch.from_numpy(extrinsics @ np.linalg.inv(extrinsics[:, :1])).float().flatten(0, 1)


def train(
    name: str,
    model: nn.Module,
    step: Callable[[np.random.Generator], dict[str, Tensor]],
    evaluate: Callable[[], dict[str, float]],
    output: Path,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    every: int = 500,
    muon_learning_rate: float | None = None,
    minutes: float = math.inf,
) -> None:
    """Train with AdamW, and with Muon for the matrices of the layers if it has a learning rate.

    The learning rate warms up and then follows a cosine to zero. The loop writes a line of JSON every `every` steps,
    saves its state with it, and resumes from there.

    Args:
        name: Name of the log and of the state.
        model: The model; parameters that require gradients are trained.
        step: Computes the losses of one step, given a random generator.
        evaluate: Computes additional measurements every `every` steps.
        output: Folder of log and state.
        steps: Number of steps.
        learning_rate: Learning rate of AdamW.
        seed: Seed of the random generators.
        every: Steps between two lines of the log.
        muon_learning_rate: Learning rate of Muon; None: AdamW trains all parameters.
        minutes: Time limit. If fewer than `steps` steps fit, the schedule follows the clock and ends in time.
    """
    output.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups, options = [{"params": parameters, "weight_decay": 0.01}], {"lr": learning_rate, "betas": (0.9, 0.98)}
    optimizer = (
        torch.optim.AdamW(groups, **options)
        if muon_learning_rate is None
        else MuonAndAdamW(groups, layer_matrices(model), muon_lr=muon_learning_rate, **options)
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    warm_up = min(500, max(1, steps // 10))
    state_file, start, seconds = output / f"{name}.state.safetensors", 0, 0.0
    if state_file.exists():
        state = load_state(state_file)
        start, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    sums: dict[str, Tensor] = {}
    begun, last, done, share = time.perf_counter() - seconds, start, start, start / steps
    while share < 1:
        factor = min(1, max((done + 1) / warm_up, share / 0.1)) * 0.5 * (1 + math.cos(math.pi * share))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        losses = step(np.random.default_rng([seed, done]))
        loss = sum(losses.values())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if norm.device.type == "cpu" and not norm.isfinite():
            raise FloatingPointError(f"The loss of step {done} is not finite: {losses}.")
        optimizer.step()
        optimizer.zero_grad()
        for key, value in (losses | {"gradient_norm": norm}).items():  # summed on the device: reading would wait
            sums[key] = sums.get(key, 0.0) + value.detach()
        done += 1
        share = max(done / steps, (time.perf_counter() - begun) / 60 / minutes)
        if done % every == 0 or share >= 1:
            measured = {key: value.item() / (done - last) for key, value in sums.items()}
            if not math.isfinite(measured["gradient_norm"]):
                raise FloatingPointError(f"A loss of steps {last + 1} to {done} is not finite: {measured}.")
            model.eval()
            with torch.no_grad():
                row = {"step": done, "minutes": (time.perf_counter() - begun) / 60} | measured | evaluate()
            model.train()
            line = json.dumps({key: round(value, 4) for key, value in row.items()})
            print(line, flush=True)
            with (output / f"{name}.jsonl").open("a") as log:
                log.write(line + "\n")
            sums, last = {}, done
            state = {"step": done, "seconds": time.perf_counter() - begun, "model": dict(model.state_dict())}
            state |= {"optimizer": optimizer.state_dict()}
            save_state(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
