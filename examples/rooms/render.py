"""Step 1 of the rooms recipe: render rooms to a folder per scene, with their cameras and their truth.

Every scene is a folder that `spa3r pretrain` reads (pictures and a `cameras.json`), and holds beside them what only the
backbone and the teacher are trained on: `truth.npz` with `depth` (V, H, W) float16, metres, and `instance_ids`
(V, H, W) uint8. A scene that is there already is left alone, so the program can be stopped and started again.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image

from spa3r.rooms import RoomViews, camera_walk, generate_room, render

VIEWS = 16
STRIDE = 3
"""Every third frame of a walk: so many show nearly all of a room."""


def look_around(seed: int, level: int, views: int = VIEWS, stride: int = STRIDE, size: int = 112) -> RoomViews:
    """Every `stride`-th frame of a walk through a room."""
    room = generate_room(seed, level)
    return render(room, camera_walk(room, stride * views, size=(size, size))[::stride])


def write_scene(seed: int, level: int, output: Path) -> None:
    """The folder of one room; it appears whole or not at all."""
    folder = output / f"{seed:07d}"
    if folder.exists():
        return
    views = look_around(seed, level)
    unfinished = output / f".{seed:07d}.{os.getpid()}"
    unfinished.mkdir(parents=True, exist_ok=True)
    cameras = {}
    for index, image in enumerate(views.images):
        name = f"{index:03d}.png"
        PIL.Image.fromarray(image).save(unfinished / name, compress_level=1)
        cameras[name] = {
            "extrinsics": views.extrinsics[index].tolist(),
            "intrinsics": views.intrinsics[index].tolist(),
        }
    (unfinished / "cameras.json").write_text(json.dumps(cameras))
    np.savez(
        unfinished / "truth.npz",
        depth=views.depth.astype(np.float16),
        instance_ids=views.instance_ids.astype(np.uint8),
    )
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--first", type=int, default=0, help="seed of the first room")
    parser.add_argument("--rooms", type=int, default=4000)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first, args.first + args.rooms)
    with ProcessPoolExecutor(args.processes) as pool:
        done = pool.map(partial(write_scene, level=args.level, output=args.output), seeds, chunksize=20)
        for count, _ in enumerate(done, start=1):
            if count % 500 == 0 or count == args.rooms:
                print(f"{count} of {args.rooms} rooms in {args.output}", flush=True)


if __name__ == "__main__":
    main()
