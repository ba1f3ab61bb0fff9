"""Step 5 of the rooms recipe: held-out-view metrics on unseen rooms, for every training seed, with the baselines.

Besides the metrics of `spa3r.evaluation.evaluate_field` on all patches, patches that show furniture are scored on their
own: the class whose mean feature is nearest is right or not, among the classes of furniture, wall, floor and ceiling.
"""

import argparse
import platform
from pathlib import Path

import torch
import transformers
from field import KNOWN_ROOMS, FieldViews

from spa3r import Spa3RForPreTraining
from spa3r.evaluation import FieldReport
from spa3r.evaluation.field import TITLES

SUMMARY = {"geometry": "geometry_cosine", "semantic": "semantic_cosine", "objects": "object_accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of trained Spa3RForPreTraining, one per seed, or 'embedded'")
    parser.add_argument("--rooms", type=int, default=300)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--views", type=int, default=8, help="of which half are targets")
    parser.add_argument("--known-rooms", type=int, default=KNOWN_ROOMS, help="for the means of the classes")
    args = parser.parse_args()
    print(about())
    print(f"{args.rooms} unseen rooms of level {args.level}, {args.views} views, half of them targets\n", flush=True)
    views = FieldViews.make(args.rooms, args.views, args.level, args.known_rooms)

    def measure(name: str, cameras: str = "given") -> FieldReport:
        report = views.measure(Spa3RForPreTraining.from_pretrained(name, dtype="float32"), cameras)
        print(f"{Path(name).name}, cameras {cameras}\n{report.table()}\n", flush=True)
        return report

    reports = [measure(name) for name in args.models]
    print(f"cosine, and accuracy on objects, over {len(reports)} training seeds: mean (lowest to highest)")
    for title, key in SUMMARY.items():
        rows = {
            name: [report.rows[name][key].mean for report in reports]
            for name in TITLES
            if key in reports[0].rows.get(name, {})
        }
        rows["gap closed"] = [report.gap_closed[key] for report in reports]
        rows["from the shuffles too"] = [report.gap_closed_from_shuffles[key] for report in reports]
        if "true_features" in rows:
            rows["share of the true"] = [ours / true for ours, true in zip(rows["model"], rows["true_features"])]
        for name, values in rows.items():
            spread = f"({min(values):.3f} to {max(values):.3f})"
            print(f"  {title:<9} {name:<21} {sum(values) / len(values):6.3f} {spread}")
    print()
    measure(args.models[0], "predicted")


def about() -> str:
    """The machine and the versions of a measurement."""
    return (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
