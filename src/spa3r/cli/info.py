"""``spa3r info``: print what works on this machine."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa3r.console import AsJson, Dtype, Verbose, one_line, plural, reporting, torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PACKAGES = (
    *("spa3r", "torch", "torchvision", "transformers", "xformers", "flash-attn", "accelerate", "peft", "safetensors"),
    *("huggingface-hub", "tokenizers", "numpy", "pillow", "av", "matplotlib", "embreex", "typer"),
)


def info(
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Print what encoding a scene of so many views costs, at the released sizes."),
    ] = None,
    size: Annotated[str, typer.Option(metavar="WxH", help="Size of a processed view, with --views.")] = "518x336",
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights, with --views.")] = Dtype.bfloat16,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List installed versions, and test which devices, types and attention back ends work here."""
    with reporting(as_json, verbose) as report:
        if views is not None:
            cost = _cost(views, size, dtype)
            report.finish(_cost_text(cost), **cost)
            return
        versions: dict[str, str | None] = {"python": sys.version.split()[0]}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        device = torch_device("auto")
        devices, dtypes, attention = _devices(), _try_dtypes(device), _try_attention(device)
        sections = {
            "Versions": {name: version or "not installed" for name, version in versions.items()},
            "Devices": devices,
            f"Types on {device}": {name: note for name, (_, note) in dtypes.items()},
            f"Attention on {device}": {name: note for name, (_, note) in attention.items()},
        }
        width = max(len(name) for section in sections.values() for name in section)
        report.finish(
            "\n\n".join(
                "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in section.items())])
                for title, section in sections.items()
            ),
            versions=versions,
            devices=devices,
            device=str(device),
            dtypes={name: {"works": works, "note": note} for name, (works, note) in dtypes.items()},
            attention={name: {"works": works, "note": note} for name, (works, note) in attention.items()},
        )


def _cost(views: int, size: str, dtype: Dtype) -> dict[str, Any]:
    """The cost of a scene of the released Spa3R, counted without data, and the largest scenes that fit."""
    import torch

    from spa3r import Spa3RConfig, Spa3RModel
    from spa3r.models.cost import largest_scene, scene_cost, total_memory
    from spa3r.models.packing import MAX_GRID

    config, sides = Spa3RConfig(), re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    grid = [int(side) / config.patch_size for side in sides.groups()] if sides else []
    if not grid or any(side % 1 or not 1 <= side <= MAX_GRID for side in grid):
        raise ValueError(
            f"`--size` must be the width and height of a view, multiples of {config.patch_size} such as 518x336, got "
            f"{size}."
        )
    if dtype == Dtype.auto:
        raise ValueError("`--dtype` must be float32, bfloat16 or float16 with `--views`, got auto.")
    with torch.device("meta"):
        model = Spa3RModel(config).to(getattr(torch, dtype.value))
    columns, rows = map(int, grid)
    device = torch_device("auto")
    cost = scene_cost(model, views, (rows, columns))
    memories = {"80 GB": 80 * 10**9, "40 GB": 40 * 10**9, "24 GB": 24 * 10**9, str(device): total_memory(device)}
    return {
        "views": views,
        "size": size,
        "dtype": dtype.value,
        "tokens": cost.tokens,
        "operations": cost.operations,
        "weights_bytes": cost.weights,
        "activations_bytes": cost.activations,
        "memory_bytes": cost.memory,
        "largest_scenes": {name: largest_scene(model, (rows, columns), memory) for name, memory in memories.items()},
    }


def _cost_text(cost: dict[str, Any]) -> str:
    gib = {name: cost[f"{name}_bytes"] / 2**30 for name in ("weights", "activations", "memory")}
    scene = f"{plural(cost['views'], 'view')} of {cost['size']} in {cost['dtype']}"
    lines = [
        f"Encoding {scene}, at the released sizes, counted:",
        f"  tokens      {cost['tokens']:,}",
        f"  operations  {cost['operations'] / 1e12:,.1f} trillion",
        f"  memory      {gib['memory']:.1f} GiB: weights {gib['weights']:.1f}, all else {gib['activations']:.1f}",
        "Largest scene that fits, if nothing else is on the device; workspaces of kernels are not counted:",
    ]
    width = max(map(len, cost["largest_scenes"]))
    return "\n".join(
        [*lines, *(f"  {name:<{width}}  {plural(views, 'view')}" for name, views in cost["largest_scenes"].items())]
    )


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": plural(torch.get_num_threads(), "thread")}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _try_dtypes(device: torch.device) -> dict[str, tuple[bool, str]]:
    """For every type of weights whether it works, and a note."""
    import torch

    found = {}
    for name in ("float32", "bfloat16", "float16"):
        try:
            square = torch.ones(16, 16, device=device, dtype=getattr(torch, name))
            (square @ square).softmax(-1).sum().item()
            found[name] = (True, "works")
        except RuntimeError as error:
            found[name] = (False, f"fails: {one_line(error)}")
    return found


def _try_attention(device: torch.device) -> dict[str, tuple[bool, str]]:
    """For every back end whether it works on segments of unequal lengths as the definition does, and a note."""
    import torch
    from transformers import PreTrainedConfig

    from spa3r.models.attention import Segments, check_attention_implementation, packed_attention, why_unusable

    segments = Segments.within([3, 5, 1])
    tokens = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(0)).to(device)

    class Layer(torch.nn.Module):
        config: PreTrainedConfig
        is_causal = False

    def attend(name: str, dtype: torch.dtype) -> Tensor:
        layer = Layer()
        layer.config = PreTrainedConfig()
        layer.config._attn_implementation = name
        query = tokens.to(dtype)
        return packed_attention(layer, query, query, query, segments).float()

    found = {}
    for name in ("xformers", "sdpa", "eager", "flash_attention_2"):
        if reason := why_unusable(name):
            found[name] = (False, reason)
            continue
        try:
            half = device.type == "cuda"
            error = (
                (attend(name, torch.float16 if half else torch.float32) - attend("eager", torch.float32)).abs().max()
            )
            note = f"works, within {error:.0e} of the definition"
            if name == "xformers" and not half:
                note += "; here it is PyTorch's SDPA, xformers' own kernels run on CUDA only"
            found[name] = (True, note) if error < (1e-2 if half else 1e-4) else (False, f"is off by {error:.0e}")
        except Exception as error:  # any failure is a result here
            found[name] = (False, f"fails: {one_line(error)}")
    default = check_attention_implementation(None)
    found[default] = (found[default][0], f"{found[default][1]} (the default)")
    return found
