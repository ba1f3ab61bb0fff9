"""Tiny Spa3-VLMs: the ones that encode scenes, and one of each family with a batch of conversations."""

from dataclasses import dataclass
from functools import cached_property

from media import noise, user
from tiny import alive, spa3r_config, vggt_config
from vlm_families import FAMILIES, MORE_FAMILIES, build

from spa3r import Spa3RImageProcessor, Spa3RModel, Spa3VLM, Spa3VLMProcessor
from spa3r.models.spa3_vlm.modeling_spa3_vlm import VIEW_KEYS
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


def compose(name="qwen2_5_vl", seed=0, size=SIZE, integration="cross_attention", spatial_source="spa3r", **kwargs):
    """A Spa3-VLM and its processor. The adapter's weights are random: what isn't fused, or not as it should be, changes
    the words."""
    vlm, vlm_processor = build(name, seed=seed)
    spa3r = None if spatial_source == "none" else make_spa3r()
    model = Spa3VLM.from_vlm_and_spa3r(vlm, spa3r, integration=integration, spatial_source=spatial_source, **kwargs)
    if model.adapter is not None:
        alive(model.adapter)
    processor = Spa3VLMProcessor(
        vlm_processor,
        Spa3RImageProcessor(size=size),
        image_token_id=vlm.config.image_token_id,
        spatial_tokens=model.config.spatial_tokens,
    )
    return model, processor


def make(name="qwen2_5_vl", integration="cross_attention", spatial_source="spa3r", **kwargs) -> Composed:
    return Composed(*compose(name, integration=integration, spatial_source=spatial_source, **kwargs))


def prompt(composed: Composed, pictures=PICTURES, question=QUESTIONS[0], **kwargs) -> dict:
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return dict(
        composed.processor.apply_chat_template(
            [[{"role": "user", "content": content}]], tokenize=True, return_dict=True, add_generation_prompt=True
        )
    )


# One of each family ---------------------------------------------------------------------------------------------------

FAMILY_SIZE, FAMILY_WORDS = 42, 3
CONVERSATIONS = [
    user(noise(60, 40, 0), noise(33, 90, 1), "and", noise(28, 28, 2), "How many chairs?"),
    user(noise(120, 50, 3), "Which object is closer?"),
    user("What is two plus two?"),
]


def inputs_of(processor, conversations, **kwargs) -> dict:
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, **({"add_generation_prompt": True} | kwargs)
    )
    return {key: value for key, value in inputs.items() if key != "labels"}  # PaliGemma's makes labels, too


def without_views(inputs: dict) -> dict:
    return {key: value for key, value in inputs.items() if key not in VIEW_KEYS}


@dataclass
class ComposedFamily:
    """A family's Spa3-VLM with a padded batch: three pictures, one, and none."""

    name: str
    model: Spa3VLM
    processor: Spa3VLMProcessor

    @cached_property
    def conversations(self) -> list:
        # A processor that was not made for conversations wants a picture in every call.
        return CONVERSATIONS if (FAMILIES | MORE_FAMILIES)[self.name].chats else CONVERSATIONS[:2]

    @cached_property
    def special_tokens(self) -> list[int]:
        # An image token among the words would ask for one more picture.
        return sorted(self.processor.tokenizer.get_added_vocab().values())

    @cached_property
    def batch(self) -> dict:
        return inputs_of(self.processor, self.conversations)

    @cached_property
    def alone(self) -> list[dict]:
        return [inputs_of(self.processor, [conversation]) for conversation in self.conversations]

    def generate(self, inputs: dict, model=None, **kwargs):
        """Tokens and the logits that they were chosen by (copies of a row one after the other)."""
        choice = {"max_new_tokens": FAMILY_WORDS, "do_sample": False, "suppress_tokens": self.special_tokens} | kwargs
        output = (model or self.model).generate(
            **inputs, **choice, return_dict_in_generate=True, output_logits=True, output_scores=True
        )
        output.words = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert output.words.shape[1] == choice["max_new_tokens"]
        return output


def make_family(name="qwen2_5_vl", **kwargs) -> ComposedFamily:
    return ComposedFamily(name, *compose(name, size=FAMILY_SIZE, **kwargs))
