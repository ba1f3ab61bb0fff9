"""The released layouts of instruction data, as files, train Spa3-VLMs of several families end to end."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from media import asked, counting_frames, noise, write_video
from tiny import PATCH, spa3r_config
from tiny_finetuning import trainer
from vlm_families import build

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.training import read_log
from spa3r.training.sources import make_instructions

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:.*gradient_checkpointing")


def write_layouts(folder: Path) -> dict[str, list[dict]]:
    """Rows of each data set as it is released, with their media."""
    for number in range(3):
        (folder / f"vsi/{number}").mkdir(parents=True)
        noise(70, 56, number).save(folder / f"vsi/{number}.jpg")
        noise(56, 70, 10 + number).save(folder / f"vsi/{number}/view.jpg")
    for name in ("vsi/walk.mp4", "scannet.mp4"):
        write_video(folder / name, counting_frames(10, 64, 56), fps=1)
    (folder / "hound/v1").mkdir(parents=True)
    for number in range(6):
        noise(56, 56, 20 + number).save(folder / f"hound/v1/{number:03d}.jpeg")
    prompt = "<image>\nThese are frames of a video.\n"
    return {
        "vsi_590k": [
            {
                "conversations": asked(prompt + "How many chairs are in this room?", "4"),
                "question_type": "object_counting",
                "video": "vsi/walk.mp4",
            },
            {
                "conversations": asked("<image>\nHow far is the lamp?", "2.5"),
                "question_type": "object_abs_distance",
                "image": "vsi/0.jpg",
            },
            {"conversations": asked("What is two plus two?", "4"), "question_type": "none"},
        ],
        "spar": [
            {
                "id": "spar-7",
                "conversations": asked("<image>\n<image>\n<image>\nWhich view is nearest?", "The second."),
                "images": [f"vsi/{number}/view.jpg" for number in range(3)],
            }
        ],
        "llava_hound": [
            {"id": "v1_3", "conversations": asked("<video>\nWhat happens?", "A walk."), "video": "hound/v1"}
        ],
        "vlm_3r": [
            {
                "conversations": [*asked("<image>\nHow large is the room?", "21.5"), *asked("And its height?", "2.4")],
                "video": "scannet.mp4",
            }
        ],
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_released_layouts_train_end_to_end(family, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    layouts = write_layouts(tmp_path)
    parts = {}
    for name, rows in layouts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        parts[name] = {"annotations": str(tmp_path / f"{name}.json"), "media_root": str(tmp_path), "weight": len(rows)}
    data = make_instructions({"mixture": parts, "num_rows": 24})
    seen = [data[index] for index in range(len(data))]
    assert {row["source"] for row in seen} == set(layouts)
    pictures = {
        sum(item["type"] == "image" for message in row["messages"] for item in message["content"]) for row in seen
    }
    assert pictures == {0, 1, 3, 5, 6}  # text, a picture, several, 10 seconds, a folder of 6

    vlm, processor = build(family)
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, Spa3RModel(spa3r_config()))
    views = Spa3RImageProcessor(patch_size=PATCH, size=56)
    processor = Spa3VLMProcessor(processor, views, image_token_id=vlm.config.image_token_id)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fields = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 8, "learning_rate": 5e-3}
    ours = trainer(tmp_path / "run", data, model, processor, **fields)
    ours.train()
    losses = [entry["loss"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry]
    assert len(losses) == 8 and sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert ours.skipped.entries() == []
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("adapter.") for name in moved)
    assert any(name.startswith("vlm.") for name in moved)
    assert not any(name.startswith("spa3r.") for name in moved)
