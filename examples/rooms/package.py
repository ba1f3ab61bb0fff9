"""Steps 6 and 11 of the rooms recipe: convert the trained models to checkpoints of the package.

`package.py scores WITH WITHOUT` keeps the overall scores of two runs of `spa3r eval rooms` in the package: a run of the
packaged Spa3-VLM and one of the packaged VLM. `spa3r demo` shows them.

All tensors are stored in half precision, which halves the file; the configuration says float32, so they are loaded as
float32. VGGT's point head is removed, since nothing uses it.
"""

import argparse
import json
from pathlib import Path

import torch

from spa3r import (
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
)
from spa3r.checkpoints import SCORES, SPA3_VLM, SPA3R, VLM
from spa3r.evaluation import EvaluationRun
from spa3r.rooms.demo import DemoScores

FOLDERS = {"spa3r": SPA3R, "spa3_vlm": SPA3_VLM, "vlm": VLM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = "a Spa3RForPreTraining, a Spa3-VLM, one of spatial_source none, or scores"
    parser.add_argument("kind", choices=(*FOLDERS, "scores"), help=kinds)
    parser.add_argument("folders", type=Path, nargs="+", help="the model's folder; for scores those of two runs")
    args = parser.parse_args()
    wanted = 2 if args.kind == "scores" else 1
    if len(args.folders) != wanted:
        parser.error(f"{args.kind}: wanted {wanted} folders, got {len(args.folders)}")
    if args.kind == "scores":
        keep_scores(*map(EvaluationRun.load, args.folders))
        return
    output, (folder,) = FOLDERS[args.kind], args.folders
    if args.kind == "spa3r":
        model = Spa3RForPreTraining.from_pretrained(folder, dtype="float32")
        model.config.semantic_teacher_name_or_path = None  # a folder of the machine that ran this
        model.config.semantic_teacher_config.name_or_path = ""
        processor = Spa3RImageProcessor(size=112)
        strip(model.spa3r)
    else:
        model = Spa3VLMForConditionalGeneration.from_pretrained(folder, dtype="float32")
        model.config.vlm_config.name_or_path = ""
        processor = Spa3VLMProcessor.from_pretrained(folder)
        if model.spa3r is not None:
            strip(model.spa3r)
    model.config.name_or_path = ""
    state = {key: tensor.to(torch.float16) for key, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    processor.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"{output.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size:.2f} MB")


def keep_scores(with_spa3r: EvaluationRun, without_spa3r: EvaluationRun) -> None:
    """Write the scores of two runs, and the hashes of their weights, by which the demo knows whose scores they are."""
    runs = {"with_spa3r": with_spa3r, "without_spa3r": without_spa3r}
    packages = with_spa3r.about["environments"][-1]["packages"]
    kept = {
        "weights_sha256": {name: run.about["model"]["weights_sha256"] for name, run in runs.items()},
        "benchmark": with_spa3r.about["benchmark"],
        "packages": {name: packages[name] for name in ("torch", "transformers")},
        "scores": DemoScores.from_answers(with_spa3r.answers, without_spa3r.answers).to_dict(),
    }
    SCORES.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(f"{SCORES.name}: {DemoScores.from_dict(kept['scores'])}")


def strip(spa3r: Spa3RModel) -> None:
    """Remove the point head, and the name of the folder that the backbone came from."""
    backbone = spa3r.backbone
    backbone.point_head, backbone.config.heads = None, ("camera", "depth")
    backbone.config.name_or_path = spa3r.config.name_or_path = ""
    spa3r.config.backbone_name_or_path = None


if __name__ == "__main__":
    main()
