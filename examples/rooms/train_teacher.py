"""Step 3 of the rooms recipe: a small DINOv3-shaped teacher that encodes what every patch shows, and its color.

It learns each patch's shares of furniture classes, wall, floor and ceiling, and its mean color, from single pictures;
the two readouts are discarded afterwards.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import RenderedRooms, pack, train
from einops import rearrange
from render import CLASSES
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from spa3r.models.cameras import unproject
from spa3r.models.spa3r.modeling_spa3r import SEMANTIC_IMAGE_SIZE
from spa3r.rooms import FURNITURE

GRID = 14

CONFIG = DINOv3ViTConfig(
    image_size=SEMANTIC_IMAGE_SIZE,
    patch_size=SEMANTIC_IMAGE_SIZE // GRID,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    layerscale_value=0.5,
    initializer_range=0.06,
    pos_embed_rescale=None,  # drawn anew at every training step; the rooms have one size
)


class Readouts(nn.Module):
    """The teacher and the two readouts that are needed only for training."""

    def __init__(self, teacher: DINOv3ViTModel):
        super().__init__()
        self.teacher = teacher
        self.classes = nn.Linear(teacher.config.hidden_size, len(CLASSES))
        self.colour = nn.Linear(teacher.config.hidden_size, 3)


def class_shares(data: RenderedRooms, rooms: np.ndarray, frames: np.ndarray, device: str, grid: int = GRID) -> Tensor:
    """The share of every patch that each class covers, in one view of each room: (V, grid * grid, classes)."""
    classes, heights = (torch.from_numpy(facts[rooms]).to(device) for facts in data.room_facts())
    depth = torch.from_numpy(data.depth[rooms, frames]).to(device).float()
    cameras = (torch.from_numpy(camera[rooms, frames]).to(device) for camera in (data.extrinsics, data.intrinsics))
    z = unproject(depth, *cameras)[..., 2]
    labels = torch.full(z.shape, CLASSES.index("wall"), device=device)
    labels[z < 0.03] = CLASSES.index("floor")
    labels[z > heights[:, None, None] - 0.03] = CLASSES.index("ceiling")
    ids = torch.from_numpy(data.instance_ids[rooms, frames]).to(device).long()
    objects = classes.long().gather(1, ids.flatten(1)).view(ids.shape)
    hot = nn.functional.one_hot(torch.where(ids > 0, objects, labels), len(CLASSES)).float()
    return hot.unflatten(1, (grid, -1)).unflatten(3, (grid, -1)).mean((2, 4)).flatten(1, 2)


def teacher_pixels(images: np.ndarray, device: str) -> Tensor:  # (V, H, W, 3) uint8 -> (V, 3, 224, 224)
    """The teacher's input in pretraining: the normalized view, resized bilinearly."""
    packed = pack(images[:, None], device=device)
    pixels = rearrange(packed["view_pixel_values"], "(v h w) (c p q) -> v c (h p) (w q)",
                       v=len(images), h=images.shape[1] // 14, p=14, q=14)  # fmt: skip
    return nn.functional.interpolate(pixels, size=(SEMANTIC_IMAGE_SIZE,) * 2, mode="bilinear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what render.py wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--muon", type=float, help="learning rate of Muon; without it AdamW trains all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=1500, help="rooms at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=24, help="a step")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit")
    parser.add_argument("--every", type=int, default=500, help="steps between two lines of the log")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.manual_seed(0)
    model = Readouts(DINOv3ViTModel(CONFIG)).to(args.device)
    print(f"{sum(p.numel() for p in model.teacher.parameters()) / 1e6:.2f} M parameters", flush=True)
    data, held_out = RenderedRooms.read(args.data, args.limit), RenderedRooms.held_out(12)
    data.wait_for(2 * args.pictures)

    def look(scenes: RenderedRooms, rooms: np.ndarray, frames: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images = scenes.images[rooms, frames]
        tokens = model.teacher(pixel_values=teacher_pixels(images, args.device)).last_hidden_state[:, -(GRID**2) :]
        shares = class_shares(scenes, rooms, frames, args.device)
        tiles = torch.from_numpy(images.reshape(len(images), GRID, 8, GRID, 8, 3)).to(args.device)
        colour = tiles.float().mean((2, 4)) / 255
        return model.classes(tokens), model.colour(tokens), shares, colour.flatten(1, 2)

    def step(rng: np.random.Generator) -> dict[str, Tensor]:
        rooms = rng.choice(data.num_ready, args.pictures, replace=False)
        frames = rng.integers(0, data.images.shape[1], args.pictures)
        classes, colour, shares, true_colour = look(data, rooms, frames)
        return {
            "classes": -(shares * classes.log_softmax(-1)).sum(-1).mean(),
            "colour": 5 * nn.functional.smooth_l1_loss(colour, true_colour, beta=0.1),
        }

    def evaluate() -> dict[str, float]:
        rooms, frames = (grid.ravel() for grid in np.mgrid[: len(held_out.seeds), :16:4])
        classes, colour, shares, true_colour = look(held_out, rooms, frames)
        is_object = shares.argmax(-1) < len(FURNITURE)
        right = classes.argmax(-1) == shares.argmax(-1)
        return {
            "held_out_right": right.float().mean().item(),
            "held_out_right_on_furniture": right[is_object].float().mean().item(),
            "held_out_colour_error": (colour - true_colour).abs().mean().item(),
        }

    train("teacher", model, step, evaluate, args.output, args.steps, args.learning_rate, 0, args.every, args.muon,
          args.minutes)  # fmt: skip
    model.teacher.save_pretrained(args.output / "teacher")


if __name__ == "__main__":
    main()
