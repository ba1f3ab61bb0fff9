"""Tiny vision-language models of transformers with their real processors, built offline.

A wrapper that claims to combine *any* vision-language model must be run on many: families differ in how pictures become
placeholder tokens, in what `get_image_features` needs and returns, and in what the language model wants besides. Here
each family is one row of a table: a configuration of two layers and a processor of the family's own classes, over one
byte-level tokenizer trained on a few sentences. Nothing is downloaded, and a build takes a fraction of a second.

    model, processor = build("qwen3_vl")

The weights are random but alive: every matrix keeps the scale of its input and nothing is left at zero, so a wrong
picture in the wrong place changes the logits.
"""

import inspect
import json
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils.import_utils import is_torchvision_greater_or_equal

# SmolVLM's processor spells the number of a video's frames with num2words, and will not start without the package.
processing_smolvlm.num2words = processing_smolvlm.num2words or str

SENTENCES = (
    "How many chairs are in the room? There are three chairs in the room.",
    "Which object is closer to the table, the lamp or the sofa? The lamp is closer.",
    "What is the distance between the door and the window in metres? About two metres.",
)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    In `config`, the value of a key about token ids is the token itself; it becomes an id once the tokenizer exists.

    Attributes:
        tokens: The tokenizer's special tokens by attribute name (`image_token` and the like).
        more_tokens: Special tokens that go without an attribute.
        turns: What stands before and after a message, by role.
        picture: What the chat template writes for a picture.
        opening: What the chat template writes first.
        processor: Class and arguments of the processor.
        image: Class and arguments of the image processor.
        video: Class and arguments of the video processor, where the processor wants one.
        audio: Class and arguments of the audio feature extractor, where the processor wants one.
        adds_bos: Whether the tokenizer itself puts `bos_token` before a text.
        chats: Whether the processor was made for conversations. One that was not wants a picture in every call and
            writes parts of the prompt itself, so that no part of the chat template can be found again.
        text: The language model's configuration, above `TEXT`.
        vision: The vision tower's configuration.
        config: The rest of the configuration.
        model_type: The configuration's type, where it is not the name of the row.
    """

    tokens: dict[str, str]
    turns: dict[str, tuple[str, str]]
    picture: str
    processor: tuple[str, dict[str, Any]]
    image: tuple[str, dict[str, Any]]
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any]
    more_tokens: tuple[str, ...] = ()
    opening: str = ""
    video: tuple[str, dict[str, Any]] | None = None
    audio: tuple[str, dict[str, Any]] | None = None
    adds_bos: bool = False
    chats: bool = True
    model_type: str | None = None


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 4096}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# The color of the padding follows from it where it is given, as in every released folder; transformers below 5.21 pads
# with gray where it is the class's default.
CLIP_MEAN = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
# A square tower: 28 x 28 pixels in 4 x 4 patches.
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 7}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 32}
SQUARE = {"height": 28, "width": 28}


def _turns(before: str, after: str, **names: str) -> dict[str, tuple[str, str]]:
    """What stands before and after a message, by role; `{}` is the role's name."""
    return {role: (before.format(names.get(role, role)), after) for role in ("system", "user", "assistant")}


CHATML = _turns("<|im_start|>{}\n", "<|im_end|>\n")
GLM = _turns("<|{}|>\n", "")
IDEFICS = _turns("{}:", "<end_of_utterance>\n", system="System", user="User", assistant="Assistant")
GEMMA3 = _turns("<start_of_turn>{}\n", "<end_of_turn>\n", system="user", assistant="model")
GEMMA4 = _turns("<|turn>{}\n", "<turn|>\n", assistant="model")
COHERE = _turns(
    "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>", "<|END_OF_TURN_TOKEN|>", system="SYSTEM", user="USER", assistant="CHATBOT"
)
VICUNA = {"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT:", "</s>")}
MISTRAL = {"system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "user": ("[INST]", "[/INST]"), "assistant": ("", "</s>")}
DEEPSEEK = {"system": ("", "\n\n"), "user": ("User:", "\n\n"), "assistant": ("Assistant:", "<|end|>")}

QWEN_TOKENS = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
QWEN_TOKENS |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
LLAMA_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
GEMMA_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "image_token": "<image_soft_token>"}
GEMMA_TOKENS |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
IDEFICS_TOKENS = {"pad_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
IDEFICS_TOKENS |= {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
IDEFICS_MORE = ("<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)))
MISTRAL_MORE = ("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
COHERE_TOKENS = {"pad_token": "<PAD>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}
COHERE_MORE = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")


def _qwen(processor: str, video: str, text: dict, vision: dict, patch_size: int = 14) -> Family:
    """Families that patch a picture at its own size and merge 2 x 2 patches into a token; 3D rotary positions."""
    sizes = {"patch_size": patch_size, "size": {"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28}}
    return Family(
        tokens=QWEN_TOKENS,
        more_tokens=("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
        turns=CHATML,
        picture="<|vision_start|><|image_pad|><|vision_end|>",
        processor=(processor, {}),
        image=("Qwen2VLImageProcessor", sizes),
        video=(video, sizes),
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}} | text,
        vision={"depth": 2, "num_heads": 2, "patch_size": patch_size} | vision,
        config={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
    )


QWEN3_VISION = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 16}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN3_5_TEXT = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}


def _idefics(name: str, video: tuple[str, dict] | None) -> Family:
    """Families that cut a large picture into tiles, and pad the pictures of a batch to the longest sample."""
    # AutoProcessor loads the class for Pillow where torchvision has no Lanczos resampling.
    backend = "" if is_torchvision_greater_or_equal("0.27") else "Pil"
    return Family(
        tokens=IDEFICS_TOKENS,
        more_tokens=IDEFICS_MORE,
        turns=IDEFICS,
        opening="<|im_start|>",
        picture="<image>",
        processor=(f"{name}Processor", {"image_seq_len": 4}),
        image=(
            f"{name}ImageProcessor{backend}",
            {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        ),
        video=video,
        text={"model_type": "llama"},
        vision=TOWER,
        config={"image_token_id": "<image>", "scale_factor": 2},
    )


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _qwen(
        "Qwen2VLProcessor", "Qwen2VLVideoProcessor", {}, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
        {},
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor", "Qwen3VLVideoProcessor", {"head_dim": 16}, QWEN3_VISION | DEEPSTACK, patch_size=16
    ),
    "qwen3_vl_moe": _qwen(
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        {"head_dim": 16} | EXPERTS,
        QWEN3_VISION | DEEPSTACK,
        patch_size=16,
    ),
    "qwen3_5": _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", QWEN3_5_TEXT, QWEN3_VISION, patch_size=16),
    "qwen3_5_moe": _qwen(
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        QWEN3_5_TEXT | EXPERTS | {"shared_expert_intermediate_size": 32},
        QWEN3_VISION,
        patch_size=16,
    ),
    "internvl": Family(
        tokens={
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        more_tokens=("<|im_start|>",),
        turns=CHATML,
        picture="<IMG_CONTEXT>\n",
        processor=("InternVLProcessor", {"image_seq_length": 4}),
        image=("GotOcr2ImageProcessor", {"size": SQUARE, "max_patches": 4}),
        video=("InternVLVideoProcessor", {"size": SQUARE}),
        text={"model_type": "qwen2"},
        vision=TOWER,
        config={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
    ),
    "llava": Family(
        tokens=LLAMA_TOKENS,
        turns=VICUNA,
        opening="<s>",
        adds_bos=True,
        picture="<image>\n",
        processor=(
            "LlavaProcessor",
            {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        image=("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": SQUARE}),
        text={"model_type": "llama"},
        vision=CLIP,
        config={"image_token_index": "<image>", "image_seq_length": 16},
    ),
    "llava_next": Family(
        tokens=LLAMA_TOKENS,
        more_tokens=("[INST]", "[/INST]"),
        turns=MISTRAL,
        opening="<s>",
        adds_bos=True,
        picture="<image>\n",
        processor=(
            "LlavaNextProcessor",
            {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        image=(
            "LlavaNextImageProcessor",
            {
                "size": {"shortest_edge": 28},
                "crop_size": SQUARE,
                "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
            },
        ),
        text={"model_type": "mistral"},
        vision=CLIP,
        config={"image_token_index": "<image>", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]},
    ),
    "llava_onevision": Family(
        tokens=QWEN_TOKENS | {"image_token": "<image>", "video_token": "<video>"},
        more_tokens=("<|im_start|>",),
        turns=CHATML,
        picture="<image>\n",
        processor=(
            "LlavaOnevisionProcessor",
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
        ),
        image=(
            "LlavaOnevisionImageProcessor",
            {"size": SQUARE, "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]]},
        ),
        video=("LlavaOnevisionVideoProcessor", {"size": SQUARE}),
        text={"model_type": "qwen2"},
        vision=SIGLIP,
        config={
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
            "vision_aspect_ratio": "anyres_max_2",
        },
    ),
    "gemma3": Family(
        tokens=GEMMA_TOKENS,
        more_tokens=("<start_of_turn>", "<end_of_turn>"),
        turns=GEMMA3,
        opening="<bos>",
        adds_bos=True,
        picture="<start_of_image>",
        processor=("Gemma3Processor", {"image_seq_length": 4}),
        image=("Gemma3ImageProcessor", {"size": SQUARE}),
        text={
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision=SIGLIP,
        config={
            "mm_tokens_per_image": 4,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    ),
    "smolvlm": _idefics(
        "SmolVLM", ("SmolVLMVideoProcessor", {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}})
    ),
    "idefics3": _idefics("Idefics3", None),
    "mistral3": Family(
        tokens=LLAMA_TOKENS | {"image_token": "[IMG]"},
        more_tokens=MISTRAL_MORE,
        turns=MISTRAL,
        opening="<s>",
        adds_bos=True,
        picture="[IMG]",
        processor=("PixtralProcessor", {"patch_size": 7, "spatial_merge_size": 2}),
        image=("PixtralImageProcessor", {"size": {"longest_edge": 56}, "patch_size": 7}),
        text={"model_type": "mistral", "head_dim": 16},
        vision=TOWER | {"model_type": "pixtral", "image_size": 56},
        config={"image_token_index": "[IMG]", "spatial_merge_size": 2},
    ),
    "pixtral": Family(
        model_type="llava",
        tokens=LLAMA_TOKENS | {"image_token": "[IMG]"},
        more_tokens=MISTRAL_MORE,
        turns=MISTRAL,
        opening="<s>",
        adds_bos=True,
        picture="[IMG]",
        processor=("PixtralProcessor", {"patch_size": 14}),
        image=("PixtralImageProcessor", {"size": {"longest_edge": 56}, "patch_size": 14}),
        text={"model_type": "mistral", "head_dim": 16},
        vision=TOWER | {"model_type": "pixtral", "image_size": 56, "patch_size": 14},
        config={"image_token_index": "[IMG]", "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "glm4v": Family(
        tokens={
            "pad_token": "<|endoftext|>",
            "eos_token": "<|user|>",
            "image_token": "<|image|>",
            "video_token": "<|video|>",
        },
        more_tokens=(
            *("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|end_of_video|>"),
        ),
        turns=GLM,
        opening="[gMASK]<sop>",
        picture="<|begin_of_image|><|image|><|end_of_image|>",
        processor=("Glm4vProcessor", {}),
        image=("Glm4vImageProcessor", {"size": {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 12 * 28 * 28}}),
        video=("Glm4vVideoProcessor", {"size": {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 12 * 28 * 28}}),
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        },
        vision={
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "image_size": 56,
            "patch_size": 14,
        },
        config={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
    ),
    "paligemma": Family(
        tokens={"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "image_token": "<image>"},
        turns={"system": ("", "\n"), "user": ("", "\n"), "assistant": ("", "<eos>")},
        chats=False,
        picture="<image>",
        processor=("PaliGemmaProcessor", {}),
        image=("SiglipImageProcessor", {"size": SQUARE, "image_seq_length": 16}),
        text={"model_type": "gemma", "head_dim": 16},
        vision=SIGLIP,
        config={"image_token_index": "<image>", "projection_dim": 64, "hidden_size": 64},
    ),
    "aya_vision": Family(
        tokens=COHERE_TOKENS | {"image_token": "<image>"},
        more_tokens=(
            *COHERE_MORE,
            *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"),
        ),
        turns=COHERE,
        opening="<BOS_TOKEN>",
        adds_bos=True,
        picture="<image>",
        processor=("AyaVisionProcessor", {"patch_size": 7, "img_size": 28, "downsample_factor": 2}),
        image=("GotOcr2ImageProcessor", {"size": SQUARE, "max_patches": 4}),
        text={"model_type": "cohere2", "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        vision=SIGLIP,
        config={"image_token_index": "<|IMG_PATCH|>", "downsample_factor": 2},
    ),
    "cohere2_vision": Family(
        tokens=COHERE_TOKENS
        | {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        more_tokens=COHERE_MORE,
        turns=COHERE,
        opening="<BOS_TOKEN>",
        adds_bos=True,
        picture="<|IMG_PATCH|>",
        processor=("Cohere2VisionProcessor", {}),
        image=("Cohere2VisionImageProcessor", {"size": SQUARE, "max_patches": 4, "patch_size": 2}),
        text={"model_type": "cohere2", "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        vision=SIGLIP,
        config={"image_token_id": "<|IMG_PATCH|>", "downsample_factor": 2, "alignment_intermediate_size": 64},
    ),
    "ovis2": Family(
        tokens=QWEN_TOKENS | {"image_token": "<image>"},
        more_tokens=(
            *("<|im_start|>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        ),
        turns=CHATML,
        picture="<image>\n",
        processor=("Ovis2Processor", {"image_seq_length": 4}),
        image=("Ovis2ImageProcessor", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
        text={"model_type": "qwen2"},
        vision=TOWER | {"vocab_size": 24, "hidden_stride": 2},
        config={
            "hidden_size": 64,
            "image_token_id": "<IMG_ATOM>",
            "visual_indicator_token_ids": ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        },
    ),
    "lfm2_vl": Family(
        tokens={
            "pad_token": "<|pad|>",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        more_tokens=("<|im_start|>", *(f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5))),
        turns=CHATML,
        opening="<|startoftext|>",
        picture="<image>",
        processor=("Lfm2VlProcessor", {}),
        image=(
            "Lfm2VlImageProcessor",
            {
                "size": {"height": 56, "width": 56},
                "tile_size": 56,
                "encoder_patch_size": 7,
                "min_image_tokens": 4,
                "max_image_tokens": 16,
                "max_tiles": 4,
            },
        ),
        text={"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        vision={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 7,
            "num_patches": 64,
            "vision_use_head": False,
        },
        config={"image_token_id": "<image>", "projector_hidden_size": 64},
    ),
    "deepseek_vl": Family(
        tokens={
            "pad_token": "<pad>",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "image_token": "<image_placeholder>",
        },
        turns=DEEPSEEK,
        opening="<|begin|>",
        adds_bos=True,
        picture="<image_placeholder>",
        processor=("DeepseekVLProcessor", {"num_image_tokens": 16}),
        image=("DeepseekVLImageProcessor", {"size": SQUARE, **CLIP_MEAN}),
        text={"model_type": "llama"},
        vision=SIGLIP,
        config={"image_token_id": "<image_placeholder>"},
    ),
    "janus": Family(
        tokens={
            "pad_token": "<pad>",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        turns=DEEPSEEK,
        opening="<|begin|>",
        adds_bos=True,
        picture="<image_placeholder>\n",
        processor=("JanusProcessor", {"num_image_tokens": 16}),
        image=("JanusImageProcessor", {"size": SQUARE, **CLIP_MEAN}),
        text={"model_type": "llama"},
        vision={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "mlp_ratio": 2.0,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        config={
            "image_token_id": "<image_placeholder>",
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
        },
    ),
    "gemma4": Family(
        tokens={
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "bos_token": "<bos>",
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        more_tokens=("<|turn>", "<turn|>", "<|video|>"),
        turns=GEMMA4,
        opening="<bos>",
        adds_bos=True,
        picture="<|image|>",
        processor=("Gemma4Processor", {"image_seq_length": 70}),
        image=("Gemma4ImageProcessor", {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}),
        audio=("Gemma4AudioFeatureExtractor", {}),
        video=("Gemma4VideoProcessor", {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}),
        text={
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "use_bidirectional_attention": "vision",
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        config={
            "image_token_id": "<|image|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "video_token_id": "<|video|>",
            "audio_token_id": "<|audio|>",
        },
    ),
}


SIZES = {"size": {"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN = {"system": ("", "\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "<eos>")}
PLAIN_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
IMAGE_BOUNDS = {"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}


def _glm(text: dict, processor: str = "Glm46V") -> Family:
    """Relatives of GLM-4V."""
    glm = FAMILIES["glm4v"]
    parts = {"processor": f"{processor}Processor", "image": f"{processor}ImageProcessor"}
    parts |= {"video": f"{processor}VideoProcessor"}
    return replace(glm, **{part: (cls, getattr(glm, part)[1]) for part, cls in parts.items()}, text=glm.text | text)


def _omni(processor: str, base: str, audio: dict, config: dict) -> Family:
    """The parts of Qwen-Omni that see, hear and write."""
    family = FAMILIES[base]
    tokens = {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    shared = {
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_config": {
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "n_window": 4,
            "output_dim": 64,
        }
        | audio,
    }
    return replace(
        family,
        tokens=QWEN_TOKENS | tokens | {"audio_token": "<|AUDIO|>"},
        more_tokens=("<|im_start|>",),
        picture="<|vision_bos|><|image_pad|><|vision_eos|>",
        processor=(processor, {}),
        video=("Qwen2VLVideoProcessor", family.image[1]),
        audio=("WhisperFeatureExtractor", {"feature_size": 16}),
        config=shared | config,
    )


def _minicpm(version: str) -> Family:
    return Family(
        tokens=QWEN_TOKENS
        | IMAGE_BOUNDS
        | {
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        more_tokens=("<|im_start|>",),
        turns=CHATML,
        picture="<|image_pad|>\n",
        processor=(f"MiniCPMV{version}Processor", {}),
        image=("MiniCPMV4_6ImageProcessor", {"scale_resolution": 56, "patch_size": 7, "max_slice_nums": 4}),
        video=("MiniCPMV4_6VideoProcessor", {"scale_resolution": 56, "patch_size": 7}),
        text={"model_type": "qwen3_5_text"} | QWEN3_5_TEXT,
        vision=NARROW | {"num_hidden_layers": 3, "patch_size": 7, "image_size": 112, "insert_layer_id": 1},
        config={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "insert_layer_id": 1,
            "image_size": 56,
        },
    )


MORE_FAMILIES: dict[str, Family] = {
    "glm46v": _glm({}),
    "glm4v_moe": _glm(
        {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "Glm4v",
    ),
    "glm_ocr": _glm({"head_dim": 16}),
    "exaone4_5": replace(
        FAMILIES["qwen2_5_vl"],
        processor=("Exaone4_5_Processor", {}),
        text={
            "model_type": "exaone4",
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision=FAMILIES["qwen2_5_vl"].vision | {"num_key_value_heads": 1},
        config={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    ),
    "llava_next_video": replace(
        FAMILIES["llava_next"],
        tokens=LLAMA_TOKENS | {"video_token": "<video>"},
        processor=("LlavaNextVideoProcessor", FAMILIES["llava_next"].processor[1]),
        video=("LlavaNextVideoVideoProcessor", {"size": {"shortest_edge": 28}, "crop_size": SQUARE}),
        text={"model_type": "llama"},
        config=FAMILIES["llava_next"].config | {"video_token_index": "<video>"},
    ),
    "vipllava": replace(FAMILIES["llava"], config=FAMILIES["llava"].config | {"vision_feature_layer": [-2, -1, 1]}),
    "video_llama_3": Family(
        tokens=QWEN_TOKENS,
        more_tokens=("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
        turns=CHATML,
        picture="<|vision_start|><|image_pad|><|vision_end|>",
        processor=("VideoLlama3Processor", {}),
        image=("VideoLlama3ImageProcessor", SIZES),
        video=("VideoLlama3VideoProcessor", SIZES),
        text={"model_type": "qwen2"},
        vision=NARROW | {"patch_size": 14},
        config={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    ),
    "paddleocr_vl": Family(
        tokens=PLAIN_TOKENS | {"image_token": "<|IMAGE_PLACEHOLDER|>"},
        more_tokens=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        turns=PLAIN,
        picture="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        processor=("PaddleOCRVLProcessor", {}),
        image=("PaddleOCRVLImageProcessor", SIZES),
        text={"head_dim": 16} | MROPE,
        vision=NARROW | {"patch_size": 14, "image_size": 56},
        config={
            "image_token_id": "<|IMAGE_PLACEHOLDER|>",
            "vision_start_token_id": "<|IMAGE_START|>",
            "vision_end_token_id": "<|IMAGE_END|>",
        },
    ),
    "lighton_ocr": Family(
        tokens=QWEN_TOKENS | {"image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        more_tokens=("<|im_start|>",),
        turns=CHATML,
        picture="<|image_pad|>",
        processor=("LightOnOcrProcessor", {"patch_size": 7, "spatial_merge_size": 2}),
        image=("PixtralImageProcessor", {"size": {"longest_edge": 56}, "patch_size": 7}),
        text={"model_type": "qwen3", "head_dim": 16},
        vision=TOWER | {"model_type": "pixtral", "image_size": 56},
        config={"image_token_id": "<|image_pad|>", "spatial_merge_size": 2},
    ),
    "perception_lm": Family(
        tokens=LLAMA_TOKENS | {"image_token": "<|image|>", "video_token": "<|video|>"},
        turns=VICUNA,
        opening="<s>",
        adds_bos=True,
        picture="<|image|>",
        processor=("PerceptionLMProcessor", {"patch_size": 7, "pooling_ratio": 2}),
        image=("PerceptionLMImageProcessor", {"tile_size": 28, "vision_input_type": "vanilla"}),
        video=("PerceptionLMVideoProcessor", {"size": SQUARE}),
        text={"model_type": "llama"},
        vision={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "do_pooling": False,
            "hidden_size": 32,
            "num_labels": 0,
            "model_args": {
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "img_size": [28, 28],
                "patch_size": 7,
                "mlp_ratio": 2,
                "global_pool": "",
                "ref_feat_shape": [4, 4],
            },
        },
        config={"image_token_id": "<|image|>", "video_token_id": "<|video|>", "projector_pooling_ratio": 2},
    ),
    "fast_vlm": Family(
        tokens=QWEN_TOKENS | {"image_token": "<image>"},
        more_tokens=("<|im_start|>",),
        turns=CHATML,
        picture="<image>\n",
        processor=(
            "LlavaProcessor",
            {"patch_size": 32, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        ),
        image=("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
        text={"model_type": "qwen2"},
        vision={
            "model_type": "timm_wrapper",
            "architecture": "test_resnet",
            "do_pooling": False,
            "hidden_size": 96,
            "num_labels": 0,
            "model_args": {"global_pool": ""},
        },
        config={"image_token_index": "<image>", "image_seq_length": 4},
    ),
    "gemma3n": Family(
        tokens=GEMMA_TOKENS
        | {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"},
        more_tokens=("<start_of_turn>", "<end_of_turn>"),
        turns=GEMMA3,
        opening="<bos>",
        adds_bos=True,
        picture="<image_soft_token>",
        processor=("Gemma3nProcessor", {"image_seq_length": 4}),
        image=("SiglipImageProcessor", {"size": {"height": 64, "width": 64}}),
        audio=("Gemma3nAudioFeatureExtractor", {}),
        text={
            "head_dim": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
        vision={
            "architecture": "test_resnet",
            "hidden_size": 96,
            "vocab_size": 8,
            "vocab_offset": 512,
            "model_args": {"global_pool": ""},
        },
        config={
            "vision_soft_tokens_per_image": 4,
            "image_token_id": "<image_soft_token>",
            "audio_token_id": "<audio_soft_token>",
            "boi_token_id": "<start_of_image>",
            "eoi_token_id": "<end_of_image>",
            "boa_token_id": "<start_of_audio>",
            "eoa_token_id": "<end_of_audio>",
            "audio_config": {
                "hidden_size": 32,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [8, 8],
                "vocab_size": 8,
                "vocab_offset": 520,
            },
        },
    ),
    "qwen2_5_omni_thinker": _omni(
        "Qwen2_5OmniProcessor",
        "qwen2_5_vl",
        {},
        {
            "image_token_index": "<|image_pad|>",
            "video_token_index": "<|video_pad|>",
            "audio_token_index": "<|AUDIO|>",
            "audio_end_token_id": "<|audio_eos|>",
        },
    ),
    "qwen3_omni_moe_thinker": _omni(
        "Qwen3OmniMoeProcessor",
        "qwen3_vl_moe",
        {"downsample_hidden_size": 8},
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|AUDIO|>"},
    ),
    "minicpmv4_6": _minicpm("4_6"),
    "minicpmv4_7": _minicpm("4_7"),
    "kimi_k25": Family(
        tokens=QWEN_TOKENS | {"image_token": "<|media_pad|>"},
        more_tokens=("<|im_start|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>"),
        turns=CHATML,
        picture="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        processor=("Kimi_K25Processor", {}),
        image=("Kimi_K25ImageProcessor", {"patch_size": 14, "size": {"max_height": 112, "max_width": 112}}),
        video=("Kimi_K25VideoProcessor", {"patch_size": 14}),
        text={
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        vision=NARROW | {"patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8},
        config={
            "image_token_id": "<|media_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|media_begin|>",
            "vision_end_token_id": "<|media_end|>",
            "projection_hidden_size": 32,
        },
    ),
    "molmo2": Family(
        tokens={
            "pad_token": "<|endoftext|>",
            "bos_token": "<|im_end|>",
            "eos_token": "<|im_end|>",
            "image_token": "<|image|>",
            "video_token": "<|video|>",
        },
        more_tokens=(
            *("<|im_start|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"),
            *("<im_end>", "<frame_end>", "<im_low>"),
        ),
        turns=CHATML,
        opening="<|im_end|>",
        picture="<|image|>",
        processor=("Molmo2Processor", {}),
        image=(
            "Molmo2ImageProcessor",
            {"size": SQUARE, "patch_size": 7, "max_crops": 2, "overlap_margins": [0, 0]},
        ),
        video=("Molmo2VideoProcessor", {"size": SQUARE, "patch_size": 7}),
        text={"head_dim": 16, "additional_vocab_size": 16},
        vision=NARROW
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 7,
            "image_size": [28, 28],
            "num_position_embeddings": 16,
        },
        config={
            "image_patch_id": "<im_patch>",
            "image_start_token_id": "<im_start>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "image_end_token_id": "<im_end>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
            "adapter_config": {
                "vision_feature_layer": [-1, -2],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 64,
                "text_hidden_size": 64,
            },
        },
    ),
    "ernie4_5_vl_moe": Family(
        tokens=PLAIN_TOKENS
        | IMAGE_BOUNDS
        | {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "video_start_token": "<|video_start|>",
            "video_end_token": "<|video_end|>",
        },
        turns=PLAIN,
        picture="<|image_start|><|image|><|image_end|>",
        processor=("Ernie4_5_VLMoeProcessor", {}),
        image=("Ernie4_5_VLMoeImageProcessor", SIZES),
        video=("Ernie4_5_VLMoeVideoProcessor", {"draw_on_frames": False}),
        text={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
        },
        vision={"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64},
        config={
            f"{kind}{part}_token_id": f"<|{kind}{part}|>"
            for kind in ("image", "video")
            for part in ("", "_start", "_end")
        },
    ),
    "minimax_m3_vl": Family(
        tokens=PLAIN_TOKENS,
        more_tokens=("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
        turns=PLAIN,
        opening="<bos>",
        picture="]<]image[>[",
        processor=("MiniMaxM3VLProcessor", {}),
        image=("MiniMaxM3VLImageProcessor", SIZES),
        video=("MiniMaxM3VLVideoProcessor", {}),
        text={
            "head_dim": 16,
            "rotary_dim": 8,
            "intermediate_size": 32,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "full_attention"],
        },
        vision=NARROW | {"patch_size": 14, "image_size": 112},
        config={
            "image_token_index": "]<]image[>[",
            "video_token_index": "]<]video[>[",
            "projector_hidden_size": 64,
        },
    ),
    "step3p7": Family(
        tokens=PLAIN_TOKENS,
        more_tokens=("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"),
        turns=PLAIN,
        opening="<bos>",
        picture="<im_patch>",
        processor=("Step3p7Processor", {}),
        image=(
            "Step3p7ImageProcessor",
            {"size": {"height": 112, "width": 112}, "patch_size": 56, "vision_patch_size": 7},
        ),
        text={
            "head_dim": 16,
            "num_local_experts": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "num_sliding_attention_heads": 4,
        },
        vision=NARROW | {"patch_size": 7, "image_size": 112, "mlp_ratio": 2.0},
        config={"image_token_id": "<im_patch>"},
    ),
    "deepseek_vl_hybrid": replace(
        FAMILIES["deepseek_vl"],
        processor=("DeepseekVLHybridProcessor", {"num_image_tokens": 16}),
        image=(
            "DeepseekVLHybridImageProcessor",
            {"size": SQUARE, "high_res_size": {"height": 64, "width": 64}} | CLIP_MEAN,
        ),
        config={
            "image_token_id": "<image_placeholder>",
            "high_res_vision_config": {
                "model_type": "sam_vision_model",
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 64,
                "num_pos_feats": 16,
            },
        },
    ),
    "idefics2": replace(
        FAMILIES["idefics3"],
        tokens=IDEFICS_TOKENS | {"image_boundary_token": "<fake_token_around_image>"},
        processor=("Idefics2Processor", {"image_seq_len": 4}),
        image=(
            "Idefics2ImageProcessor",
            {"size": {"shortest_edge": 28, "longest_edge": 28}, "do_image_splitting": False},
        ),
        text={"model_type": "mistral"},
        config={
            "image_token_id": "<image>",
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
        },
    ),
}
"""Families that only the slow tests of :mod:`test_spa3_vlm_families` run."""


@cache
def _byte_level_bpe() -> str:
    """Tokenizer file of a byte-level BPE: the 256 bytes and a few merges, so every string comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def _tokenizer(family: Family) -> transformers.PreTrainedTokenizerFast:
    """The shared tokenizer with a family's special tokens."""
    standard = {name: token for name, token in family.tokens.items() if name in ("pad_token", "bos_token", "eos_token")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
        **standard,
        **({"add_bos_token": True} if family.adds_bos else {}),
        extra_special_tokens={name: token for name, token in family.tokens.items() if name not in standard},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_tokens([*family.more_tokens], special_tokens=True)
    return tokenizer


def _chat_template(family: Family) -> str:
    """A family's chat template: messages of text and pictures; the assistant's words are marked for training."""
    words = {name: json.dumps(value) for name, value in vars(family).items() if name in ("turns", "picture", "opening")}
    return (
        "{%- macro say(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}{{ " + words["picture"] + " }}"
        "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{%- set turns = " + words["turns"] + " -%}{{ " + words["opening"] + " }}{%- for message in messages -%}"
        "{%- set turn = turns[message['role']] -%}{{ turn[0] }}{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{ say(message['content']) }}{{ turn[1] }}{%- endgeneration -%}"
        "{%- else -%}{{ say(message['content']) }}{{ turn[1] }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ turns['assistant'][0] }}{%- endif -%}"
    )


def build_processor(name: str) -> ProcessorMixin:
    """A family's processor, with a tiny tokenizer.

    Args:
        name: A key of `FAMILIES` or `MORE_FAMILIES`.
    """
    family = deepcopy((FAMILIES | MORE_FAMILIES)[name])
    parts = {"tokenizer": _tokenizer(family)}
    specs = {"image_processor": family.image, "video_processor": family.video, "feature_extractor": family.audio}
    for part, spec in specs.items():
        if spec is not None:
            parts[part] = getattr(transformers, spec[0])(**spec[1])
    cls, kwargs = family.processor
    return getattr(transformers, cls)(**parts, **kwargs, chat_template=_chat_template(family))


def build_config(name: str, processor: ProcessorMixin, **text_fields: Any) -> transformers.PreTrainedConfig:
    """A family's tiny configuration.

    Args:
        name: A key of `FAMILIES` or `MORE_FAMILIES`.
        processor: The processor whose token ids the configuration shall know.
        **text_fields: Fields of the language model's configuration in place of the family's.
    """
    # Configurations write into the dictionaries that they are given.
    family, tokenizer = deepcopy((FAMILIES | MORE_FAMILIES)[name]), processor.tokenizer

    def ids(key: str, value: Any) -> Any:
        if "_token_i" not in key and not key.endswith("_patch_id"):
            return value
        return [ids(key, item) for item in value] if isinstance(value, tuple) else tokenizer.vocab[value]

    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = TEXT | family.text | special | {"vocab_size": len(tokenizer)} | text_fields
    config = {key: ids(key, value) for key, value in family.config.items()}
    return AutoConfig.for_model(family.model_type or name, text_config=text, vision_config=family.vision, **config)


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **text_fields: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A family's tiny model and processor.

    Args:
        name: A key of `FAMILIES` or `MORE_FAMILIES`.
        seed: Seed of the weights; equal seeds give equal weights, and the global generator is left alone.
        dtype: Type of the weights.
        **text_fields: Fields of the language model's configuration in place of the family's.

    Returns:
        The model, in evaluation mode, and the processor, which pads on the left.
    """
    processor = build_processor(name)
    config = build_config(name, processor, **text_fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise / noise[0].numel() ** 0.5)
            else:
                parameter.add_((0.1 * noise).to(parameter.dtype))
    return model.eval(), processor


def image_features(model, inputs: dict):
    """What the model makes of the pictures, by the arguments that its base model names."""
    function = model.base_model.get_image_features
    kwargs = {name: inputs[name] for name in inspect.signature(function).parameters if name in inputs}
    return function(**kwargs, return_dict=True)


def without_pixels(inputs: dict) -> dict:
    """The batch less the pictures; the small tensors about them stay."""
    return {name: value for name, value in inputs.items() if name != "pixel_values"}
