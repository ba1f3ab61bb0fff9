"""Pictures a second from JPEG files, and frames a second from a video, against reading and decoding everything.

JPEG: ``reference`` decodes each file, resizes it with Pillow and splits it into patches, step by step; the floor is
decoding alone. Video: ``reference`` decodes and converts all frames, and takes the evenly spaced ones; the floor is
decoding, at the measured rate, of the frames between each wanted one and the key frame before it. Outputs are equal, or
the program ends with an error. Times are CPU seconds on one thread, medians; files are in the page cache.

    python benchmarks/processor.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch
from common import GIB, bandwidth, machine, measure_in_turn, report
from einops import rearrange

from spa3r import Spa3RImageProcessor
from spa3r.media.videos import sample_frames, uniform_indices
from spa3r.rooms import camera_walk, generate_room, render

FPS, KEY_EVERY = 30, 30
"""Frames a second of the video, and frames from one key frame to the next, as phones write them."""


def write_pictures(folder: Path, images: Sequence[np.ndarray], size: tuple[int, int]) -> list[Path]:
    """JPEG files of rendered views, enlarged, with a little noise as cameras have it."""
    rng = np.random.default_rng(0)
    paths = []
    for number, image in enumerate(images):
        large = np.asarray(PIL.Image.fromarray(image).resize(size), np.int16)
        noisy = (large + rng.integers(-3, 4, large.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number:03}.jpg")
        PIL.Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def write_video(path: Path, images: Sequence[np.ndarray], frames: int) -> Path:
    """A video of pans over rendered views."""
    per_image = -(-frames // len(images))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", KEY_EVERY
        for frame in range(frames):
            shifted = np.roll(images[frame // per_image], 2 * (frame % per_image), axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shifted))))
        container.mux(stream.encode(None))
    return path


def plain_views(paths: Sequence[Path], processor: Spa3RImageProcessor) -> torch.Tensor:
    """Decode, resize, rescale, normalize and split into patches; pictures at least as wide as high."""
    patches, p = [], processor.patch_size
    for path in paths:
        picture = PIL.Image.open(path).convert("RGB")
        height = round(picture.height * processor.size / picture.width / p) * p
        resized = picture.resize((processor.size, height), PIL.Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, np.float32) / np.float32(255)
        pixels = (pixels - np.float32(processor.image_mean)) / np.float32(processor.image_std)
        patches.append(rearrange(pixels, "(h p) (w q) c -> (h w) (c p q)", p=p, q=p))
    return torch.from_numpy(np.concatenate(patches))


def decode_pictures(paths: Sequence[Path]) -> None:
    for path in paths:
        PIL.Image.open(path).load()


def plain_frames(path: Path, count: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frames[index] for index in uniform_indices(len(frames), count)]


def decode_video(path: Path) -> None:
    with av.open(str(path)) as container:
        for _ in container.decode(video=0):
            pass


def needed_frames(frames: int, count: int) -> int:
    """Frames between the wanted ones and the key frames before them, those included."""
    return len({f for index in uniform_indices(frames, count) for f in range(index - index % KEY_EVERY, index + 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--size", default="1296x968", help="width x height of a picture")
    parser.add_argument("--frames", type=int, default=600, help="frames of the video, of 640x480")
    parser.add_argument("--take", type=int, nargs="+", default=[8, 32], help="frames taken from it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = tuple(map(int, args.size.split("x")))
    room = generate_room(seed=0, level=2)
    images = render(room, camera_walk(room, 16, size=(480, 640))).images
    copy_rate = bandwidth("cpu")
    print(machine(), f"Pillow {PIL.__version__}, av {av.__version__}", sep=", ")
    print(f"copying: {copy_rate / 1e9:.1f} GB read and written a CPU second")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_pictures(folder, [images[n % len(images)] for n in range(args.pictures)], size)
        processor = Spa3RImageProcessor()
        runs = measure_in_turn(
            {
                "reference": lambda: plain_views(paths, processor),
                "spa3r": lambda: processor([paths])["view_pixel_values"],
                "floor": lambda: decode_pictures(paths),
            },
            args.repeats,
        )
        if not torch.equal(runs["reference"].result, runs["spa3r"].result):
            raise SystemExit("the views of the library and of the reference differ")
        # Resized pixels are read as bytes and written as float32, at least once.
        written = runs["spa3r"].result.numel() * (1 + 4) / copy_rate
        seconds = {row: own.median("cpu") for row, own in runs.items()}
        floor = seconds["floor"] + written
        rows = [
            {
                "": row,
                "pictures a second": args.pictures / seconds[row],
                "peak GiB": runs[row].median("peak") / GIB,
                "time ratio": seconds[row] / seconds["reference"],
                "time / floor": seconds[row] / floor,
            }
            for row in ("reference", "spa3r")
        ]
        report(f"{args.pictures} JPEG files of {args.size} to views of width {processor.size}", rows, args.json)

        video = write_video(folder / "video.mp4", images, args.frames)
        for take in args.take:
            runs = measure_in_turn(
                {
                    "reference": lambda: plain_frames(video, take),  # noqa: B023
                    "spa3r": lambda: sample_frames(video, take),  # noqa: B023
                    "floor": lambda: decode_video(video),
                },
                max(1, args.repeats // 2),
            )
            got = [np.asarray(frame) for frame in runs["spa3r"].result]
            if not all(map(np.array_equal, got, runs["reference"].result)) or len(got) != take:
                raise SystemExit("the frames of the library and of the reference differ")
            seconds = {row: own.median("cpu") for row, own in runs.items()}
            floor = seconds["floor"] * needed_frames(args.frames, take) / args.frames
            rows = [
                {
                    "": row,
                    "frames a second": take / seconds[row],
                    "s": seconds[row],
                    "peak GiB": runs[row].median("peak") / GIB,
                    "time ratio": seconds[row] / seconds["reference"],
                    "time / floor": seconds[row] / floor,
                }
                for row in ("reference", "spa3r")
            ]
            report(f"{take} of {args.frames} frames of a video of 640x480, H.264", rows, args.json)


if __name__ == "__main__":
    main()
