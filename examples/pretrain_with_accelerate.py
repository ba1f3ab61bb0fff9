"""Pretrain a tiny Spa3R on rendered rooms in a plain accelerate loop, on any number of processes.

    accelerate launch --num_processes 2 examples/pretrain_with_accelerate.py

A demonstration of the mechanics: backbone and teacher have random weights, so nothing useful is learned.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from train_step import tiny_model

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.data import SceneBatches
from spa3r.rooms.scenes import RoomScenes
from spa3r.training import whole_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Spa3RForPreTraining; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    model = Spa3RForPreTraining.from_pretrained(args.model) if args.model else tiny_model()
    processor = Spa3RImageProcessor(patch_size=model.config.patch_size, size=8 * model.config.patch_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    # Not prepared by accelerate, which would slice packed tensors: every process makes its own share of each step.
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    scenes = SceneBatches(RoomScenes(), processor, views=(2, 4), pictures_per_batch=8, **share)
    for step, batch in zip(range(args.steps), DataLoader(scenes, batch_size=None)):
        inputs = whole_batch([batch])
        inputs["view_pixel_values"] = inputs["view_pixel_values"].to(accelerator.device)
        loss = model(**inputs).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"step {step}  loss {mean:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
