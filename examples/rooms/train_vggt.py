"""Step 2 of the rooms recipe: a small VGGT, trained on the true cameras, depth and points of rooms.

Besides VGGT's own losses, a linear readout of every patch's depth and world point and another of every view's position
in its room give the features a dense signal; both readouts are discarded afterwards. One unit is one meter.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import RenderedRooms, first_camera_world, pack, train
from torch import Tensor, nn

from spa3r import VggtConfig, VggtModel
from spa3r.models.cameras import pose_encoding_to_cameras, unproject
from spa3r.models.packing import ViewLayout, select_rows, split_prefix

DENSE_SHARE = 8  # the dense heads, which are the most expensive part, are trained on one of this many views
VIEW_COUNTS = (4, 6, 8, 12)

CONFIG = VggtConfig(
    image_size=112,
    hidden_size=96,
    num_attention_heads=3,
    num_hidden_layers=4,
    patch_embedding_num_layers=2,
    patch_embedding_num_heads=3,
    camera_num_layers=1,
    camera_num_heads=4,
    dpt_layers=[0, 1, 2, 3],
    dpt_channels=[16, 16, 32, 32],
    dpt_features=32,
    layer_scale_init=0.5,
    initializer_range=0.06,
)


class Readouts(nn.Module):
    """The model and the two readouts that are needed only for training."""

    def __init__(self, vggt: VggtModel):
        super().__init__()
        width = 2 * vggt.config.hidden_size
        self.vggt = vggt
        self.patch = nn.Linear(width, 4)  # log depth, world point
        self.place = nn.Linear(width, 4)  # sine and cosine of the view's direction in the room, and its position


def rotation_to_quaternion(rotation: Tensor) -> Tensor:  # (V, 3, 3) -> (V, 4)
    """(x, y, z, w) with w >= 0, by the eigenvector of Bar-Itzhack's matrix: stable at every angle."""
    r = rotation.double()
    rows = [
        [
            r[:, 0, 0] - r[:, 1, 1] - r[:, 2, 2],
            r[:, 1, 0] + r[:, 0, 1],
            r[:, 2, 0] + r[:, 0, 2],
            r[:, 2, 1] - r[:, 1, 2],
        ],
        [
            r[:, 1, 0] + r[:, 0, 1],
            r[:, 1, 1] - r[:, 0, 0] - r[:, 2, 2],
            r[:, 2, 1] + r[:, 1, 2],
            r[:, 0, 2] - r[:, 2, 0],
        ],
        [
            r[:, 2, 0] + r[:, 0, 2],
            r[:, 2, 1] + r[:, 1, 2],
            r[:, 2, 2] - r[:, 0, 0] - r[:, 1, 1],
            r[:, 1, 0] - r[:, 0, 1],
        ],
        [
            r[:, 2, 1] - r[:, 1, 2],
            r[:, 0, 2] - r[:, 2, 0],
            r[:, 1, 0] - r[:, 0, 1],
            r[:, 0, 0] + r[:, 1, 1] + r[:, 2, 2],
        ],
    ]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    quaternion = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    return (quaternion * torch.where(quaternion[:, 3:] < 0, -1.0, 1.0)).to(rotation.dtype)


def pose_loss(predicted: Tensor, true: Tensor) -> Tensor:  # (V, 9), (V, 9) -> ()
    """L1 of translation, rotation and field of view; a quaternion and its negative are the same rotation."""
    rotation = torch.minimum(
        (predicted[:, 3:7] - true[:, 3:7]).abs().mean(-1), (predicted[:, 3:7] + true[:, 3:7]).abs().mean(-1)
    )
    return (
        (predicted[:, :3] - true[:, :3]).abs().mean()
        + 2 * rotation.mean()
        + (predicted[:, 7:] - true[:, 7:]).abs().mean()
    )


def confident(error: Tensor, confidence: Tensor) -> Tensor:
    """VGGT's weighting: errors are weighted by the confidence, and low confidence has a penalty."""
    return (confidence * error - 0.2 * confidence.log()).mean()


class Batch:
    """Some views of some rooms: model inputs and ground truth."""

    def __init__(self, data: RenderedRooms, rooms: np.ndarray, frames: np.ndarray, device: str):
        at = (rooms[:, None], frames)
        self.inputs = pack(data.images[at], device=device)
        self.layout = ViewLayout.from_inputs(self.inputs["view_grid_hw"], self.inputs["views_per_scene"])
        room_extrinsics = data.extrinsics[at]
        self.extrinsics = first_camera_world(room_extrinsics)
        self.intrinsics = torch.from_numpy(data.intrinsics[at].reshape(-1, 3, 3))
        height, width = data.depth.shape[-2:]
        self.depth = torch.from_numpy(data.depth[at]).to(device).float().view(-1, height, width)
        fov = 2 * torch.atan(torch.tensor([height, width]) / 2 / self.intrinsics[:, [1, 0], [1, 0]])
        quaternion = rotation_to_quaternion(self.extrinsics[:, :3, :3])
        self.pose = torch.cat([self.extrinsics[:, :3, 3], quaternion, fov], dim=-1)
        forward = room_extrinsics[..., 2, :2].reshape(-1, 2)
        centre = -np.einsum("svij,svi->svj", room_extrinsics[..., :3, :3], room_extrinsics[..., :3, 3])
        self.place = torch.from_numpy(np.concatenate([forward / np.linalg.norm(forward, axis=1, keepdims=True),
                                                      centre[..., :2].reshape(-1, 2)], axis=1))  # fmt: skip
        for name in ("extrinsics", "intrinsics", "pose", "place"):
            setattr(self, name, getattr(self, name).to(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what render.py wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--muon", type=float, help="learning rate of Muon; without it AdamW trains all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=4500, help="rooms at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=24, help="a step")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--every", type=int, default=500, help="steps between two lines of the log")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.manual_seed(0)
    model = Readouts(VggtModel(CONFIG)).to(args.device)
    model.vggt.set_attn_implementation("sdpa")
    print(f"{sum(p.numel() for p in model.vggt.parameters()) / 1e6:.2f} M parameters", flush=True)
    data, held_out = RenderedRooms.read(args.data, args.limit), RenderedRooms.held_out(24)
    data.wait_for(2 * args.pictures)
    dense_views = max(1, args.pictures // DENSE_SHARE)
    vggt = model.vggt
    last = CONFIG.num_hidden_layers - 1

    def look(batch: Batch):
        kept = vggt._aggregate(batch.inputs["view_pixel_values"], batch.layout, set(range(last + 1)), None)
        special, patches = split_prefix(kept[last], batch.layout.patches_per_view, vggt.num_special_tokens)
        poses = vggt.camera_head(special[:, 0], batch.layout.views_per_scene)
        return kept, special[:, 0], patches, poses

    def patch_centres(batch: Batch, maps: Tensor) -> Tensor:  # (V, H, W, c) -> (sum of N, c)
        return maps[:, 7::14, 7::14].flatten(0, 2)

    def step(rng: np.random.Generator) -> dict[str, Tensor]:
        views = int(rng.choice(VIEW_COUNTS))
        batch = Batch(data, *data.draw(rng, args.pictures // views, views), args.device)
        kept, camera_tokens, patches, poses = look(batch)
        points = unproject(batch.depth, batch.extrinsics, batch.intrinsics)
        wanted = patch_centres(batch, torch.cat([batch.depth.log()[..., None], points], dim=-1))
        readout = model.patch(patches)
        losses = {
            "patch_depth": nn.functional.smooth_l1_loss(readout[:, :1], wanted[:, :1], beta=0.1),
            "patch_points": nn.functional.smooth_l1_loss(readout[:, 1:], wanted[:, 1:], beta=0.3),
            "place": nn.functional.smooth_l1_loss(model.place(camera_tokens), batch.place, beta=0.3),
            "pose": sum(0.6 ** (len(poses) - 1 - i) * pose_loss(pose, batch.pose) for i, pose in enumerate(poses)),
        }
        chosen = rng.choice(batch.layout.num_views, dense_views, replace=False).tolist()
        layout = batch.layout.select(chosen, [dense_views])
        layers = [
            select_rows(vggt.patch_tokens(kept[i], batch.layout), batch.layout.patches_per_view, chosen)
            for i in CONFIG.dpt_layers
        ]
        depth = torch.stack(vggt.depth_head(layers, layout))
        losses["depth"] = confident((depth[:, 0] - batch.depth[chosen].log()).abs(), 1 + depth[:, 1].exp())
        world = torch.stack(vggt.point_head(layers, layout))
        predicted = world[:, :3].sign() * world[:, :3].abs().expm1()
        error = (predicted - points[chosen].permute(0, 3, 1, 2)).norm(dim=1)
        losses["points"] = 0.3 * confident(error.clamp(max=20), 1 + world[:, 3].exp())
        return losses

    def evaluate() -> dict[str, float]:
        rows = []
        for start in range(0, len(held_out.seeds), 3):
            rooms, frames = np.arange(start, start + 3), np.tile(np.arange(0, 16, 2), (3, 1))
            batch = Batch(held_out, rooms, frames, args.device)
            kept, _, patches, poses = look(batch)
            extrinsics, _ = pose_encoding_to_cameras(poses[-1], batch.layout.image_hw(14))
            others = torch.arange(24, device=args.device) % 8 != 0
            turn = extrinsics[:, :3, :3] @ batch.extrinsics[:, :3, :3].transpose(1, 2)
            angle = torch.rad2deg(((turn.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2).clamp(-1, 1).acos())[others]
            shift = (extrinsics[:, :3, 3] - batch.extrinsics[:, :3, 3]).norm(dim=-1)[others]
            layers = [vggt.patch_tokens(kept[i], batch.layout) for i in CONFIG.dpt_layers]
            depth = torch.stack(vggt.depth_head(layers, batch.layout))[:, 0].exp()
            points = unproject(batch.depth, batch.extrinsics, batch.intrinsics)
            readout = model.patch(patches)[:, 1:] - patch_centres(batch, points)
            rows.append(
                {
                    "rotation_degrees": angle.median(),
                    "translation_metres": shift.median(),
                    "depth_error": ((depth - batch.depth).abs() / batch.depth).mean(),
                    "patch_point_metres": readout.norm(dim=-1).median(),
                }
            )
        return {f"held_out_{key}": float(np.mean([float(row[key]) for row in rows])) for key in rows[0]}

    train("vggt", model, step, evaluate, args.output, args.steps, args.learning_rate, 0, args.every, args.muon,
          args.minutes)  # fmt: skip
    vggt.save_pretrained(args.output / "vggt")


if __name__ == "__main__":
    main()
