"""Videos become the right frames, upright, whatever the container says, and nothing stays open."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from media import (
    counting_frames,
    counting_video,
    lie_about_length,
    noise,
    read_number,
    smooth,
    turn_mp4,
    write_sound,
    write_video,
)
from PIL import Image

import spa3r.media.videos
from spa3r.console import read_views
from spa3r.media.videos import (
    FrameSampling,
    count_frames,
    coverage_indices,
    default_num_frames,
    read_frames,
    sample_frames,
    sample_numbered_frames,
    uniform_indices,
)

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
        (
            "text",
            r"The video \S+text.mp4 can't be decoded \(.*It is damaged or not a video: leave it out or convert it.",
        ),
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
    with pytest.raises(ValueError, match=f"`num_frames` must be a whole number from 1 to 1024, got {num_frames}."):
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
    kept, upright = [], spa3r.media.videos._Source._upright
    monkeypatch.setattr(spa3r.media.videos._Source, "_upright", lambda *args: kept.append(upright(*args)) or kept[-1])
    assert len(sample_frames(counting_video(tmp_path / "video.mp4", 30), 4)) == 4
    assert [read_number(frame) for frame in kept] == [0, 9, 19, 29]


# Equal to decoding everything -----------------------------------------------------------------------------------------

X264 = {"x264-params": "keyint=12:bframes=3:open-gop=1"}
STREAMS = {  # what is hard to seek in: frames out of order, hidden ones, no key frames, times that aren't told
    "open.mp4": ("libx264", X264),
    "open.mkv": ("libx264", X264),
    "phone.3gp": ("libx264", {}),
    "camera.mts": ("libx264", X264),
    "camera.ts": ("libx264", {"x264-params": "interlaced=1:keyint=12"}),
    "dvd.mpg": ("mpeg2video", {"bf": "2"}),
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
    "hidden.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "unordered.avi": ("mpeg4", {"bf": "2"}),
    "untimed.avi": ("libx264", {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_frames_equal_those_of_decoding_everything(tmp_path, name):
    codec, options = STREAMS[name]
    picture = np.asarray(noise(96, 64))
    frames = [Image.fromarray(np.roll(picture, (i, 2 * i), (0, 1))) for i in range(60)]
    video = write_video(tmp_path / name, frames, fps=10, codec=codec, codec_options=options, gop_size=12)
    with av.open(str(video)) as container:
        everything = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    assert count_frames(video) == len(everything) >= 58
    for num_frames in (1, 2, 7, 32):
        expected = [everything[i] for i in uniform_indices(len(everything), num_frames)]
        np.testing.assert_array_equal(np.stack(sample_frames(video, num_frames)), expected)
    found = read_frames(video, range(0, 60, 3))
    np.testing.assert_array_equal(np.stack([*found.values()]), everything[::3])
    names, _ = read_views([str(tmp_path)], 2)  # in a folder it is known for a video
    assert names == [f"{video}#0", f"{video}#1"]


def test_sampled_frames_are_sought(tmp_path, monkeypatch):
    """8 frames of 1000 lie at most a group of pictures behind a key frame."""
    video = write_video(tmp_path / "video.mp4", counting_frames(38) * 27, codec="libx264", gop_size=25)
    decoded, decode = [], spa3r.media.videos._tolerant_decode
    monkeypatch.setattr(
        spa3r.media.videos,
        "_tolerant_decode",
        lambda *args: (decoded.append(frame) or frame for frame in decode(*args)),
    )
    assert numbers(video, 8) == [i % 38 for i in uniform_indices(38 * 27, 8)]
    assert len(decoded) <= 8 * (25 + 5)


# Parts and rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 1}, uniform_indices(20, 10)),  # as transformers: int(frames / rate * fps)
        ({"fps": 0.01}, [0]),
        ({"fps": 100}, range(20)),
        ({"fps": 1, "max_frames": 3}, [0, 9, 19]),
        ({"fps": 0.1, "min_frames": 3}, [0, 9, 19]),
        ({"max_frames": 3}, [0, 9, 19]),
        ({"min_frames": 20}, range(20)),
        ({"num_frames": 3, "video_start": 2}, [4, 11, 19]),  # as qwen-vl-utils: from ceil(start * rate) ...
        ({"num_frames": 3, "video_start": 2.1, "video_end": 6.1}, [5, 8, 12]),  # ... to floor(end * rate)
        ({"num_frames": 2, "video_end": 3}, [0, 6]),
        ({"num_frames": 2, "video_end": 300}, [0, 19]),
        ({"fps": 1, "video_start": 2, "video_end": 5.5}, uniform_indices(8, 4) + 4),
        ({"video_start": 2, "video_end": 5.5}, [4, 6, 8, 11]),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_rate_and_a_part(tmp_path, container, options, expected):
    video = counting_video(tmp_path / f"video.{container}", 20)
    assert [read_number(frame) for frame in sample_frames(video, **options)] == list(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 1025}, "`num_frames` must be a whole number from 1 to 1024, got 1025"),
        ({"num_frames": 10**9}, "`num_frames` must be a whole number from 1 to 1024, got 1000000000"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number from 1 to 1024, got 2.5"),
        ({"num_frames": True}, "`num_frames` must be a whole number from 1 to 1024, got True"),
        ({"max_frames": "8"}, "`max_frames` must be a whole number from 1 to 1024, got '8'"),
        ({"fps": 0}, "`fps` must be a finite number above 0, got 0"),
        ({"fps": float("nan")}, "`fps` must be a finite number above 0, got nan"),
        ({"fps": np.ones(2)}, r"`fps` must be a finite number above 0, got ndarray of shape \(2,\)"),
        ({"video_start": -1}, "`video_start` must be a finite number of at least 0, got -1"),
        ({"video_end": "3"}, "`video_end` must be a finite number above 0, got '3'"),
        ({"fps": 1, "num_frames": 2}, r"`num_frames` \(`nframes`\) must be given without `fps`"),
        ({"min_frames": 3, "max_frames": 2}, "`min_frames` must be at most `max_frames`, got 3 and 2"),
        ({"video_start": 3, "video_end": 2}, "`video_start` must be less than `video_end`, got 3 and 2 seconds"),
        (
            {"video_start": 60},
            r"Of the video \S+video.mp4: no frame lies from `video_start` = 60 to .* at 9.50 seconds",
        ),
        ({"video_start": 2.1, "video_end": 2.2}, "no frame lies from `video_start` = 2.1 to `video_end` = 2.2"),
    ],
)
def test_options_are_checked(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        sample_frames(counting_video(tmp_path / "video.mp4", 20), **options)


def test_a_rate_that_asks_for_too_many_frames(tmp_path):
    video = write_video(tmp_path / "video.mp4", [smooth(16, 16)] * 1100, fps=30)
    with pytest.raises(
        ValueError, match=r"`fps` = 30 asks for 1100 frames, and at most 1024 are taken. Give a smaller"
    ):
        sample_frames(video, fps=30)


# Videos of strangers --------------------------------------------------------------------------------------------------


def playlist(kind: str, folder: Path) -> Path:
    """A file named .mp4 that makes FFmpeg open the video beside it, with its usual settings."""
    counting_video(folder / "secret.mp4", 20)
    counting_video(folder / "0.ts", 20)
    path = folder / f"{kind}.mp4"
    if kind == "concat":
        path.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    elif kind == "nested":
        path.write_text("ffconcat version 1.0\n" + "file inner.mp4\n" * 100)
        (folder / "inner.mp4").write_text("ffconcat version 1.0\n" + "file secret.mp4\n" * 100)
    elif kind == "hls":
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n0.ts\n#EXT-X-ENDLIST\n")
    elif kind == "dash":
        path.write_text(
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT10S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="0" '
            'bandwidth="1"><BaseURL>secret.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
        )
    elif kind == "imf":
        path.write_text('<?xml version="1.0"?><CompositionPlaylist></CompositionPlaylist>')
    elif kind == "sdp":
        path.write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n")
    elif kind == "picture":
        noise(64, 48).save(path, "PNG")
    return path


@pytest.mark.parametrize("kind", ["concat", "nested", "hls", "dash", "imf", "sdp", "picture"])
def test_only_videos_are_opened_and_only_the_file_itself(tmp_path, kind):
    path = playlist(kind, tmp_path)
    for read in (
        sample_frames,
        count_frames,
        lambda video: read_frames(video, [0]),
        lambda v: sample_frames(v.read_bytes()),
    ):
        with pytest.raises(ValueError, match=r"The video .*(\.mp4|\d+ bytes) can't be decoded \("):
            read(path)


def test_a_playlist_is_told_what_is_read(tmp_path):
    words = r"concat.mp4 can't be decoded \(it is none of the containers that are read: MP4, MOV, 3GP, MKV"
    with pytest.raises(ValueError, match=words):
        sample_frames(playlist("concat", tmp_path))


@pytest.mark.parametrize("name", ["concat:secret.mp4|secret.mp4", "subfile,,start,0,end,0,,:secret.mp4", "pipe:0"])
def test_no_other_protocol_is_read(tmp_path, monkeypatch, name):
    counting_video(tmp_path / "secret.mp4", 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The video .* doesn't exist"):
        sample_frames(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for read in (sample_frames, count_frames):
        with pytest.raises(ValueError, match=r"The video \S+pipe.mp4 can't be opened: it is a pipe, socket or device"):
            read(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"The video /dev/zero can't be opened: it is a pipe"):
        sample_frames("/dev/zero")


def test_urls_of_files_and_content(tmp_path):
    video = counting_video(tmp_path / "a walk.mp4", 20)
    for form in (video.as_uri(), f"file://{video}", video.read_bytes()):
        assert [read_number(frame) for frame in sample_frames(form, 3)] == [0, 9, 19]


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("MAX_SECONDS", 0, r"takes longer than 0 seconds to read. Cut it, .* set spa3r.media.videos.MAX_SECONDS"),
        ("MAX_PACKETS", 19, r"has more than 19 frames. Cut it"),
        ("MAX_FRAME_PIXELS", 3000, r"A frame of the video \S+ must have at most 3000 pixels, got 64 x 48. Convert"),
        ("MAX_PIXELS", 4 * 64 * 48, r"at most 12288 pixels together, got 5 of 64 x 48. Take fewer"),
    ],
)
def test_limits(tmp_path, monkeypatch, limit, value, words):
    video = counting_video(tmp_path / "video.mp4", 20)
    monkeypatch.setattr(spa3r.media.videos, limit, value)
    with pytest.raises(ValueError, match=words):
        sample_frames(video)


def test_repeated_frames_take_no_memory(tmp_path):
    frames = sample_frames(counting_video(tmp_path / "video.mp4", 2), 1024)
    assert len(frames) == 1024 and len({id(frame) for frame in frames}) == 2


def test_titles_that_are_not_utf8_do_no_harm(tmp_path):
    """As cameras of Windows write them."""
    for name in ("video.avi", "video.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=2)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.metadata["title"] = "Wohnung Straaaae"
            for frame in counting_frames(5):
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
        content = (tmp_path / name).read_bytes()
        assert content.count(b"Straaaae") == 1
        (tmp_path / name).write_bytes(content.replace(b"Straaaae", b"Stra\xdfe\xdfe"))
        assert numbers(tmp_path / name, 2) == [0, 4] and count_frames(tmp_path / name) == 5


@pytest.mark.parametrize("container", ["mkv", "mp4", "avi", "ts", "webm"])
def test_damage_has_one_kind_of_error(tmp_path, container):
    """Whatever the media library raises; and frame 0 is not repeated in place of what is missing."""
    video = counting_video(tmp_path / f"video.{container}", 20, codec=CONTAINERS.get(container, "libx264"))
    content, refused = video.read_bytes(), 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        damaged, places = bytearray(content), rng.integers(16, len(content), 40)
        for place in places:
            damaged[place] = rng.integers(256)
        if seed % 3 == 0:
            damaged = damaged[: int(rng.integers(16, len(damaged)))]
        video.write_bytes(damaged)
        for read in (sample_frames, count_frames, lambda video: read_frames(video, [0, 19])):
            try:
                found = read(video)
            except ValueError as error:
                assert str(video) in str(error)
                refused += 1
            else:
                repeats = isinstance(found, list) and len({*map(id, found)}) < len(found)
                assert not repeats or container == "ts"  # which doesn't say how long it is
    assert refused


def test_missing_frames_are_not_made_up_by_repetition(tmp_path):
    video = write_video(tmp_path / "video.mkv", [noise(64, 48, i) for i in range(20)])
    content = video.read_bytes()
    video.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75") + len(content) // 10])
    assert 1 <= count_frames(video) <= 2
    with pytest.raises(ValueError, match=r"video.mkv is damaged: 5 frames must be taken of it, and only"):
        sample_frames(video, 5)


def test_damage_does_not_stop_the_decoder_when_a_library_listens_to_its_log(tmp_path):
    """With several threads this waits for ever: they report to Python's log, whose lock the reader holds."""
    video = write_video(tmp_path / "video.mkv", [noise(320, 240, i) for i in range(8)] * 5, codec="libx264")
    content = bytearray(video.read_bytes())
    for place in np.random.default_rng(0).integers(5000, len(content), 400):
        content[place] ^= 0x55
    video.write_bytes(content)
    program = (
        "import av, sys; av.logging.set_level(av.logging.DEBUG)\n"
        "from spa3r.media.videos import count_frames, read_frames, sample_frames\n"
        "for read in (count_frames, lambda v: sample_frames(v, 32), lambda v: read_frames(v, range(40))):\n"
        "    for _ in range(5):\n"
        "        try: read(sys.argv[1])\n"
        "        except ValueError: pass\n"
    )
    subprocess.run([sys.executable, "-c", program, str(video)], check=True, timeout=60, capture_output=True)


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

    def counted(container, stream, decode=spa3r.media.videos._tolerant_decode):
        for frame in decode(container, stream):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(spa3r.media.videos, "_tolerant_decode", counted)
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


# frames="coverage" ----------------------------------------------------------------------------------------------------


def farthest_first(points: np.ndarray, count: int) -> list[int]:
    """The definition, one distance at a time."""
    chosen = [0]
    while len(chosen) < count:
        nearest = [min(float(np.linalg.norm(point - points[other])) for other in chosen) for point in points]
        chosen.append(max((i for i in range(len(points)) if i not in chosen), key=lambda i: (nearest[i], -i)))
    return sorted(chosen)


def test_coverage_takes_the_farthest_frames_first():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 5))
    for count in (1, 2, 7, 20):
        assert coverage_indices(list(points), count) == farthest_first(points, count)
    assert coverage_indices(list(points), 50) == [*range(20)]
    assert coverage_indices([np.zeros(3)] * 4, 2) == [0, 1]  # the earliest of equal ones, and none twice


@pytest.mark.parametrize("container", CONTAINERS)
def test_coverage_wastes_no_frames_on_a_pause(tmp_path, container):
    """The camera stands still in two thirds of the video."""
    places = [0] * 12 + [4, 8, 12, 16, 20] + [24] * 12 + [28]
    frames = [counting_frames(30)[place] for place in places]
    video = write_video(tmp_path / f"pause.{container}", frames, codec=CONTAINERS[container])
    seen = {
        choice: [read_number(frame) for frame in sample_frames(video, 8, frames=choice)]
        for choice in ("uniform", "coverage")
    }
    assert len(set(seen["uniform"])) == 5 and seen["coverage"] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert seen["coverage"] == [read_number(frame) for frame in sample_frames(video, 8, frames="coverage")]
    indices, _ = sample_numbered_frames(video, 8, whole=True, frames="coverage")
    assert [places[index] for index in indices] == seen["coverage"] and indices == sorted(indices)


def test_coverage_of_a_short_video_is_all_of_it(tmp_path):
    video = counting_video(tmp_path / "video.mp4", 3)
    for count in (3, 5):
        both = [
            [read_number(frame) for frame in sample_frames(video, count, frames=f)] for f in ("uniform", "coverage")
        ]
        assert both[0] == both[1]
    assert [read_number(frame) for frame in sample_frames(video, 1, frames="coverage")] == [0]


def test_coverage_respects_the_part_of_the_video(tmp_path):
    video = counting_video(tmp_path / "video.mp4", 30)
    seen = [read_number(frame) for frame in sample_frames(video, 3, video_start=5, video_end=10, frames="coverage")]
    assert seen[0] == 10 and seen[-1] == 20 and len(seen) == 3


@pytest.mark.parametrize("value", ("best", None, 3))
def test_unknown_choices_of_frames_are_refused(value):
    with pytest.raises(ValueError, match="`frames` must be one of 'uniform', 'coverage', got"):
        FrameSampling(8, frames=value)
