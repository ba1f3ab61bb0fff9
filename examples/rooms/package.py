"""Step 6 of the rooms recipe: the trained Spa3R, with its backbone and teacher, as the checkpoint in the package.

All tensors are kept in half precision, which halves the file; the configuration says float32, as which they are loaded.
"""

import argparse
from pathlib import Path

import torch

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.checkpoints import EMBEDDED, FOLDERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained Spa3RForPreTraining")
    parser.add_argument("--output", type=Path, default=FOLDERS[EMBEDDED])
    args = parser.parse_args()
    model = Spa3RForPreTraining.from_pretrained(args.model, dtype="float32")
    for part in ("backbone", "semantic_teacher"):
        setattr(model.config, f"{part}_name_or_path", None)
        getattr(model.config, f"{part}_config").name_or_path = ""  # a folder of whoever ran this
    state = {key: tensor.to(torch.float16) for key, tensor in model.state_dict().items()}
    model.save_pretrained(args.output, state_dict=state)
    Spa3RImageProcessor(size=112).save_pretrained(args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir()) / 1e6
    print(f"{args.output.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size:.2f} MB")


if __name__ == "__main__":
    main()
