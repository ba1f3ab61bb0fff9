"""Step 4 of the rooms recipe: Predictive Spatial Field Modeling on the frozen small VGGT and teacher.

`spa3r pretrain` does the same from folders of pictures. This program reads rooms that `render.py --arrays` wrote, so
that the GPU never waits for picture decoding. Cameras are given: they are known exactly.

The training has three stages with an increasing number of views per scene. With many views from the start, walls are
learned and furniture is not.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from common import RenderedRooms, first_camera_world, pack, train
from torch import Tensor

from spa3r import Spa3RForPreTraining

SIZES = {
    "large": {
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_encoder_layers": 4,
        "num_decoder_layers": 6,
        "num_latents": 128,
    },
    "small": {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "num_latents": 64,
    },
}

ARMS = {
    "both": {},
    "geometry": {"targets": ["geometry"]},
    "semantic": {"targets": ["semantic"]},
    "mask25": {"mask_ratio": 0.25},
    "mask75": {"mask_ratio": 0.75},
    "pluecker": {"camera_embedding": "pluecker"},
}
"""The comparisons of the paper: differences from its method, which is `both`."""

STAGES = (("single", (1,), 0.15, 1.0), ("few", (2, 3, 4), 0.4, 1.0), ("many", (4, 6, 8, 12), 0.45, 0.5))
"""Name, numbers of views, share of the steps, and factor of the learning rates."""

MOST_VIEWS = max(max(views) for _, views, _, _ in STAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what `render.py --arrays` wrote")
    parser.add_argument("frozen", type=Path, help="folder of `vggt` and `teacher`")
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--arm", choices=ARMS, default="both")
    parser.add_argument("--stages", nargs="+", choices=[stage[0] for stage in STAGES], help="all by default",
                        default=[stage[0] for stage in STAGES])  # fmt: skip
    parser.add_argument("--start-from", type=Path, help="a trained Spa3RForPreTraining to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=24, help="a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--muon", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit, start included")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of the log")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.pictures < MOST_VIEWS:
        parser.error(f"--pictures: wanted at least {MOST_VIEWS}, the most views of a scene, got {args.pictures}")
    begun = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.manual_seed(args.seed)
    if args.start_from is not None:
        model = Spa3RForPreTraining.from_pretrained(args.start_from, dtype="float32")
    else:
        model = Spa3RForPreTraining.from_backbone_and_dinov3(
            args.frozen / "vggt",
            args.frozen / "teacher",
            dtype="float32",
            initializer_range=0.06,
            **SIZES[args.size],
            **ARMS[args.arm],
        )
    model.to(args.device).set_attn_implementation("sdpa")
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M trained parameters", flush=True)
    data = RenderedRooms.read(args.data)
    data.wait_for(args.pictures)

    def losses(views: tuple[int, ...]):
        def step(rng: np.random.Generator) -> dict[str, Tensor]:
            count = int(rng.choice(views))
            rooms, frames = data.draw(rng, args.pictures // count, count)
            at = (rooms[:, None], frames)
            inputs = pack(data.images[at], device=args.device)
            extrinsics = first_camera_world(data.extrinsics[at]).to(args.device)
            intrinsics = torch.from_numpy(data.intrinsics[at].reshape(-1, 3, 3)).to(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                return model(**inputs, extrinsics=extrinsics, intrinsics=intrinsics).losses

        return step

    stages = [stage for stage in STAGES if stage[0] in args.stages]
    whole = sum(share for _, _, share, _ in stages)
    for index, (name, views, share, factor) in enumerate(stages):
        left = args.minutes - (time.perf_counter() - begun) / 60
        rest = sum(share for _, _, share, _ in stages[index:])
        steps, minutes = max(1, round(args.steps * share / whole)), max(0.001, left * share / rest)
        rates = (args.learning_rate * factor, args.seed, args.every, args.muon * factor)
        train(name, model, losses(views), dict, args.output, steps, *rates, minutes)
    model.save_pretrained(args.output, include_backbone=args.start_from is not None)


if __name__ == "__main__":
    main()
