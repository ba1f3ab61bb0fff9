"""Pretrain a tiny Spa3R for a few steps on one rendered room, in plain PyTorch.

A demonstration of the mechanics: backbone and teacher have random weights, so nothing useful is learned.
"""

import argparse

import torch
from transformers import DINOv3ViTConfig

from spa3r import Spa3RConfig, Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.rooms import camera_walk, generate_room, render
from spa3r.rooms.embedded import embedded_model


def tiny_model() -> Spa3RForPreTraining:
    """A model with the embedded Spa3R's sizes, and a tiny DINOv3 as teacher."""
    fields = embedded_model()[0].spa3r.config.to_dict()
    teacher = DINOv3ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return Spa3RForPreTraining(Spa3RConfig(**(fields | {"semantic_teacher_config": teacher})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Spa3RForPreTraining; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--views", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model = Spa3RForPreTraining.from_pretrained(args.model)
        processor = Spa3RImageProcessor.from_pretrained(args.model)
    else:
        model, processor = tiny_model(), Spa3RImageProcessor(size=112)
    model.train()  # the frozen parts stay in eval mode
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)

    room = generate_room(seed=0, level=1)
    inputs = processor(list(render(room, camera_walk(room, args.views)).images))
    for step in range(args.steps):
        output = model(**inputs)  # draws new context views every time
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        terms = "  ".join(f"{name} {value.item():.3f}" for name, value in output.losses.items())
        print(f"step {step:3d}  loss {output.loss.item():.3f}  {terms}")


if __name__ == "__main__":
    main()
