"""Camera walks: smooth, clear of everything, and all over the room."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spa3r.data import relative_to_first
from spa3r.rooms import CAMERA_CLEARANCE, LEVELS, Cameras, RoomObject, camera_walk, generate_room, look_around


def centers(cameras: Cameras) -> np.ndarray:
    extrinsics = cameras.extrinsics.astype(np.float64)
    return -np.einsum("vji,vj->vi", extrinsics[:, :3, :3], extrinsics[:, :3, 3])


def turns(cameras: Cameras) -> np.ndarray:
    """Angles (V - 1,) in degrees between the axes of neighbouring frames."""
    rotation = cameras.extrinsics[:, :3, :3].astype(np.float64)
    relative = rotation[1:] @ rotation[:-1].transpose(0, 2, 1)
    return np.degrees(np.arccos(np.clip((np.trace(relative, axis1=1, axis2=2) - 1) / 2, -1, 1)))


@pytest.fixture(scope="module", params=range(len(LEVELS)))
def walks(request):
    return [(room, camera_walk(room, 64)) for room in (generate_room(seed, request.param) for seed in range(12))]


def test_cameras_are_cameras(walks):
    for room, cameras in walks:
        assert cameras.extrinsics.shape == (64, 4, 4) and cameras.extrinsics.dtype == np.float32
        assert cameras.intrinsics.shape == (64, 3, 3) and cameras.intrinsics.dtype == np.float32
        rotation = cameras.extrinsics[:, :3, :3].astype(np.float64)
        np.testing.assert_allclose(
            rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (64, 3, 3)), atol=1e-6
        )
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
        assert (cameras.extrinsics[:, 3] == [0, 0, 0, 1]).all()
        assert (cameras.intrinsics[:, :, 2] == [56, 56, 1]).all()
        fov = 2 * np.degrees(np.arctan(56 / cameras.intrinsics[:, 0, 0]))
        low, high = room.level.field_of_view
        assert (fov > low - 1e-3).all() and (fov < high + 1e-3).all()
        assert (cameras.intrinsics[:, 0, 0] == cameras.intrinsics[:, 1, 1]).all()


def test_axes_are_opencv_in_a_room_with_z_up(walks):
    for room, cameras in walks:
        right, down, forward = np.moveaxis(cameras.extrinsics[:, :3, :3], 1, 0)
        low, high = np.radians(room.level.pitch)
        assert (np.arcsin(forward[:, 2]) > low - 1e-4).all() and (np.arcsin(forward[:, 2]) < high + 1e-4).all()
        tilt = np.degrees(np.arcsin(right[:, 2]))
        assert (np.abs(tilt) <= max(np.abs(room.level.roll)) + 1e-3).all()
        assert (down[:, 2] < -0.7).all()


def test_the_walk_is_smooth(walks):
    for _, cameras in walks:
        assert np.linalg.norm(np.diff(centers(cameras), axis=0), axis=1).max() <= 0.3
        assert turns(cameras).max() <= 15


def test_the_camera_keeps_clear_of_everything(walks):
    for room, cameras in walks:
        at = centers(cameras)
        assert room.clearance(at[:, :2]).min() >= CAMERA_CLEARANCE - 1e-5
        low, high = room.level.camera_height
        assert (at[:, 2] > low - 1e-5).all() and (at[:, 2] < high + 1e-5).all()


def test_the_walk_goes_round_the_room(walks):
    for room, cameras in walks:
        area = np.ptp(centers(cameras)[:, :2], axis=0) / room.size[:2]
        assert (area > 0.3).all(), (room.seed, area)
        x, y, z = np.array(room.size) / 2
        for wall in ([-x, 0, z], [0, -y, z], [x, 0, z], [0, y, z]):
            in_camera = cameras.extrinsics[:, :3, :3] @ wall + cameras.extrinsics[:, :3, 3]
            angle = np.degrees(np.arctan2(in_camera[:, 0], in_camera[:, 2]))
            assert np.abs(angle).min() < 30, (room.seed, wall)  # inside the narrowest field of view


def test_speed_and_turn_are_arguments_and_more_frames_take_smaller_steps():
    room = generate_room(1, level=3)
    slow = camera_walk(room, 40, max_step=0.05, max_turn=4.0)
    assert np.linalg.norm(np.diff(centers(slow), axis=0), axis=1).max() <= 0.05
    assert turns(slow).max() <= 4
    fast = camera_walk(room, 12, max_step=2.0, max_turn=30.0)
    assert np.linalg.norm(np.diff(centers(fast), axis=0), axis=1).max() > 0.5
    assert turns(fast).max() <= 30
    long = camera_walk(room, 600)
    assert np.linalg.norm(np.diff(centers(long), axis=0), axis=1).max() < 0.15


def test_same_seed_same_walk_and_another_seed_another_walk():
    room = generate_room(2, level=2)
    first, again, other = camera_walk(room, 9), camera_walk(room, 9), camera_walk(room, 9, seed=1)
    assert (first.extrinsics == again.extrinsics).all() and (first.intrinsics == again.intrinsics).all()
    assert not np.allclose(first.extrinsics, other.extrinsics)


def test_picture_size_scales_the_intrinsics():
    room = generate_room(0)
    small, wide = camera_walk(room, 2), camera_walk(room, 2, size=(112, 224))
    assert (small.extrinsics == wide.extrinsics).all()
    np.testing.assert_allclose(wide.intrinsics[:, 0, 0], 2 * small.intrinsics[:, 0, 0], rtol=1e-6)
    assert (wide.intrinsics[:, :2, 2] == [112, 56]).all() and wide.size == (112, 224)


def test_one_view_and_an_empty_room_walk_too():
    empty = dataclasses.replace(generate_room(0, level=3), objects=())
    assert camera_walk(empty, 1).extrinsics.shape == (1, 4, 4)
    assert np.isfinite(camera_walk(empty, 20).extrinsics).all()


def test_relative_to_first():
    cameras = camera_walk(generate_room(5, level=3), 6)
    relative = relative_to_first(cameras.extrinsics)
    assert relative.dtype == np.float32
    np.testing.assert_allclose(relative[0], np.eye(4), atol=1e-6)
    point = np.array([0.3, -0.2, 1.0, 1.0])  # the same point, in the room's frame and in the first camera's
    seen = cameras.extrinsics.astype(np.float64) @ point
    np.testing.assert_allclose(relative.astype(np.float64) @ seen[0], seen, atol=1e-5)
    with pytest.raises(ValueError, match=r"^extrinsics: wanted an array \(V, 4, 4\), got \(4, 4\); stack the views"):
        relative_to_first(cameras.extrinsics[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_views": 0}, r"^`num_views` must be a whole number of at least 1, got 0. Ask for at least one frame"),
        ({"num_views": 2.0}, r"^`num_views` must be a whole number of at least 1, got 2.0"),
        ({"num_views": 2, "size": 112}, r"^size: wanted \(height, width\), two ints >= 1, got 112; for example"),
        ({"num_views": 2, "size": (112, 0)}, r"^size: wanted \(height, width\)"),
        ({"num_views": 2, "seed": -3}, r"^`seed` must be a whole number of at least 0, got -3"),
        ({"num_views": 2, "max_step": 0}, r"^max_step: wanted a number > 0, got 0; leave it out"),
        ({"num_views": 2, "max_turn": -1.0}, r"^max_turn: wanted a number > 0, got -1.0"),
    ],
)
def test_walk_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        camera_walk(generate_room(0), **arguments)


def test_a_full_room_cannot_be_walked():
    room = generate_room(0)
    block = RoomObject("cabinet", "red", (0, 0, 0.5), (room.size[0], room.size[1], 1.0), 0.0)
    with pytest.raises(ValueError, match=r"^room: wanted floor 0.25 m away from everything, got none among 1 objects"):
        camera_walk(dataclasses.replace(room, objects=(block,)), 3)


def test_camera_errors():
    with pytest.raises(ValueError, match=r"^extrinsics: wanted an array \(V, 4, 4\), got \(4, 4\); one camera needs"):
        Cameras(np.eye(4), np.eye(3)[None], (8, 8))
    with pytest.raises(ValueError, match=r"^intrinsics: wanted an array \(V, 3, 3\), got \(1, 4, 4\)"):
        Cameras(np.eye(4)[None], np.eye(4)[None], (8, 8))
    with pytest.raises(ValueError, match=r"^intrinsics: wanted 2 views as in extrinsics, got 1; repeat a shared one"):
        Cameras(np.stack([np.eye(4)] * 2), np.eye(3)[None], (8, 8))


def test_some_cameras_of_a_walk():
    walk = camera_walk(generate_room(0), 7)
    third, chosen = walk[::3], walk[np.array([4, 1])]
    assert np.array_equal(third.extrinsics, walk.extrinsics[[0, 3, 6]]) and third.size == walk.size
    assert np.array_equal(chosen.intrinsics, walk.intrinsics[[4, 1]]) and len(chosen.extrinsics) == 2
    with pytest.raises(ValueError, match="one camera needs a first axis of 1"):
        walk[0]


def test_pictures_of_a_room_are_spread_over_one_walk():
    room = generate_room(7, 2)
    walk = camera_walk(room, 48, (28, 40))
    for views, steps in ((1, [0]), (2, [0, 45]), (8, [0, 6, 12, 18, 24, 30, 36, 45]), (16, list(range(0, 48, 3)))):
        taken = look_around(room, views, (28, 40))
        np.testing.assert_array_equal(taken.extrinsics, walk.extrinsics[steps])
        np.testing.assert_array_equal(taken.intrinsics, walk.intrinsics[steps])
        assert taken.size == (28, 40)
    with pytest.raises(ValueError, match=r"`num_views` must be .*1.*16, got 17"):
        look_around(room, 17)
