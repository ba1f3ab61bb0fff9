"""The paper's comparisons of pretraining, by the fields of held-out views: one row for each arm of `train_spa3r.py`.

All arms were trained alike from the same frozen VGGT and teacher. The table has the mean over the seeds and the lowest
and highest value; the steps are those of all stages, from the logs. A second table compares the losses of training at
the same steps, since some arms take more of them in the same time. "Gap closed" is measured from the best of the four
baselines to perfect prediction, in percent; "objects right": furniture patches with the right nearest class mean.

Results of a model are kept in its folder (`field-ROOMS.json`), so the program can be stopped and started again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from evaluate import about
from field import KNOWN_ROOMS, FieldViews
from train_spa3r import ARMS, SIZES, STAGES

from spa3r import Spa3RForPreTraining
from spa3r.tables import Table

TITLES = {
    "both": "the method: both targets, mask 50 %, PRoPE",
    "geometry": "geometry alone",
    "semantic": "semantics alone",
    "mask25": "mask 25 %",
    "mask75": "mask 75 %",
    "pluecker": "Plücker rays",
}
COLUMNS = {
    "geometry gap closed ↑": ("gap_closed_from_shuffles", "geometry_cosine", 100, ".1f"),
    "semantic gap closed ↑": ("gap_closed_from_shuffles", "semantic_cosine", 100, ".1f"),
    "depth error ↓": ("model", "depth_error", 1, ".4f"),
    "objects right ↑": ("model", "object_accuracy", 100, ".1f"),
}

LOSSES = {"geometry, 1 - cosine": "geometry_cosine", "semantic, 1 - cosine": "semantic_cosine", "depth": "depth_probe"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of spa3r-SIZE-ARM-SEED")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rooms", type=int, default=100)
    parser.add_argument("--known-rooms", type=int, default=KNOWN_ROOMS, help="for the means of the classes")
    args = parser.parse_args()
    folders = {arm: sorted(args.run.glob(f"spa3r-{args.size}-{arm}-[0-9]")) for arm in ARMS}
    print(f"{about()}; {args.rooms} unseen rooms of level 0, 8 views, half of them targets\n", flush=True)
    views = None
    measured: dict[str, list[dict[str, Any]]] = {}
    for arm, seeds in folders.items():
        for folder in seeds:
            file = folder / f"field-{args.rooms}.json"
            if not is_newer(file, folder / "model.safetensors"):
                views = views or FieldViews.make(args.rooms, known_rooms=args.known_rooms)
                model = Spa3RForPreTraining.from_pretrained(folder, dtype="float32")
                file.write_text(json.dumps(views.measure(model).to_dict()))
                print(f"{folder.name} is measured", file=sys.stderr, flush=True)
            measured.setdefault(arm, []).append(json.loads(file.read_text()) | {"steps": steps(folder)})
    rows = [row(TITLES[arm], reports) for arm, reports in measured.items()]
    for report in [reports[0] for reports in measured.values()]:
        if ceiling := report["rows"].get("true_features"):
            rows.append(["true features", "", "", "", "", "", f"{100 * ceiling['object_accuracy']['mean']:.1f}"])
            break
    print(Table(["arm", "seeds", "steps", *COLUMNS], rows))
    logs = {arm: [log_of(folder) for folder in seeds] for arm, seeds in folders.items() if seeds}
    for step in common_steps(logs):
        print(f"\nlosses of training at step {step[1]} of the stage {step[0]!r}, means over seeds\n")
        print(Table(["arm", *LOSSES], [losses_row(TITLES[arm], rows, step) for arm, rows in logs.items()]))


def log_of(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The log of a training by stage and step."""
    lines = [(name, line) for name, *_ in STAGES for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {(name, row["step"]): row for name, line in lines for row in [json.loads(line)]}


def common_steps(logs: dict[str, list[dict[tuple[str, int], Any]]]) -> list[tuple[str, int]]:
    """Of the later stages the first and the last step that the logs of all trainings have."""
    common = set.intersection(*(set(log) for rows in logs.values() for log in rows))
    found = [sorted(step for step in common if step[0] == name) for name, *_ in STAGES[1:]]
    return [step for steps in found for step in dict.fromkeys(steps[:1] + steps[-1:])]


def losses_row(title: str, logs: list[dict[tuple[str, int], dict[str, float]]], step: tuple[str, int]) -> list[str]:
    """The cells of an arm at a step."""
    cells = [title]
    for loss in LOSSES.values():
        values = [log[step][loss] for log in logs if loss in log[step]]
        cells.append(f"{sum(values) / len(values):.4f}" if values else "–")
    return cells


def steps(folder: Path) -> int:
    """Steps of all stages of a training."""
    return sum(json.loads((folder / f"{name}.jsonl").read_text().splitlines()[-1])["step"] for name, *_ in STAGES)


def is_newer(file: Path, other: Path) -> bool:
    """Whether a file exists and was written after another."""
    return file.exists() and file.stat().st_mtime > other.stat().st_mtime


def row(title: str, reports: list[dict[str, Any]]) -> list[str]:
    """The cells of an arm."""
    trained = [report["steps"] for report in reports]
    cells = [title, str(len(reports)), f"{min(trained)} to {max(trained)}"]
    for part, metric, factor, form in COLUMNS.values():
        found = [
            report["rows"][part].get(metric) if part == "model" else report[part].get(metric) for report in reports
        ]
        values = [
            factor * (value["mean"] if isinstance(value, dict) else value) for value in found if value is not None
        ]
        spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):{form}}{spread}" if values else "not trained")
    return cells


if __name__ == "__main__":
    main()
