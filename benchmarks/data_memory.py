"""Host memory: an index of a million pictures, and a long pretraining with several workers.

python benchmarks/data_memory.py

Linux only: memory is read from /proc. RSS counts shared pages once per process, PSS only once.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel, TrainerCallback

from spa3r import VggtConfig, VggtModel
from spa3r.data.index import SceneIndex
from spa3r.training import PretrainingConfig, pretrain

MB = 1e6


def processor() -> str:
    """Name of the CPU."""
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def memory(pid: int, field: str, file: str = "status") -> int:
    """A field of /proc about a process, in bytes."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/{pid}/{file} has no {field}")


def family() -> list[int]:
    """This process and its children."""
    pid = os.getpid()
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def many_pictures(scenes: int, pictures: int, cache: str, read: int) -> dict[str, float]:
    """Build or open the index of so many scenes and pictures, and read some names; in its own process."""
    import pyarrow  # noqa: F401  what the library itself takes is not counted

    entries = [(f"scene{scene:04d}_00", f"/data/scannet/scans/scene{scene:04d}_00/color") for scene in range(scenes)]
    before, start = memory(os.getpid(), "VmRSS"), time.perf_counter()
    index = SceneIndex.build(["benchmark"], entries, lambda folder: list_folder(folder, pictures), cache)
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    for scene, picture in zip(rng.integers(scenes, size=read).tolist(), rng.integers(pictures, size=read).tolist()):
        assert index.picture(scene, picture)
    return {
        "seconds": seconds,
        "peak": memory(os.getpid(), "VmHWM") - before,
        "after": memory(os.getpid(), "VmRSS") - before,
        "file": os.path.getsize(index.file),
        "pictures": int(index.counts.sum()),
    }


def list_folder(folder: str, pictures: int) -> tuple[list[str], int]:
    """Simulates the disk: sorted names as they would be listed there."""
    return [f"frame-{picture:06d}.color.jpg" for picture in range(pictures)], pictures


def alone(function, *args) -> dict[str, float]:
    """The result of a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def show_index(scenes: int, pictures: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        print(f"Index of {scenes * pictures:,} pictures in {scenes:,} scenes; memory beyond the imports, MB:\n")
        print("| | seconds | highest RSS | RSS after 100,000 names were read | file |")
        print("|---|---|---|---|---|")
        for what in ("built", "opened again"):
            found = alone(many_pictures, scenes, pictures, cache, 100_000)
            assert found["pictures"] == scenes * pictures
            print(
                f"| {what} | {found['seconds']:.1f} | {found['peak'] / MB:.0f} | {found['after'] / MB:.0f} "
                f"| {found['file'] / MB:.0f} |",
                flush=True,
            )


def write_scenes(root: Path, scenes: int, pictures: int, size: int) -> None:
    """Folders of small JPEGs."""
    rng = np.random.default_rng(0)
    for scene in range(scenes):
        folder = root / f"scene{scene:04d}"
        folder.mkdir()
        for picture in range(pictures):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{picture}.jpg")


class MemoryRows(TrainerCallback):
    """A row of memory use every `every` steps."""

    def __init__(self, every: int):
        self.every, self.history = every, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Trainer's hook."""
        if state.global_step % self.every == 0:
            rss = sum(memory(pid, "VmRSS") for pid in family()) / MB
            pss = sum(memory(pid, "Pss", "smaps_rollup") for pid in family()) / MB
            self.history.append((rss, pss))
            print(f"| {state.global_step} | {rss:.0f} | {pss:.0f} |", flush=True)


def write_parts(folder: Path, size: int) -> dict[str, str]:
    """A tiny random backbone and teacher."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    fields = {"patch_embedding_num_layers": 1, "patch_embedding_num_heads": 2, "camera_num_layers": 1}
    vggt = VggtConfig(**sizes, **fields, image_size=size, camera_num_heads=2, heads=["camera"])
    VggtModel(vggt).save_pretrained(folder / "backbone")
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, intermediate_size=64)).save_pretrained(folder / "semantic_teacher")
    return {name: str(folder / name) for name in ("backbone", "semantic_teacher")}


def show_run(steps: int, workers: int, every: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "scenes")
        root.mkdir()
        write_scenes(root, scenes=200, pictures=20, size=size)
        tiny = {"hidden_size": 32, "num_attention_heads": 2, "num_latents": 8}
        layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
        source = {"type": "folder", "root": str(root), "cache_dir": str(Path(folder, "cache"))}
        training = {"output_dir": str(Path(folder, "run")), "max_steps": steps, "gradient_accumulation_steps": 1}
        config = PretrainingConfig.from_dict(
            {
                "model": write_parts(Path(folder), size // 2) | tiny | layers,
                "data": {"sources": [source], "image_size": size // 2, "num_workers": workers},
                "training": training | {"use_cpu": True, "report_to": "none", "save_steps": 500},
            }
        )
        print(
            f"\n{steps} steps of pretraining a tiny model, up to 24 pictures of {size} x {size} each, "
            f"{workers} workers;"
        )
        print("memory of all processes together, MB:\n")
        print("| steps | RSS | PSS |")
        print("|---|---|---|")
        rows = MemoryRows(every)
        pretrain(config, callbacks=[rows])
        growth = [100 * (rows.history[-1][part] / rows.history[0][part] - 1) for part in (0, 1)]
        print(f"\nFrom {every} to {steps} steps: RSS {growth[0]:+.1f} %, PSS {growth[1]:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of the large index")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of each of them")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the long run")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=int, default=200, help="steps between two measurements")
    parser.add_argument("--size", type=int, default=112, help="side of the pictures")
    args = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("This program reads /proc, which only Linux has.")

    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()}")
    print(
        f"Python {platform.python_version()}, torch {version('torch')}, pyarrow {version('pyarrow')}, "
        f"pillow {version('pillow')}\n"
    )
    show_index(args.scenes, args.pictures)
    show_run(args.steps, args.workers, args.every, args.size)


if __name__ == "__main__":
    main()
