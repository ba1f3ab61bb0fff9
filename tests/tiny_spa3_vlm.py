"""Tiny Spa3-VLMs that encode scenes."""

from dataclasses import dataclass
from functools import cached_property

from media import noise
from tiny import alive, spa3r_config, vggt_config
from vlm_families import build

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLM, Spa3VLMProcessor
from spa3r.models.spa3_vlm.scenes import EncodedScene


def make_spa3r() -> Spa3RModel:
    return alive(Spa3RModel(spa3r_config(backbone_config=vggt_config(patch_size=14, image_size=70))))


PICTURES = [noise(60, 40, 0), noise(33, 90, 1), noise(28, 28, 2)]


QUESTIONS = [
    "How many chairs are in the room?",
    "What?",
    "Which object is closer to the door, the lamp or the sofa?",
    "\n\nWhere  is it? ",  # white space that tokenizers might merge with what precedes it
    "How many lamps are in the room?",  # of as many tokens as the first
]


SIZE = 98
"""Of views, in pixels: pictures of several tokens in both directions, whose rotary positions are not their places."""


WORDS = 5


@dataclass
class Composed:
    model: Spa3VLM
    processor: Spa3VLMProcessor

    @cached_property
    def words(self) -> dict:
        return {"suppress_tokens": sorted(self.processor.tokenizer.get_added_vocab().values())}

    def encode(self, pictures=PICTURES, **kwargs) -> EncodedScene:
        return self.model.encode_scene(self.processor, pictures, **kwargs)

    def ask(self, scene, questions=QUESTIONS, **kwargs):
        return self.model.ask(scene, questions, **({"max_new_tokens": WORDS} | self.words | kwargs))

    def alone(self, questions=QUESTIONS, pictures=PICTURES, system=None, **kwargs) -> list[str]:
        """As everybody asks: a whole prompt for each question."""
        answers = []
        for question in questions:
            content = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": question}]
            before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
            inputs = self.processor.apply_chat_template(
                [[*before, {"role": "user", "content": content}]],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
            )
            choice = {"do_sample": False, "max_new_tokens": WORDS} | self.words | kwargs
            output = self.model.generate(**inputs, **choice)
            words = output[0, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.decode(words, skip_special_tokens=True).strip())
        return answers


def make(name="qwen2_5_vl", integration="cross_attention", spatial_source="spa3r", seed=0) -> Composed:
    """A composed whose adapter has random weights: what isn't fused, or not as it should be, changes the answers."""
    vlm, vlm_processor = build(name, seed=seed)
    spa3r = None if spatial_source == "none" else make_spa3r()
    model = Spa3VLM.from_vlm_and_spa3r(vlm, spa3r, integration=integration, spatial_source=spatial_source)
    if model.adapter is not None:
        alive(model.adapter)
    processor = Spa3VLMProcessor(
        vlm_processor,
        Spa3RImageProcessor(size=SIZE),
        image_token_id=vlm.config.image_token_id,
        spatial_tokens=model.config.spatial_tokens,
    )
    return Composed(model, processor)


def prompt(composed: Composed, pictures=PICTURES, question=QUESTIONS[0], **kwargs) -> dict:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return dict(
        composed.processor.apply_chat_template(
            [[{"role": "user", "content": content}]], tokenize=True, return_dict=True, add_generation_prompt=True
        )
    )
