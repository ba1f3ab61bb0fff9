"""Videos as lists of pictures: uniformly sampled frames, upright, with the file closed again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import PIL.Image


def default_num_frames(seconds: float, lowest: int = 4, highest: int = 8, seconds_per_frame: float = 2.0) -> int:
    """Frames that instruction tuning takes of a video: clamp(round(seconds / seconds_per_frame), lowest, highest)."""
    return min(max(round(seconds / seconds_per_frame), lowest), highest)


def uniform_indices(count: int, num_frames: int) -> np.ndarray:
    """``linspace(0, count - 1, num_frames)``, cut to integers; a short video repeats frames."""
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    return np.linspace(0, count - 1, num_frames).astype(int)


def sample_frames(video: str | Path, num_frames: int | Callable[[float], int] | None = None) -> list[PIL.Image.Image]:
    """Uniformly sampled frames of a video, first and last included.

    Frames are decoded one by one and only the wanted ones are kept, so memory doesn't grow with the video.

    Args:
        video: A file or URL.
        num_frames: How many frames, or a function that says so for a length in seconds; None:
            :func:`default_num_frames`.

    Raises:
        ValueError: The file can't be opened or holds no frames, or `num_frames` is less than 1.
    """
    return sample_numbered_frames(video, num_frames)[1]


def sample_numbered_frames(
    video: str | Path, num_frames: int | Callable[[float], int] | None = None, whole: bool = False
) -> tuple[list[int], list[PIL.Image.Image]]:
    """As :func:`sample_frames`, with the frames' numbers, from 0.

    Args:
        video: A file or URL.
        num_frames: As there.
        whole: Refuse a video that breaks off before as many frames as its header promises.

    Raises:
        ValueError: As there; or the video breaks off, and must be whole.
    """
    with _named_errors(video):
        count, seconds, promised = _length(str(video))
        if whole and count < promised:
            raise ValueError(
                f"The video {video} breaks off: it must hold {promised} frames, as its header says, and holds {count}. "
                "Fetch it again."
            )
        if not isinstance(num_frames, int):
            num_frames = (num_frames or default_num_frames)(seconds)
        indices = uniform_indices(count, num_frames) if count else np.empty(0, int)
        frames, decoded = _decode(str(video), set(indices.tolist()))
        if count and decoded <= indices[-1]:  # not every packet gave a frame
            indices = uniform_indices(decoded, num_frames) if decoded else np.empty(0, int)
            frames, _ = _decode(str(video), set(indices.tolist()))
    if not len(indices):
        raise _no_frames(video)
    numbers = indices.tolist()
    return numbers, [frames[number] for number in numbers]


def count_frames(video: str | Path) -> int:
    """How many frames a video has. Reads the whole file and decodes nothing.

    Raises:
        ValueError: The file can't be opened or holds no frames.
    """
    with _named_errors(video):
        count, _, _ = _length(str(video))
    if not count:
        raise _no_frames(video)
    return count


def read_frames(video: str | Path, indices: Iterable[int]) -> dict[int, PIL.Image.Image]:
    """Frames of a video by number. Where the container tells every frame's time, it is decoded from the nearest key
    frames only.

    Args:
        video: A file or URL.
        indices: Which frames, from 0, in the order in which they are shown.

    Returns:
        The frames by number; those that can't be decoded are missing.

    Raises:
        ValueError: The file can't be opened or holds no frames.
    """
    wanted = sorted({int(index) for index in indices})
    with _named_errors(video):
        times, key_times = _frame_times(str(video))
        if not times:
            raise _no_frames(video)
        frames = {}
        if None not in times and len(set(times)) == len(times) and key_times:
            frames = _decode_near(str(video), [index for index in wanted if index < len(times)], times, key_times)
        return frames or _decode(str(video), set(wanted))[0]


@contextmanager
def _named_errors(video: str | Path) -> Iterator[None]:
    """What goes wrong with a file, with its name and a cure."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"The video {video} doesn't exist. Check the path.") from error
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"The video {video} can't be decoded ({error}). It is damaged or no video: leave it out or convert it."
        ) from error


def _no_frames(video: str | Path) -> ValueError:
    return ValueError(f"The video {video} holds no frames. Leave it out, or record it again.")


def _frame_times(path: str) -> tuple[list[int], list[int]]:
    """When each frame is shown, in the stream's time base, ascending; and of the key frames only."""
    with av.open(path) as container:
        if not container.streams.video:
            return [], []
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(container.streams.video[0])
            if packet.size > 0 and not packet.is_discard
        ]
    times = [time for time, _ in packets]
    if None in times:
        return times, []
    return sorted(times), sorted(time for time, is_key in packets if is_key)


def _decode_near(path: str, wanted: list[int], times: list[int], key_times: list[int]) -> dict[int, PIL.Image.Image]:
    """The wanted frames, each decoded from the last key frame before it, or from the last wanted frame if that is
    nearer."""
    frames: dict[int, PIL.Image.Image] = {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoded, position = _tolerant_decode(container, stream), None
        for index in wanted:
            key = key_times[max(0, bisect_right(key_times, times[index]) - 1)]
            if position is None or key > position:
                container.seek(key, stream=stream)
                decoded = _tolerant_decode(container, stream)
            for frame in decoded:
                position = frame.pts if frame.pts is not None else position
                if frame.pts == times[index] and not frame.is_corrupt:
                    frames[index] = _upright(frame)
                if position is not None and position >= times[index]:
                    break
    return frames


def _tolerant_decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames of what can be decoded."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def _upright(frame: av.VideoFrame) -> PIL.Image.Image:
    """A phone held upright writes lying frames and the angle to turn them by."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def _length(path: str) -> tuple[int, float, int]:
    """Number of frames, by counting packets (some containers name none or a wrong number), seconds, and the number of
    frames that the header names; 0 where it names none."""
    with av.open(path) as container:
        if not container.streams.video:
            return 0, 0.0, 0
        stream = container.streams.video[0]
        count = sum(packet.size > 0 for packet in container.demux(stream))
        if stream.duration is not None:
            return count, float(stream.duration * stream.time_base), stream.frames
        return count, count / float(stream.average_rate or 30), stream.frames


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
                frames[index] = _upright(frame)
                if len(frames) == len(wanted):
                    break
    return frames, decoded
