"""Encoding of 1 to many views, and the asymmetric aggregation of 12, against the plain formulation of the same maths.

`reference` is `benchmarks/reference.py` with the same weights, run in turn with the library in one process; outputs are
checked. Memory is the peak above the weights and the input: as the system counts it in the measured runs, and counted
without data at the full depth. The floor is the number of operations over the measured rate of a matrix product.
Weights are random.

    python benchmarks/encode.py --layers 1          # one of the 24 layers of each stack, at the full width
    python benchmarks/encode.py --width 64          # a narrow model
"""

import argparse
from pathlib import Path

import torch
from common import GIB, exponent, machine, matrix_rate, measure_in_turn, report
from reference import backbone_layers, encode

from spa3r import Spa3RConfig, Spa3RModel, VggtConfig
from spa3r.models.cost import FusedAttention, LiveBytes, count_operations
from spa3r.models.packing import ViewLayout


def make_config(layers: int | None, width: int | None) -> Spa3RConfig:
    fields = {"heads": []}
    if layers is not None:
        fields |= {"num_hidden_layers": layers, "patch_embedding_num_layers": layers, "dpt_layers": [0] * 4}
    if width is not None:
        fields |= {"hidden_size": width, "num_attention_heads": width // 32, "patch_embedding_num_heads": width // 32}
    own = {} if layers is None else {"num_encoder_layers": layers}
    if width is not None:
        own |= {"hidden_size": width, "num_attention_heads": width // 32}
    return Spa3RConfig(backbone_config=VggtConfig(**fields), **own)


def on_meta(config: Spa3RConfig, dtype: torch.dtype) -> Spa3RModel:
    with torch.device("meta"):
        model = Spa3RModel(config).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


def noise(model: Spa3RModel, views: int, grid: tuple[int, int], device: str) -> torch.Tensor:
    return torch.randn(views * grid[0] * grid[1], 3 * model.config.patch_size**2, device=device)


@torch.no_grad()
def counted(call, model: Spa3RModel) -> float:
    """Counted peak of a call on a model without data, without the input, in GiB."""
    with FusedAttention(), LiveBytes([*model.parameters(), *model.buffers()]) as count:
        call()
    return count.peak / GIB


def ours_asymmetric(model: Spa3RModel, pixels: torch.Tensor, grid: tuple[int, int], views: int) -> torch.Tensor:
    layout = ViewLayout.from_inputs([grid] * views, [views])
    return model.backbone.forward_layout(pixels, layout, context_views=[views // 2]).tokens[0]


def plain_asymmetric(model: Spa3RModel, pixels: torch.Tensor, grid: tuple[int, int], views: int) -> torch.Tensor:
    targets = [view >= views // 2 for view in range(views)]
    return backbone_layers(model.backbone, pixels, views, grid, targets)[-1].flatten(0, 1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--asymmetric", type=int, default=12, help="views of the asymmetric aggregation; 0: none")
    parser.add_argument("--size", default="518x392", help="width x height of a view")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attn", help="attention back end; default: the best that is installed")
    parser.add_argument("--layers", type=int, help="layers of each stack; default: all")
    parser.add_argument("--width", type=int, help="width of the model; default: the full one")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without the reference, for scenes that it can't hold")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    width, height = map(int, args.size.split("x"))

    torch.manual_seed(0)
    model = Spa3RModel(make_config(args.layers, args.width)).to(device, dtype).eval()
    if args.attn:
        model.set_attn_implementation(args.attn)
    full = on_meta(make_config(None, args.width), dtype)
    grid = height // model.config.patch_size, width // model.config.patch_size
    rate = matrix_rate(device, dtype)
    depth = f"{args.layers} of 24 layers of each stack" if args.layers else "all layers"
    print(machine(device))
    print(f"views of {args.size}, {args.dtype}, backbone width {model.config.backbone_config.hidden_size}, {depth}")
    print(f"matrix product: {rate / 1e9:.0f} billion operations a {'CPU ' if device == 'cpu' else ''}second")
    second = "wall" if device == "cuda" else "cpu"

    def compare(views: int, ours, plain, name: str) -> dict:
        pixels, empty = noise(model, views, grid, device), noise(full, views, grid, "meta")
        calls = {} if args.alone else {"reference": lambda: plain(model, pixels)}
        runs = measure_in_turn(calls | {"spa3r": lambda: ours(model, pixels)}, args.repeats, device)
        time, peak = (runs["spa3r"].median(what) for what in (second, "peak"))
        row = {"": name, "views": views, "s": time, "wall s": runs["spa3r"].median("wall"), "peak GiB": peak / GIB}
        depth_peak = counted(lambda: ours(full, empty), full)
        row |= {"GiB, full depth": depth_peak}
        if not args.alone:
            plain_run = runs["reference"]
            error = (runs["spa3r"].result - plain_run.result).norm() / plain_run.result.norm()
            plain_peak = counted(lambda: plain(full, empty), full)
            row |= {
                "reference s": plain_run.median(second),
                "its peak GiB": plain_run.median("peak") / GIB,
                "its GiB, full depth": plain_peak,
                "time ratio": time / plain_run.median(second),
                "peak ratio": peak / plain_run.median("peak"),
                "full-depth ratio": depth_peak / plain_peak,
                "error": error.item(),
            }
        return row

    rows = []
    for views in args.views:
        layout = [[grid] * views, [views]]
        row = compare(views, lambda m, x: m.encode(x, *layout), lambda m, x: encode(m, x, views, grid), "encode")  # noqa: B023
        floor = count_operations(model, views, grid) / rate
        rows.append(row | {"floor s": floor, "time / floor": row["s"] / floor})
        print(f"  {views} views done", flush=True)
    if len(rows) > 1:
        fits = {key: exponent(args.views, [row[key] for row in rows]) for key in ("s", "peak GiB", "GiB, full depth")}
    report(
        f"encode, {args.size}, {args.dtype}, width {full.config.backbone_config.hidden_size}, {depth}", rows, args.json
    )
    if len(rows) > 1:
        print("exponents over views: " + ", ".join(f"{key} {value:.2f}" for key, value in fits.items()))
    if args.asymmetric:
        count = args.asymmetric
        row = compare(
            count,
            lambda m, x: ours_asymmetric(m, x, grid, count),
            lambda m, x: plain_asymmetric(m, x, grid, count),
            "asymmetric",
        )
        report(f"asymmetric aggregation, half context, {args.size}, {args.dtype}, {depth}", [row], args.json)


if __name__ == "__main__":
    main()
