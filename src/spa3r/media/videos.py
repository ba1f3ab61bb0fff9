"""Videos as lists of pictures: frames by number, upright, out of real media files only.

Who may give a video may be anybody. So only containers of :data:`FORMATS` are opened, and of them only the file itself:
playlists, which name other files, are refused. Reading is limited by :data:`MAX_SECONDS`, :data:`MAX_FRAMES` and
:data:`MAX_PIXELS`; set them, as attributes of this module, where videos are trusted.

Decoding runs in the caller's thread alone. As soon as any library sets PyAV's log level (torchvision 0.25 does when it
is imported), the threads of a decoder that report damage wait for Python's lock, and whoever holds the lock waits for
them. Besides, what several threads make of a damaged video differs from run to run.
"""

from __future__ import annotations

import io
import math
import operator
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import PIL.Image
from transformers.utils import logging

from spa3r.media.files import describe, is_url, local_path, regular_file, shortened

logger = logging.get_logger(__name__)

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,gif"
"""FFmpeg's names of the containers that are read; none of them names other files."""

MAX_FRAMES = 1024
"""Most frames that are taken of a video."""

MAX_PIXELS = 2**31
"""Most pixels of all frames together that are taken of a video: about 1000 frames of 1920 x 1080."""

MAX_FRAME_PIXELS = 2**27
"""Most pixels of a frame."""

MAX_SECONDS = 120.0
"""Longest time that a video is read."""

MAX_PACKETS = 2**23
"""Most frames that a video may have: 38 hours at 60 a second."""


def default_num_frames(seconds: float, lowest: int = 4, highest: int = 8, seconds_per_frame: float = 2.0) -> int:
    """Frames that instruction tuning takes of a video: clamp(round(seconds / seconds_per_frame), lowest, highest)."""
    return min(max(round(seconds / seconds_per_frame), lowest), highest)


def uniform_indices(count: int, num_frames: int) -> np.ndarray:
    """``linspace(0, count - 1, num_frames)``, cut to integers; a short video repeats frames.

    Raises:
        ValueError: `num_frames` is no whole number from 1 to :data:`MAX_FRAMES`.
    """
    return np.linspace(0, count - 1, _checked_number("num_frames", num_frames)).astype(int)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken: uniformly, first and last of the part included.

    Attributes:
        num_frames: How many, or a function that says so for a length in seconds; a shorter video repeats frames.
        fps: Frames for a second of the video, at most those that there are; instead of `num_frames`.
        min_frames: Fewest frames if `fps` or the length decides, as far as there are so many.
        max_frames: Most frames if `fps` or the length decides.
        video_start: Where the part begins, in seconds from the first frame; None: at the first frame.
        video_end: Where the part ends; None, or beyond the last frame: at the last frame.

    Raises:
        ValueError: A value is out of its range, or two contradict each other.
    """

    num_frames: int | Callable[[float], int] | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self):
        for name in ("num_frames", "min_frames", "max_frames"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                _checked_number(name, getattr(self, name))
        for name, least in (("fps", "more than 0"), ("video_start", "0 or more"), ("video_end", "more than 0")):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and name != "video_start"):
                raise ValueError(f"`{name}` must be a finite number, {least}, got {shortened(repr(value))}.")
        if self.num_frames is not None:
            if others := [name for name in ("fps", "min_frames", "max_frames") if getattr(self, name) is not None]:
                raise ValueError(
                    f"`num_frames` (`nframes`) must be given without `{'`, `'.join(others)}`: both say how many frames "
                    "are taken. Leave one of them out."
                )
        if None not in (self.min_frames, self.max_frames) and self.min_frames > self.max_frames:
            raise ValueError(f"`min_frames` must be at most `max_frames`, got {self.min_frames} and {self.max_frames}.")
        if None not in (self.video_start, self.video_end) and self.video_start >= self.video_end:
            raise ValueError(
                f"`video_start` must be less than `video_end`, got {self.video_start} and {self.video_end} seconds."
            )

    @property
    def needs_times(self) -> bool:
        """Whether the frames' times matter."""
        return any(value is not None for value in (self.fps, self.video_start, self.video_end))

    def indices(self, starts: np.ndarray, seconds: float) -> np.ndarray:
        """The numbers of the frames taken.

        Args:
            starts: When each frame is shown, in seconds from the first, ascending; at least one.
            seconds: Length of the video.

        Returns:
            (frames taken,) ascending.

        Raises:
            ValueError: The part holds no frame, or `fps` asks for too many.
        """
        first = 0 if self.video_start is None else int(np.searchsorted(starts, self.video_start - 1e-6))
        stop = len(starts) if self.video_end is None else int(np.searchsorted(starts, self.video_end + 1e-6))
        if first >= stop:
            raise ValueError(
                f"no frame lies from `video_start` = {self.video_start or 0} to `video_end` = {self.video_end} "
                f"seconds: the last of {len(starts)} is shown at {starts[-1]:.2f} seconds. Give another part"
            )
        count = stop - first
        if (first, stop) != (0, len(starts)):
            seconds *= count / len(starts)
        return first + uniform_indices(count, self._number(count, seconds))

    def _number(self, count: int, seconds: float) -> int:
        if callable(self.num_frames):
            return self.num_frames(seconds)
        if self.num_frames is not None:
            return self.num_frames
        if self.fps is None:
            lowest, highest = self.min_frames, self.max_frames
            lowest = min(4, highest or 4) if lowest is None else lowest
            return default_num_frames(seconds, lowest, max(8, lowest) if highest is None else highest)
        number = min(max(1, int(seconds * self.fps + 1e-6), self.min_frames or 1), count, self.max_frames or count)
        if number > MAX_FRAMES:
            raise ValueError(
                f"`fps` = {self.fps} asks for {number} frames, and at most {MAX_FRAMES} are taken. Give a smaller "
                "`fps`, or `max_frames`"
            )
        return number


def sample_frames(
    video: str | Path | bytes,
    num_frames: int | Callable[[float], int] | None = None,
    *,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
) -> list[PIL.Image.Image]:
    """Uniformly sampled frames of a video, or of a part of it, first and last included.

    The whole file is read, and decoded only from the nearest key frames: the frames are those that decoding all of it
    gives. Only the wanted ones are kept, so memory doesn't grow with the video.

    Args:
        video: A file, an ``http(s)://`` or ``file://`` URL, or a file's content.
        num_frames: How many frames, or a function that says so for a length in seconds; None:
            :func:`default_num_frames`. A shorter video repeats frames.
        fps: Frames for a second of the video, at most those that there are; instead of `num_frames`.
        min_frames: Fewest frames if `fps` or the length decides.
        max_frames: Most frames if `fps` or the length decides.
        video_start: Where the part begins, in seconds from the first frame; None: at the first frame.
        video_end: Where the part ends, in seconds from the first frame; None: at the last frame.

    Raises:
        ValueError: The file can't be opened or holds no frames, a frame is damaged, so much of it is missing that
            frames would repeat, an option is out of its range, or a limit of this module is exceeded.
    """
    return _sample(video, FrameSampling(num_frames, fps, min_frames, max_frames, video_start, video_end))[1]


def sample_numbered_frames(
    video: str | Path, num_frames: int | Callable[[float], int] | None = None, whole: bool = False
) -> tuple[list[int], list[PIL.Image.Image]]:
    """As :func:`sample_frames`, with the frames' numbers, from 0.

    Args:
        video: As there.
        num_frames: As there.
        whole: Refuse a video that breaks off before as many frames as its header promises.

    Raises:
        ValueError: As there; or the video breaks off, and must be whole.
    """
    return _sample(video, FrameSampling(num_frames), whole)


def count_frames(video: str | Path | bytes) -> int:
    """How many frames a video has. Reads the whole file and decodes nothing.

    Raises:
        ValueError: The file can't be opened or holds no frames.
    """
    with _opened(video) as source:
        return source.scan().count


def read_frames(video: str | Path | bytes, indices: Iterable[int]) -> dict[int, PIL.Image.Image]:
    """Frames of a video by number. Where the container tells every frame's time, it is decoded from the nearest key
    frames only.

    Args:
        video: A file, an ``http(s)://`` or ``file://`` URL, or a file's content.
        indices: Which frames, from 0, in the order in which they are shown.

    Returns:
        The frames by number; those that can't be decoded are missing.

    Raises:
        ValueError: The file can't be opened or holds no frames, or a limit of this module is exceeded.
    """
    wanted = sorted({int(index) for index in indices})
    with _opened(video) as source:
        scan = source.scan()
        frames, exact = source.decode_near([index for index in wanted if index < scan.count], scan)
    if not exact:  # as in _sample; but where packets gave no frame, the times are the better guess
        with _opened(video) as source:
            counted, decoded = source.decode(set(wanted), tolerant=True)
        if decoded >= scan.count or not frames:
            frames = {index: frame for index, frame in counted.items() if frame is not None}
    return frames


def _sample(video: Any, sampling: FrameSampling, whole: bool = False) -> tuple[list[int], list[PIL.Image.Image]]:
    with _opened(video) as source:
        scan = source.scan()
        if whole and scan.packets < scan.promised:
            raise _VideoError(
                f"The video {source.name} breaks off: it must hold {scan.promised} frames, as its header says, and "
                f"holds {scan.packets}. Fetch it again."
            )
        indices = source.choose(sampling, scan)
        frames, exact = source.decode_near(sorted(set(indices)), scan)
    if not exact:  # the containers' times don't say which frame is which, or something is damaged: count frames
        with _opened(video) as source:
            frames, decoded = source.decode(set(indices))
        if decoded <= indices[-1]:  # not every packet gave a frame
            if not decoded:
                raise _no_frames(source.name)
            indices = source.choose(sampling, scan.shortened(decoded))
            with _opened(video) as source:
                frames, _ = source.decode(set(indices))
        if damaged := sorted({index for index in indices if frames.get(index) is None}):
            raise _VideoError(
                f"The video {source.name} is damaged: its frames {', '.join(map(str, damaged[:5]))}"
                f"{' and others' if len(damaged) > 5 else ''} of {decoded} can't be decoded. Fetch it again, or take "
                "another part of it."
            )
    return indices, [frames[index] for index in indices]


class _Scan(NamedTuple):
    """What the packets of a video tell."""

    times: list[int]
    """When each frame is shown, in the stream's time base, ascending; empty if unknown or not unique."""
    keys: dict[int, int]
    """Of the key frames, in order: when each is shown, and where to seek for it."""
    starts: np.ndarray
    """(frames,) seconds from the first."""
    packets: int
    """Those read, also of frames that are not shown."""
    promised: int
    """Frames that the header names; 0 where it names none."""
    seconds: float
    """Length of the video."""
    missing: bool
    """Whether the file breaks off before what its header promises, or packets are damaged."""

    @property
    def count(self) -> int:
        return len(self.starts)

    def shortened(self, count: int) -> _Scan:
        """What remains if only so many frames can be decoded."""
        return self._replace(starts=self.starts[:count], seconds=self.seconds * count / self.count, missing=True)


class _Source:
    """An opened video.

    Args:
        name: As messages name it.
        container: PyAV's.
        check_time: Raises if reading takes too long.
    """

    def __init__(self, name: str, container: av.container.InputContainer, check_time: Callable[[], None]):
        self.name, self.container, self.check_time = name, container, check_time
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise _no_frames(name)
        self.stream = streams[0]
        context = self.stream.codec_context
        context.thread_count, context.thread_type = 1, "NONE"  # see above
        self._check_pixels(context.width, context.height)

    def scan(self) -> _Scan:
        """All packets; some containers name no number of frames, or a wrong one."""
        stream, is_vp8 = self.stream, self.stream.codec_context.codec.canonical_name == "vp8"
        packets, shown, last_duration, is_damaged = 0, [], 0, False
        for packet in self.container.demux(stream):
            self.check_time()
            if not packet.size:
                continue
            packets += 1
            if packets > MAX_PACKETS:
                raise _VideoError(f"The video {self.name} has more than {MAX_PACKETS} frames. Cut it.")
            is_damaged |= packet.is_corrupt
            is_hidden = is_vp8 and not memoryview(packet)[0] >> 4 & 1  # a frame that only others refer to
            if not (packet.is_discard or packet.is_corrupt or is_hidden):
                shown.append((packet.pts, packet.dts, packet.is_keyframe))
                last_duration = packet.duration or 0
        if not shown:
            raise _no_frames(self.name)
        rate = float(stream.average_rate or 30)
        times, keys = [shown_at for shown_at, _, _ in shown], {}
        if None in times or len(set(times)) < len(times):
            times, starts = [], np.arange(len(shown)) / rate
        else:
            times.sort()
            by_dts = self.container.format.name in ("mpeg", "mpegts")  # found by search, not by an index
            keys = {
                shown_at: dts if by_dts and dts is not None else shown_at
                for shown_at, dts, is_key in sorted(shown)
                if is_key
            }
            starts = (np.array(times) - times[0]) * float(stream.time_base)
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = len(shown) / rate
        promised_seconds = self._promised_seconds()
        gap = max([last_duration * float(stream.time_base), 1 / rate, *np.diff(starts)])
        breaks_off = packets < stream.frames or starts[-1] + gap < 0.75 * promised_seconds
        if breaks_off:
            what = f"{stream.frames} frames" if packets < stream.frames else f"{promised_seconds:.1f} seconds"
            logger.warning(
                f"The video {self.name} breaks off: its header promises {what}, and {len(shown)} frames of "
                f"{starts[-1] + gap:.1f} seconds can be read. Fetch it again."
            )
        return _Scan(times, keys, starts, packets, stream.frames, seconds, breaks_off or is_damaged)

    def _promised_seconds(self) -> float:
        """The length that the header names; 0 where it names none."""
        stream = self.stream
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        try:  # Matroska's, as FFmpeg writes it: "00:00:10.000000000"
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        except (KeyError, ValueError):
            alone = len(self.container.streams) == 1
            return self.container.duration / av.time_base if alone and self.container.duration else 0.0

    def choose(self, sampling: FrameSampling, scan: _Scan) -> list[int]:
        """Numbers of the frames to take. Repeated ones must be due to a short video, not to a damaged one."""
        try:
            indices = sampling.indices(scan.starts, scan.seconds).tolist()
        except ValueError as error:
            raise _VideoError(f"Of the video {self.name}: {str(error).rstrip('.')}.") from error
        distinct = len(set(indices))
        if distinct < len(indices) and scan.missing:
            raise _VideoError(
                f"The video {self.name} is damaged: {len(indices)} frames must be taken of it, and of what its header "
                f"promises only {scan.count} can be read. Fetch it again, or take at most so many."
            )
        self._check_pixels(self.stream.codec_context.width, self.stream.codec_context.height, distinct)
        return indices

    def decode_near(self, wanted: list[int], scan: _Scan) -> tuple[dict[int, PIL.Image.Image], bool]:
        """The wanted frames, each decoded from the last key frame before it, or from the last wanted frame if that is
        nearer; and whether all were found, every packet on the way having given a frame."""
        frames: dict[int, PIL.Image.Image] = {}
        times, key_times, exact = scan.times, list(scan.keys), True
        if not key_times:
            return frames, False
        decoded, position = iter(()), None
        for index in wanted:
            key = key_times[max(0, bisect_right(key_times, times[index]) - 1)]
            if position is None or key > position:
                try:
                    self.container.seek(scan.keys[key], stream=self.stream)
                except av.FFmpegError:
                    return frames, False
                decoded, position = _tolerant_decode(self.container, self.stream), None
            for frame in decoded:
                self.check_time()
                if frame.pts is None:
                    exact = False
                    continue
                if frame.pts >= key:  # those before refer to what was not decoded
                    place = bisect_left(times, frame.pts)
                    follows = place == 0 or times[place - 1] < key or times[place - 1] == position
                    exact &= place < len(times) and times[place] == frame.pts and follows
                position = frame.pts
                if position == times[index] and not frame.is_corrupt:
                    frames[index] = self._upright(frame)
                if position >= times[index]:
                    break
        return frames, exact and len(frames) == len(wanted)

    def decode(self, wanted: set[int], tolerant: bool = False) -> tuple[dict[int, PIL.Image.Image | None], int]:
        """The wanted frames, None for one that is damaged, and how many were decoded: up to the last of them; if
        `tolerant`, all that can be."""
        frames: dict[int, PIL.Image.Image | None] = {}
        decoded = 0
        all_frames = _tolerant_decode if tolerant else type(self.container).decode
        for frame in all_frames(self.container, self.stream):
            self.check_time()
            if decoded in wanted:
                frames[decoded] = None if frame.is_corrupt else self._upright(frame)
            decoded += 1
            if len(frames) == len(wanted) and not tolerant:
                break
        return frames, decoded

    def _upright(self, frame: av.VideoFrame) -> PIL.Image.Image:
        """A phone held upright writes lying frames and the angle to turn them by."""
        self._check_pixels(frame.width, frame.height)
        return frame.to_image().rotate(frame.rotation, expand=True)

    def _check_pixels(self, width: int, height: int, count: int = 1) -> None:
        if width * height > MAX_FRAME_PIXELS:
            raise _VideoError(
                f"A frame of the video {self.name} must have at most {MAX_FRAME_PIXELS} pixels, got {width} x "
                f"{height}. Convert it to a smaller size."
            )
        if count * width * height > MAX_PIXELS:
            raise _VideoError(
                f"The frames taken of the video {self.name} must have at most {MAX_PIXELS} pixels together, got "
                f"{count} of {width} x {height}. Take fewer, or convert it to a smaller size."
            )


class _VideoError(ValueError):
    """What is wrong with a video, with its name."""


def _no_frames(name: str) -> _VideoError:
    return _VideoError(f"The video {name} holds no frames. Leave it out, or record it again.")


@contextmanager
def _opened(video: str | Path | bytes) -> Iterator[_Source]:
    """A video opened for reading, and what goes wrong with it, by whatever part of the media library, with its name and
    a cure."""
    name, end = describe(video), time.monotonic() + MAX_SECONDS

    def check_time() -> None:
        if time.monotonic() > end:
            raise _VideoError(
                f"The video {name} takes longer than {MAX_SECONDS:g} seconds to read. Cut it, or convert it to a "
                "smaller size; where videos are trusted, set spa3r.media.videos.MAX_SECONDS."
            )

    options = {"format_whitelist": FORMATS}
    try:
        with ExitStack() as stack:
            if is_url(video):
                source, timeout = video, (MAX_SECONDS, MAX_SECONDS)
                options["protocol_whitelist"] = "http,https,httpproxy,tcp,tls"
            else:
                file = stack.enter_context(_open_file(video))
                source, timeout = _CheckedFile(file, check_time), None
                options["protocol_whitelist"] = "none"  # the file is open: nothing else is ever opened
            try:
                container = (
                    stack.enter_context(  # older PyAV's `options` crash on streams that are found late, as in MPEG
                        av.open(source, container_options=options, metadata_errors="replace", timeout=timeout)
                    )
                )
            except av.FFmpegError as error:
                if error.errno == 22:  # what FFmpeg says of a container that is not listed
                    raise OSError(
                        "it is none of the containers that are read: MP4, MOV, 3GP, MKV, WebM, AVI, "
                        "MPEG, FLV, WMV, OGV, GIF"
                    ) from error
                raise
            yield _Source(name, container, check_time)
    except _VideoError:
        raise
    except Exception as error:
        raise _VideoError(
            f"The video {name} can't be decoded ({getattr(error, 'strerror', None) or error}). It is damaged or no "
            "video: leave it out or convert it."
        ) from error


def _open_file(video: str | Path | bytes) -> BinaryIO:
    if isinstance(video, bytes | bytearray | memoryview):
        return io.BytesIO(video)
    if local_path(video).is_dir():
        raise IsADirectoryError("it is a folder")
    try:
        return regular_file(video, "video").open("rb")
    except ValueError as error:
        raise _VideoError(str(error)) from error


class _CheckedFile:
    """A file for PyAV that is read as long as there is time."""

    def __init__(self, file: BinaryIO, check_time: Callable[[], None]):
        self.seek, self.tell, self._read, self._check_time = file.seek, file.tell, file.read, check_time

    def read(self, size: int) -> bytes:
        self._check_time()
        return self._read(size)


def _tolerant_decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames of what can be decoded."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def _checked_number(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number from 1 to {MAX_FRAMES}, got {shortened(repr(value))}.")
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if number > MAX_FRAMES:
        raise ValueError(f"`{name}` must be at most {MAX_FRAMES}, got {number}. Take fewer frames.")
    return number
