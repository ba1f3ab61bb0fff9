"""Steps 6 and 11 of the rooms recipe: convert the trained models to checkpoints of the package.

All tensors are stored in half precision, which halves the file; the configuration says float32, so they are loaded as
float32. VGGT's point head is removed, since nothing uses it.
"""

import argparse
from pathlib import Path

import torch

from spa3r import (
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLMForConditionalGeneration,
    Spa3VLMProcessor,
)
from spa3r.checkpoints import SPA3_VLM, SPA3R, VLM

FOLDERS = {"spa3r": SPA3R, "spa3_vlm": SPA3_VLM, "vlm": VLM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kind", choices=FOLDERS, help="a Spa3RForPreTraining, a Spa3-VLM, or one of spatial_source none"
    )
    parser.add_argument("model", type=Path, help="its folder")
    args = parser.parse_args()
    output = FOLDERS[args.kind]
    if args.kind == "spa3r":
        model = Spa3RForPreTraining.from_pretrained(args.model, dtype="float32")
        model.config.semantic_teacher_name_or_path = None  # a folder of the machine that ran this
        model.config.semantic_teacher_config.name_or_path = ""
        processor = Spa3RImageProcessor(size=112)
        strip(model.spa3r)
    else:
        model = Spa3VLMForConditionalGeneration.from_pretrained(args.model, dtype="float32")
        model.config.vlm_config.name_or_path = ""
        processor = Spa3VLMProcessor.from_pretrained(args.model)
        if model.spa3r is not None:
            strip(model.spa3r)
    model.config.name_or_path = ""
    state = {key: tensor.to(torch.float16) for key, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    processor.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / 1e6
    print(f"{output.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size:.2f} MB")


def strip(spa3r: Spa3RModel) -> None:
    """Remove the point head, and the name of the folder that the backbone came from."""
    backbone = spa3r.backbone
    backbone.point_head, backbone.config.heads = None, ("camera", "depth")
    backbone.config.name_or_path = spa3r.config.name_or_path = ""
    spa3r.config.backbone_name_or_path = None


if __name__ == "__main__":
    main()
