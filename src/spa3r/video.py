"""Videos as lists of pictures: uniformly sampled frames, upright, with the file closed again."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import PIL.Image


def default_num_frames(seconds: float) -> int:
    """Frames that instruction tuning takes of a video: clamp(round(seconds / 2), 4, 8)."""
    return min(max(round(seconds / 2), 4), 8)


def uniform_indices(count: int, num_frames: int) -> np.ndarray:
    """``linspace(0, count - 1, num_frames)``, cut to integers; a short video repeats frames."""
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    return np.linspace(0, count - 1, num_frames).astype(int)


def sample_frames(video: str | Path, num_frames: int | None = None) -> list[PIL.Image.Image]:
    """Uniformly sampled frames of a video, first and last included.

    Frames are decoded one by one and only the wanted ones are kept, so memory doesn't grow with the video.

    Args:
        video: A file or URL.
        num_frames: How many frames; None: by the length, :func:`default_num_frames`.

    Raises:
        ValueError: The file can't be opened or holds no frames, or `num_frames` is less than 1.
    """
    try:
        count, seconds = _length(str(video))
        num_frames = default_num_frames(seconds) if num_frames is None else num_frames
        indices = uniform_indices(count, num_frames) if count else np.empty(0, int)
        frames, decoded = _decode(str(video), set(indices.tolist()))
        if count and decoded <= indices[-1]:  # not every packet gave a frame
            indices = uniform_indices(decoded, num_frames) if decoded else np.empty(0, int)
            frames, _ = _decode(str(video), set(indices.tolist()))
    except FileNotFoundError as error:
        raise ValueError(f"The video {video} doesn't exist. Check the path.") from error
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"The video {video} can't be decoded ({error}). It is damaged or no video: leave it out or convert it."
        ) from error
    if not len(indices):
        raise ValueError(f"The video {video} holds no frames. Leave it out, or record it again.")
    return [frames[index] for index in indices.tolist()]


def _length(path: str) -> tuple[int, float]:
    """Number of frames, by counting packets (some containers name none or a wrong number), and seconds."""
    with av.open(path) as container:
        if not container.streams.video:
            return 0, 0.0
        stream = container.streams.video[0]
        count = sum(packet.size > 0 for packet in container.demux(stream))
        if stream.duration is not None:
            return count, float(stream.duration * stream.time_base)
        return count, count / float(stream.average_rate or 30)


def _decode(path: str, wanted: set[int]) -> tuple[dict[int, PIL.Image.Image], int]:
    """The wanted frames, and how many were decoded on the way to the last of them."""
    frames: dict[int, PIL.Image.Image] = {}
    decoded = 0
    if not wanted:
        return frames, decoded
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            decoded = index + 1
            if index in wanted:
                # A phone held upright writes lying frames and the angle to turn them by.
                frames[index] = frame.to_image().rotate(frame.rotation, expand=True)
                if len(frames) == len(wanted):
                    break
    return frames, decoded
