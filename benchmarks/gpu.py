"""Rows for ``benchmarks/gpu.sh``: encoding, prefill and matrix products on one CUDA device, with random weights.

Views of 518 x 336 in bfloat16 at the released sizes. Each row is printed when it is known, so that a process that is
ended early loses only the rows after it. ``fraction`` is the rate of a row's operations, counted by formula, over the
rate of matrix products that ``rate`` measured on the same device.

    python benchmarks/gpu.py rate OUT
    python benchmarks/gpu.py encode OUT --attn sdpa --views 32 100
    python benchmarks/gpu.py prefill OUT --views 8 32
    python benchmarks/gpu.py fake OUT            # CUDA paths on tensors without data, on any machine
    python benchmarks/gpu.py encode OUT --tiny   # a tiny model on any machine, as a smoke test
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from common import GIB, bandwidth, machine, matrix_rate
from global_attention import FULL_SIZE, operations
from PIL import Image
from pretrain_step import tiny
from pretraining_memory import WithoutPinning
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spa3r import Spa3RConfig, Spa3RModel
from spa3r.models.attention import why_unusable
from spa3r.models.layers import TransformerLayer

LONG_ENOUGH = 4.0
"""Seconds after which a row is not repeated."""


def measured(call: Callable[[], object], device: str, repeats: int = 3) -> tuple[float, float, float]:
    """Seconds of the first call, seconds of the fastest call after it (of the only one, if it is long), peak GiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) <= repeats and (not seconds or sum(seconds) < LONG_ENOUGH):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else float("nan")
    return seconds[0], min(seconds[1:] or seconds), peak


def rate(args: argparse.Namespace) -> None:
    """The rate of bfloat16 matrix products, and the bandwidth of a copy."""
    side, size = (256, 2**20) if args.tiny else (8192, 2**32)  # of matrices, and bytes of a copy
    products = matrix_rate(args.device, torch.bfloat16, side)
    copied = bandwidth(args.device, size)
    print(f"bfloat16 products of {side} x {side}: {products / 1e12:.3g} * 10^12 operations a second")
    print(f"copy of {size / GIB:.2g} GiB: {copied / 1e9:.3g} GB read and written a second")
    (args.out / "rate.json").write_text(json.dumps({"products": products, "bandwidth": copied}))


def encode_operations(config: Spa3RConfig, views: int, grid: tuple[int, int]) -> float:
    """Operations of `encode`: the backbone's and the encoder's."""
    backbone, width = config.backbone_config, config.hidden_size
    fields = {name: getattr(backbone, name) for name in ("global_attention", "global_merge_ratio", "global_num_views")}
    patches = views * grid[0] * grid[1]
    tokens = patches + config.num_latents + config.num_register_tokens
    layer = 2 * (4 + 2 * config.mlp_ratio) * width**2 * tokens + 4 * width * tokens**2
    projection = 2 * patches * config.geometry_hidden_size * width
    return operations(backbone, views, fields, grid)[0] + config.num_encoder_layers * layer + projection


def make_spa3r(args: argparse.Namespace) -> tuple[Spa3RModel, tuple[int, int]]:
    """A Spa3R in bfloat16 without the backbone's heads, and the patch grid of a view."""
    config = tiny() if args.tiny else Spa3RConfig()
    config.backbone_config.heads = []
    for name, value in (args.approximation or {}).items():
        setattr(config.backbone_config, name, value)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = Spa3RModel(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, (4, 5) if args.tiny else tuple(side // config.patch_size for side in FULL_SIZE)


def encode(args: argparse.Namespace) -> None:
    """Time, memory and fraction of the matrix rate of ``encode`` of one scene."""
    rate_file = args.out / "rate.json"
    products = json.loads(rate_file.read_text())["products"] if rate_file.is_file() else float("nan")
    model, grid = make_spa3r(args)
    model.set_attn_implementation(args.attn)
    if args.compile:
        for layer in model.modules():
            if isinstance(layer, TransformerLayer):
                layer.compile(backend="aot_eager" if args.tiny else "inductor")
    size = f"{grid[1] * model.config.patch_size} x {grid[0] * model.config.patch_size}"
    how = f"attention {args.attn}, {'compiled' if args.compile else 'not compiled'}"
    print(f"encode, bfloat16, views of {size}, {how}, backbone {json.dumps(args.approximation or 'exact')}\n")
    print("| views | s | first call s | GiB | of it weights | 10^12 operations a second | fraction |")
    print("|---|---|---|---|---|---|---|")
    weights = sum(p.nbytes for p in model.parameters()) / GIB
    with torch.inference_mode():
        for views in args.views:
            pixels = torch.randn(views * grid[0] * grid[1], 3 * model.config.patch_size**2, device=args.device)
            inputs = (pixels, [grid] * views, [views])
            try:
                first, seconds, peak = measured(lambda: model.encode(*inputs), args.device)  # noqa: B023
            except torch.OutOfMemoryError as error:
                print(f"| {views} | out of memory: {str(error).partition('.')[0]} |", flush=True)
                torch.cuda.empty_cache()
                continue
            done = encode_operations(model.config, views, grid) / seconds
            print(
                f"| {views} | {seconds:.3f} | {first:.2f} | {peak:.2f} | {weights:.2f} | {done / 1e12:.3g} "
                f"| {done / products:.2f} |",
                flush=True,
            )


def prefill(args: argparse.Namespace) -> None:
    """Time to the first token of a Spa3-VLM: pictures, latents, and the prompt's pass through the VLM."""
    from real_size import released_vlm

    from spa3r.rooms.embedded import embedded_model

    model, processor = embedded_model() if args.tiny else released_vlm(args.device)
    print("first token of a Spa3-VLM (Qwen2.5-VL-3B, VGGT-1B, Spa3R), bfloat16, pictures of 518 x 336\n")
    print("| pictures | prompt tokens | s | GiB |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for views in args.views:
        noise = rng.integers(0, 256, (views, *FULL_SIZE, 3), dtype=np.uint8)
        content = [{"type": "image", "image": Image.fromarray(picture)} for picture in noise]
        content.append({"type": "text", "text": "How far is the sofa from the door?"})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
        ).to(args.device)
        _, seconds, peak = measured(
            lambda: model.generate(**inputs, do_sample=False, max_new_tokens=1),  # noqa: B023
            args.device,
        )
        print(f"| {views} | {inputs['input_ids'].shape[1]} | {seconds:.3f} | {peak:.2f} |", flush=True)


def fake(args: argparse.Namespace) -> None:
    """Run ``encode`` on fake CUDA tensors, exact, merged and asymmetric: shapes, types and devices, no numbers."""
    config = tiny() if args.tiny else Spa3RConfig()
    config.backbone_config.heads = []
    grid = (4, 5) if args.tiny else tuple(side // config.patch_size for side in FULL_SIZE)
    with torch.device("meta"):
        model = Spa3RModel(config).eval()
    model.set_attn_implementation("fused")
    with ExitStack() as stack:
        for mode in (FakeTensorMode(), WithoutPinning(), torch.no_grad()):
            stack.enter_context(mode)
        for module in model.modules():
            for name, weight in module._parameters.items():
                fake_weight = torch.empty(weight.shape, device="cuda", dtype=torch.bfloat16)
                module._parameters[name] = nn.Parameter(fake_weight, requires_grad=False)
        for views in args.views:
            pixels = torch.empty(views * grid[0] * grid[1], 3 * config.patch_size**2, device="cuda")
            for kind in ("full", "merged"):  # "subset" reads its choice of views back, which needs data
                model.backbone.config.global_attention = kind
                latents = model._encode(pixels, [grid] * views, [views])
                print(f"{views} views, {kind}: latents {tuple(latents.shape)}, {latents.dtype}, {latents.device}")
                assert (latents.device.type, latents.dtype) == ("cuda", torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rate", "encode", "prefill", "fake"))
    parser.add_argument("out", type=Path, help="folder, for the measured rate")
    parser.add_argument("--views", type=int, nargs="+", default=[32])
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--approximation", type=json.loads, help="fields of the backbone, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.tiny and args.what != "fake":
        parser.error("the released sizes need a CUDA device, got none. --tiny runs anywhere.")
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(args.device))
    if args.tiny:
        print("A TINY model: these numbers say that the program runs, nothing else.")
    if args.what == "encode" and (reason := why_unusable(args.attn)):
        print(f"not run with {args.attn}: {reason}")
        return
    {"rate": rate, "encode": encode, "prefill": prefill, "fake": fake}[args.what](args)


if __name__ == "__main__":
    main()
