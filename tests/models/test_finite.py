"""Inference on weights, pictures or latents that are not finite says so instead of answering."""

import math

import pytest
import torch
from media import noise
from tiny import alive, pretraining_config
from tiny_spa3_vlm import make

from spa3r import Spa3RForPreTraining, Spa3RImageProcessor
from spa3r.answering.engine import answer

PICTURES = [noise(60, 40, 0), noise(33, 90, 1)]


@pytest.fixture
def spa3r():
    model = alive(Spa3RForPreTraining(pretraining_config())).eval().spa3r
    processor = Spa3RImageProcessor(size=8 * model.config.patch_size, patch_size=model.config.patch_size)
    return model, processor([PICTURES], return_tensors="pt")


@pytest.fixture
def composed():
    return make()


def spoil(module: torch.nn.Module, value: float = math.nan) -> None:
    next(module.parameters()).data.view(-1)[0] = value


CALLS = {
    "encode": lambda model, inputs: model.encode(**inputs),
    "features": lambda model, inputs: model.backbone_features(**inputs),
}


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("call", CALLS)
def test_pixels(call, value, spa3r):
    model, inputs = spa3r
    CALLS[call](model, inputs)
    inputs["view_pixel_values"][3, 5] = value
    with pytest.raises(ValueError, match=r"must be finite, and `view_pixel_values` holds NaN or infinite values\."):
        CALLS[call](model, inputs)


@pytest.mark.parametrize("call", CALLS)
def test_weights(call, spa3r):
    model, inputs = spa3r
    spoil(model.backbone)
    with pytest.raises(ValueError, match=r"must be finite, and weights of the model are not \(.*its files are damaged"):
        CALLS[call](model, inputs)


def test_overflow(spa3r):
    model, inputs = spa3r
    for parameter in model.encoder.parameters():
        parameter.data.fill_(1e38)
    with pytest.raises(ValueError, match=r"The latents must be finite, and a number overflowed in torch\.float32"):
        model.encode(**inputs)


def test_latents(spa3r):
    model, inputs = spa3r
    output = model(**inputs)
    latents = output.latents.detach().clone()
    latents[0, 0, 0] = math.nan
    cameras = (output.extrinsics.detach(), output.intrinsics.detach())
    with pytest.raises(ValueError, match=r"The field must be finite, and `latents` holds NaN"):
        model.decode(latents, *cameras, inputs["view_grid_hw"], inputs["views_per_scene"])


@pytest.mark.parametrize("part", ("spa3r", "adapter", "language", "vision"))
def test_spa3_vlm_answers_nothing(part, composed):
    """By whole prompts, by encoded scenes, and where answers are scored."""
    model, processor = composed.model, composed.processor
    place = {"spa3r": model.spa3r.encoder, "adapter": model.adapter, "language": model.vlm.lm_head}
    spoil(place[part]) if part in place else spoil(model.vlm.base_model.visual)
    if part == "language":
        model.vlm.lm_head.weight.data.fill_(math.nan)
    words = r"must be finite, and weights of the model are not \("
    content = [*({"type": "image", "image": picture} for picture in PICTURES), {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template([messages], **options)
    with pytest.raises(ValueError, match=words):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=words), torch.no_grad():
        model(**inputs)
    with pytest.raises(ValueError, match=words):
        model.ask(composed.encode(PICTURES), "What?")  # of the language model, the answer tells
    if part == "language":
        with pytest.raises(ValueError, match=words):
            answer(model.vlm, processor, [{"messages": messages}], max_new_tokens=2)
