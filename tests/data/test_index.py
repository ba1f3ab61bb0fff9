"""The index finds every picture, is rebuilt when the disk changes and only then, and lies where it may."""

import os
import pickle
import shutil
import stat
import tempfile
from pathlib import Path

import pyarrow
import pytest

from spa3r.data.index import SceneIndex, natural_key


def write_tree(root: Path, counts: dict[str, int]) -> Path:
    """Folders of empty pictures that nobody has touched for a while."""
    for scene, count in counts.items():
        (root / scene).mkdir(parents=True)
        for number in range(count):
            (root / scene / f"{number}.jpg").touch()
        age(root / scene)
    return root


def age(folder: Path, seconds: int = 100) -> None:
    time = folder.stat().st_mtime - seconds
    os.utime(folder, (time, time))


class Lister:
    """Lists folders, and remembers which."""

    def __init__(self):
        self.seen: list[str] = []

    def __call__(self, folder: str) -> tuple[list[str], int]:
        self.seen.append(Path(folder).name)
        names = sorted(os.listdir(folder), key=natural_key)
        return names, len(names)


def build(root: Path, cache: Path, lister: Lister, **kwargs) -> SceneIndex:
    entries = [(folder.name, str(folder)) for folder in sorted(root.iterdir())]
    return SceneIndex.build([root], entries, lister, cache, **kwargs)


def content(index: SceneIndex) -> list[tuple]:
    return [
        (index.name(row), index.path(row), int(index.counts[row]), index.pictures(row)) for row in range(len(index))
    ]


def test_numbers_in_names_are_sorted_by_value():
    names = ["10.jpg", "2.jpg", "frame-000010.png", "frame-9.png", "1.jpg", "01.jpg", "a.jpg"]
    assert sorted(names, key=natural_key) == [
        *("01.jpg", "1.jpg", "2.jpg", "10.jpg", "a.jpg", "frame-9.png", "frame-000010.png")
    ]


def test_every_picture_is_found_in_order(tmp_path):
    root = write_tree(tmp_path / "data", {"b": 12, "a": 3})
    index = build(root, tmp_path / "cache", Lister())
    assert content(index) == [
        ("a", str(root / "a"), 3, [f"{number}.jpg" for number in range(3)]),
        ("b", str(root / "b"), 12, [f"{number}.jpg" for number in range(12)]),
    ]
    assert index.picture(1, 10) == "10.jpg"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_parallel_is_serial(tmp_path):
    root = write_tree(tmp_path / "data", {f"scene{number:03d}": number % 7 for number in range(600)})
    serial = build(root, tmp_path / "serial", Lister(), threads=1)
    parallel = build(root, tmp_path / "parallel", Lister(), threads=16)
    assert content(serial) == content(parallel) and len(serial) == 600


def test_unchanged_folders_are_not_listed_again(tmp_path):
    root, lister = write_tree(tmp_path / "data", {"a": 3, "b": 2}), Lister()
    first = build(root, tmp_path / "cache", lister)
    before = os.stat(first.file)
    again = build(root, tmp_path / "cache", lister)
    assert lister.seen == ["a", "b"] and content(again) == content(first)
    assert os.stat(again.file).st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_a_changed_folder_is_listed_again_and_no_other(tmp_path, change):
    root, lister = write_tree(tmp_path / "data", {"a": 3, "b": 2, "c": 1}), Lister()
    build(root, tmp_path / "cache", lister)
    if change == "add":
        (root / "b" / "9.jpg").touch()
    elif change == "remove":
        (root / "b" / "1.jpg").unlink()
    else:
        (root / "b" / "1.jpg").rename(root / "b" / "7.jpg")
    lister.seen.clear()
    index = build(root, tmp_path / "cache", lister)
    assert lister.seen == ["b"]
    expected = {"add": ["0.jpg", "1.jpg", "9.jpg"], "remove": ["0.jpg"], "rename": ["0.jpg", "7.jpg"]}[change]
    assert index.pictures(1) == expected and [index.counts[0], index.counts[2]] == [3, 1]


@pytest.mark.parametrize("change", ["add", "remove"])
def test_scenes_that_come_and_go_change_the_index(tmp_path, change):
    root, lister = write_tree(tmp_path / "data", {"a": 3, "b": 2}), Lister()
    build(root, tmp_path / "cache", lister)
    if change == "add":
        write_tree(root, {"aa": 1})
    else:
        shutil.rmtree(root / "a")
    lister.seen.clear()
    index = build(root, tmp_path / "cache", lister)
    assert [index.name(row) for row in range(len(index))] == (["a", "aa", "b"] if change == "add" else ["b"])
    assert lister.seen == (["aa"] if change == "add" else [])


def test_a_folder_that_changed_just_now_is_listed_again(tmp_path):
    """Its time of change may not change with the next picture: clocks tick."""
    root, lister = write_tree(tmp_path / "data", {"a": 3, "b": 2}), Lister()
    os.utime(root / "a")
    build(root, tmp_path / "cache", lister)
    build(root, tmp_path / "cache", lister)
    assert lister.seen == ["a", "b", "a"]


@pytest.mark.parametrize("damage", [b"", b"ARROW1 and no more", None])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    root = write_tree(tmp_path / "data", {"a": 3, "b": 2})
    index = build(root, tmp_path / "cache", Lister())
    expected, file = content(index), Path(index.file)
    del index
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    assert content(build(root, tmp_path / "cache", Lister())) == expected


def test_a_failed_build_leaves_the_old_index_and_nothing_else(tmp_path):
    root = write_tree(tmp_path / "data", {"a": 3, "b": 2})
    index = build(root, tmp_path / "cache", Lister())
    before = Path(index.file).read_bytes()
    (root / "b" / "9.jpg").touch()

    def broken(folder):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build(root, tmp_path / "cache", broken)
    assert [file.read_bytes() for file in (tmp_path / "cache").iterdir()] == [before]


def test_a_worker_opens_the_same_index_and_no_other(tmp_path):
    root = write_tree(tmp_path / "data", {"a": 3, "b": 2})
    index = build(root, tmp_path / "cache", Lister())
    sent = pickle.dumps(index)
    assert len(sent) < 1000 and content(pickle.loads(sent)) == content(index)
    (root / "b" / "9.jpg").touch()
    build(root, tmp_path / "cache", Lister())
    with pytest.raises(RuntimeError, match="was rebuilt while it was in use: the pictures changed"):
        pickle.loads(sent)


def test_the_index_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = build(write_tree(tmp_path / "data", {"a": 3}), None, Lister())
    assert Path(index.file).parent == tmp_path / "cache" / "spa3r" / "indices"


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = write_tree(tmp_path / "data", {"a": 3})
    (tmp_path / "file").touch()  # no folder, so nothing can be written into it, not even by root
    with pytest.warns(UserWarning, match=r"can't be kept in \S+ \(.+\); it goes to \S+\. Give a `cache_dir`"):
        index = build(root, tmp_path / "file", Lister())
    assert Path(index.file).is_relative_to(tmp_path) and index.pictures(0) == ["0.jpg", "1.jpg", "2.jpg"]


def test_the_data_is_only_read(tmp_path):
    root = write_tree(tmp_path / "data", {"a": 3})
    root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}
    build(root, tmp_path / "cache", Lister())
    assert {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))} == before
    root.chmod(stat.S_IRWXU)


def test_pictures_are_not_copied_into_memory(tmp_path):
    entries = [(f"s{number}", f"/s{number}") for number in range(100)]
    names = [f"{number}.jpg" for number in range(1000)]
    before = pyarrow.total_allocated_bytes()
    index = SceneIndex.build(["many"], entries, lambda folder: (names, len(names)), tmp_path)
    assert index.picture(99, 999) == "999.jpg"
    assert pyarrow.total_allocated_bytes() - before < 10_000 < os.path.getsize(index.file)
