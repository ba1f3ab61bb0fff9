"""The same number of latents for more views: what 8, 16 and 32 context views give, and what they cost.

The views of a room are steps of one walk, the fewer among the more; four other steps are targets. The table has the
number of VGGT's patch tokens and of Spa3R's latents, the CPU time of one encoding (VGGT, then Spa3R's encoder),
and the field of the targets: Spa3R's, and VGGT's own features of the nearest context view, which come closer as views
grow.
"""

import argparse
import time

import numpy as np
import torch
from common import FIRST_HELD_OUT, RenderedRooms
from evaluate import about
from field import KNOWN_ROOMS, class_means, known_views, make_batch

from spa3r import Spa3RForPreTraining
from spa3r.evaluation import FieldReport, evaluate_field
from spa3r.rooms.walk import WALK_STEPS
from spa3r.tables import Table

TARGETS = np.array([4, 16, 28, 40])
CONTEXT = {
    8: np.arange(0, WALK_STEPS, 6),
    16: np.arange(0, WALK_STEPS, 3),
    32: np.array([step for step in range(WALK_STEPS) if step % 3 != 1]),
}
"""Number of context views, and their steps of the walk."""

COLUMNS = ("geometry_cosine", "semantic_cosine", "object_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of trained Spa3RForPreTraining, one per seed, or 'embedded'")
    parser.add_argument("--rooms", type=int, default=30)
    parser.add_argument("--known-rooms", type=int, default=KNOWN_ROOMS, help="for the means of the classes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{about()}; {args.rooms} unseen rooms of level 0, {len(TARGETS)} targets in each; {len(args.models)} seeds, "
          "mean (lowest to highest)\n", flush=True)  # fmt: skip
    rooms = RenderedRooms.render(FIRST_HELD_OUT + 1000, args.rooms, steps=range(WALK_STEPS))
    known = known_views(args.known_rooms)
    reports: dict[int, list[FieldReport]] = {count: [] for count in CONTEXT}
    seconds: dict[int, tuple[float, float]] = {}
    for name in args.models:
        model = Spa3RForPreTraining.from_pretrained(name, dtype="float32")
        means = class_means(known, model)
        for count, context in CONTEXT.items():
            batches = [make_batch(rooms, room, context, TARGETS) for room in range(args.rooms)]
            reports[count].append(evaluate_field(model, batches, class_means=means))
            seconds.setdefault(count, encoding_seconds(model, rooms, context))
    latents, width = model.config.num_latents, model.config.hidden_size
    patches, geometry = (rooms.images.shape[2] // 14) ** 2, model.config.geometry_hidden_size
    rows = []
    for count, found in reports.items():
        backbone, encoder = seconds[count]
        for title, predictor, tokens, size, time_of in (
            ("VGGT's tokens, nearest view", "nearest_view", count * patches, geometry, backbone),
            ("Spa3R's latents", "model", latents, width, backbone + encoder),
        ):
            cells = [spread([report.rows[predictor][metric].mean for report in found]) for metric in COLUMNS]
            rows.append([str(count), title, f"{tokens} x {size}", f"{time_of:.2f} s", *cells])
    titles = [f"{name.replace('_', ' ')} ↑" for name in COLUMNS]
    print(Table(["views", "", "tokens", "CPU time to encode", *titles], rows))


@torch.no_grad()
def encoding_seconds(model: Spa3RForPreTraining, rooms: RenderedRooms, context: np.ndarray) -> tuple[float, float]:
    """CPU seconds of VGGT and of Spa3R's encoder for the views of a room: medians of three."""
    inputs = make_batch(rooms, 0, context, TARGETS[:0])
    layout = [inputs[name] for name in ("view_pixel_values", "view_grid_hw", "views_per_scene")]
    backbone, whole = [], []
    for _ in range(3):
        begun = time.process_time()
        model.spa3r.backbone_features(*layout)
        between = time.process_time()
        model.spa3r.encode(*layout)
        backbone.append(between - begun)
        whole.append(time.process_time() - between)
    seconds = float(np.median(backbone))
    return seconds, max(0.0, float(np.median(whole)) - seconds)


def spread(values: list[float]) -> str:
    """The mean, and the lowest and highest value of several."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
