"""Encode views of a room into latents, then decode the feature field of a held-out view.

Without --model it uses the embedded Spa3R, which is trained on rendered rooms.
"""

import argparse

import torch

from spa3r import Spa3RImageProcessor, Spa3RModel
from spa3r.rooms import camera_walk, generate_room, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="embedded", help="folder or hub id of a Spa3R; default: the one in the package"
    )
    parser.add_argument("--views", type=int, default=6, help="views shown to the encoder")
    args = parser.parse_args()

    model, processor = Spa3RModel.from_pretrained(args.model), Spa3RImageProcessor.from_pretrained(args.model)

    room = generate_room(seed=1_000_000)  # never used for training
    photos = list(render(room, camera_walk(room, args.views + 1)).images)
    with torch.no_grad():
        latents = model.encode(**processor(photos[:-1]))  # the last view is held out
        # VGGT processes all views to get the pose of the held-out camera and its features.
        truth = model.backbone(**processor(photos), output_cameras=True)
        height, width = processor(photos)["view_grid_hw"][-1].tolist()
        field = model.decode(latents, truth.extrinsics[-1:], truth.intrinsics[-1:], [[height, width]], [1])

    wanted = truth.tokens[0][-height * width :]  # tokens of the last view end with its patches
    error = 1 - torch.nn.functional.cosine_similarity(field.geometry_features, wanted, dim=-1)
    print(f"{args.views} views -> latents {tuple(latents.shape)}")
    print(f"held-out view: field of {height} x {width} patches, {field.geometry_features.shape[1]} features each")
    print(f"1 - cosine to VGGT's features: {error.mean():.3f}")


if __name__ == "__main__":
    main()
