"""What the steps of the rooms recipe share: rendered rooms in memory, batches of them, the loop around a step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from render import VIEWS, look_around
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from spa3r.rooms import relative_to_first
from spa3r.training.checkpoints import load_state, save_state
from spa3r.training.optimizers import MuonAndAdamW, layer_matrices

FIRST_HELD_OUT = 1_000_000
"""Seed of the first room that no step of the recipe trains on."""


@dataclass
class RenderedRooms:
    """Rooms of 16 views each, as they were rendered.

    Attributes:
        seeds: Of every room.
        images: (R, 16, H, W, 3) uint8.
        depth: (R, 16, H, W) float16, metres.
        instance_ids: (R, 16, H, W) uint8.
        extrinsics: (R, 16, 4, 4) float32, camera-from-room.
        intrinsics: (R, 16, 3, 3) float32, pixels.
    """

    seeds: np.ndarray
    images: np.ndarray
    depth: np.ndarray
    instance_ids: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray

    @classmethod
    def read(cls, root: Path, limit: int | None = None) -> RenderedRooms:
        """All scene folders that `render.py` wrote."""
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
            for index in range(0, len(folders), 100):  # a few at a time: all at once would need the memory twice
                for room, parts in enumerate(pool.map(read_one, folders[index : index + 100]), start=index):
                    for column, part in zip(columns, parts):
                        column[room] = part
        return cls(np.array([int(folder.name) for folder in folders]), *columns)

    @classmethod
    def held_out(cls, count: int, level: int = 0) -> RenderedRooms:
        """Rooms that are in no training set, rendered now."""
        seeds = np.arange(FIRST_HELD_OUT, FIRST_HELD_OUT + count)
        views = [look_around(int(seed), level) for seed in seeds]
        names = ("images", "depth", "instance_ids", "extrinsics", "intrinsics")
        return cls(seeds, *(np.stack([getattr(view, name) for view in views]) for name in names))

    def draw(self, rng: np.random.Generator, scenes: int, views: int) -> tuple[np.ndarray, np.ndarray]:
        """Rooms (scenes,) and frames (scenes, views): a stretch of each walk in equal steps, either way round."""
        rooms = rng.choice(len(self.seeds), scenes, replace=False)
        frames = []
        for _ in range(scenes):
            stride = rng.integers(1, max(1, (VIEWS - 1) // (views - 1)) + 1)
            first = rng.integers(0, VIEWS - stride * (views - 1))
            walk = first + stride * np.arange(views)
            frames.append(walk[::-1] if rng.random() < 0.5 else walk)
        return rooms, np.array(frames)


def pack(images: np.ndarray, patch: int = 14) -> dict:
    """Pictures (scenes, views, H, W, 3) uint8 -> what the image processor gives for them, without its detours."""
    scenes, views, height, width, _ = images.shape
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    pixels = (torch.from_numpy(np.ascontiguousarray(images)).float() / 255 - mean) / std
    grid = (height // patch, width // patch)
    pixels = pixels.view(scenes * views, grid[0], patch, grid[1], patch, 3).permute(0, 1, 3, 5, 2, 4)
    return {
        "view_pixel_values": pixels.reshape(-1, 3 * patch * patch),
        "view_grid_hw": torch.tensor([grid] * (scenes * views)),
        "views_per_scene": torch.tensor([views] * scenes),
    }


def first_camera_world(extrinsics: np.ndarray) -> Tensor:
    """Cameras (scenes, views, 4, 4) of any world -> (scenes * views, 4, 4), world = each scene's first camera."""
    return torch.from_numpy(np.concatenate([relative_to_first(scene) for scene in extrinsics]))


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
) -> None:
    """AdamW, with Muon for the layers' matrices if it has a learning rate; warm-up and a cosine to zero.

    It writes a line of JSON every `every` steps, and goes on where it was stopped.
    """
    output.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups, options = [{"params": parameters, "weight_decay": 0.01}], {"lr": learning_rate, "betas": (0.9, 0.98)}
    optimizer = (
        torch.optim.AdamW(groups, **options)
        if muon_learning_rate is None
        else MuonAndAdamW(groups, layer_matrices(model), muon_lr=muon_learning_rate, **options)
    )
    warm_up = min(500, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * done / steps))
    )
    state_file, start, seconds = output / f"{name}.state.safetensors", 0, 0.0
    if state_file.exists():
        state = load_state(state_file)
        start, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    model.train()
    sums: dict[str, float] = {}
    begun, last = time.perf_counter() - seconds, start
    for done in range(start, steps):
        losses = step(np.random.default_rng([seed, done]))
        loss = sum(losses.values())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            raise FloatingPointError(f"The loss of step {done} is not finite: {losses}.")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        if (done + 1) % every == 0 or done + 1 == steps:
            model.eval()
            with torch.no_grad():
                measured = evaluate()
            model.train()
            row = {"step": done + 1, "minutes": (time.perf_counter() - begun) / 60}
            row |= {key: value / (done + 1 - last) for key, value in sums.items()} | measured
            line = json.dumps({key: round(value, 4) for key, value in row.items()})
            print(line, flush=True)
            with (output / f"{name}.jsonl").open("a") as log:
                log.write(line + "\n")
            sums, last = {}, done + 1
            state = {"step": done + 1, "seconds": time.perf_counter() - begun, "model": dict(model.state_dict())}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save_state(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
