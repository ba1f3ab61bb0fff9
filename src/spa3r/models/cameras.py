"""Cameras: pose encodings, rays, points. Conventions of the whole library:

- ``extrinsics`` (..., 4, 4): camera-from-world, rigid. OpenCV axes: x right, y down, z forward. The world frame is the
  camera of the scene's first view. Translations are in the backbone's unit (VGGT: relative to the scene, not meters)
  or, if the caller provides cameras, in the caller's unit.
- ``intrinsics`` (..., 3, 3): pixels of the processed view, no skew; the center of the top left pixel is (0.5, 0.5).
- Cameras are computed in float32, regardless of the model's dtype and of autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from spa3r.checks import shorten
from spa3r.models.packing import to_device

MIN_FIELD_OF_VIEW = 0.01
"""Radians. VGGT's ReLU allows a field of view of 0, which would give an infinite focal length and a NaN loss."""

RIGID_TOLERANCE = 0.02
"""Maximum deviation of R R^T from the identity; rounded and half-precision cameras are well below."""


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:  # (..., 4) -> (..., 3, 3)
    """Rotation matrix of a quaternion (x, y, z, w), scalar last, of any nonzero norm."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2.0 / quaternion.square().sum(-1)
    return _matrix(
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )


def rotation_to_quaternion(rotation: Tensor) -> Tensor:  # (..., 3, 3) -> (..., 4)
    """Unit quaternion (x, y, z, w) of a rotation matrix, w at least 0."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Each row is the quaternion times 4 of its own entry; that of the largest entry loses no precision.
    rows = _matrix(
        (1 + xx - yy - zz, xy + yx, xz + zx, zy - yz),
        (xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx),
        (xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy),
        (zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz),
    )
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*rows.shape[:-2], 1, 4)
    quaternion = torch.nn.functional.normalize(rows.gather(-2, largest)[..., 0, :], dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def homogeneous(matrix: Tensor) -> Tensor:  # (..., 3, 3) or (..., 3, 4) -> (..., 4, 4)
    """Lift to 4 x 4: a missing fourth column becomes 0, the fourth row (0, 0, 0, 1)."""
    if matrix.shape[-1] == 3:
        matrix = torch.cat([matrix, torch.zeros_like(matrix[..., :1])], dim=-1)
    last_row = torch.zeros_like(matrix[..., :1, :])
    last_row[..., 3] = 1
    return torch.cat([matrix, last_row], dim=-2)


def pose_encoding_to_cameras(
    pose_encoding: Tensor, image_hw: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:  # (V, 9) -> (V, 4, 4), (V, 3, 3)
    """Convert VGGT's pose encoding [translation 3, quaternion 4 (x, y, z, w), fov_h, fov_w (radians)] to cameras.

    Args:
        pose_encoding: (V, 9).
        image_hw: Height and width of every processed view in pixels.

    Returns:
        ``extrinsics`` (V, 4, 4) and ``intrinsics`` (V, 3, 3), float32; the principal point is the image center. Fields
        of view are clamped to at least :data:`MIN_FIELD_OF_VIEW`, so that focal lengths stay finite.
    """
    pose_encoding = pose_encoding.float()
    translation, quaternion, fov = pose_encoding.split([3, 4, 2], dim=-1)
    extrinsics = homogeneous(torch.cat([quaternion_to_rotation(quaternion), translation[..., None]], dim=-1))
    half = to_device(image_hw, torch.float32, pose_encoding.device) / 2  # (V, 2), (height, width)
    focal = half / torch.tan(fov.clamp(min=MIN_FIELD_OF_VIEW) / 2)  # (V, 2), (fy, fx)
    return extrinsics, calibration(focal[:, 1], focal[:, 0], half[:, 1], half[:, 0])


def cameras_to_pose_encoding(
    extrinsics: Tensor, intrinsics: Tensor, image_hw: Sequence[tuple[int, int]]
) -> Tensor:  # (V, 4, 4), (V, 3, 3) -> (V, 9)
    """The inverse of :func:`pose_encoding_to_cameras`, with a unit quaternion; the principal point is not encoded."""
    half = to_device(image_hw, torch.float32, extrinsics.device) / 2
    fov = 2 * torch.atan(half / torch.stack([intrinsics[:, 1, 1], intrinsics[:, 0, 0]], dim=-1))
    return torch.cat([extrinsics[:, :3, 3], rotation_to_quaternion(extrinsics[:, :3, :3]), fov], dim=-1)


def calibration(fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor) -> Tensor:  # each (V,) -> (V, 3, 3)
    """The upper triangular matrix of focal lengths and a principal point."""
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return _matrix((fx, zero, cx), (zero, fy, cy), (zero, zero, one))


def _matrix(*rows: Sequence[Tensor]) -> Tensor:  # n rows of m x (...,) -> (..., n, m)
    return torch.stack([torch.stack(tuple(row), dim=-1) for row in rows], dim=-2)


def invert_extrinsics(extrinsics: Tensor) -> Tensor:  # (..., 4, 4) -> (..., 4, 4)
    """World-from-camera of a rigid camera-from-world."""
    rotation = extrinsics[..., :3, :3].transpose(-2, -1)
    return homogeneous(torch.cat([rotation, -rotation @ extrinsics[..., :3, 3:]], dim=-1))


def relative_to_first_view(extrinsics: Tensor, views_per_scene: Sequence[int]) -> Tensor:  # (V, 4, 4) -> (V, 4, 4)
    """Express cameras of any shared world frame in the library's frame, the camera of each scene's first view."""
    with maybe_autocast(extrinsics.device.type, enabled=False):
        extrinsics = extrinsics.float()
        first_views = accumulate(views_per_scene[:-1], initial=0)
        inverses = invert_extrinsics(torch.stack([extrinsics[view] for view in first_views]))  # one for each scene
        inverses = [inverse for inverse, count in zip(inverses.unbind(), views_per_scene) for _ in range(count)]
        return extrinsics @ torch.stack(inverses)


def check_cameras(
    extrinsics: Tensor, intrinsics: Tensor, num_views: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # (V, 4, 4), (V, 3, 3) -> the same, on the device
    """Validate cameras and convert them to tensors; NumPy arrays and nested lists are accepted.

    Values are checked only on the CPU; checking them on an accelerator would synchronize.

    Args:
        extrinsics: (V, 4, 4) camera-from-world, rigid.
        intrinsics: (V, 3, 3) in pixels, no skew, focal lengths above 0.
        num_views: V.
        device: Target device.

    Raises:
        ValueError: A shape or type is wrong, or a camera is invalid: not finite, not rigid, singular.
    """
    tensors = []
    for name, cameras, side in (("extrinsics", extrinsics, 4), ("intrinsics", intrinsics, 3)):
        try:
            if isinstance(cameras, str) or cameras is None:
                raise TypeError("no numbers")
            tensor = torch.as_tensor(cameras)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` must be a tensor of shape (views, {side}, {side}), got {shorten(cameras)} ({error})."
            ) from error
        wanted = (num_views, side, side)
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"`{name}` must have shape (views, {side}, {side}) = {wanted}, got {tuple(tensor.shape)}. "
                "Give one camera for each view of `view_grid_hw`, all scenes one after the other."
            )
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise ValueError(f"`{name}` must be floating point, got {tensor.dtype}.")
        if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_values(name, tensor.detach().double())
        elif tensor.is_meta and device.type != "meta":
            raise ValueError(f"`{name}` must have values, got a tensor on the meta device, which has none.")
        tensors.append(tensor.to(device))
    return tensors[0], tensors[1]


def _check_values(name: str, cameras: Tensor) -> None:
    """Raise for the first invalid camera."""
    last_row = torch.eye(cameras.shape[-1], dtype=cameras.dtype)[-1]
    fault = cameras.isfinite().flatten(1).all(1).logical_not(), "hold finite values"
    if not fault[0].any():
        affine = (cameras[:, -1] - last_row).abs().amax(-1) > 1e-4
        fault = affine, f"have the last row {tuple(int(value) for value in last_row)}"
    if not fault[0].any() and name == "extrinsics":
        rotation = cameras[:, :3, :3]
        skewed = (rotation @ rotation.mT - torch.eye(3, dtype=cameras.dtype)).abs().amax((1, 2)) > RIGID_TOLERANCE
        fault = skewed | (torch.linalg.det(rotation) < 0), "be rigid: a rotation and a translation, without scale"
    elif not fault[0].any():
        focal = cameras.diagonal(dim1=1, dim2=2)[:, :2]
        skewed = (cameras[:, 0, 1].abs() > 1e-3 * focal[:, 0]) | (cameras[:, 1, 0].abs() > 1e-3 * focal[:, 1])
        fault = skewed | (focal <= 0).any(1), "have focal lengths above 0 and no skew"
    if fault[0].any():
        view = int(fault[0].nonzero()[0])
        rows = [[round(value, 4) for value in row] for row in cameras[view].tolist()]
        raise ValueError(
            f"`{name}` must {fault[1]}, got {rows} for view {view}. Leave the view out, or give no cameras: the "
            "backbone predicts them."
        )


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:  # (V, H, W) -> (V, H, W, 3)
    """World points of depth maps, as a point cloud.

    Args:
        depth: (V, H, W), along the optical axis, in the unit of the extrinsics.
        extrinsics: (V, 4, 4).
        intrinsics: (V, 3, 3), pixels of a picture of H x W.
    """
    height, width = depth.shape[-2:]
    depth, intrinsics = depth.float(), intrinsics.float()[:, None, None]
    x = (torch.arange(width, device=depth.device) + 0.5 - intrinsics[..., 0, 2]) / intrinsics[..., 0, 0]  # (V, 1, W)
    y = torch.arange(height, device=depth.device)[:, None] + 0.5
    y = (y - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1]  # (V, H, 1)
    points = torch.stack([x * depth, y * depth, depth], dim=-1)  # in the camera's frame
    with maybe_autocast(depth.device.type, enabled=False):
        inverse = invert_extrinsics(extrinsics.float())[:, None]
        return points @ inverse[..., :3, :3].transpose(-2, -1) + inverse[..., None, :3, 3]


def camera_rays(intrinsics: Tensor, grid_hw: tuple[int, int], patch_size: int) -> Tensor:  # (V, 3, 3) -> (V, h*w, 3)
    """Unit rays through the patch centers, in each camera's own frame, row by row.

    Args:
        intrinsics: (V, 3, 3) in pixels of the processed view.
        grid_hw: Patch grid of the views.
        patch_size: Side of a patch in pixels.
    """
    height, width = grid_hw
    scaled = intrinsics.float() / patch_size
    x = torch.arange(width, device=intrinsics.device) + 0.5
    y = torch.arange(height, device=intrinsics.device) + 0.5
    x = (x - scaled[:, 0, 2, None]) / scaled[:, 0, 0, None]  # (V, w)
    y = (y - scaled[:, 1, 2, None]) / scaled[:, 1, 1, None]  # (V, h)
    rays = torch.stack(
        torch.broadcast_tensors(x[:, None, :], y[:, :, None], torch.ones_like(x[:, :1, None])), dim=-1
    )  # (V, h, w, 3)
    return torch.nn.functional.normalize(rays.flatten(1, 2), dim=-1)


def pluecker_rays(
    extrinsics: Tensor, intrinsics: Tensor, grid_hw: tuple[int, int], patch_size: int
) -> Tensor:  # (V, 4, 4), (V, 3, 3) -> (V, h*w, 6)
    """Plücker coordinates of the rays through the patch centers in the world frame: direction d and moment c x d.

    d is a unit vector, and c is the camera center. Any other point of the ray gives the same moment, so the coordinates
    identify the line only.

    Args:
        extrinsics: (V, 4, 4).
        intrinsics: (V, 3, 3) in pixels of the processed view.
        grid_hw: Patch grid of the views.
        patch_size: Side of a patch in pixels.
    """
    with maybe_autocast(extrinsics.device.type, enabled=False):
        world_from_camera = invert_extrinsics(extrinsics.float())
        directions = camera_rays(intrinsics, grid_hw, patch_size) @ world_from_camera[:, :3, :3].transpose(-2, -1)
        centers = world_from_camera[:, None, :3, 3].expand_as(directions)
        return torch.cat([directions, torch.linalg.cross(centers, directions)], dim=-1)
