"""Memory of the data: an index of a million pictures, and a long run with several workers.

python benchmarks/data_memory.py

Linux only: memory is what /proc tells. RSS counts what processes share once for each of them, PSS only once.
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
from torch.utils.data import DataLoader

from spa3r import Spa3RImageProcessor
from spa3r.data import FolderScenes, SceneBatches
from spa3r.data.index import SceneIndex

MB = 1e6


def processor() -> str:
    """Name of the CPU."""
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def memory(pid: int, field: str, file: str = "status") -> int:
    """A line of /proc about a process, bytes."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/{pid}/{file} has no {field}")


def family() -> list[int]:
    """This process and its children."""
    pid = os.getpid()
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def many_pictures(scenes: int, pictures: int, cache: str, read: int) -> dict[str, float]:
    """Builds the index of so many scenes and pictures, or opens it, and reads some names; in a process of its own."""
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
    """Stands for the disk: names as they would be found there, sorted."""
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


def show_run(steps: int, workers: int, every: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "scenes")
        root.mkdir()
        write_scenes(root, scenes=200, pictures=20, size=size)
        source = FolderScenes(root, cache_dir=Path(folder, "cache"))
        batches = SceneBatches(source, Spa3RImageProcessor(size=size))
        loader = DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=True)
        print(f"\n{steps} batches of up to 24 pictures of {size} x {size}, {workers} workers, epochs of {len(batches)}")
        print("batches; memory of all processes together, MB:\n")
        print("| batches | pictures | RSS | PSS |")
        print("|---|---|---|---|")
        done = pictures = epoch = 0
        history: list[tuple[float, float]] = []
        while done < steps:
            batches.set_epoch(epoch)
            for batch in loader:
                done, pictures = done + 1, pictures + len(batch["view_grid_hw"])
                if done % every == 0:
                    rss = sum(memory(pid, "VmRSS") for pid in family()) / MB
                    pss = sum(memory(pid, "Pss", "smaps_rollup") for pid in family()) / MB
                    history.append((rss, pss))
                    print(f"| {done} | {pictures} | {rss:.0f} | {pss:.0f} |", flush=True)
                if done == steps:
                    break
            epoch += 1
        growth = [100 * (history[-1][part] / history[0][part] - 1) for part in (0, 1)]
        print(f"\nFrom {every} to {steps} batches: RSS {growth[0]:+.1f} %, PSS {growth[1]:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of the large index")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures of each of them")
    parser.add_argument("--steps", type=int, default=2000, help="batches of the long run")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=int, default=200, help="batches between two measurements")
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
