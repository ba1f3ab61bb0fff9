"""Step 1 of the rooms recipe: render rooms with cameras and ground truth.

Without `--arrays`, every scene is a folder that `spa3r pretrain` reads (pictures and a `cameras.json`). It also holds
`truth.npz`, which is used only to train the backbone and the teacher: `depth` (V, H, W) float16, meters, and
`instance_ids` (V, H, W) uint8. Existing scenes are skipped, so the program can be stopped and started again.

With `--arrays`, all scenes share a few `.npy` files, which can be read by a GPU training while they are being written.
`common.RenderedRooms` describes both forms.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image

from spa3r.rooms import FURNITURE, Room, RoomViews, generate_room, look_around, render
from spa3r.rooms.walk import WALK_VIEWS

VIEWS = WALK_VIEWS
"""Pictures of a room: all that its questions may be about."""

SIZE = 112
"""Height and width of a view, pixels."""

CLASSES = (*FURNITURE, "wall", "floor", "ceiling")
"""The classes of pixels."""

ARRAYS = {
    "images": ("uint8", (VIEWS, SIZE, SIZE, 3)),
    "depth": ("float16", (VIEWS, SIZE, SIZE)),
    "instance_ids": ("uint8", (VIEWS, SIZE, SIZE)),
    "extrinsics": ("float32", (VIEWS, 4, 4)),
    "intrinsics": ("float32", (VIEWS, 3, 3)),
    "object_classes": ("uint8", (256,)),
    "heights": ("float32", ()),
    "seeds": ("int64", ()),
    "ready": ("uint8", ()),
}
"""Type and shape of a room's entry in every file of `--arrays`; `ready` is 1 for a room that is complete."""


def rendered(seed: int, level: int) -> RoomViews:
    """The pictures of a room."""
    room = generate_room(seed, level)
    return render(room, look_around(room, VIEWS, (SIZE, SIZE)))


def write_scene(seed: int, level: int, output: Path) -> None:
    """Write the folder of one room atomically."""
    folder = output / f"{seed:07d}"
    if folder.exists():
        return
    views = rendered(seed, level)
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


def object_classes(room: Room) -> np.ndarray:  # -> (256,) uint8
    """The class of every instance id of a room, as an index into `CLASSES`. Id 0, the background, has none and is 0."""
    classes = np.zeros(256, np.uint8)
    classes[1 : 1 + len(room.objects)] = [CLASSES.index(item.name) for item in room.objects]
    return classes


def create_arrays(output: Path, rooms: int) -> None:
    """Create empty files for `rooms` rooms. Existing files with the same shape are kept."""
    for name, (dtype, shape) in ARRAYS.items():
        file, shape = output / f"{name}.npy", (rooms, *shape)
        if not file.exists():
            np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
        elif (found := np.load(file, mmap_mode="r").shape) != shape:
            raise ValueError(f"{file} holds an array of shape {found}, wanted {shape}: give another folder.")


def write_row(row: int, first: int, level: int, output: Path) -> None:
    """Write the entry of one room into the files of `create_arrays`; `ready` is set last."""
    arrays = {name: np.load(output / f"{name}.npy", mmap_mode="r+") for name in ARRAYS}
    if arrays["ready"][row]:
        return
    seed = first + row
    views = rendered(seed, level)
    room = generate_room(seed, level)
    for name in ("images", "depth", "instance_ids", "extrinsics", "intrinsics"):
        arrays[name][row] = getattr(views, name)
    arrays["object_classes"][row], arrays["heights"][row], arrays["seeds"][row] = (
        object_classes(room),
        room.size[2],
        seed,
    )
    arrays["ready"][row] = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--first", type=int, default=0, help="seed of the first room")
    parser.add_argument("--rooms", type=int, default=4000)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--arrays", action="store_true", help="write a few large files instead of folders")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.arrays:
        create_arrays(args.output, args.rooms)
        write, rooms = partial(write_row, first=args.first), range(args.rooms)
    else:
        write, rooms = write_scene, range(args.first, args.first + args.rooms)
    with ProcessPoolExecutor(args.processes) as pool:
        done = pool.map(partial(write, level=args.level, output=args.output), rooms, chunksize=20)
        for count, _ in enumerate(done, start=1):
            if count % 500 == 0 or count == args.rooms:
                print(f"{count} of {args.rooms} rooms in {args.output}", flush=True)


if __name__ == "__main__":
    main()
