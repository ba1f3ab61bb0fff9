"""What the approximations of global attention cost: errors and answers on rendered rooms, operations at full size.

The embedded Spa3R and Spa3-VLM see unseen rooms with 8, 16, 32 and 64 views of one walk each. All errors are relative
to full attention, ||approximate - full|| / ||full||, means over the rooms. The speed is CPU time of the backbone on one
thread, full attention and the others in turn. Operations are counted by formula for VGGT-1B.

    python benchmarks/global_attention.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import defaultdict

import torch
import transformers
from PIL import Image

from spa3r import VggtConfig
from spa3r.answering.engine import AnsweringEngine
from spa3r.evaluation import evaluate_field
from spa3r.models.packing import ViewLayout
from spa3r.rooms import RoomWalk, camera_walk, generate_room, render, room_questions
from spa3r.rooms.embedded import embedded_model, embedded_spa3r
from spa3r.rooms.instructions import FIRST_TEST_SEED
from spa3r.vsi_bench.format import make_prompt
from spa3r.vsi_bench.scoring import aggregate, score_prediction

LONGEST = 64
MERGED, SUBSETS = (0.5, 0.75, 0.9), (8, 4)
FULL_SIZE, FULL_SIZE_SUBSETS = (336, 518), (64, 32, 16)
FULL_SIZE_VIEWS = (32, 100, 200, 300, 1000)


def choices(views: int, subsets: tuple[int, ...]) -> dict[str, dict]:
    rows = {"full": {"global_attention": "full"}}
    rows |= {f"merged {r}": {"global_attention": "merged", "global_merge_ratio": r} for r in MERGED}
    return rows | {f"subset {k}": {"global_attention": "subset", "global_num_views": k} for k in subsets if k < views}


def choose(model, fields: dict) -> None:
    for name, value in fields.items():
        setattr(model.backbone.config, name, value)


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def operations(config: VggtConfig, views: int, fields: dict, grid: tuple[int, int]) -> tuple[float, float]:
    """Floating-point operations (2 for a multiplication and an addition) of the backbone: all, and of attention across
    views alone. Norms, softmax and projections of pixels are left out; they are below one percent."""
    width, layers = config.hidden_size, config.num_hidden_layers
    patches = grid[0] * grid[1]
    special = 1 + config.num_register_tokens
    tokens, queries = patches + special, views * (patches + special)
    dense = 2 * (4 + 2 * config.mlp_ratio) * width**2 * queries * (config.patch_embedding_num_layers + 2 * layers)
    frame = 4 * width * tokens * queries * (config.patch_embedding_num_layers + layers)
    keys, wider, matching = queries, 1.0, 0.0
    head_dim = width // config.num_attention_heads
    if fields["global_attention"] == "merged":
        merged = int(fields["global_merge_ratio"] * patches * (views - 1))
        keys, wider = queries - merged, (head_dim + 8) / head_dim
        matching = 2 * merged * keys * head_dim
    elif fields["global_attention"] == "subset":
        keys = min(views, fields["global_num_views"]) * tokens
    across = layers * (4 * width * wider * queries * keys + matching)
    return dense + frame + across, across


def print_operations() -> None:
    """The table of operations at full size."""
    config = VggtConfig()
    height, width = FULL_SIZE
    grid = (height // config.patch_size, width // config.patch_size)
    print(f"VGGT-1B, views of {width} x {height}: operations of the backbone by formula, in 10^15; in brackets the")
    print("share of attention across views; then how many times fewer operations than full attention\n")
    names = list(choices(max(FULL_SIZE_VIEWS), FULL_SIZE_SUBSETS))
    print(f"| views | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for views in FULL_SIZE_VIEWS:
        cells, full = [], 0.0
        for name, fields in choices(10**9, FULL_SIZE_SUBSETS).items():
            total, across = operations(config, views, fields, grid)
            full = total if name == "full" else full
            fewer = "" if total == full else f", {full / total:.1f} x"
            cells.append(f"{total / 1e15:.3g} ({100 * across / total:.0f} %){fewer}")
        print(f"| {views} | {' | '.join(cells)} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, default=3)
    parser.add_argument("--views", type=int, nargs="+", default=(8, 16, 32, 64))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    print(f"{platform.machine()} CPU, one thread; torch {torch.__version__}, transformers {transformers.__version__}\n")
    print_operations()
    pretrained, image_processor = embedded_spa3r()
    spa3r = pretrained.spa3r
    vlm, processor = embedded_model()
    engine = AnsweringEngine(vlm, processor)
    print(f"embedded Spa3R and Spa3-VLM in float32; {args.rooms} unseen rooms of level 0, views of 112 x 112\n")
    print(
        "| views | attention | speed | features | latents | field | gap closed | score | same answers |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for views in args.views:
        rooms, batches = [], []
        for seed in range(FIRST_TEST_SEED + 500, FIRST_TEST_SEED + 500 + args.rooms):
            room = generate_room(seed)
            cameras = camera_walk(room, LONGEST)[:: LONGEST // views]
            pictures = [Image.fromarray(image) for image in render(room, cameras).images]
            inputs = image_processor([pictures], return_tensors="pt")
            questions = room_questions(RoomWalk.from_cameras(room, cameras), 0)
            rooms.append((inputs, pictures, questions))
            batches.append({**inputs, "target_mask": [view % 2 == 1 for view in range(views)]})
        seconds, results, asked = defaultdict(list), defaultdict(list), 0
        rows = choices(views, SUBSETS)
        for inputs, _, _ in rooms:
            layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
            for name, fields in rows.items():
                choose(spa3r, fields)
                start = time.process_time()
                features = spa3r.backbone_features(**inputs)
                seconds[name].append(time.process_time() - start)
                if name == "full":
                    cameras = spa3r.backbone(**inputs, output_cameras=True).cameras
                latents = spa3r.encoder(features, layout)
                field = spa3r.decode(latents, *cameras, inputs["view_grid_hw"], inputs["views_per_scene"])
                results[name].append((features, latents, field.geometry_features))
        for name, fields in rows.items():
            choose(spa3r, fields)
            choose(vlm.spa3r, fields)
            gap = evaluate_field(pretrained, batches).gap_closed["geometry_cosine"]
            answers, scores = [], []
            for _, pictures, questions in rooms:
                own = engine.ask(engine.encode(pictures), [make_prompt(row) for row in questions], max_new_tokens=16)
                answers += own
                scores += [
                    {**row, "score": score_prediction(row, answer)} for row, answer in zip(questions, own, strict=True)
                ]
            if name == "full":
                exact, asked = answers, len(answers)
            errors = [
                mean([error(ours[part], full[part]) for ours, full in zip(results[name], results["full"])])
                for part in range(3)
            ]
            speed = statistics.median(seconds["full"]) / statistics.median(seconds[name])
            same = sum(a == b for a, b in zip(answers, exact)) / asked
            print(
                f"| {views} | {name} | {speed:.2f} | {' | '.join(f'{value:.4f}' for value in errors)} | {gap:.3f} "
                f"| {aggregate(scores)['overall']:.1f} | {100 * same:.0f} % of {asked} |",
                flush=True,
            )
    print(
        "\nspeed: of the backbone, full = 1. features: the backbone's, which the encoder reads. field: geometry\n"
        "features decoded from the latents. gap closed: geometry cosine of evaluate_field, every other view a target;\n"
        "its targets and baselines are computed with the same attention, so it tells whether the field still predicts\n"
        "them, not how far they moved. score: of VSI-Bench, overall, in percent. same answers: as with full attention."
    )


if __name__ == "__main__":
    main()
