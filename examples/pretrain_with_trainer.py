"""Pretrain a tiny Spa3R on rendered rooms with `transformers.Trainer`.

A demonstration of the mechanics: backbone and teacher have random weights, so nothing useful is learned.
`spa3r pretrain` adds the recipe, exact resumption, evaluation and reports.
"""

import argparse
import tempfile

from train_step import tiny_model
from transformers import Trainer, TrainingArguments

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.data import SceneBatches
from spa3r.rooms.scenes import RoomScenes
from spa3r.training import whole_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Spa3RForPreTraining; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    model = Spa3RForPreTraining.from_pretrained(args.model) if args.model else tiny_model()
    processor = Spa3RImageProcessor(patch_size=model.config.patch_size, size=8 * model.config.patch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            per_device_train_batch_size=1,  # one batch of scenes, made by SceneBatches
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},  # otherwise accelerate slices packed tensors
        )
        scenes = SceneBatches(RoomScenes(num_rooms=16), processor, views=(2, 4), pictures_per_batch=8)
        trainer = Trainer(model, arguments, train_dataset=scenes, data_collator=whole_batch)
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main()
