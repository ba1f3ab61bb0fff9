"""Cameras: pose encodings, rays, frames; and the field of view of zero that VGGT may predict."""

import math

import pytest
import torch
from tiny import TARGETS, alive, pretraining_config, relative_error, view_inputs

from spa3r import Spa3RForPreTraining
from spa3r.models.cameras import (
    MIN_FIELD_OF_VIEW,
    camera_rays,
    homogeneous,
    invert_extrinsics,
    pluecker_rays,
    pose_encoding_to_cameras,
    quaternion_to_rotation,
    relative_to_first_view,
    unproject,
)
from spa3r.rooms import camera_walk, generate_room, render


def cameras(count: int) -> torch.Tensor:
    extrinsics, _ = pose_encoding_to_cameras(torch.randn(count, 9), [(8, 8)] * count)
    return extrinsics


def test_quaternions_are_scalar_last_and_of_any_norm():
    half = math.pi / 4  # a quarter turn about z takes x to y
    rotation = quaternion_to_rotation(3 * torch.tensor([0.0, 0.0, math.sin(half), math.cos(half)]))
    assert torch.allclose(rotation @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)
    rotations = quaternion_to_rotation(torch.randn(50, 4))
    assert relative_error(rotations @ rotations.mT, torch.eye(3).expand(50, 3, 3)) <= 1e-6
    assert torch.allclose(torch.linalg.det(rotations), torch.ones(50), atol=1e-5)


def test_pose_encoding_means_what_it_says():
    pose = torch.tensor([[1.0, 2, 3, 0, 0, 0, 1, math.pi / 2, 2 * math.atan(0.5)]])
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, [(40, 60)])
    wanted = torch.eye(4)
    wanted[:3, 3] = torch.tensor([1.0, 2, 3])
    assert torch.equal(extrinsics[0], wanted)
    # fy = (H / 2) / tan(fov_h / 2), fx = (W / 2) / tan(fov_w / 2); the principal point is the middle
    assert torch.allclose(intrinsics[0], torch.tensor([[60.0, 0, 30], [0, 20, 20], [0, 0, 1]]), rtol=1e-6)


@pytest.mark.parametrize("fov", (0.0, 1e-30, 0.005))
def test_field_of_view_of_zero_gives_finite_cameras(fov):
    pose = torch.randn(3, 9)
    pose[:, 7:] = fov
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, [(56, 84)] * 3)
    assert extrinsics.isfinite().all() and intrinsics.isfinite().all()
    assert intrinsics[:, 0, 0].max() < 84 / MIN_FIELD_OF_VIEW * 1.01
    assert camera_rays(intrinsics, (4, 6), 14).isfinite().all()


def test_fields_of_view_above_the_limit_are_unchanged_to_the_bit():
    fov = torch.cat([torch.linspace(0.01001, 3.1, 5000), torch.tensor([0.0100001])])
    pose = torch.cat([torch.randn(len(fov), 7), torch.stack([fov, fov.flip(0)], -1)], -1)
    _, intrinsics = pose_encoding_to_cameras(pose, [(56, 84)] * len(fov))
    half = torch.tensor([56.0, 84.0]) / 2
    focal = half / torch.tan(pose[:, 7:] / 2)
    assert torch.equal(intrinsics[:, 1, 1], focal[:, 0]) and torch.equal(intrinsics[:, 0, 0], focal[:, 1])


def test_pretraining_survives_a_field_of_view_of_zero():
    model = alive(Spa3RForPreTraining(pretraining_config())).train()
    with torch.no_grad():
        model.spa3r.backbone.camera_head.output.fc2.bias[7:] = -100.0
    out = model(**view_inputs(targets=TARGETS))
    out.loss.backward()
    assert out.intrinsics.isfinite().all() and out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_half_precision_poses_become_float32_cameras():
    for camera in pose_encoding_to_cameras(torch.rand(2, 9).bfloat16() + 0.5, [(8, 8)] * 2):
        assert camera.dtype == torch.float32


def test_inverse_of_a_rigid_camera():
    extrinsics = cameras(20)
    assert relative_error(invert_extrinsics(extrinsics) @ extrinsics, torch.eye(4).expand(20, 4, 4)) <= 1e-5
    assert homogeneous(torch.zeros(2, 3, 4))[:, 3].tolist() == [[0, 0, 0, 1]] * 2


def test_world_becomes_each_scenes_first_camera():
    extrinsics, world = cameras(7), cameras(1)
    ours = relative_to_first_view(extrinsics, (2, 1, 4))
    assert relative_error(ours[[0, 2, 3]], torch.eye(4).expand(3, 4, 4)) <= 1e-5
    assert relative_error(relative_to_first_view(extrinsics @ world, (2, 1, 4)), ours) <= 1e-5
    # the way from one camera to another does not change
    between = ours[5] @ torch.linalg.inv(ours[4])
    assert relative_error(between, extrinsics[5] @ torch.linalg.inv(extrinsics[4])) <= 1e-5


def test_rays_go_through_patch_centers_row_by_row():
    intrinsics = torch.tensor([[[50.0, 0, 21], [0, 40, 14], [0, 0, 1]], [[30.0, 0, 20], [0, 35, 12], [0, 0, 1]]])
    rays = camera_rays(intrinsics, (2, 3), 14)
    for view in range(2):
        for row in range(2):
            for column in range(3):
                pixel = torch.tensor([14 * (column + 0.5), 14 * (row + 0.5), 1.0])
                ray = torch.linalg.inv(intrinsics[view]) @ pixel
                assert torch.allclose(rays[view, 3 * row + column], ray / ray.norm(), atol=1e-6)
    assert rays.norm(dim=-1).sub(1).abs().max() < 1e-6 and (rays[..., 2] > 0).all()


def test_pluecker_rays_are_direction_and_moment_in_the_world():
    """Against plain maths: a ray through two of its points, whichever they are."""
    intrinsics = torch.tensor([[[9.0, 0, 5], [0, 7, 8], [0, 0, 1]]]).expand(3, 3, 3)
    extrinsics = cameras(3)
    rays = pluecker_rays(extrinsics, intrinsics, (4, 3), 4).double()
    assert rays.shape == (3, 12, 6)
    for view in range(3):
        world_from_camera = torch.linalg.inv(extrinsics[view].double())
        for row in range(4):
            for column in range(3):
                pixel = torch.tensor([4 * column + 2, 4 * row + 2, 1.0], dtype=torch.float64)
                in_camera = torch.linalg.inv(intrinsics[view].double()) @ pixel
                near, far = (
                    (world_from_camera @ torch.cat([depth * in_camera, torch.ones(1)]))[:3] for depth in (0.3, 5.0)
                )
                direction = (far - near) / (far - near).norm()
                for point in (near, far, world_from_camera[:3, 3]):  # any point of the ray has the same moment
                    wanted = torch.cat([direction, torch.linalg.cross(point, direction)])
                    assert relative_error(rays[view, 3 * row + column], wanted) <= 1e-5


def test_pluecker_rays_of_the_first_view_are_its_camera_rays_and_of_others_follow_the_world():
    intrinsics = torch.tensor([[[9.0, 0, 5], [0, 7, 8], [0, 0, 1]]]).expand(2, 3, 3)
    extrinsics = cameras(2)
    relative = relative_to_first_view(extrinsics, [2])
    rays = pluecker_rays(relative, intrinsics, (4, 3), 4)
    assert relative_error(rays[0, :, :3], camera_rays(intrinsics[:1], (4, 3), 4)[0]) <= 1e-5
    assert rays[0, :, 3:].abs().max() < 1e-5, "a ray through the origin has no moment"
    moved = relative_to_first_view(extrinsics @ cameras(1), [2])  # another world frame, re-expressed
    assert relative_error(pluecker_rays(moved, intrinsics, (4, 3), 4), rays) <= 1e-4
    twice = relative.clone()
    twice[:, :3, 3] *= 2
    doubled = pluecker_rays(twice, intrinsics, (4, 3), 4)
    assert torch.equal(doubled[..., :3], rays[..., :3]) and relative_error(doubled[..., 3:], 2 * rays[..., 3:]) <= 1e-6


def test_points_of_two_views_are_one_room():
    """Rendered depth, unprojected, lies inside the room and on what it shows."""
    room = generate_room(seed=0, level=1)
    views = render(room, camera_walk(room, 3, size=(48, 64)))
    points = unproject(*(torch.from_numpy(array) for array in (views.depth, views.extrinsics, views.intrinsics)))
    assert points.shape == (3, 48, 64, 3)
    half = torch.tensor(room.size) / 2
    centred = points - torch.tensor([0, 0, half[2]])
    assert (centred.abs() <= half + 1e-3).all()
    on_a_wall = (centred.abs() - half).abs().amin(-1) < 1e-3
    background = torch.from_numpy(views.instance_ids) == 0
    assert on_a_wall[background].float().mean() > 0.9 and not on_a_wall[~background].float().mean() > 0.5
