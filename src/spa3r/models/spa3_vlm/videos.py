"""Converts videos in the forms of transformers and qwen-vl-utils to frames, which the VLM takes as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa3r.checks import shorten
from spa3r.media.files import describe
from spa3r.media.images import Image, flattened, is_batch, to_rgb
from spa3r.media.videos import (
    FrameChoice,
    FrameSampling,
    candidate_count,
    coverage_indices,
    descriptor,
    sample_frames,
    uniform_indices,
)

VIDEO_KEYS = ("video", "url", "path")
"""Keys of a message item that may hold its video."""

NUMBER_OPTIONS = ("num_frames", "fps", "min_frames", "max_frames")
VIDEO_OPTIONS = (*NUMBER_OPTIONS, "nframes", "video_start", "video_end")
"""Video options of a message item, with the names of transformers and qwen-vl-utils."""

CALL_OPTIONS = ("num_frames", "fps", "do_sample_frames", "video_metadata")
"""Options of a processor call that apply to all its videos."""

OF_ITEMS = (*(set(VIDEO_OPTIONS) - {"num_frames", "fps"}), "video_fps", "video_load_backend", "sample_indices_fn")
"""Options of transformers' chat templates or qwen-vl-utils that are not allowed in a call for all videos."""


def frames_of(video: Any, options: Mapping[str, Any]) -> list[Image]:
    """The selected frames of a video.

    Args:
        video: A file, a URL, a file's content, or its frames: a list of pictures or an array (frames, ...).
        options: Options for :class:`~spa3r.media.videos.FrameSampling`.

    Raises:
        ValueError: It is none of these, can't be read, or lacks what an option needs.
    """
    options = {key: value for key, value in options.items() if value is not None}
    is_sampled = options.pop("do_sample_frames", True)
    if isinstance(video, str | Path | bytes):
        if not is_sampled:
            raise ValueError(
                f"`do_sample_frames=False` must come with lists of frames, which are taken whole, got the video "
                f"{describe(video)}. Leave it out, and give `num_frames` or `fps`."
            )
        return [*sample_frames(video, **options)]
    if not isinstance(video, list | tuple) and not is_batch(video):
        raise ValueError(
            f"A video must be a file, a URL, bytes, a list of frames or an array of four dimensions, got "
            f"{describe(video)}. Give a single picture as an image."
        )
    frames = flattened(video) if isinstance(video, list | tuple) else list(video)
    if not frames:
        raise ValueError("A video given as a list must hold at least one frame, got none. Leave the video out.")
    sampling = FrameSampling(**options)
    if others := [key for key in options if key not in ("num_frames", "frames")]:
        raise ValueError(
            f"{', '.join(f'`{key}`' for key in others)} can't be used for a video given as a list of frames, which "
            "have no times. Give `num_frames` (`nframes`), the frames that you want, or the video's file."
        )
    if sampling.num_frames is None:
        return frames
    if callable(sampling.num_frames):
        raise ValueError("`num_frames` must be a number for a list of frames, whose length in seconds is unknown.")
    count = sampling.num_frames
    if sampling.frames == "uniform":
        return [frames[index] for index in uniform_indices(len(frames), count)]
    candidates = uniform_indices(len(frames), candidate_count(len(frames), count))
    chosen = coverage_indices([descriptor(to_rgb(frames[index])) for index in candidates], count)
    return [frames[candidates[place]] for place in chosen]


def options_of_item(item: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Video options of a message item; if it doesn't set the number of frames, the call's default applies.

    Raises:
        ValueError: An option is not supported, or is given twice.
    """
    given = {key: value for key, value in item.items() if value is not None and key not in ("type", *VIDEO_KEYS)}
    if unknown := sorted(map(str, given.keys() - {*VIDEO_OPTIONS})):
        raise ValueError(
            f"A video's {', '.join(map(shorten, unknown[:5]))} can't be used: frames are pictures of the size of the "
            f"processor's `view_image_processor`. Leave it out; what is used: {', '.join(VIDEO_OPTIONS)}."
        )
    if "nframes" in given:
        if "num_frames" in given:
            raise ValueError("A video must have `nframes` or `num_frames`, got both. Leave one out.")
        given["num_frames"] = given.pop("nframes")
    if any(key in given for key in NUMBER_OPTIONS):
        return {"frames": defaults.get("frames"), **given}
    return {**defaults, **given}


def check_call(keywords: Mapping[str, Any]) -> None:
    """Raise for options of a single video among the keywords of a call, which would be ignored.

    Raises:
        ValueError: Such an option is given; the message names it.
    """
    if wrong := sorted(key for key in keywords if key in OF_ITEMS):
        cure = "Give it in the video's item of the message" if wrong[0] in VIDEO_OPTIONS else "Leave it out"
        raise ValueError(
            f"Options of a call for all its videos must be `num_frames` or `fps`, got `{wrong[0]}`. {cure}; options of "
            f"an item: {', '.join(VIDEO_OPTIONS)}."
        )


def listed_videos(videos: Any) -> list[Any]:
    """The videos of a call, as transformers takes them: one, a list, or a list of lists with one list per text.

    A list of pictures is one video. A pair of a video and its metadata, as qwen-vl-utils returns it, is one video.
    """
    if videos is None:
        return []
    if isinstance(videos, tuple) and len(videos) == 2 and isinstance(videos[1], Mapping):
        return [videos[0]]
    if isinstance(videos, list | tuple):
        if videos and all(_is_picture(item) for item in videos):
            return [list(videos)]
        return [video for item in videos for video in listed_videos(item)]
    if is_batch(videos) and videos.ndim == 5:
        return list(videos)
    return [videos]


def call_options(keywords: dict[str, Any], num_frames: int | None, frames: FrameChoice = "uniform") -> dict[str, Any]:
    """Remove the video options from a call's keywords, flat or under ``videos_kwargs``.

    Args:
        keywords: Keywords of the call; video options are removed from it.
        num_frames: The processor's setting.
        frames: The processor's setting.

    Returns:
        Options for :func:`frames_of`.

    Raises:
        ValueError: An option is not supported, or is given twice with different values.
    """
    given = {key: keywords.pop(key) for key in CALL_OPTIONS if key in keywords}
    nested = dict(keywords.pop("videos_kwargs", None) or {})
    if unknown := sorted(map(str, nested.keys() - {*CALL_OPTIONS, "return_tensors"})):
        raise ValueError(
            f"`videos_kwargs` must be of {', '.join(CALL_OPTIONS)}, got {', '.join(map(shorten, unknown[:5]))}. Leave "
            "it out: videos become pictures, for which `images_kwargs` are used."
        )
    given = {key: value for key, value in {**nested, **given}.items() if value is not None}
    is_sampled = given.get("do_sample_frames", True)
    if not is_sampled:  # already sampled: `fps` says how, and pictures have no times
        if "num_frames" in given:
            raise ValueError("`num_frames` can't be used with `do_sample_frames=False`. Leave one of them out.")
        return {"do_sample_frames": False}
    fps = given.get("fps")
    if isinstance(fps, list | tuple):  # qwen-vl-utils returns one per video
        if len(set(fps)) != 1:
            raise ValueError(f"`fps` must be one number for all videos, got {shorten(fps)}. Give messages instead.")
        fps = fps[0]
    if fps is not None and given.get("num_frames") is not None:
        raise ValueError("`fps` and `num_frames` must not be given together. Leave one of them out.")
    number = given.get("num_frames", None if fps is not None else num_frames)
    return {"num_frames": number, "fps": fps, "frames": frames}


def _is_picture(item: Any) -> bool:
    if isinstance(item, str | Path | bytes | list | tuple | Mapping):
        return False
    return not is_batch(item)


def places_of(texts: Sequence[str], place: str | None) -> list[int]:
    """Number of video placeholders in each text."""
    return [text.count(place) if place else 0 for text in texts]
