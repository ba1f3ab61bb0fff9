"""Step 5 of the rooms recipe: held-out-view metrics on unseen rooms, for every training seed, with the baselines."""

import argparse
import platform
from pathlib import Path

import torch
import transformers
from common import FIRST_HELD_OUT

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.data import SceneBatches
from spa3r.evaluation import FieldReport, evaluate_field
from spa3r.rooms.scenes import RoomScenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", type=Path, nargs="+", help="folders of trained Spa3RForPreTraining, one for each seed"
    )
    parser.add_argument("--rooms", type=int, default=300)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--views", type=int, default=8, help="of which half are targets")
    args = parser.parse_args()
    print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    print(f"{args.rooms} unseen rooms of level {args.level}, {args.views} views, half of them targets\n")

    def measure(folder: Path, cameras: str) -> FieldReport:
        rooms = RoomScenes(args.level, first_seed=FIRST_HELD_OUT + 1000, num_rooms=args.rooms, stride=(2, 2))
        processor = Spa3RImageProcessor(size=112)
        batches = SceneBatches(
            rooms, processor, views=(args.views,) * 2, pictures_per_batch=args.views, cameras=cameras, seed=0
        )
        report = evaluate_field(Spa3RForPreTraining.from_pretrained(folder, dtype="float32"), batches)
        print(f"{folder.name}, cameras {cameras}\n{report.table()}\n", flush=True)
        return report

    reports = [measure(folder, "given") for folder in args.models]
    print(f"cosine over {len(reports)} training seeds: mean (lowest to highest)")
    for target in ("geometry", "semantic"):
        key = f"{target}_cosine"
        rows = {name: [report.rows[name][key].mean for report in reports] for name in reports[0].rows}
        rows["gap closed"] = [report.gap_closed[key] for report in reports]
        rows["from the shuffles too"] = [report.gap_closed_from_shuffles[key] for report in reports]
        for name, values in rows.items():
            spread = f"({min(values):.3f} to {max(values):.3f})"
            print(f"  {target:<9} {name:<21} {sum(values) / len(values):6.3f} {spread}")
    print()
    measure(args.models[0], "predicted")


if __name__ == "__main__":
    main()
