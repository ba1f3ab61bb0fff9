"""Tiny fine-tunings: the embedded Spa3-VLM on small views, instructions made by hand."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import yaml

from spa3r.rooms.embedded import embedded_model
from spa3r.training import FinetuningArguments, FinetuningTrainer

ROOMS = {"type": "room_questions", "first_seed": 0, "num_rooms": 4, "frames": 2}
ROOMS |= {"types": ["object_counting", "object_rel_distance"]}

SHAPES = ((2, 3), (0, 1), (1, 9), (3, 2), (0, 5), (1, 1), (2, 4), (1, 2))
"""Pictures and words of the answer of each row: ragged scenes beside rows of text."""


def example(row: int, shapes=SHAPES) -> dict:
    pictures, words = shapes[row % len(shapes)]
    rng = np.random.default_rng(row)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(pictures)]
    question = f"How many chairs are in room {row}?"
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    answer = " ".join(str(number) for number in range(words))
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "source": "hand",
        "row": f"row-{row}",
        "question_type": "object_counting",
        "skipped": [],
    }


def examples(count: int = 8, shapes=SHAPES) -> list[dict]:
    return [example(row, shapes) for row in range(count)]


@cache
def _embedded():
    return embedded_model()


def composed():
    """A copy of the embedded Spa3-VLM and its processor, on views of 4 x 4 patches."""
    model, processor = copy.deepcopy(_embedded())
    processor.view_image_processor.size = 56
    return model, processor


def arguments(output_dir: Path, **fields) -> FinetuningArguments:
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    defaults |= {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    defaults |= {"learning_rate": 1e-3, "warmup_steps": 0}
    return FinetuningArguments(output_dir=str(output_dir), **(defaults | fields))


def trainer(output_dir: Path, data=None, model=None, processor=None, **fields) -> FinetuningTrainer:
    own = {"eval_dataset", "psfm", "evaluation", "callbacks"}
    others = {key: fields.pop(key) for key in own & fields.keys()}
    if model is None:
        model, processor = composed()
    args = arguments(output_dir, **fields)
    return FinetuningTrainer(model, args, data or examples(), processing_class=processor, **others)


def write_config(file: Path, **training) -> Path:
    """A configuration file for the command."""
    defaults = {"output_dir": str(file.parent / "run"), "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    defaults |= {"use_cpu": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    defaults |= {"learning_rate": 1e-3, "report_to": "none"}
    sections = {
        "model": {"init_from": "embedded", "view_size": 56},
        "data": {"train": ROOMS, "num_workers": 0},
        "training": defaults | training,
    }
    file.write_text(yaml.safe_dump(sections))
    return file
