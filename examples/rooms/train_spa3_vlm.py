"""Step 9 of the rooms recipe: combine the small VLM of step 8 and the packaged Spa3R into a Spa3-VLM.

Vision tower, Spa3R and the first `LOOKING` layers are frozen. The adapter learns to encode the position of the object
that an image token shows. It is then frozen while the other layers learn; an adapter that appends tokens learns with
them. `spa3r finetune` trains with any data; here every room is asked about many times, so each is encoded once, before
training.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import FIRST_HELD_OUT, pack, reduced_precision, train
from conversations import BACK, FRAMES, WALKS, Conversations
from questions import CODE_WIDTH, Questions, answer_loss, calculating, place_code
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spa3r import Spa3RImageProcessor, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.checkpoints import EMBEDDED, VLM
from spa3r.evaluation import evaluate_answers, score_table
from spa3r.models.spa3r.modeling_spa3r import Spa3RModel
from spa3r.rooms.embedded import VIEW_SIZE, embedded_spa3r
from spa3r.rooms.instructions import RoomQuestions


@torch.no_grad()
def encode_rooms(spa3r: Spa3RModel, source: str, pictures: Iterator[np.ndarray]) -> Tensor:
    """(rooms, tokens, width) float16: the output of Spa3R, or of its VGGT, for every room's pictures."""
    encode = spa3r.encode if source == "spa3r" else spa3r.backbone_features
    encoded = []
    while rooms := list(islice(pictures, 10)):
        with reduced_precision():
            tokens = encode(*pack(np.stack(rooms)).values())
        encoded.append(tokens.reshape(len(rooms), -1, tokens.shape[-1]).half())
        if len(encoded) % 50 == 0:
            print(f"{10 * len(encoded)} rooms encoded", flush=True)
    return torch.cat(encoded)


def remember(model: Spa3VLMForConditionalGeneration, seen: Tensor, encoded: Tensor | None) -> None:
    """Replace the frozen encoders by their stored outputs for every room; pixels are room numbers from now on."""

    def get_image_features(pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        tokens = seen[pixel_values].float().unflatten(1, (FRAMES, -1)).flatten(0, 1)
        return BaseModelOutputWithPooling(pooler_output=tuple(tokens))

    def encode(view_pixel_values: Tensor, *layout) -> Tensor:
        return encoded[view_pixel_values].float()

    def backbone_features(view_pixel_values: Tensor, *layout) -> Tensor:
        return encoded[view_pixel_values].float().flatten(0, 1)

    model.vlm.base_model.get_image_features = get_image_features
    if model.spa3r is not None:
        model.spa3r._encode, model.spa3r._backbone_features = encode, backbone_features


def forget(model: Spa3VLMForConditionalGeneration) -> None:
    """Restore the encoders."""
    del model.vlm.base_model.get_image_features
    if model.spa3r is not None:
        del model.spa3r._encode, model.spa3r._backbone_features


def align(model: Spa3VLMForConditionalGeneration, folder: Path, args: argparse.Namespace) -> None:
    """Train only the adapter: it adds the position code of the object that an image token shows to the token.

    It learns from two walks in each room. The last fiftieth of the rooms is held out.

    Args:
        model: The model, whose adapter is trained.
        folder: Folder of the outputs of the frozen parts for the walks.
        args: Arguments of the program.
    """
    names = {"seen": "seen", "encoded": f"encoded_by_{args.spatial_source}"}
    walks = [{key: load_file(folder / f"{name}{walk}.safetensors")["made"] for key, name in names.items()}
             | load_file(folder / f"cells{walk}.safetensors") for walk in WALKS]  # fmt: skip
    rooms = len(walks[0]["seen"])
    known = rooms - max(1, rooms // 50)
    made = {key: torch.cat([walk[key] for walk in walks]) for key in ("seen", "encoded", "places", "is_clear")}
    del walks
    # Waves of 3 m are too short for what most latents encode; right and ahead themselves matter most.
    weights = torch.tensor([3.0] * 2 + [0.1, 0.5, 1.0, 1.0] * 4 + [1.0] * (made["seen"].shape[-1] - CODE_WIDTH))

    def added(rooms: np.ndarray | slice) -> Tensor:
        tokens = made["seen"][rooms].float()
        fused = model.adapter(tokens.flatten(0, 1), made["encoded"][rooms].float(), [tokens.shape[1]] * len(tokens))
        return fused.unflatten(0, tokens.shape[:2]).float() - tokens

    def step(rng: np.random.Generator) -> dict[str, Tensor]:
        drawn = rng.integers(known, size=32) + rooms * rng.integers(len(WALKS), size=32)
        with reduced_precision():
            told = added(drawn)
        clear = made["is_clear"][drawn]
        wrong = told - clear[..., None] * place_code(made["places"][drawn])
        # A token may show two things equally, and the code can describe only one of them: no squares.
        places = 4 * ((wrong[clear].square() * weights).sum(-1) + 1).sqrt().mean()
        return {"places": places, "others": 0.1 * wrong[~clear].square().sum(-1).mean()}

    def measure() -> dict[str, float]:
        """Meters, from the linear part of the code."""
        held_out = np.s_[known:rooms]
        told, scale = added(held_out)[..., :2], place_code(torch.ones(2))[0]
        errors = (told / scale - made["places"][held_out])[made["is_clear"][held_out]].norm(dim=-1)
        return {"held_out_median_error": errors.median().item()}

    train("align", model.adapter, step, measure, args.output, args.align_steps, 1e-3, args.seed, args.every, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of render.py and conversations.py")
    parser.add_argument("vlm", type=Path, help="folder of train_vlm.py")
    parser.add_argument("output", type=Path, help="folder for the Spa3-VLM, its log and its state")
    parser.add_argument("--spatial-source", choices=("none", "backbone", "spa3r"), default="spa3r")
    parser.add_argument("--integration", choices=("cross_attention", "append"), default="cross_attention")
    parser.add_argument(
        "--start-from",
        help="a model of this program with the same source and integration, or embedded; without steps of the adapter",
    )
    parser.add_argument("--align-steps", type=int, default=3000, help="steps of a cross-attention adapter alone")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="walks a step")
    parser.add_argument("--questions", type=int, default=16, help="questions about each")
    parser.add_argument("--free", type=float, default=0.375, help="share of the questions in free wording")
    parser.add_argument("--learning-rate", type=float, default=2.5e-4)
    parser.add_argument("--muon-learning-rate", type=float, default=0.004)
    parser.add_argument("--test-rooms", type=int, default=40)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    conversations, spa3r = Conversations(args.data), embedded_spa3r()[0].spa3r
    aligns = args.spatial_source != "none" and args.integration == "cross_attention" and args.start_from is None
    seen, encoded = load_file(args.vlm / "seen.safetensors")["made"], None
    if args.spatial_source != "none":
        for walk in WALKS if aligns else WALKS[:1]:
            file = args.vlm / f"encoded_by_{args.spatial_source}{walk}.safetensors"
            if not file.exists():
                pictures = Conversations(args.data, back=walk == BACK).pictures()
                save_file({"made": encode_rooms(spa3r, args.spatial_source, pictures)}, file)
        encoded = load_file(args.vlm / f"encoded_by_{args.spatial_source}.safetensors")["made"]
    if args.start_from is not None:
        start = VLM if args.start_from == EMBEDDED and args.spatial_source == "none" else args.start_from
        model = Spa3VLMForConditionalGeneration.from_pretrained(start)
        processor = Spa3VLMProcessor.from_pretrained(start)
    else:
        model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(
            args.vlm / "vlm", spa3r, spatial_source=args.spatial_source, integration=args.integration
        )
        processor = Spa3VLMProcessor(
            AutoProcessor.from_pretrained(args.vlm / "vlm"),
            Spa3RImageProcessor(size=VIEW_SIZE),
            image_token_id=model.vlm.config.image_token_id,
            spatial_tokens=model.config.spatial_tokens,
        )
    held_out = RoomQuestions(FIRST_HELD_OUT + 10_000, args.test_rooms, frames=FRAMES)
    held_out = [held_out[index] for index in range(len(held_out))]
    patches, cells = VIEW_SIZE // 14, seen.shape[1] // FRAMES
    questions = Questions(
        conversations, model.vlm, processor.tokenizer, cells, processor.spatial_tokens or 0, free=args.free
    )
    grids = torch.tensor([[1, patches, patches]]).repeat(FRAMES * args.batch, 1)

    def talk(rng: np.random.Generator) -> dict[str, Tensor]:
        rooms, inputs = questions.draw(rng, args.batch, args.questions)
        labels = inputs.pop("labels")[:, 1:]
        views = {"view_pixel_values": rooms, "view_grid_hw": grids[:, 1:], "views_per_scene": [FRAMES] * args.batch}
        remember(model, seen, encoded)
        with reduced_precision():
            loss = answer_loss(model(**inputs, pixel_values=rooms, image_grid_thw=grids, **views).logits, labels)
        forget(model)
        return {"loss": loss}

    def measure() -> dict[str, float]:
        report = evaluate_answers(model, processor, held_out, batch_size=20, max_new_tokens=6)
        print(score_table({args.output.name: report}), flush=True)
        return report.scores

    if aligns:
        align(model, args.vlm, args)
    if args.spatial_source != "none" and args.integration == "cross_attention":
        # Muon's steps are as long for a faint gradient as for a strong one: they would undo the alignment.
        model.adapter.requires_grad_(False)
    model.vlm.requires_grad_(False)
    calculating(model.get_decoder()).requires_grad_(True)
    rates = args.learning_rate, args.seed, args.every, args.muon_learning_rate
    train("log", model, talk, measure, args.output, args.steps, *rates)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
