"""Pictures, depth and ids: they agree with the room, with the cameras and with one another."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import spa3r.rooms
from spa3r.rooms import (
    COLORS,
    FURNITURE,
    LEVELS,
    Cameras,
    Room,
    RoomObject,
    RoomViews,
    camera_walk,
    generate_room,
    render,
)

DIGEST = """
import hashlib
from spa3r.rooms import camera_walk, generate_room, render
room = generate_room(11, level=3)
views = render(room, camera_walk(room, 3, size=(40, 56)))
arrays = (views.images, views.depth, views.instance_ids, views.extrinsics, views.intrinsics)
digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
"""


@pytest.fixture(scope="module", params=range(len(LEVELS)))
def scene(request) -> tuple[Room, RoomViews]:
    room = generate_room(3, request.param)
    return room, render(room, camera_walk(room, 24))


def points_of(views: RoomViews) -> np.ndarray:
    """Points (V, H, W, 3) in the room's frame, from depth, intrinsics and extrinsics alone."""
    _, height, width = views.depth.shape
    v, u = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
    rays = np.einsum("vij,hwj->vhwi", np.linalg.inv(views.intrinsics.astype(np.float64)), pixels)
    in_camera = rays * views.depth[..., None]
    extrinsics = views.extrinsics.astype(np.float64)
    return np.einsum("vji,vhwj->vhwi", extrinsics[:, :3, :3], in_camera - extrinsics[:, None, None, :3, 3])


def looking_at(target, distance: float, yaw: float, size: int = 96) -> Cameras:
    """One level camera in front of a point, at 90 degrees of view."""
    forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    rotation = np.stack([[np.sin(yaw), -np.cos(yaw), 0.0], [0.0, 0.0, -1.0], forward])
    extrinsics = np.eye(4)
    extrinsics[:3, :3], extrinsics[:3, 3] = rotation, -rotation @ (np.array(target) - distance * forward)
    intrinsics = np.array([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]])
    return Cameras(extrinsics[None], intrinsics[None], (size, size))


def test_shapes_and_types(scene):
    room, views = scene
    assert views.images.shape == (24, 112, 112, 3) and views.images.dtype == np.uint8
    assert views.depth.shape == (24, 112, 112) and views.depth.dtype == np.float32
    assert views.instance_ids.shape == (24, 112, 112) and views.instance_ids.dtype == np.int32
    assert views.instance_ids.min() == 0 and views.instance_ids.max() <= len(room.objects)
    assert np.isfinite(views.depth).all() and views.depth.min() > 0
    assert views.depth.max() < np.linalg.norm(room.size)


def test_points_of_an_instance_lie_in_its_box(scene):
    room, views = scene
    points = points_of(views)
    seen = np.unique(views.instance_ids[views.instance_ids > 0])
    assert len(seen) > 0.7 * len(room.objects)
    for k in seen:
        item = room.objects[k - 1]
        local = (points[views.instance_ids == k] - np.array(item.center)) @ item.rotation
        assert (np.abs(local) <= np.array(item.size) / 2 + 1e-3).all(), (k, item.name)


def test_background_points_lie_on_walls_floor_and_ceiling(scene):
    room, views = scene
    points = points_of(views)[views.instance_ids == 0]
    half = np.array(room.size) / 2
    to_surface = half - np.abs(points - [0, 0, half[2]])
    assert to_surface.min() > -1e-3
    distance = to_surface.min(axis=1)
    assert distance.max() < 0.026  # doors, windows and pictures are boards of 2.5 cm
    assert (distance < 1e-3).mean() > 0.8


def test_views_agree_on_depth_and_ids(scene):
    _, views = scene
    points = points_of(views)
    height, width = views.depth.shape[1:]
    for a, b in ((0, 2), (5, 6), (11, 13), (20, 17)):
        in_camera = points[a].reshape(-1, 3) @ views.extrinsics[b, :3, :3].T + views.extrinsics[b, :3, 3]
        in_camera = in_camera.astype(np.float64)
        ids = views.instance_ids[a].ravel()[in_camera[:, 2] > 0.1]
        in_camera = in_camera[in_camera[:, 2] > 0.1]
        uv = (in_camera @ views.intrinsics[b].T)[:, :2] / in_camera[:, 2:]
        # Only points near a pixel's center, so that the pixel's own point is near too.
        near = (np.abs(uv - np.floor(uv) - 0.5) < 0.15).all(axis=1) & (uv >= 0).all(axis=1)
        near &= (uv < [width, height]).all(axis=1)
        u, v = np.floor(uv[near]).astype(int).T
        depth, expected = views.depth[b, v, u], in_camera[near, 2]
        assert len(expected) > 50, (a, b)
        # Nothing can be seen in front of what the other view sees but an occluder.
        visible = depth > expected - 0.05
        assert visible.mean() > 0.6
        assert (np.abs(depth - expected)[visible] < 0.08).mean() > 0.97
        assert (views.instance_ids[b, v, u] == ids[near])[visible].mean() > 0.97


def test_depth_is_along_the_optical_axis():
    room = dataclasses.replace(generate_room(0), size=(6.0, 6.0, 2.6), objects=(), fixtures=())
    views = render(room, looking_at((3.0, 0.0, 1.3), distance=2.0, yaw=0.0))
    wall = np.abs(points_of(views)[0][..., 0] - 3) < 1e-3
    assert wall.mean() > 0.5
    np.testing.assert_allclose(views.depth[0][wall], 2.0, atol=1e-5)


def test_right_is_right_and_down_is_down():
    # Looking along +x, an object at -y is on the right, and its foot is below its middle.
    item = RoomObject("cabinet", "red", (1.5, -1.0, 0.5), (0.6, 0.6, 1.0), 0.0)
    room = dataclasses.replace(generate_room(0), size=(6.0, 6.0, 2.6), objects=(item,), fixtures=())
    ids = render(room, looking_at((1.5, 0.0, 1.3), distance=2.0, yaw=0.0)).instance_ids[0]
    rows, columns = np.nonzero(ids)
    assert len(rows) and columns.min() > 48 and rows.mean() > 48


@pytest.mark.parametrize("name", FURNITURE)
def test_every_class_shows_its_color(name):
    size = FURNITURE[name].largest
    pictures = {}
    for color in ("red", "blue"):
        item = RoomObject(name, color, (0.0, 0.0, size[2] / 2), size, -np.pi / 2)  # its front looks at -x
        room = dataclasses.replace(generate_room(0), size=(7.0, 7.0, 2.6), objects=(item,), fixtures=())
        views = render(room, looking_at((0.0, 0.0, size[2] + 0.3), distance=2.5, yaw=0.0), antialias=1)
        pictures[color] = views.images[0][views.instance_ids[0] == 1].astype(float)
    assert len(pictures["red"]) > 40
    red_minus_blue = {color: (pixels[:, 0] - pixels[:, 2]).mean() for color, pixels in pictures.items()}
    assert red_minus_blue["red"] > red_minus_blue["blue"] + 10


def test_surfaces_are_told_apart_and_lit():
    room = generate_room(0)
    assert len({wall.rgb for wall in room.walls}) == 4
    views = render(room, camera_walk(room, 16))
    assert (views.images.reshape(16, -1).std(axis=1) > 15).all()
    dark = dataclasses.replace(room, light=dataclasses.replace(room.light, rgb=(0.2, 0.2, 0.2)))
    assert render(dark, camera_walk(room, 16)).images.mean() < 0.8 * views.images.mean()


def test_things_cast_shadows():
    item = RoomObject("table", "white", (0.0, 0.0, 0.4), (1.6, 1.0, 0.8), 0.0)
    bare = dataclasses.replace(generate_room(0), size=(6.0, 6.0, 2.6), objects=(), fixtures=())
    bare = dataclasses.replace(bare, light=dataclasses.replace(bare.light, position=(0.0, 0.0, 2.2)))
    cameras = looking_at((0.0, 0.0, 0.5), distance=2.5, yaw=0.0)
    without, with_table = render(bare, cameras), render(dataclasses.replace(bare, objects=(item,)), cameras)
    under = (np.abs(points_of(with_table)[0] - [0, 0, 0]) < [0.7, 0.4, 0.01]).all(axis=-1)
    under &= with_table.instance_ids[0] == 0
    assert under.sum() > 20
    assert with_table.images[0][under].mean() < 0.75 * without.images[0][under].mean()


def test_antialiasing_changes_edges_of_the_picture_only():
    room = generate_room(4, level=2)
    cameras = camera_walk(room, 4)
    hard, soft = render(room, cameras, antialias=1), render(room, cameras, antialias=3)
    assert (hard.depth == soft.depth).all() and (hard.instance_ids == soft.instance_ids).all()
    changed = (hard.images != soft.images).any(axis=-1)
    assert 0.02 < changed.mean() < 0.6
    # An edge pixel of the soft picture lies between its neighbors: the picture varies less.
    assert (
        np.abs(np.diff(soft.images.astype(int), axis=2)).mean()
        < np.abs(np.diff(hard.images.astype(int), axis=2)).mean()
    )


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout.strip()


def test_same_arrays_in_another_process_and_after_other_calls():
    here: dict = {}
    render(generate_room(1), camera_walk(generate_room(1), 2))
    exec(DIGEST, here)
    assert run_python(DIGEST + "print(digest)") == here["digest"]


def test_rooms_import_no_torch():
    # A bare parent package, because importing the real one registers models with transformers.
    code = f"""
import sys, types
parent = types.ModuleType("spa3r")
parent.__path__ = [{str(Path(spa3r.rooms.__file__).parents[1])!r}]
sys.modules["spa3r"] = parent
import spa3r.rooms
print(sorted({{"torch", "transformers", "embreex"}} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_views_do_not_depend_on_their_neighbors():
    room = generate_room(6, level=3)
    cameras = camera_walk(room, 5)
    together = render(room, cameras)
    alone = render(room, Cameras(cameras.extrinsics[3:4], cameras.intrinsics[3:4], cameras.size))
    assert (together.images[3] == alone.images[0]).all() and (together.depth[3] == alone.depth[0]).all()


def test_all_objects_are_seen_on_a_long_walk():
    missed = []
    for seed in range(4):
        room = generate_room(seed, level=2)
        ids = render(room, camera_walk(room, 64, size=(48, 48)), antialias=1).instance_ids
        missed += [(seed, k) for k in range(1, len(room.objects) + 1) if (ids == k).sum() < 20]
    assert not missed


def test_neighboring_views_overlap(scene):
    _, views = scene
    points = points_of(views)
    height, width = views.depth.shape[1:]
    for a in range(23):
        in_camera = points[a].reshape(-1, 3) @ views.extrinsics[a + 1, :3, :3].T + views.extrinsics[a + 1, :3, 3]
        uv = (in_camera @ views.intrinsics[a + 1].T)[:, :2] / in_camera[:, 2:]
        inside = (in_camera[:, 2] > 0) & (uv > 0).all(axis=1) & (uv < [width, height]).all(axis=1)
        assert inside.mean() > 0.5, a


def test_render_errors():
    room = generate_room(0)
    cameras = camera_walk(room, 2)
    for antialias in (0, True, 1.5):
        with pytest.raises(
            ValueError, match=r"^`antialias` must be a whole number of at least 1, got .*[.] 1 turns it off"
        ):
            render(room, cameras, antialias=antialias)
    extrinsics = cameras.extrinsics.copy()
    extrinsics[1, :3, 3] += 20
    with pytest.raises(
        ValueError, match=r"^extrinsics: wanted cameras inside the room of .*, got view 1 at \[.*\]; the"
    ):
        render(room, Cameras(extrinsics, cameras.intrinsics, cameras.size))


def test_a_missing_embreex_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "embreex.rtcore_scene", None)
    room = generate_room(0)
    with pytest.raises(
        ImportError, match=r"^embreex: wanted for rendering rooms, .*; install it with `pip install emb"
    ):
        render(room, camera_walk(room, 1))


def test_colors_are_albedos():
    assert all(0 <= channel <= 1 for rgb in COLORS.values() for channel in rgb)


def test_a_picture_without_an_edge():
    room = dataclasses.replace(generate_room(0), size=(5.0, 5.0, 2.6), objects=(), fixtures=())
    cameras = looking_at((2.5, 0.5, 1.3), distance=0.3, yaw=0.0, size=16)
    narrow = cameras.intrinsics * [[1000.0, 1, 1], [1, 1000, 1], [1, 1, 1]]
    views = render(room, Cameras(cameras.extrinsics, narrow, cameras.size))
    assert (views.images == views.images[0, 0, 0]).mean() > 0.3
    np.testing.assert_allclose(views.depth, 0.3, atol=1e-5)
