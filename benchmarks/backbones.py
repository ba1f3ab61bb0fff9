"""Encoding and pretraining on Depth Anything 3 Base and Small beside VGGT-1B, with Spa3R's released sizes.

The first table is measured in one process, model by model: CPU seconds and peak memory above the weights, as the system
counts them, of encoding one scene. With `--quarter`, each backbone has a quarter of its layers at full width, for
machines that can't give VGGT-1B minutes; Spa3R's encoder is left out then. The second table is counted without data at
the full depth: the same scene in bfloat16, and the parts of a pretraining step. Weights are random.

    python benchmarks/backbones.py            # one thread, float32; needs 6 GiB
    python benchmarks/backbones.py --quarter
    python benchmarks/backbones.py --counted  # the second table alone, at once
"""

import argparse
import gc

import torch
from common import GIB, Runs, machine, measure_once, report
from pretraining_memory import SCENE, on_meta, released
from torch.utils.flop_counter import FlopCounterMode

from spa3r import DepthAnything3Config, Spa3RConfig, Spa3RModel, VggtConfig
from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.cost import FusedAttention, scene_cost
from spa3r.models.packing import ViewLayout

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SMALL |= {"dpt_channels": [48, 96, 192, 384], "dpt_features": 64}


QUARTER = {
    VggtConfig: {"num_hidden_layers": 6, "patch_embedding_num_layers": 6, "heads": []},
    DepthAnything3Config: {"num_hidden_layers": 3, "alternating_start": 1, "heads": []},
}
"""Of 24 layers of each of VGGT's stacks, and of Depth Anything 3's 4 layers of a view and 8 alternating ones."""


def backbones(quarter: bool = False) -> dict[str, BackboneConfig]:
    vggt, depth_anything_3 = (QUARTER[kind] if quarter else {} for kind in (VggtConfig, DepthAnything3Config))
    return {
        "VGGT-1B": VggtConfig(**vggt),
        "Depth Anything 3 Base": DepthAnything3Config(**depth_anything_3),
        "Depth Anything 3 Small": DepthAnything3Config(**SMALL | depth_anything_3),
    }


def make(config: BackboneConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Spa3RModel:
    """A Spa3R with random weights; large models are not initialized layer by layer."""
    with torch.device("meta"):
        model = Spa3RModel(Spa3RConfig(backbone_config=config)).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    if device == "meta":
        return model
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(-0.02, 0.02)
    return model


@torch.inference_mode()
def measure(config: BackboneConfig, views: int, grid: tuple[int, int], quarter: bool) -> dict:
    """One model, alone in memory."""
    model, runs = make(config), Runs()
    part = model.backbone if quarter else model
    call = part.forward if quarter else model.encode
    pixels = torch.randn(views * grid[0] * grid[1], 3 * config.patch_size**2)
    measure_once(lambda: call(pixels, [grid] * views, [views]), "cpu", runs)
    weights = sum(parameter.numel() for parameter in part.parameters())
    return {
        "parameters (million)": round(weights / 1e6),
        "weights GiB": 4 * weights / GIB,
        "CPU s": runs.cpu[0],
        "peak GiB above": runs.peak[0] / GIB,
    }


def measured(views: int, grid: tuple[int, int], quarter: bool) -> list[dict]:
    rows: list[dict] = []
    for name, config in backbones(quarter).items():
        row = {"backbone": name} | measure(config, views, grid, quarter)
        rows.append(row)
        first = rows[0]
        row["time ratio"] = row["CPU s"] / first["CPU s"]
        memory, of_first = (each["weights GiB"] + each["peak GiB above"] for each in (row, first))
        row["memory ratio"] = memory / of_first
        print(f"  {name} done", flush=True)
        gc.collect()
    return rows


@torch.no_grad()
def counted(views: int, grid: tuple[int, int]) -> list[dict]:
    """Without data: encoding in bfloat16, and the frozen forward pass of a pretraining step of a scene of 12 views."""
    rows: list[dict] = []
    for name, config in backbones().items():
        cost = scene_cost(make(config, "meta", torch.bfloat16), views, grid)
        row = {"backbone": name, "encode, trillion operations": cost.operations / 1e12}
        row |= {"encode GiB": cost.memory / GIB}
        fields = {key: value for key, value in released().to_dict().items() if key == "semantic_teacher_config"}
        model = on_meta(Spa3RConfig(backbone_config=config, **fields)).bfloat16().eval()
        backbone = model.spa3r.backbone
        backbone.set_attn_implementation("sdpa")
        layout = ViewLayout.from_inputs([grid] * SCENE, [SCENE])
        pixels = torch.empty(SCENE * grid[0] * grid[1], 3 * config.patch_size**2, device="meta", dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter, FusedAttention():
            backbone.forward_layout(pixels, layout, context_views=[SCENE // 2])
        row |= {"pretraining, backbone's trillion operations": counter.get_total_flops() / 1e12}
        frozen, trained = (
            sum(p.numel() for p in model.parameters() if p.requires_grad == learns) for learns in (False, True)
        )
        row |= {"frozen GiB, bfloat16": 2 * frozen / GIB, "trained GiB, with AdamW": 16 * trained / GIB}
        first = rows[0] if rows else row
        row |= {
            "operations ratio": row["pretraining, backbone's trillion operations"]
            / first["pretraining, backbone's trillion operations"]
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", default="518x392", help="width x height of a view")
    parser.add_argument("--quarter", action="store_true", help="a quarter of the backbones' layers, no encoder")
    parser.add_argument("--counted", action="store_true", help="the second table alone")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    grid = height // 14, width // 14
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(machine())
    if not args.counted:
        what = "a quarter of the backbone's layers" if args.quarter else "encode"
        title = f"{what}, {args.views} views of {args.size}, float32, measured"
        report(title, measured(args.views, grid, args.quarter))
    title = f"encode, {args.views} views of {args.size}, bfloat16; pretraining, {SCENE} views, half context; counted"
    report(title, counted(args.views, grid))


if __name__ == "__main__":
    main()
