"""A tiny VSI-Bench with real videos, and tiny models to ask."""

import json
from functools import cache
from pathlib import Path

from media import noise, write_video
from tiny import alive, spa3r_config, vggt_config
from vlm_families import build

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLMForConditionalGeneration, Spa3VLMProcessor
from spa3r.evaluation import EvaluationSettings
from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES, is_choice

QUESTIONS = (5, 2, 1, 3)
"""Questions about each scene."""

SETTINGS = EvaluationSettings(num_frames=2, max_new_tokens=4, batch_size=2)


@cache
def build_composed(family: str = "qwen2_5_vl", **fields) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """A composed of random weights whose scene has a say."""
    vlm, vlm_processor = build(family)
    spa3r = alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=14))))
    model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spa3r, **fields)
    alive(model.adapter)
    views = Spa3RImageProcessor(size=56, patch_size=14)
    return model, Spa3VLMProcessor(vlm_processor, views, image_token_id=model.vlm.config.image_token_id)


def make_rows(questions=QUESTIONS) -> list[dict]:
    """Rows of every type, with `questions[i]` about scene i."""
    scenes = [scene for scene, count in enumerate(questions) for _ in range(count)]
    types = (*CHOICE_TYPES, *NUMBER_TYPES)
    rows = []
    for number, scene in enumerate(scenes):
        question_type = types[number % len(types)]
        choice = is_choice(question_type)
        rows.append(
            {
                "id": 100 + number,
                "dataset": ("scannet", "arkitscenes")[scene % 2],
                "scene_name": f"scene{scene}",
                "question_type": question_type,
                "question": f"What of thing {number}?",
                "options": ["A. left", "B. right"] if choice else None,
                "ground_truth": "AB"[number % 2] if choice else str(number % 5),
            }
        )
    return rows


def write_vsi_bench(folder: Path, questions=QUESTIONS, frames: int = 6, pruned: bool = False) -> Path:
    """The released layout: test.jsonl, and a video of each scene."""
    rows = make_rows(questions)
    for row in rows:
        if pruned:
            row["pruned"] = row["id"] % 3 == 0
        video = folder / row["dataset"] / f"{row['scene_name']}.mp4"
        if not video.exists():
            video.parent.mkdir(parents=True, exist_ok=True)
            seed = 100 * int(row["scene_name"].removeprefix("scene"))
            write_video(video, [noise(64, 48, seed + frame) for frame in range(frames)])
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
