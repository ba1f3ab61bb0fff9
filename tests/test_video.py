"""Videos become the right frames, upright, whatever the container says, and nothing stays open."""

import os
from pathlib import Path

import numpy as np
import pytest
from media import (
    counting_frames,
    counting_video,
    lie_about_length,
    read_number,
    smooth,
    turn_mp4,
    write_sound,
    write_video,
)

import spa3r.video
from spa3r.video import count_frames, default_num_frames, read_frames, sample_frames, uniform_indices

CONTAINERS = {"mp4": "mpeg4", "mov": "libx264", "mkv": "mpeg4", "webm": "libvpx", "avi": "mpeg4"}


def numbers(path: Path, num_frames: int | None = None) -> list[int]:
    return [read_number(frame) for frame in sample_frames(path, num_frames)]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 4), (0.5, 4), (8.9, 4), (9, 4), (9.1, 5), (11, 6), (12, 6), (13, 6), (15.1, 8), (16, 8), (3600, 8)],
)
def test_default_number_of_frames_is_the_clamped_half_of_the_seconds(seconds, expected):
    assert default_num_frames(seconds) == expected == min(max(round(seconds / 2), 4), 8)


@pytest.mark.parametrize(
    ("count", "num_frames", "expected"),
    [(20, 5, [0, 4, 9, 14, 19]), (20, 1, [0]), (3, 3, [0, 1, 2]), (2, 4, [0, 0, 0, 1]), (1, 3, [0, 0, 0])],
)
def test_indices_are_uniform_and_cut_to_integers(count, num_frames, expected):
    assert uniform_indices(count, num_frames).tolist() == expected


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("num_frames", [None, 1, 3, 20, 30])
def test_frames_of_every_container(tmp_path, container, num_frames):
    """Matroska and WebM don't say how many frames they have."""
    video = counting_video(tmp_path / f"video.{container}", 20, codec=CONTAINERS[container])
    wanted = num_frames or 5  # 20 frames at 2 a second: 10 seconds
    assert numbers(video, num_frames) == uniform_indices(20, wanted).tolist()


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [0, 0, 0, 0]),
        (2, [0, 0, 0, 1]),
        (4, [0, 1, 2, 3]),
        (26, [0, 5, 10, 15, 20, 25]),
        (36, uniform_indices(36, 8).tolist()),
    ],
)
def test_default_number_follows_the_length_and_short_videos_repeat_frames(tmp_path, count, expected):
    assert numbers(counting_video(tmp_path / "video.mp4", count)) == expected


@pytest.mark.parametrize("promised", [7, 10, 40, 100_000])
def test_a_container_that_lies_about_its_length(tmp_path, promised):
    video = lie_about_length(counting_video(tmp_path / "video.avi", 20), promised)
    assert numbers(video, 3) == [0, 9, 19]
    assert numbers(video)[-1] == 19


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_video_that_breaks_off_gives_frames_up_to_there(tmp_path, share):
    video = counting_video(tmp_path / "video.mp4", 20, options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * share)])
    found = numbers(video, 3)
    assert len(found) == 3 and found[0] == 0 and found == sorted(found) and 0 < found[-1] < 20


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phones_turned_video_comes_upright(tmp_path, degrees):
    upright = smooth(48, 64)
    video = write_video(tmp_path / "video.mp4", [upright.rotate(degrees, expand=True)] * 3)
    (lying,) = sample_frames(video, 1)
    (frame,) = sample_frames(turn_mp4(video, degrees), 1)
    assert frame.size == (48, 64)

    def error(picture):
        return np.abs(np.asarray(picture, np.float64) - np.asarray(upright, np.float64)).mean()

    assert error(frame) < 5
    assert lying.size != upright.size or error(lying) > 50


def test_frames_are_rgb_pictures_of_the_videos_size(tmp_path):
    for frame in sample_frames(str(counting_video(tmp_path / "video.mp4", 6)), 6):
        assert frame.mode == "RGB" and frame.size == (64, 48)


def unreadable(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "text":
        path.write_text("These are frames of a video.\n" * 40)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":  # without its index, which stands at the end
        path.write_bytes(counting_video(path, 20).read_bytes()[: path.stat().st_size // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        write_sound(path)
    elif kind == "header":
        path = counting_video(folder / "header.mkv", 20)
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75") + 12])  # up to the first frame
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"The video \S+missing.mp4 doesn't exist. Check the path."),
        ("text", r"The video \S+text.mp4 can't be decoded \(.*It is damaged or no video: leave it out or convert it."),
        ("empty", r"The video \S+empty.mp4 can't be decoded \("),
        ("truncated", r"The video \S+truncated.mp4 can't be decoded \("),
        ("folder", r"The video \S+folder.mp4 can't be decoded \("),
        ("sound", r"The video \S+sound.mp4 holds no frames. Leave it out, or record it again."),
        ("header", r"The video \S+header.mkv holds no frames. Leave it out, or record it again."),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, kind, words):
    with pytest.raises(ValueError, match=words):
        sample_frames(unreadable(kind, tmp_path))


@pytest.mark.parametrize("num_frames", [0, -1])
def test_number_of_frames_must_be_positive(tmp_path, num_frames):
    with pytest.raises(ValueError, match=f"`num_frames` must be at least 1, got {num_frames}."):
        sample_frames(counting_video(tmp_path / "video.mp4", 2), num_frames)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of this process's open files")
def test_open_files_stay_flat(tmp_path):
    good = counting_video(tmp_path / "good.mp4", 6)
    bad = [unreadable(kind, tmp_path) for kind in ("text", "truncated", "sound", "header", "missing")]
    sample_frames(good)
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(50):
        sample_frames(good, 2)
        with pytest.raises(ValueError, match="The video"):
            sample_frames(bad[turn % len(bad)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_holds_wanted_frames_only(tmp_path, monkeypatch):
    """Only the wanted frames are turned into pictures, each once."""
    from spa3r import video as module

    kept = []
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args: kept.append(decode(*args)) or kept[-1])
    sample_frames(counting_video(tmp_path / "video.mp4", 30), 4)
    ((frames, decoded),) = kept
    assert sorted(frames) == [0, 9, 19, 29] and decoded == len(counting_frames(30))


# Frames by number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_frames_by_number(tmp_path, container):
    video = counting_video(tmp_path / f"video.{container}", 30, codec=CONTAINERS[container])
    assert count_frames(video) == 30
    wanted = [11, 29, 2, 3, 2, 30, 99]  # in any order, repeated, and two that don't exist
    assert {index: read_number(frame) for index, frame in read_frames(video, wanted).items()} == {
        index: index for index in (2, 3, 11, 29)
    }
    assert read_frames(video, [30]) == {}


def test_a_long_video_is_entered_at_its_key_frames(tmp_path, monkeypatch):
    """Frames 700 and 703 lie behind the key frame 500, frame 10 behind the first."""
    video = write_video(tmp_path / "video.mp4", counting_frames(38) * 20, codec="libx264", gop_size=250)
    decoded = []

    def counted(container, stream, decode=spa3r.video._tolerant_decode):
        for frame in decode(container, stream):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(spa3r.video, "_tolerant_decode", counted)
    frames = read_frames(video, [10, 700, 703])
    assert {index: read_number(frame) for index, frame in frames.items()} == {10: 10, 700: 700 % 38, 703: 703 % 38}
    assert 204 + 11 <= len(decoded) <= 204 + 11 + 10


def test_frames_by_number_are_upright(tmp_path):
    video = turn_mp4(write_video(tmp_path / "video.mp4", [smooth(64, 48)] * 3), 90)
    (by_number,), (sampled,) = read_frames(video, [1]).values(), sample_frames(video, 1)
    assert by_number.size == sampled.size == (48, 64)
    assert np.abs(np.asarray(by_number, float) - np.asarray(sampled)).mean() < 1


def test_frames_that_are_cut_off_are_missing(tmp_path):
    video = counting_video(tmp_path / "video.mkv", 30)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert list(read_frames(video, [0, 3, 29])) == [0, 3]


def test_frames_by_number_of_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for read in (count_frames, lambda video: read_frames(video, [0])):
        with pytest.raises(ValueError, match=r"text\.mp4 can't be decoded"):
            read(tmp_path / "text.mp4")
        with pytest.raises(ValueError, match=r"gone\.mp4 doesn't exist"):
            read(tmp_path / "gone.mp4")
        with pytest.raises(ValueError, match=r"sound\.mp4 holds no frames"):
            read(write_sound(tmp_path / "sound.mp4"))


def test_frames_by_number_close_the_file(tmp_path):
    video = counting_video(tmp_path / "video.mp4", 10)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_frames(video, [0, 9])
    assert len(os.listdir("/proc/self/fd")) == before
