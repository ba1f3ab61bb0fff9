"""A pretraining step at the released sizes on one CUDA device: step time, views per second, peak memory.

VGGT-1B and DINOv3 ViT-L/16 with random weights in bfloat16, Spa3R in float32 under autocast to bfloat16, AdamW; 24
views of 518 x 392 in scenes of 12. The pictures are noise: only the cost matters.

    python benchmarks/pretraining_step.py
    python benchmarks/pretraining_step.py --tiny   # on any machine: a tiny model, as a smoke test
"""

import argparse
import platform
import resource
import statistics
import time

import torch
import transformers
from pretraining_memory import released
from transformers import DINOv3ViTConfig

from spa3r import Spa3RConfig, Spa3RForPreTraining, VggtConfig


def tiny() -> Spa3RConfig:
    backbone = VggtConfig(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_embedding_num_layers": 1},
        **{"patch_embedding_num_heads": 2, "camera_num_layers": 1, "camera_num_heads": 2, "dpt_layers": [0, 0, 1, 1]},
        **{"dpt_channels": [8, 8, 8, 8], "dpt_features": 8, "image_size": 112},
    )
    teacher = DINOv3ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    return Spa3RConfig(backbone_config=backbone, semantic_teacher_config=teacher, num_latents=8, **sizes)


def make_model(config: Spa3RConfig, device: str) -> Spa3RForPreTraining:
    with torch.device(device):
        model = Spa3RForPreTraining(config)
    for frozen in model.frozen_modules().values():
        frozen.to(torch.bfloat16)  # the camera head stays float32
    return model.train()


def make_batch(views: int, grid: tuple[int, int], patch_size: int, device: str) -> dict:
    """Scenes of 12 views, half of them targets; the layout as Python numbers, which need no synchronization."""
    scene = min(views, 12)
    return {
        "view_pixel_values": torch.randn(views * grid[0] * grid[1], 3 * patch_size**2, device=device),
        "view_grid_hw": [grid] * views,
        "views_per_scene": [scene] * (views // scene),
        "target_mask": [view >= scene // 2 for view in range(scene)] * (views // scene),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--views", type=int, default=24, help="a multiple of 12")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of encoder and decoder")
    parser.add_argument("--attn", help="attention back end; default: the best that is installed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 3 steps, on any device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("the released sizes need a CUDA device, got none. --tiny runs anywhere.")
    steps, grid = (3, (4, 5)) if args.tiny else (args.steps, (28, 37))

    torch.manual_seed(0)
    model = make_model(tiny() if args.tiny else released(), device)
    if args.attn:
        model.set_attn_implementation(args.attn)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=device == "cuda")
    batch = make_batch(args.views, grid, model.config.patch_size, device)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the weights were temporarily float32
    seconds, losses = [], []
    for _ in range(3 + steps):  # three warm-up steps
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # synchronizes with the device
        seconds.append(time.perf_counter() - start)
    seconds = seconds[3:]

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}; {versions}; attention {model.config._attn_implementation}; checkpointing {args.checkpointing}")
    if args.tiny:
        print("A TINY model: these numbers say that the program runs, nothing else.")
    size = f"{grid[1] * model.config.patch_size} x {grid[0] * model.config.patch_size}"
    median, slowest = statistics.median(seconds), max(seconds)
    print(f"{args.views} views of {size}, {steps} steps, bfloat16 autocast; loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    views_per_second = args.views * steps / sum(seconds)
    print(f"step {median:.3f} s (median), {slowest:.3f} s (slowest); {views_per_second:.1f} views a second")
    if device == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        print(f"peak memory {peak:.2f} GiB allocated, {reserved:.2f} GiB reserved")
    else:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (whole process)")


if __name__ == "__main__":
    main()
