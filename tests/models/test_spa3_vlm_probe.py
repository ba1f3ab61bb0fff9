"""A VLM of a family that no test runs is probed with its first pictures: noise in image tokens must move its logits."""

import logging
import re

import pytest
import torch
from tiny_spa3_vlm import PICTURES, make, make_spa3r, prompt
from transformers import LlavaForConditionalGeneration
from vlm_families import build

from spa3r import Spa3VLM
from spa3r.models.spa3_vlm import asking, probe

NOTE = "is not among those that are tested with spa3r"


@pytest.fixture
def untested(monkeypatch):
    """No family is tested, and nothing was logged yet."""
    monkeypatch.setattr(probe, "TESTED_FAMILIES", frozenset())
    probe.logger.warning_once.cache_clear()


def counted(vlm) -> list:
    calls = []
    vlm.register_forward_pre_hook(lambda *_: calls.append(vlm.training))
    return calls


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_an_untested_family_is_probed_once_and_gives_the_same(name, untested, monkeypatch, caplog):
    composed = make(name)
    inputs = prompt(composed)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(probe, "TESTED_FAMILIES", frozenset([composed.model.vlm.config.model_type]))
        logits = composed.model(**inputs).logits
        words = composed.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert not caplog.messages
    calls = counted(composed.model.vlm)
    state = torch.random.get_rng_state()
    composed.model.train()
    composed.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    composed.model.eval()
    assert calls == [False] * 4 + [True]  # twice forward and twice generate, without dropout; then the call itself
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(composed.model(**inputs).logits, logits)
    assert torch.equal(composed.model.generate(**inputs, max_new_tokens=3, do_sample=False), words)
    assert len(calls) == 9
    assert [NOTE in message and "A probe checks" in message for message in caplog.messages] == [True]


def test_the_first_call_may_generate(untested):
    composed = make()
    calls = counted(composed.model.vlm)
    output = composed.model.generate(**prompt(composed), max_new_tokens=2, num_beams=2, num_return_sequences=2)
    assert len(output) == 2 and len(calls) == 4 + 2


class DeafInForward(LlavaForConditionalGeneration):
    """Takes image tokens, and leaves them out."""

    def forward(self, *args, mm_encoder_outputs=None, **kwargs):
        return super().forward(*args, **kwargs)


class DeafInGenerate(LlavaForConditionalGeneration):
    def generate(self, *args, mm_encoder_outputs=None, **kwargs):
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("kind", [DeafInForward, DeafInGenerate])
@pytest.mark.parametrize("call", ["forward", "generate", "encode_scene", "plain"])
def test_a_family_that_ignores_image_tokens_is_refused(kind, call, untested):
    composed = make("llava")
    vlm, vlm_processor = build("llava")
    vlm.__class__ = kind
    model = Spa3VLM.from_vlm_and_spa3r(vlm, make_spa3r())
    inputs = prompt(composed)
    where = "forward" if kind is DeafInForward else "generate"
    with pytest.raises(ValueError, match=re.escape(f"its {where} ignores the image tokens in `mm_encoder_outputs`")):
        if call == "forward":
            model(**inputs)
        elif call == "generate":
            model.generate(**inputs, max_new_tokens=1)
        elif call == "encode_scene":
            model.encode_scene(composed.processor, [PICTURES[0]])
        else:
            asking.encode_scene(vlm, vlm_processor, [PICTURES[0]])


def test_tested_families_are_not_probed(caplog):
    composed = make()
    calls = counted(composed.model.vlm)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        composed.model(**prompt(composed))
    assert len(calls) == 1 and not any(NOTE in message for message in caplog.messages)


def test_a_sharded_model_is_not_probed_and_says_so(untested, caplog):
    composed = make()
    next(composed.model.vlm.parameters()).ds_id = 0  # as DeepSpeed marks them
    calls = counted(composed.model.vlm)
    with torch.no_grad():
        composed.model(**prompt(composed))
    assert len(calls) == 1 and "so it is not probed either" in "".join(caplog.messages)
