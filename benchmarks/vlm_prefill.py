"""The first token of a Spa3-VLM about pictures: views, latents and the prompt's pass, against the plain formulation.

``reference`` is ``benchmarks/reference.py`` with the same weights: plain encoding, plain cross-attention, and logits of
every token of the prompt. The library computes those of the last one only. Both run the VLM of transformers. The widths
are those of Qwen2.5-VL-3B, VGGT-1B and Spa3R, in float32 with random weights. The floor is the number of operations,
counted in a run of the library, over the measured rate of a matrix product.

    python benchmarks/vlm_prefill.py --layers 1     # one layer of each stack, at the full width
    python benchmarks/vlm_prefill.py --tiny         # the embedded model, as a smoke test
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import GIB, machine, matrix_rate, measure_in_turn, report
from PIL import Image
from real_size import released_vlm
from reference import prefill
from torch.utils.flop_counter import FlopCounterMode

from spa3r import Spa3VLM, Spa3VLMProcessor
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model


def prompt(processor: Spa3VLMProcessor, views: int, size: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    """A question about rendered pictures."""
    room = generate_room(seed=0, level=2)
    pictures = render(room, camera_walk(room, views, size=size[::-1])).images
    content = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures]
    content.append({"type": "text", "text": "How far is the sofa from the door?"})
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True).to(
        device
    )


def ours(model: Spa3VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:  # -> (1, 1, vocabulary)
    return model(**inputs, logits_to_keep=1, use_cache=True).logits


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", default="518x392", help="width x height of a picture")
    parser.add_argument("--layers", type=int, help="layers of each stack; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the embedded model, on any device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, processor = embedded_model() if args.tiny else released_vlm(device, args.layers, torch.float32)
    model = model.to(device)
    if not args.tiny:
        model.adapter.bottleneck.fc2.weight.normal_(std=0.02)  # a new adapter is the identity
    second = "wall" if device == "cuda" else "cpu"
    rate = matrix_rate(device, torch.float32)
    depth = "the embedded model" if args.tiny else f"{args.layers} of all layers" if args.layers else "all layers"
    print(machine(device))
    print(f"matrix product: {rate / 1e9:.0f} billion operations a {'CPU ' if device == 'cpu' else ''}second")
    rows = []
    for views in args.views:
        inputs = prompt(processor, views, tuple(map(int, args.size.split("x"))), device)
        calls = {"reference": lambda: prefill(model, inputs), "spa3r": lambda: ours(model, inputs)}  # noqa: B023
        runs = measure_in_turn(calls, args.repeats, device)
        with FlopCounterMode(display=False) as count:
            ours(model, inputs)
        plain, own = runs["reference"], runs["spa3r"]
        wanted, got = plain.result[:, -1], own.result[:, -1]
        floor = count.get_total_flops() / rate
        time = own.median(second)
        rows.append(
            {
                "views": views,
                "prompt tokens": inputs["input_ids"].shape[1],
                "s": time,
                "wall s": own.median("wall"),
                "peak GiB": own.median("peak") / GIB,
                "reference s": plain.median(second),
                "its peak GiB": plain.median("peak") / GIB,
                "time ratio": time / plain.median(second),
                "peak ratio": own.median("peak") / plain.median("peak"),
                "error": ((got - wanted).norm() / wanted.norm()).item(),
                "time / floor": time / floor,
            }
        )
        print(f"  {views} views done", flush=True)
    report(f"first token of a Spa3-VLM, pictures of {args.size}, float32, {depth}", rows, args.json)


if __name__ == "__main__":
    main()
