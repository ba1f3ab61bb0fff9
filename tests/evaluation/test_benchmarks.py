"""VSI-Bench in every form in which it is released; rooms; videos that come and go without a trace."""

import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from media import counting_frames, counting_video, read_number, write_video
from pyarrow import Table, parquet
from tiny_benchmark import make_rows, write_vsi_bench

from spa3r.evaluation import RoomsBenchmark, VsiBench, open_benchmark
from spa3r.evaluation.benchmarks import scene_of
from spa3r.evaluation.runner import _ahead
from spa3r.media.videos import sample_numbered_frames
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions


def write_parquet(file: Path, rows: list[dict]) -> None:
    parquet.write_table(Table.from_pylist(rows), file)


@pytest.fixture
def released(tmp_path) -> Path:
    """The whole release: the column `pruned` beside everything else."""
    return write_vsi_bench(tmp_path / "VSI-Bench", pruned=True)


def ids(benchmark) -> list[int]:
    return [row["id"] for row in benchmark.rows]


# Annotations ----------------------------------------------------------------------------------------------------------


def layouts(rows):
    """Of every layout of the full set its files."""
    kept, pruned = ([row for row in rows if row["pruned"] == wanted] for wanted in (False, True))
    return {
        "jsonl": {"test.jsonl": rows},
        "parquet": {"test.parquet": rows},
        "shards": {"test-00000-of-00002.parquet": rows[:4], "test-00001-of-00002.parquet": rows[4:]},
        "parts": {"test_debiased.parquet": kept, "test_pruned.parquet": pruned},
        "with parts": {"test.jsonl": rows, "test_debiased.parquet": kept, "test_pruned.parquet": pruned},
    }


@pytest.mark.parametrize("layout", layouts([{"pruned": True}]))
def test_every_layout_gives_the_same_rows(layout, released):
    rows = [row | {"pruned": row["id"] % 3 == 0} for row in make_rows()]
    (released / "test.jsonl").unlink()
    for name, content in layouts(rows)[layout].items():
        if name.endswith("parquet"):
            write_parquet(released / name, content)
        else:
            (released / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    assert VsiBench(released).rows == rows
    assert VsiBench(released, "debiased").rows == [row for row in rows if not row["pruned"]]
    assert VsiBench(released, "pruned").rows == [row for row in rows if row["pruned"]]


def test_a_list_of_ids_says_which_rows_are_pruned(tmp_path):
    folder = write_vsi_bench(tmp_path)
    with pytest.raises(ValueError, match=r"`subset` can be \"debiased\" where .* has none of them"):
        VsiBench(folder, "debiased")
    (folder / "pruned_ids.txt").write_text("102\n104\n")
    assert ids(VsiBench(folder, "pruned")) == [102, 104]
    assert ids(VsiBench(folder, "debiased")) == [i for i in ids(VsiBench(folder)) if i not in (102, 104)]


def test_a_file_of_annotations_will_do(released):
    assert VsiBench(released / "test.jsonl").rows == VsiBench(released).rows
    assert ids(VsiBench(released / "test.jsonl", "pruned")) == ids(VsiBench(released, "pruned"))
    assert VsiBench(released / "test.jsonl").missing() == {}


def test_a_data_set_of_the_hub_is_named_by_its_commit(released, tmp_path, monkeypatch):
    """As it lies in the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "datasets--lab--VSI"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.move(released, cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    benchmark = VsiBench("lab/VSI")
    assert len(benchmark.rows) == 11 and benchmark.about["revision"] == commit
    assert benchmark.frames("scannet/scene0", 2)[0] == [0, 5]
    assert open_benchmark(benchmark.about).rows == benchmark.rows


def test_scenes_are_in_order_and_benchmarks_come_back(released):
    benchmark = VsiBench(released, "debiased")
    assert list(benchmark.scenes) == list(dict.fromkeys(map(scene_of, benchmark.rows)))
    assert [row for rows in benchmark.scenes.values() for row in rows] == benchmark.rows
    again = open_benchmark(json.loads(json.dumps(benchmark.about)))
    assert again.rows == benchmark.rows and again.fingerprint == benchmark.fingerprint
    assert again.fingerprint != VsiBench(released).fingerprint


def test_the_choice_of_frames_belongs_to_the_benchmark(released):
    video = write_video(released / "scannet" / "scene0.mp4", [counting_frames(9)[i] for i in [0] * 9 + [4, 8]])
    uniform, coverage = VsiBench(released), VsiBench(released, frames="coverage")
    again = open_benchmark(json.loads(json.dumps(coverage.about)))
    assert "frames" not in uniform.about and uniform.frames("scannet/scene0", 3)[0] == [0, 5, 10]
    for benchmark in (coverage, again):
        numbers, pictures = benchmark.frames("scannet/scene0", 3)
        assert numbers == sample_numbered_frames(video, 3, frames="coverage")[0] == [0, 9, 10]
        assert [read_number(picture) for picture in pictures] == [0, 4, 8]
    with pytest.raises(ValueError, match="`frames` must be one of 'uniform', 'coverage', got 'best'"):
        VsiBench(released, frames="best")


def without(key):
    return lambda rows: rows[1].pop(key)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        *(
            (
                lambda rows, name=name: rows[1].update(scene_name=name),
                r"Row 101 of .*: `scene_name` must be a name below",
            )
            for name in ("../..", "a/../../b", "/etc/passwd", "..", "C:\\a", "a\0b", "..\\a", "")
        ),
        (lambda rows: rows[1].update(dataset=".."), r"Row 101 of .*: `dataset` must be a name below"),
        (
            lambda rows: rows[0].update(options=[1, 2]),
            r"Row 100 of .*: `options` of .* got \[1, 2\]",
        ),
        (lambda rows: rows[0].update(question=7), r"Row 100 of .*: `question` must be a text, got 7"),
        (lambda rows: rows.insert(3, "row"), r"test.jsonl, line 4 must be a JSON object, got str"),
        (without("scene_name"), r"row 101 of .*VSI-Bench lacks \['scene_name'\]"),
        (lambda rows: rows[2].update(question_type="color"), r"Row 102 of .*: `question_type` must be a type of"),
        (lambda rows: rows[0].update(options=None), r"Row 100 of .*: `options` of a question of type"),
        (lambda rows: rows[6].update(ground_truth="many"), r"Row 106 of .*: `ground_truth` of .* a finite number"),
        (lambda rows: rows[1].update(id=100), r"`id` must be of one row only, and .* 11 rows with repeated ids"),
        (lambda rows: rows.clear(), r"must hold at least one question, and .*VSI-Bench holds none"),
    ],
)
def test_rows_that_can_not_be_asked_are_refused_at_once(spoil, words, released):
    rows = make_rows()
    spoil(rows)
    (released / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=words):
        VsiBench(released)


def test_a_scene_of_another_folder_is_not_read(released):
    benchmark = VsiBench(released)
    for scene in ("../secret", "scannet/../../secret", "/secret"):
        with pytest.raises(ValueError, match="A scene must be a name below"):
            benchmark.frames(scene, 2)


def test_numbers_and_marked_files_are_read(released):
    rows = make_rows()
    for row in rows:
        if row["options"] is None:
            row["ground_truth"] = float(row["ground_truth"])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    for encoding in ("utf-8-sig", "utf-16"):
        (released / "test.jsonl").write_bytes(text.encode(encoding))
        assert VsiBench(released).rows == rows
        (released / "pruned_ids.txt").write_bytes("101\n102\n".encode(encoding))
        assert ids(VsiBench(released, "pruned")) == [101, 102]
    (released / "test.jsonl").write_text(text + "{")
    with pytest.raises(ValueError, match=rf"test.jsonl, line {len(rows) + 1} is no JSON"):
        VsiBench(released)


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(FileNotFoundError, match=r"must be a folder in VSI-Bench's layout, .* got '\S+gone', which"):
        VsiBench(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"must hold test.parquet, test.jsonl, .* got the folder \S+empty with"):
        VsiBench(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"must be a .parquet or .jsonl file where it is a file, got \S+rows.csv"):
        VsiBench(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"`subset` must be one of full, debiased, pruned, got 'hard'"):
        VsiBench(tmp_path, "hard")


# Videos ---------------------------------------------------------------------------------------------------------------


def test_frames_are_the_official_ones_with_their_numbers(released):
    counting_video(released / "scannet" / "scene0.mp4", 20)
    numbers, frames = VsiBench(released).frames("scannet/scene0", 7)
    assert numbers == np.linspace(0, 19, 7).astype(int).tolist()
    assert [read_number(frame) for frame in frames] == numbers


def test_archives_need_not_be_unpacked(released):
    benchmark = VsiBench(released)
    wanted = benchmark.frames("scannet/scene0", 3)
    for inside in ("scannet/", ""):
        with zipfile.ZipFile(released / "scannet.zip", "w") as archive:
            for video in (released / "scannet").glob("*.mp4"):
                archive.write(video, f"{inside}{video.name}")
        shutil.move(released / "scannet", released / "unpacked")
        assert benchmark.missing() == {}
        numbers, frames = benchmark.frames("scannet/scene0", 3)
        assert numbers == wanted[0]
        assert all(np.array_equal(a, b) for a, b in zip(frames, wanted[1]))
        shutil.move(released / "unpacked", released / "scannet")
    shutil.rmtree(released / "scannet")
    with pytest.raises(ValueError, match=r"The archive \S+scannet.zip holds no scannet/other.mp4"):
        benchmark.frames("scannet/other", 3)
    (released / "scannet.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"The archive \S+scannet.zip can't be read \(File is not a zip file\)"):
        benchmark.frames("scannet/scene0", 3)
    assert list(benchmark.missing()) == ["scannet/scene0", "scannet/scene2"]


def test_what_is_missing_or_broken_is_named(released):
    benchmark = VsiBench(released)
    video = released / "scannet" / "scene0.mp4"
    counting_video(video, 20, options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * 0.7)])
    with pytest.raises(ValueError, match=r"scene0.mp4 is truncated: it must hold 20 frames, as its header says, and"):
        benchmark.frames("scannet/scene0", 2)
    video.write_text("no video")
    assert benchmark.missing() == {}
    with pytest.raises(ValueError, match=r"The video \S+scene0.mp4 can't be decoded"):
        benchmark.frames("scannet/scene0", 2)
    video.unlink()
    assert list(benchmark.missing()) == ["scannet/scene0"]
    with pytest.raises(ValueError, match=r"The video \S+scene0.mp4 doesn't exist, nor an archive \S+scannet.zip"):
        benchmark.frames("scannet/scene0", 2)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of this process's open files")
def test_two_hundred_videos_in_a_row_leave_nothing_behind(tmp_path):
    """Open files and memory, read ahead by threads as in a run."""
    video, rows = write_video(tmp_path / "scene.mp4", counting_frames(38, 160, 120)), []
    (tmp_path / "scannet").mkdir()
    for scene in range(200):
        os.link(video, tmp_path / "scannet" / f"{scene:03d}.mp4")
        rows.append(make_rows((1,))[0] | {"id": scene, "dataset": "scannet", "scene_name": f"{scene:03d}"})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = VsiBench(tmp_path)

    def in_use() -> tuple[int, float]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    measured = []
    for _, reading in _ahead(lambda scene: benchmark.frames(scene, 32), list(benchmark.scenes), 2):
        numbers, frames = reading.result()
        assert len(frames) == 32 and read_number(frames[-1]) == numbers[-1] == 37
        measured.append(in_use())
    files, memory = zip(*measured)
    assert len(measured) == 200 and max(files[20:]) <= max(files[:20]) and len(os.listdir("/proc/self/fd")) <= files[0]
    # Kept, the frames of 180 videos would take 300 MiB.
    assert max(memory[20:]) - max(memory[:20]) < 20


# Rooms ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rooms() -> RoomsBenchmark:
    return RoomsBenchmark(num_rooms=2, frames=2, size=28)


def test_rooms_are_asked_about_what_room_questions_show(rooms):
    questions = RoomQuestions(FIRST_TEST_SEED, 2, frames=2, size=28)
    asked = {row["id"]: row for row in map(questions.row, range(len(questions)))}
    assert rooms.rows == list(asked.values())
    for scene in rooms.scenes:
        numbers, frames = rooms.frames(scene, 2)
        wanted = questions.pictures(int(scene.removeprefix("rooms/")))
        assert numbers == [0, 45] and all(np.array_equal(a, b) for a, b in zip(frames, wanted, strict=True))


def test_rooms_come_back_and_threads_may_ask_for_them(rooms):
    again = open_benchmark(rooms.about)
    assert again.fingerprint == rooms.fingerprint
    with ThreadPoolExecutor(4) as pool:
        for _, frames in pool.map(lambda scene: again.frames(scene, 2), list(again.scenes) * 4):
            assert len(frames) == 2


def test_rooms_are_test_rooms_with_their_own_frames(rooms):
    with pytest.raises(ValueError, match=r"`first_seed` must be at least 1000000, got 7: the rooms before are for"):
        RoomsBenchmark(first_seed=7)
    with pytest.raises(ValueError, match=r"`num_frames` must be 2, the pictures of a room .* got 3"):
        rooms.frames("rooms/1000000", 3)
