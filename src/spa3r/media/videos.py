"""Videos as lists of upright frames, selected by number, from real media files only.

Videos may come from untrusted users. Only containers in :data:`FORMATS` are opened, and only the file itself is read:
playlists, which refer to other files, are rejected. Reading is limited by :data:`MAX_SECONDS`, :data:`MAX_FRAMES` and
:data:`MAX_PIXELS`; for trusted videos, change these attributes of this module.

Decoding uses only the caller's thread. Once any library sets PyAV's log level (torchvision 0.25 does when it is
imported), decoder threads that report damage wait for the GIL, and the thread that holds the GIL waits for them: a
deadlock. Also, multithreaded decoding of a damaged video is not deterministic.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, get_args

import av
import numpy as np
import PIL.Image
from av.stream import Disposition
from transformers.utils import logging

from spa3r.checks import check_count, is_number, range_words, shorten
from spa3r.media.files import describe, is_url, local_path, regular_file

logger = logging.get_logger(__name__)

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,gif"
"""FFmpeg's names of the supported containers; none of them refers to other files."""

MAX_FRAMES = 1024
"""Maximum number of frames taken from a video."""

MAX_PIXELS = 2**31
"""Maximum total pixels of all frames taken from a video: about 1000 frames of 1920 x 1080."""

MAX_FRAME_PIXELS = 2**27
"""Maximum pixels of a frame."""

MAX_SECONDS = 120.0
"""Maximum time in seconds for reading a video."""

MAX_PACKETS = 2**23
"""Maximum number of frames of a video: 38 hours at 60 fps."""


FrameChoice = Literal["uniform", "coverage"]
"""How frames are chosen: evenly spaced, or those that differ most from each other."""

CANDIDATES = 4
"""Evenly spaced frames per chosen frame that ``"coverage"`` looks at."""

DESCRIPTOR_SIZE = 16
"""Side in pixels of the small pictures by which ``"coverage"`` compares frames."""


def default_num_frames(seconds: float, lowest: int = 4, highest: int = 8, seconds_per_frame: float = 2.0) -> int:
    """Frames per video in instruction tuning: clamp(round(seconds / seconds_per_frame), lowest, highest)."""
    return min(max(round(seconds / seconds_per_frame), lowest), highest)


def uniform_indices(count: int, num_frames: int) -> np.ndarray:
    """``linspace(0, count - 1, num_frames)``, truncated to integers; a short video repeats frames.

    Raises:
        ValueError: `num_frames` is not a whole number from 1 to :data:`MAX_FRAMES`.
    """
    return np.linspace(0, count - 1, check_count("num_frames", num_frames, 1, MAX_FRAMES)).astype(int)


def descriptor(picture: PIL.Image.Image) -> np.ndarray:
    """A small picture of a frame, by which :func:`coverage_indices` compares it: (3 * 16 * 16,), float32."""
    small = picture.convert("RGB").resize((DESCRIPTOR_SIZE, DESCRIPTOR_SIZE), PIL.Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)


def coverage_indices(descriptors: Sequence[np.ndarray], count: int) -> list[int]:
    """Choose frames that differ from each other: greedy farthest-point selection, which starts at the first frame.

    Each step takes the frame whose nearest chosen frame is farthest away (Euclidean distance of the descriptors; the
    earliest of equal ones). So no frame that is left out is farther from a chosen one than the chosen ones are from
    each other (Gonzalez 1985).

    Args:
        descriptors: (D,) of every frame, as :func:`descriptor` returns it; at least one.
        count: Number of frames to choose; all, if there are not more.

    Returns:
        Indices of the chosen frames, ascending.
    """
    points = np.stack(descriptors).astype(np.float64)
    chosen, distances = [0], np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distances = np.minimum(distances, ((points - points[chosen[-1]]) ** 2).sum(-1))
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
    return sorted(chosen)


def candidate_count(available: int, count: int) -> int:
    """Number of evenly spaced frames of which ``"coverage"`` chooses `count`."""
    return max(count, min(CANDIDATES * count, available, MAX_FRAMES))


def check_frames(frames: Any) -> None:
    """Raise for an unknown way to choose frames.

    Raises:
        ValueError: It is not one of :data:`FrameChoice`.
    """
    if not isinstance(frames, str) or frames not in get_args(FrameChoice):
        raise ValueError(
            f"`frames` must be one of {', '.join(map(repr, get_args(FrameChoice)))}, got {shorten(frames)}."
        )


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken: evenly spaced, including the first and last of the selected part; or of
    :data:`CANDIDATES` times as many, those that differ most from each other.

    Attributes:
        num_frames: Number of frames, or a function that computes it from the length in seconds; a shorter video repeats
            frames.
        fps: Frames per second of the video, at most all frames; an alternative to `num_frames`.
        min_frames: Minimum number if `fps` or the length decides, limited by the available frames.
        max_frames: Maximum number if `fps` or the length decides.
        video_start: Start of the part, in seconds from the first frame; None: the first frame.
        video_end: End of the part; None, or a value after the last frame: the last frame.
        frames: ``"uniform"``, or ``"coverage"``: always the first frame, then by :func:`coverage_indices`.

    Raises:
        ValueError: A value is out of its range, or two contradict each other.
    """

    num_frames: int | Callable[[float], int] | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    frames: FrameChoice = "uniform"

    def __post_init__(self) -> None:
        check_frames(self.frames)
        for name in ("num_frames", "min_frames", "max_frames"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                check_count(name, getattr(self, name), 1, MAX_FRAMES)
        for name in ("fps", "video_start", "video_end"):
            value, above = getattr(self, name), name != "video_start"
            if value is not None and not is_number(value, 0, above=above):
                raise ValueError(
                    f"`{name}` must be {range_words(0, None, 'a finite number', above)}, got {shorten(value)}."
                )
        if self.num_frames is not None:
            if others := [name for name in ("fps", "min_frames", "max_frames") if getattr(self, name) is not None]:
                raise ValueError(
                    f"`num_frames` (`nframes`) must be given without `{'`, `'.join(others)}`: both say how many frames "
                    "are taken. Leave one of them out."
                )
        least, most = self.min_frames, self.max_frames
        if least is not None and most is not None and least > most:
            raise ValueError(f"`min_frames` must be at most `max_frames`, got {least} and {most}.")
        start, end = self.video_start, self.video_end
        if start is not None and end is not None and start >= end:
            raise ValueError(f"`video_start` must be less than `video_end`, got {start} and {end} seconds.")

    def indices(self, starts: np.ndarray, seconds: float) -> tuple[np.ndarray, int]:
        """The numbers of the frames to read, and how many of them are taken.

        Args:
            starts: Start time of each frame, in seconds from the first, ascending; at least one.
            seconds: Length of the video.

        Returns:
            (frames,), ascending: with ``"uniform"`` all are taken, with ``"coverage"`` they are candidates; and the
            number to take.

        Raises:
            ValueError: The part contains no frame, or `fps` selects too many.
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
        number = self._number(count, seconds)
        read = number if self.frames == "uniform" else candidate_count(count, number)
        return first + uniform_indices(count, read), number

    def _number(self, count: int, seconds: float) -> int:
        if self.num_frames is not None:
            return self.num_frames(seconds) if isinstance(self.num_frames, Callable) else self.num_frames
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
    frames: FrameChoice = "uniform",
) -> list[PIL.Image.Image]:
    """Frames of a video, or of a part of it; evenly spaced ones include the first and the last.

    The whole file is read, but decoding starts at the nearest key frames; the frames equal those of decoding the whole
    file. Only the selected frames are kept, so memory doesn't grow with the video.

    Args:
        video: A file, an ``http(s)://`` or ``file://`` URL, or a file's content.
        num_frames: As in :class:`FrameSampling`, as all of the following; None: :func:`default_num_frames`.
        fps: Frames per second of the video.
        min_frames: Minimum number of frames.
        max_frames: Maximum number of frames.
        video_start: Start of the part in seconds.
        video_end: End of the part in seconds.
        frames: ``"uniform"`` or ``"coverage"``; the latter reads more frames, so it takes longer.

    Raises:
        ValueError: The file can't be opened or has no frames, a frame is damaged, so much is missing that frames would
            repeat, an option is out of its range, or a limit of this module is exceeded.
    """
    return _sample(video, FrameSampling(num_frames, fps, min_frames, max_frames, video_start, video_end, frames))[1]


def sample_numbered_frames(
    video: str | Path,
    num_frames: int | Callable[[float], int] | None = None,
    whole: bool = False,
    frames: FrameChoice = "uniform",
) -> tuple[list[int], list[PIL.Image.Image]]:
    """Like :func:`sample_frames`, with the frames' numbers, from 0.

    Args:
        video: As in :func:`sample_frames`.
        num_frames: As in :func:`sample_frames`.
        whole: Reject a video that ends before the number of frames in its header.
        frames: As in :func:`sample_frames`.

    Raises:
        ValueError: As in :func:`sample_frames`; or `whole` is set and the video is truncated.
    """
    return _sample(video, FrameSampling(num_frames, frames=frames), whole)


def count_frames(video: str | Path | bytes) -> int:
    """Count the frames of a video. Reads the whole file without decoding it.

    Raises:
        ValueError: The file can't be opened or has no frames.
    """
    with _opened(video) as source:
        return source.scan().num_frames


def read_frames(video: str | Path | bytes, indices: Iterable[int]) -> dict[int, PIL.Image.Image]:
    """Read frames of a video by number. If the container has every frame's time, decoding starts at the nearest key
    frames.

    Args:
        video: A file, an ``http(s)://`` or ``file://`` URL, or a file's content.
        indices: Frame numbers, from 0, in display order.

    Returns:
        The frames by number, without those that can't be decoded.

    Raises:
        ValueError: The file can't be opened or has no frames, or a limit of this module is exceeded.
    """
    wanted = sorted({int(index) for index in indices})
    with _opened(video) as source:
        scan = source.scan()
        frames, exact = source.decode_near([index for index in wanted if index < scan.num_frames], scan, _whole)
    if not exact:  # as in _sample; but if packets gave no frame, the times are the better estimate
        with _opened(video) as source:
            counted, decoded = source.decode(set(wanted), _whole, tolerant=True)
        if decoded >= scan.num_frames or not frames:
            frames = {index: frame for index, frame in counted.items() if frame is not None}
    return frames


T = TypeVar("T")


def _whole(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture


def _sample(video: Any, sampling: FrameSampling, whole: bool = False) -> tuple[list[int], list[PIL.Image.Image]]:
    if sampling.frames == "uniform":
        indices, frames, _ = _read(video, sampling, whole, _whole)
        return indices, frames
    indices, descriptors, number = _read(video, sampling, whole, descriptor)
    chosen = [indices[place] for place in coverage_indices(descriptors, number)]
    frames = read_frames(video, chosen)
    if missing := [index for index in chosen if index not in frames]:
        raise _VideoError(
            f"The video {describe(video)} is damaged: its frame {missing[0]} can't be decoded twice. Download it again."
        )
    return chosen, [frames[index] for index in chosen]


def _read(
    video: Any, sampling: FrameSampling, whole: bool, keep: Callable[[PIL.Image.Image], T]
) -> tuple[list[int], list[T], int]:
    """Numbers of the frames that are read, what `keep` makes of each, and how many of them are to be taken."""
    with _opened(video) as source:
        scan = source.scan()
        if whole and scan.packets < scan.announced:
            raise _VideoError(
                f"The video {source.name} is truncated: it must hold {scan.announced} frames, as its header says, and "
                f"holds {scan.packets}. Download it again."
            )
        indices, number = source.choose(sampling, scan)
        frames, exact = source.decode_near(sorted(set(indices)), scan, keep)
    if not exact:  # times don't identify the frames, or something is damaged: count frames
        with _opened(video) as source:
            frames, decoded = source.decode(set(indices), keep)
        if decoded <= indices[-1]:  # not every packet gave a frame
            if not decoded:
                raise _no_frames(source.name)
            indices, number = source.choose(sampling, scan.shortened(decoded))
            with _opened(video) as source:
                frames, _ = source.decode(set(indices), keep)
        if damaged := sorted({index for index in indices if frames.get(index) is None}):
            raise _VideoError(
                f"The video {source.name} is damaged: its frames {', '.join(map(str, damaged[:5]))}"
                f"{' and others' if len(damaged) > 5 else ''} of {decoded} can't be decoded. Download it again, or "
                "take another part of it."
            )
    return indices, [frame for index in indices if (frame := frames[index]) is not None], number


class _Scan(NamedTuple):
    """Information from the packets of a video."""

    times: list[int]
    """Display time of each frame, in the stream's time base, ascending; empty if unknown or not unique."""
    keys: dict[int, int]
    """Key frames in order: display time, and position to seek to."""
    starts: np.ndarray
    """(frames,), seconds from the first frame."""
    packets: int
    """Number of packets read, including those of hidden frames."""
    announced: int
    """Number of frames in the header; 0 if missing."""
    seconds: float
    """Length of the video."""
    missing: bool
    """Whether the file ends before the length in its header, or packets are damaged."""

    @property
    def num_frames(self) -> int:
        return len(self.starts)

    def shortened(self, count: int) -> _Scan:
        """The scan of a video of which only `count` frames can be decoded."""
        return self._replace(starts=self.starts[:count], seconds=self.seconds * count / self.num_frames, missing=True)


class _Source:
    """An opened video.

    Args:
        name: Name for messages.
        container: PyAV's container.
        check_time: Raises if reading takes too long.
    """

    def __init__(self, name: str, container: av.container.InputContainer, check_time: Callable[[], None]):
        self.name, self.container, self.check_time = name, container, check_time
        covers = Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise _no_frames(name)
        self.stream, self.time_base = streams[0], streams[0].time_base or Fraction(1, av.time_base)
        context = self.stream.codec_context
        context.thread_count, context.thread_type = 1, "NONE"  # see the module's docstring
        self._check_pixels(context.width, context.height)

    def scan(self) -> _Scan:
        """Read all packets; some containers store no number of frames, or a wrong one."""
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
            is_hidden = is_vp8 and not memoryview(packet)[0] >> 4 & 1  # only other frames refer to it
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
            by_dts = self.container.format.name in ("mpeg", "mpegts")  # seeks by search, not with an index
            keys = {
                shown_at: dts if by_dts and dts is not None else shown_at
                for shown_at, dts, is_key in sorted(shown)
                if is_key
            }
            starts = (np.array(times) - times[0]) * float(self.time_base)
        announced_seconds = self._announced_seconds()
        seconds = announced_seconds if stream.duration is not None else len(shown) / rate
        gap = max([last_duration * float(self.time_base), 1 / rate, *np.diff(starts)])
        is_truncated = packets < stream.frames or starts[-1] + gap < 0.75 * announced_seconds
        if is_truncated:
            what = f"{stream.frames} frames" if packets < stream.frames else f"{announced_seconds:.1f} seconds"
            logger.warning(
                f"The video {self.name} is truncated: its header announces {what}, and {len(shown)} frames of "
                f"{starts[-1] + gap:.1f} seconds can be read. Download it again."
            )
        return _Scan(times, keys, starts, packets, stream.frames, seconds, is_truncated or is_damaged)

    def _announced_seconds(self) -> float:
        """The length in the header; 0 if missing."""
        stream = self.stream
        if stream.duration is not None:
            return float(stream.duration * self.time_base)
        try:  # Matroska, as FFmpeg writes it: "00:00:10.000000000"
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        except (KeyError, ValueError):
            alone = len(self.container.streams) == 1
            return self.container.duration / av.time_base if alone and self.container.duration else 0.0

    def choose(self, sampling: FrameSampling, scan: _Scan) -> tuple[list[int], int]:
        """:meth:`FrameSampling.indices`. Repeats are allowed for a short video, but not for a damaged one."""
        try:
            places, number = sampling.indices(scan.starts, scan.seconds)
            indices = places.tolist()
        except ValueError as error:
            raise _VideoError(f"Of the video {self.name}: {str(error).rstrip('.')}.") from error
        distinct = len(set(indices))
        if distinct < len(indices) and scan.missing:
            raise _VideoError(
                f"The video {self.name} is damaged: {len(indices)} frames must be taken of it, and only "
                f"{scan.num_frames} of those that its header announces can be read. Download it again, or take "
                "at most so many."
            )
        self._check_pixels(self.stream.codec_context.width, self.stream.codec_context.height, min(distinct, number))
        return indices, number

    def decode_near(
        self, wanted: list[int], scan: _Scan, keep: Callable[[PIL.Image.Image], T]
    ) -> tuple[dict[int, T], bool]:
        """What `keep` makes of the wanted frames, each decoded from the last key frame before it, or from the previous
        wanted frame if that is nearer; and whether all were found and every packet on the way gave a frame."""
        frames: dict[int, T] = {}
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
                if frame.pts >= key:  # earlier ones refer to frames that were not decoded
                    place = bisect_left(times, frame.pts)
                    follows = place == 0 or times[place - 1] < key or times[place - 1] == position
                    exact &= place < len(times) and times[place] == frame.pts and follows
                position = frame.pts
                if position == times[index] and not frame.is_corrupt:
                    frames[index] = keep(self._upright(frame))
                if position >= times[index]:
                    break
        return frames, exact and len(frames) == len(wanted)

    def decode(
        self, wanted: set[int], keep: Callable[[PIL.Image.Image], T], tolerant: bool = False
    ) -> tuple[dict[int, T | None], int]:
        """What `keep` makes of the wanted frames, None for damaged ones, and the number of decoded frames: up to the
        last wanted one, or, if `tolerant`, all that can be decoded."""
        frames: dict[int, T | None] = {}
        decoded = 0
        all_frames = _tolerant_decode if tolerant else type(self.container).decode
        for frame in all_frames(self.container, self.stream):
            self.check_time()
            if decoded in wanted:
                frames[decoded] = None if frame.is_corrupt else keep(self._upright(frame))
            decoded += 1
            if len(frames) == len(wanted) and not tolerant:
                break
        return frames, decoded

    def _upright(self, frame: av.VideoFrame) -> PIL.Image.Image:
        """Rotate a frame upright: phones store rotated frames with an angle."""
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
    """An error about a video, including its name."""


def _no_frames(name: str) -> _VideoError:
    return _VideoError(f"The video {name} holds no frames. Leave it out, or record it again.")


@contextmanager
def _opened(video: str | Path | bytes) -> Generator[_Source]:
    """Open a video for reading. Errors of any part of the media library are raised with the video's name and a
    cure."""
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
                options["protocol_whitelist"] = "none"  # the file is open already: forbid opening anything else
            try:
                container = (
                    stack.enter_context(  # older PyAV's `options` crash on streams that are found late, as in MPEG
                        av.open(source, "r", container_options=options, metadata_errors="replace", timeout=timeout)
                    )
                )
            except av.FFmpegError as error:
                if error.errno == 22:  # FFmpeg's error for a container that is not listed
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
            f"The video {name} can't be decoded ({getattr(error, 'strerror', None) or error}). It is damaged or not "
            "a video: leave it out or convert it."
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
    """A file for PyAV with a time limit on reading."""

    def __init__(self, file: BinaryIO, check_time: Callable[[], None]):
        self.seek, self.tell, self._read, self._check_time = file.seek, file.tell, file.read, check_time

    def read(self, size: int) -> bytes:
        self._check_time()
        return self._read(size)


def _tolerant_decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames that can be decoded, skipping errors."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue
