"""Choosing frames of a video: evenly spaced ones against those that differ most, on walks through rooms.

Videos of unseen rooms of level 0, rendered and encoded: an even walk, and the same walk with pauses, in which the
camera stands still at three places for as long as it walks in all. 8 frames are taken with `frames="uniform"` and
`frames="coverage"`. Reported are the share of the walk's objects that are seen in the frames, and the scores of the
embedded Spa3-VLM with the 95 % interval of the difference over rooms. No model is used to choose the frames.

    python benchmarks/frames.py
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
import transformers

from spa3r.answering.engine import AnsweringEngine
from spa3r.media.videos import sample_numbered_frames
from spa3r.rooms import RoomWalk, camera_walk, generate_room, render, room_questions
from spa3r.rooms.embedded import embedded_model
from spa3r.rooms.instructions import FIRST_TEST_SEED
from spa3r.vsi_bench.format import make_prompt
from spa3r.vsi_bench.intervals import difference_intervals
from spa3r.vsi_bench.scoring import aggregate, score_prediction

STEPS, FRAMES = 64, 8
PAUSES = {"even walk": (), "with pauses": (9, 30, 52)}
"""Steps at which the camera stands still."""


def write(path: Path, images: np.ndarray) -> Path:
    """A video with a key frame every 12 frames, as cameras write them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 12
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = AnsweringEngine(*embedded_model())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, av {av.__version__}"
    print(f"{platform.machine()} CPU; {versions}")
    print(f"{args.rooms} unseen rooms, walks of {STEPS} steps, {FRAMES} frames of each video\n")
    print("| video | frames | objects seen | questions | score | coverage - uniform |\n|---|---|---|---|---|---|")
    for video, pauses in PAUSES.items():
        steps = [step for step in range(STEPS) for _ in range(1 + (STEPS // 3) * (step in pauses))]
        lines = {"uniform": [], "coverage": []}
        seen = {"uniform": [], "coverage": []}
        for seed in range(FIRST_TEST_SEED + 700, FIRST_TEST_SEED + 700 + args.rooms):
            room = generate_room(seed)
            cameras = camera_walk(room, STEPS)
            rendered = render(room, cameras)
            rows = room_questions(RoomWalk.from_cameras(room, cameras), 0)
            objects = set(np.unique(rendered.instance_ids).tolist())
            with tempfile.TemporaryDirectory() as folder:
                file = write(Path(folder) / "walk.mp4", rendered.images[steps])
                for choice, own in lines.items():
                    numbers, pictures = sample_numbered_frames(file, FRAMES, frames=choice)
                    views = [steps[number] for number in numbers]
                    found = set(np.unique(rendered.instance_ids[views]).tolist())
                    seen[choice].append(len(found) / len(objects))
                    with torch.no_grad():
                        scene = engine.encode(pictures)
                        answers = engine.ask(scene, [make_prompt(row) for row in rows], max_new_tokens=16)
                    own += [{**row, "score": score_prediction(row, text)} for row, text in zip(rows, answers)]
        low, high = difference_intervals(lines["uniform"], [line["score"] for line in lines["coverage"]])["overall"]
        difference = aggregate(lines["coverage"])["overall"] - aggregate(lines["uniform"])["overall"]
        for choice, own in lines.items():
            told = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})" if choice == "coverage" else ""
            print(
                f"| {video} | {choice} | {100 * np.mean(seen[choice]):.1f} % | {len(own)} "
                f"| {aggregate(own)['overall']:.1f} | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
