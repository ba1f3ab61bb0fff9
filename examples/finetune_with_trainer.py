"""Fine-tune the embedded VLM with Spa3R on questions about rooms with `transformers.Trainer`.

A demonstration of the mechanics: after these few steps the model has learned next to nothing. `spa3r finetune` adds
policies, exact resumption, scored answers during training, and reports.
"""

import argparse
import tempfile

from transformers import Trainer, TrainingArguments

from spa3r import Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.data import Spa3VLMCollator
from spa3r.rooms.embedded import embedded_model
from spa3r.rooms.instructions import RoomQuestions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Spa3-VLM; default: the embedded one")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()

    if args.model:
        model = Spa3VLMForConditionalGeneration.from_pretrained(args.model)
        processor = Spa3VLMProcessor.from_pretrained(args.model)
    else:
        model, processor = embedded_model()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,  # the loss is the mean over the tokens of all four rows
            logging_steps=1,
            report_to="none",
            remove_unused_columns=False,  # rows are conversations; the collator converts them to model inputs
            ddp_find_unused_parameters=False,
        )
        rooms = RoomQuestions(first_seed=0, num_rooms=4, frames=2)
        trainer = Trainer(model, arguments, train_dataset=rooms, data_collator=Spa3VLMCollator(processor))
        trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    main()
