"""Cameras for tiny scenes."""

import torch
from tiny import (
    PATCH,
)

from spa3r.models.cameras import pose_encoding_to_cameras


def some_cameras(inputs) -> dict:
    """A rigid camera for every view."""
    pose = torch.randn(len(inputs["view_grid_hw"]), 9)
    pose[:, 7:] = 0.8
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, (inputs["view_grid_hw"] * PATCH).tolist())
    return {"extrinsics": extrinsics, "intrinsics": intrinsics}
