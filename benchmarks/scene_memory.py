"""Memory of scenes at the released sizes, counted without data: against the plain formulation, and up to 1 000 views.

Tensors are counted, without workspaces of kernels and gaps of the allocator. `reference` is `benchmarks/reference.py`:
the features of all layers are kept, and masking is a matrix. The counts of the first table are those of a CPU, of the
second those of a GPU, which takes more tokens at a time. Weights and the input count in the second table only.

    python benchmarks/scene_memory.py
"""

import argparse

import torch
from common import GIB, exponent, machine, report
from encode import counted, make_config, noise, on_meta, ours_asymmetric, plain_asymmetric
from reference import encode

from spa3r.models import layers
from spa3r.models.cost import scene_cost

VIEWS = (8, 32, 100, 200, 300, 1000)


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(machine())
    model = on_meta(make_config(None, None), torch.float32)
    grid, on_gpu = (28, 37), layers.CHUNK_BYTES
    layers.CHUNK_BYTES = layers.CPU_CHUNK_BYTES
    rows = []
    for name, views, ours, plain in (
        ("encode", 8, lambda x: model.encode(x, [grid] * 8, [8]), lambda x: encode(model, x, 8, grid)),
        (
            "asymmetric aggregation",
            12,
            lambda x: ours_asymmetric(model, x, grid, 12),
            lambda x: plain_asymmetric(model, x, grid, 12),
        ),
    ):
        pixels = noise(model, views, grid, "meta")
        peak, reference = counted(lambda: ours(pixels), model), counted(lambda: plain(pixels), model)  # noqa: B023
        rows.append(
            {"": name, "views": views, "spa3r GiB": peak, "reference GiB": reference, "ratio": peak / reference}
        )
    report("above weights and input, 518x392, float32, all layers", rows)

    layers.CHUNK_BYTES = on_gpu
    model, rows = on_meta(make_config(None, None), torch.bfloat16), []
    for views in VIEWS:
        cost = scene_cost(model, views, (24, 37))
        rows.append(
            {
                "views": views,
                "tokens": cost.tokens,
                "operations (10^12)": cost.operations / 1e12,
                "weights GiB": cost.weights / GIB,
                "all else GiB": cost.activations / GIB,
                "GiB": cost.memory / GIB,
            }
        )
    report("encode, 518x336, bfloat16, all layers", rows)
    fits = {key: exponent(VIEWS[1:], [row[key] for row in rows[1:]]) for key in ("operations (10^12)", "all else GiB")}
    print("exponents over views from 32: " + ", ".join(f"{key} {value:.2f}" for key, value in fits.items()))


if __name__ == "__main__":
    main()
