"""A pretraining step, forward and backward, against the plain formulation of the released configuration.

``reference`` is ``benchmarks/reference.py`` with the same weights: separate passes of the backbone over the context
views and over all views, one scene at a time. The other rows are the library's: the same passes, one pass with
asymmetric attention, and that with gradient checkpointing. Loss terms and gradients are first checked against the plain
formulation, on scenes of two views. Half of a scene's views are context. The step of the optimizer costs the same in
all rows and is left out; gradients count as memory.

Memory is the peak above weights and input, as the system or CUDA counts it. With ``--layers``, memory at full depth is
counted without data, and time at full depth is calculated: the step, and for every missing layer the time of the
backbone or of encoder and decoder alone at this depth. The floor is the number of operations of a step
without checkpointing over the measured rate of a matrix product. Weights are random. On CUDA the frozen parts are in
bfloat16 and the step runs under autocast.

    python benchmarks/pretrain_step.py --layers 1                  # one layer of each stack, at the full width
    python benchmarks/pretrain_step.py --count                     # no time, only operations and memory
    python benchmarks/pretrain_step.py --views 12 --scenes 2       # all layers, for a GPU
    python benchmarks/pretrain_step.py --tiny                      # a tiny model, as a smoke test
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import GIB, machine, matrix_rate, measure_in_turn, report
from reference import backbone_layers, decode, encode_features, pretraining_losses
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, DINOv3ViTConfig

from spa3r import Spa3RConfig, Spa3RForPreTraining, VggtConfig
from spa3r.models import layers
from spa3r.models.cost import FusedAttention, LiveBytes
from spa3r.models.packing import ViewLayout

ROWS = {
    "reference": {"view_masking": "separate"},
    "separate": {"view_masking": "separate"},
    "asymmetric": {"view_masking": "asymmetric"},
    "asymmetric, checkpointing": {"view_masking": "asymmetric"},
}


def tiny() -> Spa3RConfig:
    backbone = VggtConfig(
        **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_embedding_num_layers": 1},
        **{"patch_embedding_num_heads": 2, "camera_num_layers": 1, "camera_num_heads": 2, "dpt_layers": [0, 0, 1, 1]},
        **{"dpt_channels": [8, 8, 8, 8], "dpt_features": 8, "image_size": 112},
    )
    teacher = DINOv3ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    return Spa3RConfig(backbone_config=backbone, semantic_teacher_config=teacher, num_latents=8, **sizes)


def released(depth: int | None = None, own_depth: int | None = None) -> Spa3RConfig:
    """The released sizes: VGGT-1B, DINOv3 ViT-L/16 and Spa3R.

    Args:
        depth: Layers of each stack; None: all.
        own_depth: Layers of Spa3R's encoder and decoder; None: `depth`.
    """
    count = depth or 24
    teacher = DINOv3ViTConfig(
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": count, "num_attention_heads": 16},
        num_register_tokens=4,
    )
    if depth is None:
        return Spa3RConfig(semantic_teacher_config=teacher)
    backbone = VggtConfig(num_hidden_layers=depth, patch_embedding_num_layers=depth, dpt_layers=[depth - 1] * 4)
    own = {"num_encoder_layers": own_depth or depth, "num_decoder_layers": own_depth or depth}
    return Spa3RConfig(backbone_config=backbone, semantic_teacher_config=teacher, **own)


def fused_attention(module, query, key, value, mask, scaling=None, **kwargs):
    """What the fused kernels of xformers, flash and SDPA keep: queries, keys, values, output, a sum per query."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, scale=scaling)[0].transpose(1, 2), None


AttentionInterface.register("fused", fused_attention)


class Case:
    """Scenes of equal views, and the steps on them."""

    def __init__(self, scenes: int, views: int, grid: tuple[int, int], device: str, autocast: bool):
        self.scenes, self.views, self.grid, self.device, self.autocast = scenes, views, grid, device, autocast
        self.context = max(1, views // 2)
        self.pixels = torch.empty(scenes, views * grid[0] * grid[1], 3 * 14**2, device=device)
        if device != "meta":
            self.pixels.normal_()

    @contextmanager
    def configured(self, model: Spa3RForPreTraining, row: str) -> Iterator[None]:
        """The model as a row needs it, without gradients from before."""
        model.zero_grad()
        model.config.view_masking = ROWS[row]["view_masking"]
        if checkpointing := row.endswith("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cuda" if self.device == "cuda" else "cpu", torch.bfloat16, enabled=self.autocast):
            yield
        if checkpointing:
            model.gradient_checkpointing_disable()

    def plain_step(self, model: Spa3RForPreTraining) -> dict[str, float | Tensor]:
        total: dict[str, Any] = {}
        for pixels in self.pixels:
            losses = pretraining_losses(model, pixels, self.views, self.grid, self.context)
            (sum(losses.values()) / self.scenes).backward()
            total = {name: total.get(name, 0) + value.detach() / self.scenes for name, value in losses.items()}
        return total

    def step(self, model: Spa3RForPreTraining) -> dict[str, Tensor]:
        targets = [view >= self.context for view in range(self.views)]
        views, scenes = self.views, self.scenes
        output = model(self.pixels.flatten(0, 1), [self.grid] * (views * scenes), [views] * scenes, targets * scenes)
        output.loss.backward()
        return {name: value.detach() for name, value in output.losses.items()}

    def of(self, row: str, model: Spa3RForPreTraining) -> Callable[[], dict]:
        def run() -> dict:
            with self.configured(model, row):
                return (self.plain_step if row == "reference" else self.step)(model)

        return run

    # Parts whose time depends on the number of layers; the first scene only.

    def backbone_alone(self, row: str, model: Spa3RForPreTraining) -> Callable[[], object]:
        backbone, cells = model.spa3r.backbone, self.grid[0] * self.grid[1]
        every, few = self.pixels[0], self.pixels[0, : self.context * cells]
        layout = ViewLayout.from_inputs([self.grid] * self.views, [self.views])
        context = ViewLayout.from_inputs([self.grid] * self.context, [self.context])
        heads = {"output_cameras": False, "output_depth": False}

        @torch.no_grad()
        def run() -> None:
            if row == "reference":
                backbone_layers(backbone, few, self.context, self.grid)
                backbone_layers(backbone, every, self.views, self.grid)
            elif row == "separate":
                backbone.forward_layout(few, context, **heads)
                backbone.forward_layout(every, layout, **heads)
            else:
                backbone.forward_layout(every, layout, **heads, context_views=[self.context])

        return run

    def transformers_alone(self, row: str, model: Spa3RForPreTraining) -> Callable[[], object]:
        spa3r, cells = model.spa3r, self.grid[0] * self.grid[1]
        features = torch.randn(self.context * cells, model.config.geometry_hidden_size, device=self.device)
        extrinsics = torch.eye(4, device=self.device).repeat(self.views, 1, 1)
        intrinsics = torch.eye(3, device=self.device).repeat(self.views, 1, 1)
        intrinsics[:, :2] *= 14 * max(self.grid)
        layout = ViewLayout.from_inputs([self.grid] * self.views, [self.views])
        context = ViewLayout.from_inputs([self.grid] * self.context, [self.context])

        def run() -> None:
            with self.configured(model, row):
                if row == "reference":
                    latents = encode_features(spa3r, features[None], self.context, self.grid)
                    tokens = decode(spa3r, latents, extrinsics, intrinsics, self.grid)
                else:
                    latents = spa3r.encoder(features, context)
                    tokens = spa3r.decoder(latents, extrinsics, intrinsics, layout)
                tokens.float().square().mean().backward()

        return run


def check(model: Spa3RForPreTraining, case: Case) -> dict[str, tuple[float, float]]:
    """The largest relative errors of a loss term and of a weight's gradient, by way of masking."""
    errors = {}
    for masking in ("separate", "asymmetric"):
        results = []
        for step in (case.plain_step, case.step):
            with case.configured(model, masking):
                losses = step(model)
            results.append((losses, [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]))
        (wanted, plain), (got, ours) = results
        terms = max(abs(got[name] / wanted[name] - 1).item() for name in wanted)
        # Gradients that vanish next to the others are noise.
        largest = max(gradient.norm() for gradient in plain)
        weights = max(
            ((mine - gradient).norm() / gradient.norm().clamp(min=1e-3 * largest)).item()
            for mine, gradient in zip(ours, plain, strict=True)
        )
        errors[masking] = terms, weights
    model.zero_grad()
    return errors


def on_meta(config: Spa3RConfig, fused: bool) -> Spa3RForPreTraining:
    with torch.device("meta"):
        model = Spa3RForPreTraining(config).train()
    model.set_attn_implementation("fused" if fused else "sdpa")  # modes of functions don't reach recomputed layers
    return model


def count_memory(config: Spa3RConfig, row: str, case: Case) -> float:
    """Counted peak of a step without data in float32, above weights and input, in GiB."""
    model = on_meta(config, fused=row != "reference")
    with FusedAttention(), LiveBytes([*model.parameters(), *model.buffers(), case.pixels]) as count:
        case.of(row, model)()
    return count.peak / GIB


def count_operations(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as count:
        step()
    return count.get_total_flops()


def operations_at_full_depth(row: str, case: Case) -> int:
    """Operations of a step of the released sizes: linear in the numbers of layers, from three counts."""

    def counted(*depths: int) -> int:
        with FusedAttention():
            return count_operations(case.of(row, on_meta(released(*depths), fused=row != "reference")))

    least, config = counted(1, 1), released()
    deeper = (config.backbone_config.num_hidden_layers - 1) * (counted(2, 1) - least)
    return least + deeper + (config.num_encoder_layers - 1) * (counted(1, 2) - least)


def count(rows: list[str], case: Case, title: str, file: Path | None) -> None:
    """Print operations and memory of the released sizes, and their ratios."""
    table: list[dict[str, Any]] = []
    for row in rows:
        operations, memory = operations_at_full_depth(row, case) / 1e12, count_memory(released(), row, case)
        first = table[0] if table else {"10^12 operations": operations, "GiB": memory}
        entry = {"": row, "10^12 operations": operations, "GiB": memory}
        table.append(entry | {f"{key} ratio": entry[key] / first[key] for key in ("10^12 operations", "GiB")})
    report(f"a pretraining step counted without data, {title}, all layers", table, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=8, help="views of a scene")
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--size", default="518x392", help="width x height of a view")
    parser.add_argument("--layers", type=int, help="layers of each stack; default: all")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--attn", help="attention back end; default: the best that is installed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--count", action="store_true", help="count operations and memory of all layers, measure none")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, height = map(int, "70x56".split("x") if args.tiny else args.size.split("x"))
    grid = height // 14, width // 14
    half = device == "cuda"

    if args.count:
        layers.CHUNK_BYTES = layers.CPU_CHUNK_BYTES
        print(machine())
        what = f"{args.scenes} scene(s) of {args.views} views of {width}x{height}, float32"
        count(args.rows, Case(args.scenes, args.views, grid, "meta", False), what, args.json)
        return
    torch.manual_seed(0)
    full = tiny() if args.tiny else released()
    with torch.device(device):
        model = Spa3RForPreTraining(tiny() if args.tiny else released(args.layers)).train()
    if half:
        for frozen in model.frozen_modules().values():
            frozen.to(torch.bfloat16)  # the camera head stays float32
    if args.attn:
        model.set_attn_implementation(args.attn)
    rate = matrix_rate(device, torch.bfloat16 if half else torch.float32)
    second = "wall" if half else "cpu"
    print(machine(device))
    if args.tiny:
        print("A TINY model: these numbers say that the program runs, nothing else.")
    depth = f"{args.layers} layer(s) of each stack" if args.layers else "all layers"
    precision = "bfloat16 autocast" if half else "float32"
    title = f"{args.scenes} scene(s) of {args.views} views of {width}x{height}, {precision}"
    print(f"a pretraining step, {title}, {depth}")
    print(f"matrix product: {rate / 1e9:.0f} billion operations a {'' if half else 'CPU '}second")

    for masking, (terms, weights) in check(model, Case(1, 4, (12, 16), device, half)).items():
        print(f"checked, {masking}: relative error of loss terms {terms:.1e}, of gradients {weights:.1e}", flush=True)

    case, empty = (Case(args.scenes, args.views, grid, where, half) for where in (device, "meta"))
    empty.autocast = False
    measured = measure_in_turn({row: case.of(row, model) for row in args.rows}, args.repeats, device)
    print("steps: " + ", ".join(f"{row} {runs.median(second):.1f} s" for row, runs in measured.items()), flush=True)
    parts = {}
    if args.layers:
        for name, part in (("backbone", case.backbone_alone), ("transformers", case.transformers_alone)):
            parts[name] = measure_in_turn({row: part(row, model) for row in args.rows}, args.repeats, device)
            seconds = (f"{row} {runs.median(second):.1f} s" for row, runs in parts[name].items())
            print(f"{name} alone: " + ", ".join(seconds), flush=True)
    model.zero_grad()
    layers.CHUNK_BYTES = layers.CPU_CHUNK_BYTES if device == "cpu" else layers.CHUNK_BYTES
    if args.layers:
        floor = operations_at_full_depth("asymmetric", empty) / rate
    else:
        floor = count_operations(case.of("asymmetric", model)) / rate
        model.zero_grad()

    rows = []
    for row in args.rows:
        runs = measured[row]
        time = runs.median(second)
        entry = {"": row, "s": time, "wall s": runs.median("wall"), "peak GiB": runs.median("peak") / GIB}
        compared = ["s", "peak GiB"]
        if args.layers:
            backbone, own = (args.scenes * parts[name][row].median(second) / args.layers for name in parts)
            entry |= {"s of a backbone layer": backbone, "s of an encoder and decoder layer": own}
            config = full.backbone_config
            time += (config.num_hidden_layers - args.layers) * backbone
            time += (full.num_encoder_layers - args.layers) * own
            entry |= {"s, full depth": time, "GiB, full depth": count_memory(full, row, empty)}
            compared = ["s, full depth", "GiB, full depth"]
        entry |= {"time / floor": time / floor}
        if "reference" in args.rows:
            plain = rows[0] if rows else entry
            entry |= {f"{key} ratio": entry[key] / plain[key] for key in compared}
        rows.append(entry)
    print(f"floor of the asymmetric step at full depth: {floor:.4g} s")
    report(f"pretraining step, {title}, {depth}", rows, args.json)


if __name__ == "__main__":
    main()
