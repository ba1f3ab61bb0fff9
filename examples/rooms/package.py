"""Steps 6 and 11 of the rooms recipe: what was trained becomes a checkpoint in the package.

All tensors are kept in half precision, which halves the file; the configuration says float32, as which they are loaded.
VGGT's point head stays behind: nothing reads it.
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
        model.config.semantic_teacher_name_or_path = None  # a folder of whoever ran this
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
    """Away with the point head, and with the name of the folder that the backbone came from."""
    backbone = spa3r.backbone
    backbone.point_head, backbone.config.heads = None, ("camera", "depth")
    backbone.config.name_or_path = spa3r.config.name_or_path = ""
    spa3r.config.backbone_name_or_path = None


if __name__ == "__main__":
    main()
