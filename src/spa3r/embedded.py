"""The embedded model: a small Spa3-VLM, so that every command and example runs without a download.

It has all parts of a large one. Its Spa3R comes with the package and is trained on the rooms (``examples/rooms``). The
VLM, shaped like Qwen2.5-VL with its real processor, and the adapter are made in code and untrained: random numbers of a
fixed seed.
"""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from spa3r.checkpoints import EMBEDDED
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RModel

UNTRAINED_NOTE = "the embedded VLM is untrained (random weights): its answers mean nothing"

ROOMS_NOTE = "the embedded Spa3R was trained on rendered rooms only: it knows no photographs"

VIEW_SIZE = 112
"""Pixels a side of a view: 8 x 8 patches."""

SENTENCES = (
    "How many chairs are in the room? There are three chairs in the room.",
    "How many tables and lamps can you see? Two tables and one lamp.",
    "How many objects are in this room? There are nine objects.",
    "Is there a sofa in this room? Yes, there is a red sofa by the wall.",
    "Is there a plant next to the window? No, there is no plant.",
    "Which object is closer to the camera, the lamp or the sofa? The lamp is closer.",
    "Which of these objects is nearest to the bed: table, chair, shelf or lamp? The shelf.",
    "What is the distance between the door and the window in metres? About two metres.",
    "How far is the chair from the table, in metres? It is 1.4 metres away.",
    "What is the length of the longest side of the sofa in centimetres? About 210 centimetres.",
    "What is the height of the wardrobe in centimetres? It is 185 centimetres high.",
    "What is the size of this room in square metres? It is about 24.5 square metres.",
    "If I am standing by the door and facing the window, is the bed to my left or to my right?",
    "Standing at the table and facing the television, the plant is behind me, on the left.",
    "Turn left at the sofa, go forward to the wardrobe, then turn right until you reach the door.",
    "You walk past the bed, turn back at the wall, and stop in front of the desk.",
    "In which order do these objects appear for the first time: bed, chair, desk, lamp?",
    "First the lamp, then the bed, after that the desk, and at the end the chair.",
    "What colour is the chair next to the desk? The chair is blue.",
    "What colour is the floor? The floor is brown, with gray tiles.",
    "What is on the wall between the door and the window? A picture hangs on the wall.",
    "What stands in the corner of the room? A green cupboard stands in the corner.",
    "Where is the television? It stands on a white bench in front of the sofa.",
    "Where is the camera at the end of the walk? It is in the middle of the room.",
    "Describe the room. It is a small room with a bed, a desk, a chair and two windows.",
    "Describe what you see. An orange armchair, a black table, and a yellow lamp above it.",
    "Answer with a number. Answer with one word. Answer yes or no. Choose from the options A, B, C and D.",
    "The views show the same room from different places. These are frames of a video.",
    "zero one two three four five six seven eight nine ten eleven twelve",
    "0 1 2 3 4 5 6 7 8 9 10 0.5 1.2 2.5 3.0 4.8",
    "red orange yellow green teal blue purple pink brown white gray black",
    "left right up down front back behind above below under near far between",
)
"""What the tokenizer learns its merges from. Any other text is spelled in bytes."""

SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item['type'] == 'text' -%}
                {{- item['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@cache
def _bpe() -> str:
    """Tokenizer file of a byte-level BPE: any string comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def _vlm_processor() -> Qwen2_5_VLProcessor:
    standard = {name: token for name, token in SPECIAL_TOKENS.items() if name in ("pad_token", "eos_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        **standard,
        extra_special_tokens={name: token for name, token in SPECIAL_TOKENS.items() if name not in standard},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_tokens(["<|im_start|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    size = {"shortest_edge": 28 * 28, "longest_edge": (2 * VIEW_SIZE) ** 2}  # in pixels, whatever the names say
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size),
        video_processor=Qwen2VLVideoProcessor(patch_size=14, merge_size=2, size=size),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def _vlm_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def embedded_model(seed: int = 0) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """The embedded model and its processor, on the CPU in float32.

    Args:
        seed: Seed of the untrained weights, those of the VLM and the adapter. Equal seeds give equal weights; the
            global generator is left alone.

    Returns:
        The model, in eval mode, and the processor; its views are 112 pixels wide.
    """
    vlm_processor = _vlm_processor()
    config = _vlm_config(vlm_processor.tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        spa3r = Spa3RModel.from_pretrained(EMBEDDED)
        model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spa3r, initializer_range=0.1)
        # A fresh adapter is the identity; here the scene shall have a say.
        model.adapter.bottleneck.fc2.weight.normal_(std=0.1)
    views = Spa3RImageProcessor.from_pretrained(EMBEDDED)
    return model, Spa3VLMProcessor(vlm_processor, views, image_token_id=config.image_token_id)


def embedded_spa3r() -> tuple[Spa3RForPreTraining, Spa3RImageProcessor]:
    """The Spa3R in the package with its semantic teacher, on the CPU in float32: trained on rooms of level 0.

    Returns:
        The model, in eval mode, and its image processor; its views are 112 pixels wide.
    """
    return Spa3RForPreTraining.from_pretrained(EMBEDDED), Spa3RImageProcessor.from_pretrained(EMBEDDED)
