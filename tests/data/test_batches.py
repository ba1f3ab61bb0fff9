"""Batches hold what the plan says, whoever loads them, and go on where pictures can't be read."""

import gc
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from media import counting_video, encoded, noise
from PIL import Image
from scene_files import look_around, write_folders, write_gray, write_scannet, write_scannetpp
from torch.utils.data import DataLoader

from spa3r import Spa3RImageProcessor
from spa3r.data import (
    DatasetScenes,
    FolderScenes,
    ScanNetPPScenes,
    ScanNetScenes,
    SceneBatches,
    SceneSource,
    SkippedReport,
    StreamedScenes,
    VideoScenes,
    relative_to_first,
)
from spa3r.models.cameras import unproject
from spa3r.rooms import generate_room
from spa3r.rooms.scenes import RoomScenes

PROCESSOR = Spa3RImageProcessor(size=28)
FEW = {"views": (2, 4), "pictures_per_batch": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """40 scenes of 6 pictures; frame f of scene s has the gray level 6 s + f, so a level names its picture."""
    root = tmp_path_factory.mktemp("folders")
    for scene in range(40):
        write_gray(root / f"s{scene}", 6, first=6 * scene)
    return root


@pytest.fixture
def source(folders):
    return FolderScenes(folders, name="gray")


def levels(batch: dict) -> list[int]:
    """The gray level of every view."""
    views = PROCESSOR.unpack(batch["view_pixel_values"], batch["view_grid_hw"])
    return [round(view.astype(float).mean()) for view in views]


def scenes_of(batches) -> list[str]:
    return [scene for batch in batches for scene in batch["scenes"]]


def assert_same(ours: list[dict], others: list[dict]) -> None:
    assert len(ours) == len(others)
    for one, other in zip(ours, others):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def joined(*parts: dict) -> dict:
    """The batches of all ranks of a step as one."""
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(value, torch.Tensor)
        else sum((part[key] for part in parts[1:]), value)
        for key, value in parts[0].items()
    }


# What a batch holds ---------------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_model_takes(source):
    for batch in SceneBatches(source, PROCESSOR, **FEW):
        assert set(batch) == {
            *(
                "view_pixel_values",
                "view_grid_hw",
                "views_per_scene",
                "target_mask",
                "scenes",
                "skipped",
                "num_pictures",
            )
        }
        counts = batch["views_per_scene"].tolist()
        assert len(set(counts)) == 1 and 2 <= counts[0] <= 4 and sum(counts) <= 8
        assert batch["target_mask"].dtype == torch.bool and len(batch["scenes"]) == len(counts)
        assert len(batch["target_mask"]) == len(batch["view_grid_hw"]) == sum(counts) == batch["num_pictures"]
        masks = batch["target_mask"].view(len(counts), -1)
        assert not masks[:, 0].any() and (masks.sum(1) == counts[0] - max(1, int(counts[0] * 0.5))).all()
        for scene, views in zip(batch["scenes"], np.split(np.array(levels(batch)), len(counts))):
            assert {level // 6 for level in views} == {int(scene.removeprefix("gray/s"))}
            assert (np.diff(views) > 0).all()
        assert batch["skipped"] == []


def test_the_budget_is_used(source):
    sizes = [len(batch["view_grid_hw"]) for batch in SceneBatches(source, PROCESSOR, views=(4, 4))]
    assert sizes == [24] * 6 + [16] or sorted(sizes) == [16] + [24] * 6


@pytest.mark.parametrize("count", [1, 3])
def test_scenes_of_few_pictures_repeat_them(count, tmp_path):
    write_gray(tmp_path / "data" / "a", count)
    (batch,) = SceneBatches(FolderScenes(tmp_path / "data"), PROCESSOR, views=(8, 8))
    assert batch["views_per_scene"].tolist() == [8] and levels(batch) == sorted(levels(batch))
    assert set(levels(batch)) == set(range(count)) and batch["num_pictures"] == count


def test_scenes_of_mixed_sizes(tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for number, size in enumerate([(28, 28), (56, 28), (90, 61), (20, 40)]):
        noise(*size).save(folder / f"{number}.png")
    write_gray(tmp_path / "data" / "b", 4, (28, 14))
    batches = SceneBatches(
        FolderScenes(tmp_path / "data", stride=(1, 1)), Spa3RImageProcessor(size=28, mode="pretraining"), views=(4, 4)
    )
    (batch,) = batches
    grids = dict(zip(batch["scenes"], batch["view_grid_hw"].view(2, 4, 2).tolist()))
    assert grids == {"data/a": [[2, 2], [1, 2], [1, 2], [4, 2]], "data/b": [[1, 2]] * 4}
    assert len(batch["view_pixel_values"]) == batch["view_grid_hw"].prod(1).sum()


# The order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, workers):
    batches = SceneBatches(source, PROCESSOR, **FEW)
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=workers)), list(batches))
    assert len(batches) == len(list(batches)) == len(DataLoader(batches, batch_size=None, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_what_one_sees(source, workers):
    one = SceneBatches(source, PROCESSOR, views=(4, 4), pictures_per_batch=16)
    two = [
        DataLoader(
            SceneBatches(source, PROCESSOR, views=(4, 4), pictures_per_batch=8, rank=rank, world_size=2),
            batch_size=None,
            num_workers=workers,
        )
        for rank in (0, 1)
    ]
    assert_same([joined(*parts) for parts in zip(*two, strict=True)], list(one))


@pytest.mark.parametrize("world", [1, 3])
def test_no_scene_twice_and_none_left_out_in_an_epoch(source, world):
    for epoch in (0, 1):
        seen = Counter()
        for rank in range(world):
            batches = SceneBatches(source, PROCESSOR, **FEW, rank=rank, world_size=world)
            batches.set_epoch(epoch)
            seen.update(scenes_of(batches))
        assert set(seen.values()) == {1} and len(seen) == 40


def test_epochs_and_seeds_differ_and_repeat(source):
    batches = SceneBatches(source, PROCESSOR, **FEW)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert scenes_of(first) != scenes_of(second) and len(first) == len(second) == len(batches)
    frames = [
        {
            scene: tuple(found)
            for batch in epoch
            for scene, found in zip(batch["scenes"], np.split(np.array(levels(batch)), len(batch["scenes"])))
        }
        for epoch in (first, second)
    ]
    assert sum(frames[0][scene] != frames[1][scene] for scene in frames[0]) > 20
    batches.set_epoch(0)
    assert_same(list(batches), first)
    assert scenes_of(SceneBatches(source, PROCESSOR, **FEW, seed=1)) != scenes_of(first)


def test_drawing_leaves_the_global_generators_alone(source):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(SceneBatches(source, PROCESSOR, **FEW))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 4, 10_000])
def test_skipped_batches_are_those_that_iterating_gives(source, workers, count):
    batches = SceneBatches(source, PROCESSOR, **FEW)
    batches.set_epoch(3)
    expected = list(batches)
    batches.skip_batches(count)
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=workers)), expected[count:])
    batches.set_epoch(3)  # as a trainer may say once more before it goes on
    assert_same(list(batches), expected[count:])
    batches.set_epoch(4)
    assert len(list(batches)) == len(expected)


def test_skipping_reads_nothing(source, monkeypatch):
    batches = SceneBatches(source, PROCESSOR, **FEW)
    read = []
    load = FolderScenes.load
    monkeypatch.setattr(FolderScenes, "load", lambda self, *wanted: read.append(wanted) or load(self, *wanted))
    batches.skip_batches(len(batches) - 1)
    (last,) = batches
    assert len(read) == len(last["scenes"])


def test_persistent_workers_hear_of_a_new_epoch(source):
    batches = SceneBatches(source, PROCESSOR, **FEW)
    loader = DataLoader(batches, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epochs.append(list(loader))
        assert_same(epochs[-1], list(batches))
    assert scenes_of(epochs[0]) != scenes_of(epochs[1])


@pytest.mark.slow
def test_spawned_workers_read_the_same_index(source):
    batches = SceneBatches(source, PROCESSOR, **FEW, scenes_per_epoch=8)
    loader = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert_same(list(loader), list(batches))


# Sources without an end, and several --------------------------------------------------------------------------------


def test_endless_rooms_are_new_in_every_epoch():
    batches = SceneBatches(RoomScenes(num_frames=2, size=28), PROCESSOR, views=(2, 2), scenes_per_epoch=3)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(scenes_of(batches))
    assert epochs == [[f"rooms/{seed:07d}" for seed in range(3 * epoch, 3 * epoch + 3)] for epoch in range(3)]


def test_an_epoch_without_end(source):
    batches = SceneBatches([RoomScenes(size=28), source], PROCESSOR, **FEW, weights=[1, 9])
    with pytest.raises(TypeError, match=r"length of an epoch is not known: .* Give `scenes_per_epoch`"):
        len(batches)
    batches.skip_batches(5000)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=2))
    plain = iter(batches)
    assert_same([next(loader) for _ in range(3)], [next(plain) for _ in range(3)])


def test_mixtures_follow_their_weights(source, tmp_path):
    write_gray(tmp_path / "small" / "only", 3)
    batches = SceneBatches([source, FolderScenes(tmp_path / "small")], PROCESSOR, views=(2, 2), weights=[3, 1])
    batches.set_epoch(1)
    seen = Counter(scene.partition("/")[0] for scene in scenes_of(batches))
    assert seen.total() == 41 and 20 < seen["gray"] < 39
    longer = SceneBatches([source, source], PROCESSOR, views=(2, 2), weights=[3, 1], scenes_per_epoch=240)
    assert Counter(scenes_of(longer)).total() == 240
    without = SceneBatches([source, FolderScenes(tmp_path / "small")], PROCESSOR, views=(2, 2))
    assert set(Counter(scenes_of(without)).values()) == {1} and len(set(scenes_of(without))) == 41


# Streams --------------------------------------------------------------------------------------------------------------


def stream(scenes: int = 20, shards: int = 4, single: bool = False, **kwargs) -> StreamedScenes:
    """Scenes of six pictures, streamed in shards; frame f of scene s has the gray level 6 s + f."""

    def rows(parts):
        for number in (number for part in parts for number in part):
            levels = range(6 * number, 6 * number + 6)
            files = [{"bytes": encoded(Image.new("RGB", (28, 28), (level,) * 3)), "path": None} for level in levels]
            for images in files if single else [files]:
                yield {"images": images, "scene": f"s{number}"}

    kind = datasets.Image() if single else datasets.List(datasets.Image())
    features = datasets.Features({"images": kind, "scene": datasets.Value("string")})
    parts = [list(range(scenes))[shard::shards] for shard in range(shards)]
    loaded = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"parts": parts})
    assert loaded.num_shards == shards
    return StreamedScenes(loaded, scene_column="scene", **kwargs)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_streams_give_every_scene_once_whatever_the_workers(single, workers):
    batches = SceneBatches(stream(single=single, shards=1), PROCESSOR, **FEW)
    plain = list(batches)
    assert Counter(scenes_of(plain)) == Counter(f"stream/s{number}" for number in range(20))
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=workers)), plain)
    batches.skip_batches(2)
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=workers)), plain[2:])
    with pytest.raises(TypeError):
        len(batches)


def test_streams_start_over_in_a_longer_epoch():
    batches = SceneBatches(stream(), PROCESSOR, **FEW, scenes_per_epoch=60)
    seen = scenes_of(batches)
    assert len(seen) == 60 and len(list(batches)) == len(batches)
    turns = [seen[:20], seen[20:40], seen[40:]]
    assert all(len(set(turn)) == 20 for turn in turns) and turns[0] != turns[1]
    batches.set_epoch(1)
    assert scenes_of(batches) != seen


@pytest.mark.parametrize("shards", [1, 4])
def test_ranks_share_a_stream(shards):
    parts = [
        SceneBatches(stream(shards=shards), PROCESSOR, views=(2, 2), scenes_per_epoch=20, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    seen = [scenes_of(part) for part in parts]
    assert len(parts[0]) == len(parts[1]) and len(seen[0]) == len(seen[1]) == 10
    assert len(set(seen[0] + seen[1])) == 20
    assert_same(list(DataLoader(parts[1], batch_size=None, num_workers=2)), list(parts[1]))
    with pytest.raises(ValueError, match="With 2 ranks a stream needs `scenes_per_epoch`, got None"):
        SceneBatches(stream(), PROCESSOR, rank=0, world_size=2)


def test_two_ranks_see_what_one_sees_of_a_stream_that_is_not_split():
    one = SceneBatches(stream(shards=1), PROCESSOR, views=(4, 4), pictures_per_batch=16, scenes_per_epoch=20)
    two = [
        SceneBatches(
            stream(shards=1),
            PROCESSOR,
            views=(4, 4),
            pictures_per_batch=8,
            scenes_per_epoch=20,
            rank=rank,
            world_size=2,
        )
        for rank in (0, 1)
    ]
    assert_same([joined(*parts) for parts in zip(*two, strict=True)], list(one))


def test_streams_in_mixtures(source):
    batches = SceneBatches([stream(), source], PROCESSOR, **FEW, weights=[1, 1], scenes_per_epoch=60)
    plain = list(batches)
    assert 15 < Counter(scene.partition("/")[0] for scene in scenes_of(plain))["stream"] < 45
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=2)), plain)


def test_an_empty_stream_is_refused():
    batches = SceneBatches(stream(scenes=0, shards=1), PROCESSOR, scenes_per_epoch=4)
    with pytest.raises(ValueError, match="The stream 'stream' holds no scene"):
        list(batches)


# Known cameras --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "scannet", "scannetpp"])
@pytest.mark.parametrize("mode", ["crop", "pad", "pretraining"])
def test_given_cameras_are_those_of_the_views(layout, mode, tmp_path):
    write, make = {
        "folder": (write_folders, FolderScenes),
        "scannet": (write_scannet, ScanNetScenes),
        "scannetpp": (write_scannetpp, ScanNetPPScenes),
    }[layout]
    rooms = [look_around(seed, 5, (60, 84)) for seed in range(2)]
    processor = Spa3RImageProcessor(size=84, mode=mode)
    source = make(write(tmp_path / "data", rooms))
    (batch,) = SceneBatches(source, processor, views=(3, 3), cameras="given")
    assert batch["extrinsics"].dtype == batch["intrinsics"].dtype == torch.float32
    views = processor.unpack(batch["view_pixel_values"], batch["view_grid_hw"])
    names = [source.scene_name(scene) for scene in range(2)]
    for place, scene in enumerate(batch["scenes"]):
        room = rooms[names.index(scene.partition("/")[2])]
        candidates = [np.asarray(processor.process_view(image), float) for image in room.images]
        frames = [
            int(np.argmin([np.abs(view - candidate).mean() for candidate in candidates]))
            for view in views[3 * place : 3 * place + 3]
        ]
        expected = relative_to_first(room.extrinsics[frames])
        assert np.abs(batch["extrinsics"][3 * place : 3 * place + 3].numpy() - expected).max() < 1e-5
        intrinsics = processor.process_intrinsics(room.intrinsics[0].astype(float), (60, 84))
        assert np.abs(batch["intrinsics"][3 * place : 3 * place + 3].numpy() - intrinsics).max() < 1e-3


def test_points_of_different_views_agree():
    """What two views of a batch see of the same place has the same coordinates: cameras and pictures fit."""
    source = RoomScenes(level=0, num_frames=4, size=56)
    processor = Spa3RImageProcessor(size=56)
    (batch,) = SceneBatches(source, processor, views=(4, 4), cameras="given", scenes_per_epoch=1)
    truth = look_around(0, 4, (56, 56), level=0, zoom=True)
    points = unproject(torch.from_numpy(truth.depth), batch["extrinsics"], batch["intrinsics"])
    world = np.linalg.inv(truth.extrinsics[0].astype(float))
    points = points.double().numpy() @ world[:3, :3].T + world[:3, 3]
    assert np.abs(points[..., 2].min() - 0) < 0.02  # the lowest of all is the floor
    length, width, _ = generate_room(0, 0).size
    assert np.allclose(np.abs(points[..., :2]).reshape(-1, 2).max(0), (length / 2, width / 2), atol=0.05)


def test_frames_without_a_camera_are_not_drawn(tmp_path):
    room = look_around(0, 6)
    root = write_scannet(tmp_path / "data", [room])
    for frame in (0, 3, 4):
        (root / "scene0000_00" / "pose" / f"{frame}.txt").write_text("-inf -inf -inf -inf\n" * 4)
    processor = Spa3RImageProcessor(size=84)
    candidates = [np.asarray(processor.process_view(image), float) for image in room.images]
    drawn = set()
    for seed in range(6):
        batches = SceneBatches(ScanNetScenes(root, stride=(1, 1)), processor, views=(2, 3), cameras="given", seed=seed)
        for batch in batches:
            for view in processor.unpack(batch["view_pixel_values"], batch["view_grid_hw"]):
                drawn.add(int(np.argmin([np.abs(view - candidate).mean() for candidate in candidates])))
            assert batch["skipped"] == [] and batch["extrinsics"].isfinite().all()
    assert drawn == {1, 2, 5}


def test_sources_without_cameras_are_refused_at_once(source, tmp_path):
    with pytest.raises(ValueError, match=r'cameras="given" wants known cameras .* 40 of 40 scenes have none'):
        SceneBatches(source, PROCESSOR, cameras="given")
    counting_video(tmp_path / "a.mp4", 3)
    with pytest.raises(ValueError, match="VideoScenes knows none"):
        SceneBatches([RoomScenes(), VideoScenes(tmp_path)], PROCESSOR, cameras="given", weights=[1, 1])


# What can't be read ---------------------------------------------------------------------------------------------------


def damage(root: Path, share: float, seed: int = 0) -> set[str]:
    """Cuts off a share of the pictures; their names."""
    files = sorted(root.rglob("*.png"))
    broken = np.random.default_rng(seed).permutation(files)[: round(share * len(files))]
    for file in broken:
        file.write_bytes(file.read_bytes()[:40])
    return {f"{file.parent.name}/{file.name}" for file in broken}


@pytest.fixture
def damaged(tmp_path):
    for scene in range(40):
        write_gray(tmp_path / "data" / f"s{scene}", 6, first=6 * scene)
    return tmp_path / "data"


def test_one_picture_in_twenty_is_reported_and_replaced(damaged):
    broken = damage(damaged, 0.05)
    batches = SceneBatches(FolderScenes(damaged), PROCESSOR, views=(4, 4))
    loader = DataLoader(batches, batch_size=None, num_workers=2, persistent_workers=True)
    report, seen = SkippedReport(0.05), []
    for epoch in range(6):
        batches.set_epoch(epoch)
        for batch in loader:
            report.add(batch)
            seen += batch["scenes"]
            assert batch["views_per_scene"].tolist() == [4] * len(batch["scenes"])
            assert batch["num_pictures"] <= len(batch["view_grid_hw"]) + len(batch["skipped"])
            for views in np.split(np.array(levels(batch)), len(batch["scenes"])):
                assert (np.diff(views) >= 0).all()  # another frame came in the place, and time still runs forwards
    assert Counter(Counter(seen).values()) == {6: 40}
    assert {f"{entry['scene']}/{entry['picture']}" for entry in report.entries()} == broken
    assert len(broken) == 12 and all(name in str(report) for name in broken) and "can't be decoded" in str(report)


def test_what_is_seen_does_not_depend_on_the_workers_where_pictures_are_bad(damaged):
    damage(damaged, 0.3)
    batches = SceneBatches(FolderScenes(damaged), PROCESSOR, **FEW, max_bad_share=1)
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=2)), list(batches))


def test_too_many_bad_pictures_stop_the_run_soon(damaged):
    damage(damaged, 0.3)
    batches = SceneBatches(FolderScenes(damaged), PROCESSOR, views=(4, 4))
    for workers in (0, 1):
        seen = 0
        with pytest.raises(RuntimeError, match=r"`max_bad_share` = 0\.05 of the pictures may be bad, got \d+ of \d+"):
            for batch in DataLoader(batches, batch_size=None, num_workers=workers):
                seen += batch["num_pictures"]
        assert seen < 200


def test_where_no_other_frame_is_left_good_ones_are_repeated(tmp_path):
    folder = write_gray(tmp_path / "data" / "a", 3, first=10)
    (folder / "1.png").write_bytes(b"")
    (batch,) = SceneBatches(FolderScenes(tmp_path / "data"), PROCESSOR, views=(8, 8), max_bad_share=1)
    assert len(levels(batch)) == 8 and set(levels(batch)) == {10, 12}
    assert batch["skipped"][0] | {"reason": ""} == {"source": "data", "scene": "a", "picture": "1.png", "reason": ""}


def test_pictures_smaller_than_a_patch_are_skipped(tmp_path):
    folder = write_gray(tmp_path / "data" / "a", 3)
    noise(5, 50).save(folder / "1.png")
    (batch,) = SceneBatches(FolderScenes(tmp_path / "data"), PROCESSOR, views=(3, 3), max_bad_share=1)
    (entry,) = batch["skipped"]
    assert entry["picture"].endswith("1.png") and "at least one patch" in entry["reason"]


@pytest.mark.parametrize("broken", ["video", "folder", "pictures", "cameras"])
def test_scenes_that_cannot_be_read_leave_the_batch_to_the_others(broken, tmp_path):
    fields = {"views": (2, 2), "pictures_per_batch": 40, "max_bad_share": 1}
    if broken == "video":
        for scene in range(4):
            counting_video(tmp_path / f"{scene}.mp4", 3)
        (tmp_path / "1.mp4").write_bytes(b"no video")
        source, name = VideoScenes(tmp_path), "1.mp4"
    else:
        rooms = [look_around(seed, 2, (28, 28), level=0) for seed in range(4)]
        source, name = FolderScenes(write_folders(tmp_path, rooms)), "scene_1"
        for file in (tmp_path / name).iterdir():
            if broken == "folder" or (broken == "cameras" and file.suffix == ".json"):
                file.write_text("{}") if broken == "cameras" else file.unlink()
            elif broken == "pictures":
                file.write_bytes(b"")
        if broken == "folder":
            (tmp_path / name).rmdir()
        if broken == "cameras":
            fields["cameras"] = "given"
    (batch,) = SceneBatches(source, PROCESSOR, **fields)
    assert len(batch["scenes"]) == 3 and batch["views_per_scene"].tolist() == [2, 2, 2]
    (entry,) = batch["skipped"]
    assert (entry["scene"], entry["picture"]) == (name, "") and batch["num_pictures"] == 6
    assert {
        "video": "can't be decoded",
        "folder": "is gone",
        "pictures": "None of the 2 pictures tried can be read, the first: 0.png",
        "cameras": "None of its frames has a valid camera",
    }[broken] in entry["reason"]


def test_an_empty_batch_takes_the_next_scene(tmp_path):
    for scene in range(4):
        counting_video(tmp_path / f"{scene}.mp4", 3)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    batches = SceneBatches(VideoScenes(tmp_path), PROCESSOR, views=(2, 2), pictures_per_batch=2, max_bad_share=1)
    seen = list(batches)
    assert len(seen) == len(batches) == 4 and all(len(batch["scenes"]) == 1 for batch in seen)
    assert [batch["skipped"] != [] for batch in seen].count(True) == 1
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=2)), seen)
    streamed = SceneBatches(stream(shards=1), PROCESSOR, views=(2, 2), pictures_per_batch=2, max_bad_share=1)
    assert len(scenes_of(streamed)) == 20


def test_a_stream_goes_on_behind_a_broken_scene():
    rows = [
        {
            "images": [
                {"bytes": b"no picture" if n == 2 else encoded(Image.new("RGB", (28, 28), (n,) * 3)), "path": None}
            ]
        }
        for n in range(6)
    ]
    loaded = datasets.Dataset.from_list(rows, features=datasets.Features({"images": datasets.List(datasets.Image())}))
    source = StreamedScenes(loaded.to_iterable_dataset(), shuffle_buffer=1)
    batches = SceneBatches(source, PROCESSOR, views=(2, 2), pictures_per_batch=2, max_bad_share=1)
    seen = list(batches)
    assert [levels(batch)[0] for batch in seen] == [0, 1, 3, 3, 4, 5]  # the third batch took the next scene
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=2)), seen)


def test_a_source_of_which_nothing_can_be_read_stops_the_run(tmp_path):
    for scene in range(30):
        (tmp_path / f"{scene}.mp4").write_bytes(b"no video")
    with pytest.raises(RuntimeError, match=r"of the scenes may be bad, got 20 of 20 \(100\.0%\)"):
        list(SceneBatches(VideoScenes(tmp_path), PROCESSOR))
    with pytest.raises(RuntimeError, match=r"None of 100 scenes in a row can be read\.\nSkipped: "):
        list(SceneBatches(VideoScenes(tmp_path), PROCESSOR, max_bad_share=1))


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"views": (0, 4)}, r"`views` must be .* got \(0, 4\)"),
        ({"views": (5, 4)}, r"`views` must be .* got \(5, 4\)"),
        ({"views": (4,)}, r"`views` must be .* got \(4,\)"),
        ({"pictures_per_batch": 11}, "must hold one scene of the largest number of views, 12, got 11"),
        ({"cameras": "known"}, "must be 'predicted' or 'given', got 'known'"),
        ({"mask_ratio": 1.5}, r"`mask_ratio` must be a number from 0 to 1, got 1\.5"),
        ({"max_bad_share": -1}, r"`max_bad_share` must be a number from 0 to 1, got -1"),
        ({"rank": 2, "world_size": 2}, r"`rank` must be in \[0, world_size\), got 2 of 2"),
        ({"scenes_per_epoch": 0}, "`scenes_per_epoch` must be a number of at least 1, got 0"),
        ({"weights": [1, 2]}, r"`weights` must be a positive number for each of the 1 sources, got \[1, 2\]"),
        ({"weights": [0]}, r"`weights` must be a positive number .* got \[0\]"),
        ({"world_size": 41}, "at least a scene for each of the 41 ranks, got 40"),
    ],
)
def test_settings_are_checked(source, fields, words):
    with pytest.raises(ValueError, match=words):
        SceneBatches(source, PROCESSOR, **fields)


def test_sources_are_checked(source):
    with pytest.raises(ValueError, match="`sources` must be at least one SceneSource, got"):
        SceneBatches([], PROCESSOR)
    with pytest.raises(ValueError, match=r"Several sources of which some have no end \(rooms\) need `weights`"):
        SceneBatches([source, RoomScenes()], PROCESSOR)


def test_a_source_of_ones_own():
    class Noise(SceneSource):
        name, stride = "noise", (1, 1)

        def __len__(self):
            return 3

        def scene_name(self, scene):
            return str(scene)

        def num_frames(self, scene):
            return 4

        def load(self, scene, frames):
            return RoomScenes(size=28).load(scene, frames)

    assert sorted(scenes_of(SceneBatches(Noise(), PROCESSOR))) == ["noise/0", "noise/1", "noise/2"]


# Leaks ----------------------------------------------------------------------------------------------------------------


def test_nothing_stays_open(source, tmp_path):
    counting_video(tmp_path / "a.mp4", 6)
    everything = [source, VideoScenes(tmp_path), RoomScenes(size=28, num_rooms=2), stream(4, 1)]
    batches = SceneBatches(everything, PROCESSOR, **FEW, weights=[1] * 4, scenes_per_epoch=12)

    def read_all() -> None:
        list(batches)
        list(DataLoader(batches, batch_size=None, num_workers=2))

    def descriptors() -> int:
        gc.collect()  # pipes of ended workers may wait for it
        return len(os.listdir("/proc/self/fd"))

    read_all()  # multiprocessing opens descriptors of its own the first time
    before = descriptors()
    read_all()
    read_all()
    assert descriptors() <= before + 2


def test_data_sets_are_batched_like_folders(tmp_path):
    rows = [
        {"images": [{"bytes": encoded(Image.new("RGB", (28, 28), (6 * s + f,) * 3)), "path": None} for f in range(6)]}
        for s in range(10)
    ]
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    batches = SceneBatches(DatasetScenes(datasets.Dataset.from_list(rows, features=features)), PROCESSOR, **FEW)
    plain = list(batches)
    assert sorted(scenes_of(plain)) == sorted(f"dataset/{scene}" for scene in range(10))
    assert_same(list(DataLoader(batches, batch_size=None, num_workers=2)), plain)
