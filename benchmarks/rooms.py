"""Speed of the rooms: views per second of generating, walking and rendering, level by level.

python benchmarks/rooms.py
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import version

from spa3r.rooms import LEVELS, camera_walk, generate_room, render


def processor() -> str:
    """Name of the CPU if the system reports it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", type=int, default=8, help="rooms of every level")
    parser.add_argument("--views", type=int, default=32, help="views of every room")
    parser.add_argument("--size", type=int, nargs=2, default=(112, 112), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    size = tuple(args.size)

    print(f"{processor()}, {os.cpu_count()} cores (one thread used), {platform.system()}")
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, embreex {version('embreex')}")
    print(f"{args.rooms} rooms a level, {args.views} views of {size[0]} x {size[1]} each; views per second:\n")
    print("| level | antialias | room + walk + render | render alone | ms a room | ms a walk |")
    print("|---|---|---|---|---|---|")
    render(generate_room(0), camera_walk(generate_room(0), 1))  # lazy loading on first use is not measured
    for level in range(len(LEVELS)):
        for antialias in (1, 2):
            drawing = walking = rendering = 0.0
            for seed in range(args.rooms):
                start = time.perf_counter()
                room = generate_room(seed, level)
                drawn = time.perf_counter()
                cameras = camera_walk(room, args.views, size)
                walked = time.perf_counter()
                render(room, cameras, antialias)
                rendering += time.perf_counter() - walked
                walking += walked - drawn
                drawing += drawn - start
            views = args.rooms * args.views
            print(
                f"| {level} | {antialias} | {views / (drawing + walking + rendering):.0f} | {views / rendering:.0f} "
                f"| {1e3 * drawing / args.rooms:.0f} | {1e3 * walking / args.rooms:.0f} |"
            )


if __name__ == "__main__":
    main()
