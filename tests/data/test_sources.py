"""Every layout gives the same scenes: pictures in order, cameras in our convention, clear words for what is wrong."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from media import counting_video, encoded, read_number, write_sound
from PIL import Image
from scene_files import look_around, write_folders, write_gray, write_scannet, write_scannetpp, write_videos

from spa3r.data import (
    DatasetScenes,
    FolderScenes,
    ScanNetPPScenes,
    ScanNetScenes,
    SceneError,
    StreamedScenes,
    VideoScenes,
    relative_to_first,
)
from spa3r.rooms.scenes import RoomScenes
from spa3r.training.sources import make_source


@pytest.fixture(scope="module")
def rooms():
    return [look_around(seed, frames) for seed, frames in enumerate((3, 5, 12))]


FOLDERS = {
    "folder": (write_folders, FolderScenes),
    "scannet": (write_scannet, ScanNetScenes),
    "scannetpp": (write_scannetpp, ScanNetPPScenes),
    "scannetpp_resized": (partial(write_scannetpp, pictures="resized_undistorted_images"), ScanNetPPScenes),
}


def grays(loaded) -> list[int]:
    return [round(np.asarray(image, np.float64).mean()) for image in loaded.images]


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*FOLDERS, "video"])
def test_every_layout_gives_the_same_pictures(layout, rooms, tmp_path):
    write, source = FOLDERS.get(layout, (write_videos, VideoScenes))
    scenes = source(write(tmp_path / "data", rooms))
    assert [scenes.num_frames(scene) for scene in range(len(scenes))] == [3, 5, 12]
    assert len({scenes.scene_name(scene) for scene in range(3)}) == 3
    for scene, views in enumerate(rooms):
        frames = [frame for frame in (0, 2, 10, 11) if frame < len(views.images)]
        loaded = scenes.load(scene, frames)
        assert loaded.frames == frames and loaded.unread == []
        for frame, image in zip(frames, loaded.images, strict=True):
            distances = [np.abs(np.asarray(image, float) - other).mean() for other in views.images]
            assert image.size == (84, 56) and np.argmin(distances) == frame and min(distances) < 12


def test_files_are_closed(rooms, tmp_path):
    sources = [
        FolderScenes(write_folders(tmp_path / "folders", rooms)),
        VideoScenes(write_videos(tmp_path / "videos", rooms)),
        DatasetScenes(write_dataset(tmp_path / "dataset")),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for source in sources:
            assert len(source.load(0, [0, 1]).images) == 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_folders_are_sorted_and_strangers_are_left_out(tmp_path):
    for name in ("room10", "room9", ".hidden", "empty"):
        write_gray(tmp_path / "data" / name, 0 if name == "empty" else 2)
    for name in ("notes.txt", "._0.png", "truth.npz"):
        (tmp_path / "data" / "room9" / name).write_bytes(b"no picture")
    shutil.copy(tmp_path / "data" / "room9" / "0.png", tmp_path / "data" / "room9" / "B.PNG")
    write_gray(tmp_path / "data" / "room9" / "deeper", 4)
    source = FolderScenes(tmp_path / "data")
    assert [source.scene_name(scene) for scene in range(len(source))] == ["room9", "room10"]
    assert [source.num_frames(scene) for scene in range(2)] == [3, 2]
    assert source.name == "data" and FolderScenes(tmp_path / "data", name="mine").name == "mine"


@pytest.mark.parametrize("given", ["names", "file"])
def test_chosen_scenes_in_the_given_order(tmp_path, given):
    for name in "abc":
        write_gray(tmp_path / "data" / name, 2)
    (tmp_path / "list.txt").write_text("c\n\na\n")
    source = FolderScenes(tmp_path / "data", scenes=["c", "a"] if given == "names" else tmp_path / "list.txt")
    assert [source.scene_name(scene) for scene in range(len(source))] == ["c", "a"]
    with pytest.raises(ValueError, match="`scenes` names 'z', and there is no folder"):
        FolderScenes(tmp_path / "data", scenes=["z"])
    with pytest.raises(ValueError, match=r"or a text file with one name a line, got nowhere\.txt"):
        FolderScenes(tmp_path / "data", scenes="nowhere.txt")
    write_gray(tmp_path / "other", 2)
    for name in ("../other", str(tmp_path / "other")):
        with pytest.raises(ValueError, match=r"A name of `scenes` must be a name below .* got '.*other'"):
            FolderScenes(tmp_path / "data", scenes=[name])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_and_cameras_may_have_a_byte_order_mark(encoding, rooms, tmp_path):
    write, make = FOLDERS["folder"]
    root = write(tmp_path / "data", rooms)
    expected = make(root).load(0, [0]).extrinsics
    for file in root.rglob("cameras.json"):
        file.write_bytes(file.read_text().encode(encoding))
    name = make(root).scene_name(0)
    (tmp_path / "list.txt").write_bytes(f"{name}\r\n".encode(encoding))
    source = FolderScenes(root, scenes=tmp_path / "list.txt")
    assert source.scene_name(0) == name and np.array_equal(source.load(0, [0]).extrinsics, expected)


def test_what_changed_on_disk_is_seen(tmp_path):
    write_gray(tmp_path / "data" / "a", 3)
    write_gray(tmp_path / "data" / "b", 3)
    assert [FolderScenes(tmp_path / "data").num_frames(scene) for scene in range(2)] == [3, 3]
    Image.new("RGB", (28, 28), (77,) * 3).save(tmp_path / "data" / "a" / "9.png")
    (tmp_path / "data" / "b" / "0.png").unlink()
    write_gray(tmp_path / "data" / "c", 1)
    source = FolderScenes(tmp_path / "data")
    assert [source.num_frames(scene) for scene in range(3)] == [4, 2, 1]
    assert grays(source.load(0, [3])) == [77] and grays(source.load(1, [0])) == [1]


def test_pictures_that_cannot_be_read_are_named_and_the_others_are_there(tmp_path):
    folder = write_gray(tmp_path / "data" / "a", 5, first=10)
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    source = FolderScenes(tmp_path / "data")
    (folder / "4.png").unlink()
    loaded = source.load(0, [0, 1, 2, 3, 4])
    assert loaded.frames == [0, 2] and grays(loaded) == [10, 12]
    assert [picture for picture, _ in loaded.unread] == ["1.png", "3.png", "4.png"]
    assert "can't be decoded" in loaded.unread[0][1] and "doesn't exist" in loaded.unread[2][1]
    shutil.rmtree(folder)
    with pytest.raises(SceneError, match=r"The folder \S+ is gone"):
        source.load(0, [0])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (FolderScenes, "holds no folder with pictures"),
        (VideoScenes, "holds no video"),
        (ScanNetScenes, r"ScanNet's layout is <root>/scene\*/color/\*\.jpg"),
        (ScanNetPPScenes, r"text file with one name a line, got \S+nvs_sem_train.txt"),
    ],
)
def test_folders_without_scenes_are_refused(source, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        source(tmp_path)
    with pytest.raises(ValueError, match=r"`root` must be a folder, got \S+nowhere, which is none"):
        source(tmp_path / "nowhere")


def test_the_folder_of_one_scene_is_told_from_a_folder_of_scenes(tmp_path):
    with pytest.raises(ValueError, match=r"which holds pictures itself\. Give the folder above it"):
        FolderScenes(write_gray(tmp_path / "scene", 3))


@pytest.mark.parametrize("stride", [(0, 4), (4, 2), 3, (1, 2, 3), (1.0, 2), "12"])
def test_strides_are_checked(stride):
    with pytest.raises(ValueError, match=r"`stride` must be the smallest and the largest step .* got .* \(1, 4\)"):
        RoomScenes(stride=stride)


def test_strides_are_those_of_the_method(rooms, tmp_path):
    assert ScanNetScenes(write_scannet(tmp_path / "a", rooms)).stride == (2, 6)
    assert ScanNetPPScenes(write_scannetpp(tmp_path / "b", rooms)).stride == (20, 60)
    assert FolderScenes(write_folders(tmp_path / "c", rooms), stride=[3, 5]).stride == (3, 5)


# ScanNet's lists ------------------------------------------------------------------------------------------------------


def test_scannet_reads_a_split_and_leaves_out_what_is_not_there(rooms, tmp_path):
    root = write_scannet(tmp_path / "scans", rooms)
    (root / "tasks").mkdir()
    (tmp_path / "train.txt").write_text("scene0002_00\nscene0000_00\nscene0706_00\n")
    with pytest.warns(UserWarning, match=r"scannet: 1 of 3 scenes of the list are not in \S+ .* scene0706_00"):
        source = ScanNetScenes(root, scenes=tmp_path / "train.txt")
    assert [source.scene_name(scene) for scene in range(len(source))] == ["scene0002_00", "scene0000_00"]
    assert [ScanNetScenes(root).scene_name(scene) for scene in range(3)] == [f"scene000{n}_00" for n in range(3)]


def test_scannetpp_uses_its_split_only(rooms, tmp_path):
    root = write_scannetpp(tmp_path / "data", rooms)
    write_gray(root / "data" / "ffffffffff" / "dslr" / "undistorted_images", 2)
    assert len(ScanNetPPScenes(root)) == 3
    with (root / "splits" / "nvs_sem_train.txt").open("a") as file:
        file.write("not_there\n")
    with pytest.warns(UserWarning, match="1 of 4 scenes of the list are not in"):
        assert len(ScanNetPPScenes(root)) == 3
    with (
        pytest.warns(UserWarning, match="1 of 1 scenes"),
        pytest.raises(ValueError, match=r"holds no such picture of a scene of splits/nvs_sem_val\.txt"),
    ):
        ScanNetPPScenes(root, split="nvs_sem_val")


# Cameras --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_layout_gives_the_same_cameras(layout, rooms, tmp_path):
    write, make = FOLDERS[layout]
    source = make(write(tmp_path / "data", rooms))
    source.check_cameras()
    for scene, views in enumerate(rooms):
        frames = list(range(len(views.images)))
        assert source.camera_frames(scene).tolist() == frames
        loaded = source.load(scene, frames)
        expected = relative_to_first(views.extrinsics)
        assert np.abs(relative_to_first(loaded.extrinsics) - expected).max() < 1e-5
        assert np.abs(loaded.intrinsics - views.intrinsics).max() < 1e-4


def test_rooms_are_rendered_as_they_are_written_to_disk():
    source = RoomScenes(level=1, num_frames=4, first_seed=7, size=56)
    views = look_around(8, 4, (56, 56), zoom=True)
    loaded = source.load(1, [3, 0])
    assert loaded.frames == [3, 0] and source.scene_name(1) == "0000008" and source.num_frames(1) == 4
    assert all(np.array_equal(image, views.images[frame]) for image, frame in zip(loaded.images, (3, 0)))
    assert np.array_equal(loaded.extrinsics, views.extrinsics[[3, 0]])
    assert np.array_equal(loaded.intrinsics, views.intrinsics[[3, 0]])
    assert source.camera_frames(1).tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match=r"have no end\. Give `num_rooms`"):
        len(source)
    assert len(RoomScenes(num_rooms=5)) == 5
    for fields, words in (
        ({"level": 9}, "level"),
        ({"first_seed": -1}, "seed"),
        ({"size": 0}, "size"),
        ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
        ({"num_rooms": 0}, "`num_rooms` must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            RoomScenes(**fields)


@pytest.mark.parametrize("layout", FOLDERS)
def test_frames_without_a_valid_camera_are_known(layout, rooms, tmp_path):
    write, make = FOLDERS[layout]
    root = write(tmp_path / "data", rooms)
    if layout == "scannet":
        (root / "scene0001_00" / "pose" / "1.txt").write_text("-inf -inf -inf -inf\n" * 3 + "0 0 0 1\n")
        (root / "scene0001_00" / "pose" / "3.txt").unlink()
    else:
        file = sorted(root.rglob("*.json"))[1]
        content = json.loads(file.read_text())
        if layout == "folder":
            content["1.png"]["extrinsics"][0][3] = float("nan")
            del content["3.png"]
        else:
            content["frames"][1]["transform_matrix"][0][3] = float("inf")
            del content["frames"][3]
        file.write_text(json.dumps(content))
    source = make(root)
    assert source.camera_frames(1).tolist() == [0, 2, 4]
    loaded = source.load(1, [0, 1])
    assert len(loaded.images) == 2 and loaded.extrinsics is None
    assert source.load(1, [0, 2]).extrinsics.shape == (2, 4, 4)


def test_intrinsics_of_scannetpp_follow_resized_pictures(rooms, tmp_path):
    root = write_scannetpp(tmp_path / "data", rooms[:1])
    for file in root.rglob("*.JPG"):
        Image.open(file).resize((42, 14)).save(file)
    intrinsics = ScanNetPPScenes(root).load(0, [0, 1]).intrinsics
    assert np.allclose(intrinsics, np.diag([0.5, 0.25, 1]) @ rooms[0].intrinsics[:2].astype(float), atol=1e-4)


@pytest.mark.parametrize("layout", FOLDERS)
def test_scenes_without_cameras_are_named(layout, rooms, tmp_path):
    write, make = FOLDERS[layout]
    source = make(write(tmp_path / "data", rooms, cameras=False))
    assert source.load(0, [0]).extrinsics is None and source.camera_frames(0).tolist() == []
    with pytest.raises(ValueError, match=rf"3 of 3 scenes have none, the first: {source.scene_name(0)} \(no \S+\)"):
        source.check_cameras()


@pytest.mark.parametrize("layout", FOLDERS)
def test_camera_files_that_are_no_such_thing_are_named(layout, rooms, tmp_path):
    write, make = FOLDERS[layout]
    root = write(tmp_path / "data", rooms)
    file = root / "scene0000_00" / "intrinsic" / "intrinsic_color.txt"
    if layout != "scannet":
        file = min(root.rglob("*.json"))
    for content in ("{", "[]", '{"0.png": {"extrinsics": [1]}, "frames": 3}'):
        file.write_text(content)
        with pytest.raises(SceneError, match=file.name):
            make(root).camera_frames(0)
        loaded = make(root).load(0, [0])  # whoever predicts cameras doesn't need them
        assert len(loaded.images) == 1 and loaded.extrinsics is None


@pytest.mark.parametrize("kind", ["video", "dataset", "stream"])
def test_sources_that_know_no_cameras_say_so(kind, rooms, tmp_path):
    if kind == "video":
        source = VideoScenes(write_videos(tmp_path / "data", rooms))
    else:
        loaded = write_dataset(tmp_path)
        source = DatasetScenes(loaded) if kind == "dataset" else StreamedScenes(loaded.to_iterable_dataset())
    with pytest.raises(ValueError, match=r'cameras="given" wants sources whose cameras are known, got .* knows none'):
        source.check_cameras()


# Videos ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_frames_of_a_video_are_those_of_their_numbers(ending, codec, tmp_path):
    counting_video(tmp_path / f"a.{ending}", 30, codec=codec)
    source = VideoScenes(tmp_path)
    assert (source.num_frames(0), source.scene_name(0)) == (30, f"a.{ending}")
    assert [read_number(image) for image in source.load(0, [2, 3, 11, 29]).images] == [2, 3, 11, 29]


def test_broken_videos_stay_in_the_index_and_are_refused_when_they_are_read(tmp_path):
    counting_video(tmp_path / "a.mp4", 10)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    write_sound(tmp_path / "c.mp4")
    source = VideoScenes(tmp_path)
    assert [source.num_frames(scene) for scene in range(3)] == [10, 0, 0]
    for scene, words in ((1, r"b\.mp4 can't be decoded"), (2, r"c\.mp4 holds no frames")):
        with pytest.raises(SceneError, match=words):
            source.load(scene, [0])
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(SceneError, match=r"a\.mp4 doesn't exist"):
        source.load(0, [0])


def test_frames_behind_damage_are_missing(tmp_path):
    file = counting_video(tmp_path / "a.mkv", 30)
    source = VideoScenes(tmp_path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    loaded = source.load(0, [0, 3, 29])
    assert loaded.frames == [0, 3] and loaded.unread == [("frame 29", "It can't be decoded.")]


def test_videos_by_name(tmp_path):
    for name in "abc":
        counting_video(tmp_path / f"{name}.mp4", 3)
    source = VideoScenes(tmp_path, scenes=["c.mp4", "a.mp4"])
    assert [source.scene_name(scene) for scene in range(len(source))] == ["c.mp4", "a.mp4"]
    with pytest.raises(ValueError, match=r"`scenes` names 'z\.mp4', and there is no file"):
        VideoScenes(tmp_path, scenes=["z.mp4"])
    with pytest.raises(ValueError, match=r"A name of `scenes` must be a name below"):
        VideoScenes(tmp_path, scenes=["../a.mp4"])


# Data sets ------------------------------------------------------------------------------------------------------------

COUNTS = (3, 1, 5, 2)


def gray_file(level: int) -> dict:
    return {"bytes": encoded(Image.new("RGB", (28, 28), (level,) * 3)), "path": f"{level}.png"}


def write_dataset(folder: Path, single: bool = False) -> datasets.Dataset:
    """Scenes of 3, 1, 5 and 2 pictures; frame f of scene s has the gray level 10 s + f."""
    scenes = [{"images": [gray_file(10 * s + f) for f in range(n)], "scene": f"s{s}"} for s, n in enumerate(COUNTS)]
    image = datasets.Image()
    if single:
        scenes = [{"image": image, "scene": row["scene"]} for row in scenes for image in row["images"]]
        features = {"image": image, "scene": datasets.Value("string")}
    else:
        features = {"images": datasets.List(image), "scene": datasets.Value("string")}
    file = folder / f"{'single' if single else 'lists'}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(scenes, features=datasets.Features(features)).to_parquet(file)
    return datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))


def all_frames(source, scenes) -> dict[str, list[int]]:
    return {
        source.scene_name(scene): grays(source.load(scene, list(range(source.num_frames(scene))))) for scene in scenes
    }


EXPECTED = {f"s{s}": [10 * s + f for f in range(n)] for s, n in enumerate(COUNTS)}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_data_sets_with_random_access(single, shuffled, tmp_path):
    loaded = write_dataset(tmp_path, single)
    loaded = loaded.shuffle(seed=0) if shuffled else loaded
    source = DatasetScenes(loaded, "image" if single else "images", "scene")
    found = all_frames(source, range(len(source)))
    assert {name: sorted(frames) for name, frames in found.items()} == EXPECTED
    assert shuffled or found == EXPECTED
    assert grays(source.load(0, [0])) == found[source.scene_name(0)][:1]


def test_rows_are_named_by_their_number_where_there_is_no_name(tmp_path):
    source = DatasetScenes(write_dataset(tmp_path))
    assert list(all_frames(source, range(len(source)))) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_data_sets_that_are_streamed(single, shards, tmp_path):
    stream = write_dataset(tmp_path, single).to_iterable_dataset(num_shards=1 if single else shards)
    source = StreamedScenes(stream, "image" if single else "images", "scene")
    assert all_frames(source, source.scenes(seed=0)) == EXPECTED
    assert list(all_frames(source, source.scenes(seed=0))) == list(all_frames(source, source.scenes(seed=0)))
    orders = {tuple(all_frames(source, source.scenes(seed=seed))) for seed in range(8)}
    assert len(orders) > 1 or single
    with pytest.raises(TypeError, match="number of scenes of a stream is not known"):
        len(source)


def test_ranks_stream_shards_of_their_own_where_they_can(tmp_path):
    source = StreamedScenes(write_dataset(tmp_path).to_iterable_dataset(num_shards=4), scene_column="scene")
    parts = [list(all_frames(source, source.scenes(0, rank, 2))) for rank in (0, 1)]
    assert source.splits(2) and sorted(parts[0] + parts[1]) == sorted(EXPECTED) and len(parts[0]) == 2
    assert not source.splits(3)
    assert [list(all_frames(source, source.scenes(0, rank, 3))) for rank in (0, 1)] == [
        list(all_frames(source, source.scenes(0)))
    ] * 2


def test_streams_without_features_and_with_pictures_already_decoded():
    def rows():
        for s, count in enumerate(COUNTS):
            yield {"images": [Image.new("RGB", (28, 28), (10 * s + f,) * 3) for f in range(count)], "scene": f"s{s}"}

    source = StreamedScenes(datasets.IterableDataset.from_generator(rows), scene_column="scene")
    assert all_frames(source, source.scenes(0)) == EXPECTED


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["disk", "parquet", "imagefolder"])
def test_data_sets_by_name(kind, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fields = {"type": "dataset", "streaming": streaming}
    if kind == "imagefolder":
        rows = []
        for s, count in enumerate(COUNTS):
            for f in range(count):
                name = f"{s}-{f}.png"
                (tmp_path / "pictures").mkdir(exist_ok=True)
                Image.new("RGB", (28, 28), (10 * s + f,) * 3).save(tmp_path / "pictures" / name)
                rows.append(json.dumps({"file_name": name, "scene": f"s{s}"}))
        (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(rows))
        fields |= {"dataset": "imagefolder", "data_dir": str(tmp_path / "pictures"), "images_column": "image"}
    elif kind == "disk":
        write_dataset(tmp_path).save_to_disk(tmp_path / "saved")
        fields["dataset"] = str(tmp_path / "saved")
    else:
        write_dataset(tmp_path)
        fields |= {"dataset": "parquet", "data_files": str(tmp_path / "lists.parquet")}
    if streaming:
        fields["shuffle_buffer"] = 1  # after a shuffled pass over Parquet files `datasets` sleeps for five seconds
    source = make_source({**fields, "scene_column": "scene"})
    assert type(source) is (StreamedScenes if streaming else DatasetScenes)
    assert all_frames(source, source.scenes(0) if streaming else range(len(source))) == EXPECTED


def test_damaged_rows_are_named(tmp_path):
    rows = [{"images": [gray_file(1), {"bytes": b"no picture", "path": "bad.jpg"}, None, gray_file(4)]}]
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    loaded = DatasetScenes(datasets.Dataset.from_list(rows, features=features)).load(0, [0, 1, 2, 3])
    assert loaded.frames == [0, 3] and grays(loaded) == [1, 4]
    assert [name for name, _ in loaded.unread] == ["frame 1 (bad.jpg)", "frame 2"]
    assert loaded.unread[1][1] == "The row holds no picture."


@pytest.mark.parametrize("empty", [[], None])
def test_rows_without_pictures_are_broken_scenes(empty):
    rows = [{"images": [gray_file(1)]}, {"images": empty}]
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    loaded = datasets.Dataset.from_list(rows, features=features)
    source = DatasetScenes(loaded)
    assert [source.num_frames(scene) for scene in range(2)] == [1, 0]
    streamed = StreamedScenes(loaded.to_iterable_dataset())
    for broken, scene in ((source, 1), (streamed, list(streamed.scenes(0))[1])):
        with pytest.raises(SceneError, match="Its row holds no pictures"):
            broken.load(scene, [0])


def test_data_sets_that_cannot_be_used_are_refused(tmp_path):
    lists, single = write_dataset(tmp_path), write_dataset(tmp_path, single=True)
    for source, change in (
        (DatasetScenes, lambda rows: rows),
        (StreamedScenes, lambda rows: rows.to_iterable_dataset()),
    ):
        with pytest.raises(ValueError, match="`dataset` has no column 'photos'; it has images, scene"):
            source(change(lists), "photos")
        with pytest.raises(ValueError, match="'image' holds single pictures, and `scene_column` must name their"):
            source(change(single), "image")
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset, got IterableDataset\. Use StreamedScenes"):
        DatasetScenes(lists.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"must be a datasets\.IterableDataset, got Dataset\. Use DatasetScenes"):
        StreamedScenes(lists)
    nameless = single.map(lambda row, number: {"scene": None if number == 2 else row["scene"]}, with_indices=True)
    with pytest.raises(ValueError, match="'scene' must name a scene in every row, got none in 1 of 11 rows"):
        DatasetScenes(nameless, "image", "scene")
    with pytest.raises(ValueError, match="must hold at least one row, got none in 'dataset'"):
        DatasetScenes(lists.select([]))


# Configuration --------------------------------------------------------------------------------------------------------


def test_sources_from_fields(rooms, tmp_path):
    write_folders(tmp_path / "folder", rooms)
    write_videos(tmp_path / "video", rooms)
    write_scannet(tmp_path / "scannet", rooms)
    write_scannetpp(tmp_path / "scannetpp", rooms)
    classes = {"folder": FolderScenes, "video": VideoScenes, "scannet": ScanNetScenes, "scannetpp": ScanNetPPScenes}
    for kind, cls in classes.items():
        source = make_source({"type": kind, "root": str(tmp_path / kind), "stride": [1, 2], "name": "mine"})
        assert type(source) is cls and (source.stride, source.name, len(source)) == ((1, 2), "mine", 3)
    assert make_source({"type": "rooms", "level": 2, "num_rooms": 9}).num_rooms == 9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "must be one of folder, video, scannet, scannetpp, dataset, rooms, got None"),
        ({"type": "scan"}, "got 'scan'"),
        (
            {"type": "rooms", "levels": 2, "size": 56},
            r"'rooms' has no field 'levels'\. It has: type, level, num_frames, stride_of_walk, first_seed",
        ),
        ({"type": "dataset", "stream": True}, r"no field 'stream'\. It has: type, streaming, .*, name"),
        ({"type": "folder", "stride": [1, 2]}, r"'folder' needs 'root'\. Add it"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        make_source(fields)
