"""The whole chain on a Depth Anything 3: pretraining, a Spa3-VLM, fine-tuning, questions, evaluation."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run_json
from media import noise
from tiny import alive, depth_anything_3_config, pretraining_config, teacher_config, vggt_config
from tiny_benchmark import write_vsi_bench
from tiny_finetuning import write_config as write_finetuning
from tiny_training import folder_source, write_config
from transformers import DINOv3ViTModel
from vlm_families import build

from spa3r import (
    DepthAnything3Model,
    Spa3RForPreTraining,
    Spa3RImageProcessor,
    Spa3RModel,
    Spa3VLM,
    Spa3VLMProcessor,
    VggtModel,
)
from spa3r.cli.demo import _predict_held_out
from spa3r.rooms import generate_room, look_around, render

PATCH = 14
QUICK = ("--num-frames", 2, "--max-new-tokens", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def backbone(folder) -> Path:
    model = alive(DepthAnything3Model(depth_anything_3_config(patch_size=PATCH, image_size=5 * PATCH)))
    model.save_pretrained(folder / "depth_anything_3")
    Spa3RImageProcessor(size=5 * PATCH, patch_size=PATCH).save_pretrained(folder / "depth_anything_3")
    return folder / "depth_anything_3"


@pytest.fixture(scope="module")
def pretrained(folder, backbone) -> Path:
    """What `spa3r pretrain` leaves after two steps."""
    alive(DINOv3ViTModel(teacher_config())).save_pretrained(folder / "teacher")
    parts = {"backbone": str(backbone), "semantic_teacher": str(folder / "teacher")}
    config = write_config(folder / "config.yaml", parts, folder_source(folder, 4))
    told = run_json("pretrain", config, "--training.max_steps=2", f"--data.image_size={5 * PATCH}")
    assert (told["step"], told["finished"]) == (2, True)
    return folder / "run"


@pytest.fixture(scope="module")
def composed(folder, pretrained) -> Path:
    """A Spa3-VLM on it, fine-tuned for a step by the command."""
    vlm, processor = build("qwen2_5_vl")
    vlm.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    config = write_finetuning(folder / "finetune.yaml")
    model = {"vlm": str(folder / "vlm"), "spa3r": str(pretrained), "view_size": 4 * PATCH}
    told = run_json(
        "finetune",
        config,
        f"--training.output_dir={folder / 'tuned'}",
        "--training.max_steps=1",
        "--model.init_from=null",
        *(f"--model.{name}={value}" for name, value in model.items()),
    )
    assert (told["step"], told["finished"]) == (1, True)
    return folder / "tuned"


def test_what_pretraining_leaves_is_a_spa3r_on_it(pretrained, folder):
    model = Spa3RModel.from_pretrained(pretrained)
    assert type(model.backbone) is DepthAnything3Model
    log = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert any("depth_probe" in name for line in log for name in line)
    told = run_json("encode", picture(folder), "--model", pretrained, "-o", folder / "latents.safetensors")
    assert Path(told["output"]).is_file()


def picture(folder: Path) -> Path:
    file = folder / "view.png"
    noise(90, 60, 0).save(file)
    return file


def test_a_spa3_vlm_on_it_answers_and_is_scored(composed, folder):
    model = Spa3VLM.from_pretrained(composed)
    assert type(model.spa3r.backbone) is DepthAnything3Model
    processor = Spa3VLMProcessor.from_pretrained(composed)
    alive(model.adapter)
    content = [{"type": "image", "image": noise(90, 60, 0)}, {"type": "text", "text": "How many chairs?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    own = {"view_pixel_values", "view_grid_hw", "views_per_scene", "image_tokens_per_scene"}
    with torch.no_grad():
        fused = model(**inputs).logits
        plain = model.vlm(**{name: value for name, value in inputs.items() if name not in own}).logits
    assert not torch.allclose(fused, plain)
    assert isinstance(
        run_json("ask", picture(folder), "What?", "--model", composed, "--max-new-tokens", 2)["answer"], str
    )
    data = write_vsi_bench(folder / "vsi", (2, 1))
    told = run_json("eval", "vsi-bench", "--model", composed, "--data", data, *QUICK, "-o", folder / "scored")
    assert told["benchmark"]["questions"] == 3 and told["scores"]["overall"] >= 0


def test_the_app_shows_it(composed):
    pytest.importorskip("gradio", reason="gradio needs an environment of its own")
    from spa3r.app import Demo

    model, processor = Spa3VLM.from_pretrained(composed), Spa3VLMProcessor.from_pretrained(composed)
    demo = Demo(model, processor, 2**28)
    place, views, facts, *_ = demo.look_at_room(0)
    assert views and "image tokens" in facts
    chat, _ = demo.ask(place, "What do you see?", [])
    assert chat[-1]["role"] == "assistant"


def test_held_out_views_of_rooms_are_predicted_as_the_demo_does():
    """`spa3r demo` has models of its own; this is what it runs on them."""
    config = depth_anything_3_config(patch_size=PATCH, image_size=5 * PATCH)
    model = alive(Spa3RForPreTraining(pretraining_config(backbone_config=config)))
    room = generate_room(seed=0, level=0)
    rooms = [render(room, look_around(room, 4, (4 * PATCH, 4 * PATCH)))] * 2
    processor = Spa3RImageProcessor(size=4 * PATCH, patch_size=PATCH)
    _, output, metrics = _predict_held_out(model, processor, rooms)
    assert output.geometry_features.isfinite().all() and metrics is not None


def test_it_is_refused_with_another_backbone(pretrained, folder):
    VggtModel(vggt_config()).save_pretrained(folder / "vggt")
    light = folder / "light"
    Spa3RModel.from_pretrained(pretrained).save_pretrained(light, include_backbone=False)
    with pytest.raises(ValueError, match=r"the one that it was trained on, a 'depth_anything_3' .*got .*'vggt'"):
        Spa3RModel.from_pretrained(light, backbone_name_or_path=str(folder / "vggt"))
