"""Memory of a pretraining step at the released sizes, calculated, and the calculation checked by counting.

VGGT-1B, DINOv3 ViT-L/16 and Spa3R; frozen parts in bfloat16, trained ones in float32 under autocast to bfloat16, AdamW;
scenes of 12 views, half of them targets. Needs no accelerator: parameters are counted on the `meta` device, and a
step's tensors are counted on fake tensors of a CUDA device and in a real step on the CPU.

    python benchmarks/pretraining_memory.py
"""

import argparse
import platform

import torch
import transformers
from pretrain_step import released
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import DINOv3ViTConfig

from spa3r import Spa3RConfig, Spa3RForPreTraining, VggtConfig
from spa3r.models.cost import LiveBytes
from spa3r.models.dense_head import DPT_PATCHES_AT_ONCE
from spa3r.models.layers import TransformerLayer

GIB = 2**30
SCENE = 12
"""Views of a scene; the first half is context."""
SIZES = {"224 x 224": (16, 16), "518 x 392": (28, 37), "518 x 518": (37, 37)}
"""Width x height of a view, and its patch grid (rows, columns)."""


def medium() -> Spa3RConfig:
    """A model small enough for a real step on a CPU, and large enough that its weights don't matter."""
    backbone = VggtConfig(
        **{"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "patch_embedding_num_layers": 2},
        **{"patch_embedding_num_heads": 4, "camera_num_layers": 1, "camera_num_heads": 4, "dpt_layers": [0, 1, 2, 3]},
        **{"dpt_channels": [64, 64, 64, 64], "dpt_features": 64, "image_size": 112},
    )
    teacher = DINOv3ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_register_tokens=4
    )
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "num_encoder_layers": 3, "num_decoder_layers": 3}
    return Spa3RConfig(backbone_config=backbone, semantic_teacher_config=teacher, num_latents=64, **sizes)


def on_meta(config: Spa3RConfig) -> Spa3RForPreTraining:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Spa3RForPreTraining(config)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def layer_bytes(width: int, heads: int, ratio: float, is_decoder: bool, half: bool) -> float:
    """Bytes that one layer keeps per token for its backward pass."""
    b = 2 if half else 4  # bytes of inputs of matrix products
    norms = 2 * 4 * width  # the inputs of both LayerNorms, always float32
    if half:
        qk_norms = 2 * 4 * width  # float32 copies of queries and keys
        value = 1 if is_decoder else 3  # in the encoder a part of the fused projection's output, kept with it
    else:
        qk_norms = 5 * 4 * width  # the fused projection's output, and normalized queries and keys
        value = 1 if is_decoder else 0
    # Inputs of the fused projection and of fc1, queries, keys, values, output of the attention; both sides of the GELU;
    # in the decoder the output in the camera's frame.
    products = b * width * (5 + 2 * ratio + value + is_decoder)
    statistics = 4 * (4 + 3 * heads)
    rotation = 4 * b * width / heads if half and not is_decoder else 0
    return norms + qk_norms + products + statistics + rotation


def arithmetic(config: Spa3RConfig, views: int, grid: tuple[int, int], half: bool, checkpointing: bool = False) -> dict:
    """Bytes of activations by part; `half`: autocast to bfloat16 as on CUDA, else float32."""
    b = 2 if half else 4
    scenes, cells = max(1, views // SCENE), grid[0] * grid[1]
    patches, width, wide = views * cells, config.hidden_size, config.geometry_hidden_size
    semantic, ratio = config.semantic_hidden_size, config.mlp_ratio
    prefix = config.num_register_tokens + config.num_latents
    context = patches / 2
    tokens = {"encoder": context + scenes * prefix, "decoder": patches + views * prefix}
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    kept, work = {}, 4 * 4 * patches * wide  # the first gradients
    for part, count in layers.items():
        layer = layer_bytes(width, config.num_attention_heads, ratio, part == "decoder", half)
        # With checkpointing: the input of the layer and the result of its attention, with a sum for every query.
        kept[part] = tokens[part] * count * (2 * b * width + 4 * config.num_attention_heads if checkpointing else layer)
        work = max(work, tokens[part] * layer * checkpointing)  # one layer at a time is recomputed
    kept["encoder"] += context * b * wide  # the input
    kept["decoder"] += patches * 4 * width + tokens["decoder"] * 4 * 4 * (8 + 8)  # last norm's input; cameras, angles
    heads = 3 * 2 * b * ratio * width + (3 * b if half else 4) * width
    loss = 4 * (2 * (wide + semantic) if half else wide + semantic)  # in float32: predictions, and normalized ones
    kept["heads, loss"] = patches * (heads + loss)
    if half:
        linear = (module.weight for module in on_meta(config).modules() if isinstance(module, nn.Linear))
        kept["cast weights"] = b * sum(weight.numel() for weight in linear if weight.requires_grad)
    # For the backbone, in float32: tokens, patches in two orders, those of the context; for the teacher; predictions.
    targets = 4 * (3 * wide + wide / 2 + semantic) + b * (wide + semantic)
    pixels = cells * config.patch_size**2
    kept["targets"] = patches * (targets + 4 * 3 * config.patch_size**2) + views * pixels * 2 * 4

    chunk, features = min(max(1, DPT_PATCHES_AT_ONCE // cells), views), config.backbone_config.dpt_features
    dense = 2 * 4 * pixels * features / 2  # two float32 maps at full picture size
    dense += b * (64 + 16) * cells * features + 5 * 4 * cells * wide  # coarser maps; tokens of four layers, and normed
    frozen = chunk * dense + 4 * pixels * features / 2 + patches * (8 * 4 * wide + 2 * 4 * 3 * config.patch_size**2)
    return {"kept": kept, "frozen": frozen, "work": work}


def states(config: Spa3RConfig, devices: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state on each device, by sharding strategy."""
    model = on_meta(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = {p: 4 if p.requires_grad or "camera_head" in name else 2 for name, p in model.named_parameters()}
    frozen = sum(p.numel() * size[p] for p in size if not p.requires_grad)
    layers = [part for part in model.modules() if isinstance(part, TransformerLayer)]
    in_layers = {p for layer in layers for p in layer.parameters()}
    gathered = sum(p.numel() * size[p] for p in size if p not in in_layers)
    gathered += 2 * max(sum(p.numel() * size[p] for p in layer.parameters()) for layer in layers)  # and the next one
    return {
        "one device": frozen + 16 * trained,  # weight, gradient, and AdamW's two moments
        "DDP": frozen + 20 * trained,  # and the buckets for communicating gradients
        # Weights in bfloat16; shards of gradients and of float32 weights and moments; a bucket of default size.
        "ZeRO-2": frozen + 2 * trained + 14 * trained / devices + 2 * 5e8,
        "FSDP2": (frozen + 16 * trained) / devices + gathered,
    }


# Counting -------------------------------------------------------------------------------------------------------------


class WithoutPinning(TorchFunctionMode):
    """Fake tensors can't be pinned without CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "pin_memory"})


def inputs(config: Spa3RConfig, views: int, grid: tuple[int, int], device: str) -> dict:
    scenes = max(1, views // SCENE)
    own = views // scenes
    return {
        "view_pixel_values": torch.empty(views * grid[0] * grid[1], 3 * config.patch_size**2, device=device).normal_(),
        "view_grid_hw": [grid] * views,
        "views_per_scene": [own] * scenes,
        "target_mask": [view >= own // 2 for view in range(own)] * scenes,
    }


def count(model: Spa3RForPreTraining, batch: dict, backward: bool) -> dict[str, float]:
    """Counted bytes of a step: kept at the end of the forward pass, peak of the frozen pass, peak of all."""
    counted = {}
    with LiveBytes([*model.parameters(), *model.buffers()]) as bytes_:
        bytes_.add(batch["view_pixel_values"])

        def note_frozen(module, args):
            counted["frozen"], bytes_.peak = bytes_.peak, bytes_.live

        hook = model.spa3r.encoder.register_forward_pre_hook(note_frozen)
        output = model(**batch)
        counted["kept"] = bytes_.live
        if backward:
            output.loss.backward()
            counted["peak"] = bytes_.peak
        hook.remove()
    return counted


def count_on_fake_cuda(
    fake: FakeTensorMode, config: Spa3RConfig, views: int, grid: tuple[int, int], checkpointing: bool
) -> dict[str, float]:
    """The forward pass at the real size, under autocast, on fake CUDA tensors without memory."""
    model = on_meta(config)
    model.set_attn_implementation("fused")
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    with fake, WithoutPinning():
        for path, module in model.named_modules():
            for name, p in module._parameters.items():
                if p is not None:
                    dtype = torch.float32 if p.requires_grad or "camera_head" in path else torch.bfloat16
                    tensor = torch.empty(p.shape, device="cuda", dtype=dtype)
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype)
        # `torch.autocast` itself is disabled without CUDA.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            return count(model, inputs(config, views, grid, "cuda"), backward=False)
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)


def total(activations: dict) -> float:
    return max(activations["frozen"], sum(activations["kept"].values()) + activations["work"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    devices = parser.parse_args().devices
    config = released()
    model = on_meta(config)
    parts = {**dict(model.spa3r.named_children()), "semantic_teacher": model.semantic_teacher}
    print(f"{platform.machine()} CPU; torch {torch.__version__}, transformers {transformers.__version__}")
    print("\nParameters (millions), counted on the meta device:")
    for name, part in parts.items():
        kind = "trained" if all(p.requires_grad for p in part.parameters()) else "frozen"
        print(f"  {name:<18}{sum(p.numel() for p in part.parameters()) / 1e6:>8.1f}  {kind}")

    print(f"\nWeights, gradients and optimiser on each device (GiB), {devices} devices where there are several:")
    spread = states(config, devices)
    print("  " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in spread.items()))

    print(
        "\nA step on each device (GiB), by arithmetic; kernels' workspaces, the allocator's gaps, the driver are extra:"
    )
    columns = ("encoder", "decoder", "heads, loss", "targets", "frozen pass", *spread, "one, ckpt.")
    print(f"{'views':>5} {'picture':>10}" + "".join(f"{name:>12}" for name in columns))
    for views in (12, 24, 48):
        for size, grid in SIZES.items():
            plain, sparing = (arithmetic(config, views, grid, True, ckpt) for ckpt in (False, True))
            kept = [plain["kept"][name] for name in columns[:4]] + [plain["frozen"]]
            sums = [state + total(plain) for state in spread.values()] + [spread["one device"] + total(sparing)]
            print(f"{views:>5} {size:>10}" + "".join(f"{value / GIB:>12.1f}" for value in kept + sums))

    print("\nCounted / arithmetic, the forward pass at these sizes on fake CUDA tensors, bfloat16 autocast:")
    print(f"{'views':>5} {'picture':>10} {'checkpointing':>14}{'kept':>8}{'frozen pass':>13}")
    fake = FakeTensorMode()  # one for all: DINOv3 caches its positions
    for views, size in ((12, "518 x 392"), (24, "224 x 224"), (24, "518 x 392"), (48, "518 x 518")):
        for checkpointing in (False, True):
            said = arithmetic(config, views, SIZES[size], True, checkpointing)
            counted = count_on_fake_cuda(fake, config, views, SIZES[size], checkpointing)
            ratios = counted["kept"] / sum(said["kept"].values()), counted["frozen"] / said["frozen"]
            yes = "yes" if checkpointing else "no"
            print(f"{views:>5} {size:>10} {yes:>14}{ratios[0]:>8.2f}{ratios[1]:>13.2f}")

    print("\nCounted / arithmetic, a real step forward and backward on this CPU, a medium size in float32:")
    print(f"{'views':>5} {'picture':>10}{'kept':>8}{'frozen pass':>13}{'peak':>8}")
    small = medium()
    model = Spa3RForPreTraining(small).train()
    model.set_attn_implementation("sdpa")
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    for views, grid in ((12, (8, 8)), (24, (8, 8)), (12, (16, 16))):
        said = arithmetic(small, views, grid, half=False)
        model.zero_grad()
        counted = count(model, inputs(small, views, grid, "cpu"), backward=True)
        kept = sum(said["kept"].values())
        pairs = {"kept": kept, "frozen": said["frozen"], "peak": gradients + kept + said["work"]}
        ratios = [counted[name] / value for name, value in pairs.items()]
        picture = f"{14 * grid[1]} x {14 * grid[0]}"
        print(f"{views:>5} {picture:>10}{ratios[0]:>8.2f}{ratios[1]:>13.2f}{ratios[2]:>8.2f}")


if __name__ == "__main__":
    main()
