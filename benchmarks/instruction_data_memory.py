"""Host memory of instruction data: 100 000 rows of annotations for videos of 32 frames, read by two workers.

Prints the total memory of the loading process and its workers while rows are decoded: resident (RSS: shared pages
count once per process) and proportional (PSS: they count once). Linux only.

python benchmarks/instruction_data_memory.py
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from spa3r.data import InstructionDataset

VIDEOS = 8


def write_video(path: Path, frames: int = 96, size: tuple[int, int] = (240, 320)) -> None:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        picture = rng.integers(0, 255, (*size, 3), np.uint8)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * index, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def memory(pids: list[int]) -> tuple[float, float]:
    """Total RSS and PSS of processes, MB."""
    totals = {"Rss": 0, "Pss": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in totals:
                totals[name] += int(value.split()[0])
    return totals["Rss"] / 1000, totals["Pss"] / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--decoded", type=int, default=2_000, help="rows whose videos are decoded")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"datasets {datasets.__version__}, PyAV {av.__version__}"
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        datasets.disable_progress_bars()
        for index in range(VIDEOS):
            write_video(folder / f"{index}.mp4")
        with (folder / "rows.jsonl").open("w") as file:
            for index in range(args.rows):
                question = (
                    f"<image>\nThese are frames of a video.\nHow many chairs are in room {index}? " + "word " * 60
                )
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": str(index % 7)}]
                file.write(json.dumps({"conversations": turns, "video": f"{index % VIDEOS}.mp4"}) + "\n")
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        before, begun = memory([os.getpid()]), time.perf_counter()
        data = InstructionDataset(folder / "rows.jsonl", num_frames=32)
        lengths = data.lengths
        after = memory([os.getpid()])
        seconds, rss, pss = time.perf_counter() - begun, after[0] - before[0], after[1] - before[1]
        print(f"{len(data)} rows, {size:.0f} MB of JSON, mean length {lengths.mean():.0f} tokens")
        print(f"opened, and every row read once, in {seconds:.0f} s: RSS +{rss:.0f} MB, PSS +{pss:.0f} MB")
        print(f"\n{args.workers} workers, {args.decoded} rows of 32 frames from all over the file\n")
        print("| rows decoded | RSS of all, MB | of the largest, MB | PSS of all, MB |\n|---|---|---|---|")
        chosen = torch.utils.data.Subset(data, np.linspace(0, len(data) - 1, args.decoded).astype(int).tolist())
        loader = iter(DataLoader(chosen, batch_size=None, num_workers=args.workers))
        pids = [os.getpid(), *(worker.pid for worker in loader._workers)]
        for done, example in enumerate(loader, start=1):
            assert len(example["messages"][0]["content"]) == 33
            if done % max(1, args.decoded // 10) == 0:
                rss, pss = memory(pids)
                largest = max(memory([pid])[0] for pid in pids)
                print(f"| {done} | {rss:.0f} | {largest:.0f} | {pss:.0f} |", flush=True)


if __name__ == "__main__":
    main()
