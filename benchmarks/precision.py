"""bfloat16, int8 and compiled layers against float32: what they change, and the time that they take on a CPU.

Errors of bfloat16 and int8 are those of the embedded model: of the backbone's features, the latents and the VLM's
logits, relative to float32, and the number of answers about rooms that stay the same. Times are CPU time of layers with
VGGT-1B's width on the tokens of two views of 518 x 392, random weights, one thread, alternating in one run; bfloat16 is
timed only where the CPU has instructions for it.

    python benchmarks/precision.py
"""

import argparse
import copy
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, whose time is counted

import torch
from PIL import Image
from torch import Tensor, nn

import spa3r
from spa3r import VggtConfig
from spa3r.models.attention import Segments
from spa3r.models.layers import Float32Module, TransformerLayer, make_layers
from spa3r.models.precision import Int8Linear, cast, compile_layers, cpu_has_bfloat16, cpu_has_vnni, use_int8_layers
from spa3r.rooms import RoomWalk, camera_walk, generate_room, render, room_questions
from spa3r.rooms.embedded import embedded_model
from spa3r.vsi_bench.format import make_prompt

WIDTH, HEADS = 1024, 16
TORCHAO = {
    "torchao int8 weight-only": "Int8WeightOnlyConfig",
    "torchao int8 dynamic": "Int8DynamicActivationInt8WeightConfig",
}
VIEWS, TOKENS = 2, 37 * 28 + 5


def use_torchao(model: nn.Module, config: str) -> None:
    """int8 by torchao, of the layers that ``use_int8_layers`` replaces.

    ``Int8WeightOnlyConfig`` multiplies in floating point; ``Int8DynamicActivationInt8WeightConfig`` quantizes the
    inputs, too, with a scale for each token.
    """
    from torchao import quantization

    exact = {layer for part in model.modules() if isinstance(part, Float32Module) for layer in part.modules()}
    layers = [part for part in model.modules() if isinstance(part, TransformerLayer) and part not in exact]
    linear = {part for layer in layers for part in layer.modules() if type(part) is nn.Linear}
    quantization.quantize_(model, getattr(quantization, config)(), filter_fn=lambda module, _: module in linear)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted).norm() / wanted.norm()).item()


def cpu_time() -> float:
    """Seconds of this process and of those that it waited for, such as compilers."""
    return sum(os.times()[:4])


def errors(num_rooms: int, with_torchao: bool) -> None:
    reference, processor = embedded_model()
    ways: dict[str, Callable] = {
        "bfloat16, all parts": lambda model: cast(model, torch.bfloat16),
        "int8 backbone": lambda model: use_int8_layers(model.spa3r.backbone),
    }
    if with_torchao:
        ways["torchao int8 weight-only backbone"] = lambda model: use_torchao(
            model.spa3r.backbone, "Int8WeightOnlyConfig"
        )
        ways["torchao int8 dynamic backbone"] = lambda model: use_torchao(
            model.spa3r.backbone, "Int8DynamicActivationInt8WeightConfig"
        )
    places = []
    for seed in range(9_000, 9_000 + num_rooms):
        room = generate_room(seed=seed)
        cameras = camera_walk(room, 4)
        rows = room_questions(RoomWalk.from_cameras(room, cameras), per_type=1)
        questions = [make_prompt(row) for row in rows][:6]
        places.append(([Image.fromarray(image) for image in render(room, cameras).images], questions))
    views = [processor.view_image_processor(images) for images, _ in places]
    content = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": q[0]}],
            }
        ]
        for images, q in places
    ]
    prompts = [
        processor.apply_chat_template(each, tokenize=True, return_dict=True, add_generation_prompt=True)
        for each in content
    ]

    def outputs(model: spa3r.Spa3VLM) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        with torch.no_grad():  # torchao's tensors don't take inference mode
            features = [model.spa3r.backbone(**inputs, output_layers=(-1,)).tokens[0].flatten() for inputs in views]
            latents = [model.spa3r.encode(**inputs).flatten() for inputs in views]
            logits = [model(**inputs).logits.flatten() for inputs in prompts]
            answers = [
                answer
                for images, questions in places
                for answer in model.ask(model.encode_scene(processor, images), questions, max_new_tokens=8)
            ]
        return torch.cat(features).float(), torch.cat(latents).float(), torch.cat(logits).float(), answers

    wanted = outputs(reference)
    print(f"\n| embedded model, {len(places)} rooms of 4 views | features | latents | logits | same answers |")
    print("|---|---|---|---|---|")
    for name, change in ways.items():
        model = copy.deepcopy(reference)
        change(model)
        *got, answers = outputs(model)
        parts = " | ".join(f"{relative_error(part, each):.1e}" for part, each in zip(got, wanted))
        same = sum(one == other for one, other in zip(answers, wanted[3]))
        print(f"| {name} | {parts} | {same} of {len(answers)} |", flush=True)


def times(layers: int, repeats: int, with_torchao: bool) -> None:
    torch.manual_seed(0)
    config = VggtConfig()
    config._attn_implementation = "sdpa"
    stack = make_layers(layers, config, WIDTH, HEADS, 4, 1e-5, qk_norm="layer_norm", layer_scale=0.01).eval()
    tokens = torch.randn(VIEWS * TOKENS, WIDTH)
    kinds = [Segments.within([TOKENS] * VIEWS), Segments.within([VIEWS * TOKENS])]  # of frame and global layers

    def run(stack: nn.ModuleList) -> Tensor:
        hidden = tokens.to(next(parameter.dtype for parameter in stack.parameters() if parameter.is_floating_point()))
        for index, layer in enumerate(stack):
            hidden = layer(hidden, kinds[index % 2])
        return hidden.float()

    ways: dict[str, Callable] = {"int8 layers": use_int8_layers}
    if cpu_has_bfloat16():
        ways["bfloat16"] = lambda model: model.to(torch.bfloat16)
    if with_torchao:
        ways["torchao int8 weight-only"] = lambda model: use_torchao(model, "Int8WeightOnlyConfig")
    ways["compiled layers"] = compile_layers
    with torch.inference_mode():
        print(f"\n| {layers} layers, {VIEWS} views | float32, s | it, s | float32 / it | first call, s | error |")
        print("|---|---|---|---|---|---|")
        for name, change in ways.items():
            changed = copy.deepcopy(stack)
            change(changed)
            start = cpu_time()
            got = run(changed)
            first = cpu_time() - start
            error = relative_error(got - tokens, run(stack) - tokens)
            taken: list[list[float]] = [[], []]
            for _ in range(repeats):
                for each, seconds in zip((stack, changed), taken):
                    start = time.process_time()
                    run(each)
                    seconds.append(time.process_time() - start)
            plain, own = map(statistics.median, taken)
            print(f"| {name} | {plain:.2f} | {own:.2f} | {plain / own:.2f} | {first:.0f} | {error:.1e} |", flush=True)

        linear = nn.Linear(WIDTH, 4 * WIDTH)
        both = {"float32": linear, "int8": Int8Linear(linear)}
        rates: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(2 * repeats):
            for name, each in both.items():
                start = time.process_time()
                each(tokens)
                rates[name].append(2 * tokens.numel() * 4 * WIDTH / (time.process_time() - start) / 1e9)
        best = {name: max(values) for name, values in rates.items()}
        print(
            f"\nOne product of {len(tokens)} x {WIDTH} x {4 * WIDTH}: float32 {best['float32']:.0f}, int8 "
            f"{best['int8']:.0f} billion operations a second, {best['int8'] / best['float32']:.2f} times as many. No "
            "stack of int8 layers can gain more than that on this CPU."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, default=8, help="0: no errors")
    parser.add_argument("--layers", type=int, default=2, help="0: no times")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with_torchao = importlib.util.find_spec("torchao") is not None
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()}, {cpu}, bfloat16 instructions: {cpu_has_bfloat16()}, VNNI: {cpu_has_vnni()}, 1 thread")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, spa3r {spa3r.__version__}")
    if args.layers:
        times(args.layers, args.repeats, with_torchao)
    if args.rooms:
        errors(args.rooms, with_torchao)


if __name__ == "__main__":
    main()
