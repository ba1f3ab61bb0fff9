"""Run the language model of a Spa3-VLM in an engine of vLLM, which is not changed.

Only the image tokens of a Spa3-VLM differ from those of its VLM. They are computed here: views, Spa3R, vision tower and
adapter. The engine loads the plain VLM and takes the fused image tokens in place of pictures.

export_vlm(model, processor, "vlm")
engine = vllm.LLM("vlm", enable_mm_embeds=True, limit_mm_per_prompt={"image": 32})
engine.generate(vllm_prompt(model, processor, messages), vllm.SamplingParams(temperature=0))

vLLM is not imported here and may run elsewhere; :func:`vllm_messages` makes requests for its HTTP server.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spa3r.checks import shorten
from spa3r.conversion import save_together
from spa3r.media.images import Image
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.asking import PROBE, conversation, with_image_tokens
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor, prompt_inputs
from spa3r.models.spa3_vlm.state import in_eval_mode, turn
from spa3r.models.spa3_vlm.vlm import image_tokens

GRID_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose engines take all image tokens of a prompt in one tensor, with the grid of each picture."""

LIST_FAMILIES = ("internvl", "llava", "llava_onevision")
"""Families whose engines take a tensor of image tokens for each picture. All pictures that vLLM 0.32 processes at once,
also those of other requests, must have the same number of tokens: it stops otherwise."""


TOWER = re.compile(r"\bvision_tower\.(?!vision_model\.)")


def export_vlm(model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, folder: str | Path) -> None:
    """Write the VLM of a Spa3-VLM, with its own processor, to a folder that transformers and vLLM load.

    Args:
        model: A Spa3-VLM. Its Spa3R and adapter are not part of the export: they make the image tokens.
        processor: Its processor.
        folder: Target folder; existing files are replaced.

    Raises:
        ValueError: vLLM takes no fused image tokens of this model, or the model has adapters of PEFT.
        WriteError: The folder can't be written.
    """
    check_served(model)
    save_together(folder, _Exported(model.vlm), processor.vlm_processor)


class _Exported:
    """A VLM that is saved as vLLM reads it."""

    def __init__(self, vlm: PreTrainedModel):
        self.vlm = vlm

    def save_pretrained(self, folder: Path) -> None:
        weights = None
        if self.vlm.config.model_type in ("llava", "llava_onevision"):
            # The names of released checkpoints. Newer versions of transformers read them and write shorter ones.
            weights = {TOWER.sub(r"\g<0>vision_model.", name): value for name, value in self.vlm.state_dict().items()}
        self.vlm.save_pretrained(folder, state_dict=weights)
        if self.vlm.config.model_type == "qwen3_vl":
            # transformers always interleaves the three axes of rotary positions, vLLM only if the file says so.
            file = folder / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config["text_config"]["rope_parameters"]["mrope_interleaved"] = True
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def vllm_prompt(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, messages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The prompt of a conversation for an engine of vLLM that serves the VLM written by :func:`export_vlm`.

    Args:
        model: A Spa3-VLM.
        processor: Its processor.
        messages: A conversation in the chat format of Hugging Face that ends with a question. Its pictures and frames
            of videos are the views of one scene.

    Returns:
        What ``vllm.LLM.generate`` and ``vllm.AsyncLLM.generate`` take: ``prompt_token_ids``, with one placeholder for
        each picture, and for prompts with pictures ``multi_modal_data`` (their fused image tokens, on the CPU) and
        ``multi_modal_uuids`` (a digest of the tokens of each picture, by which the engine reuses them). The engine
        must run with ``enable_mm_embeds=True`` and ``limit_mm_per_prompt`` of at least the number of pictures.

    Raises:
        ValueError: vLLM takes no fused image tokens of this model, a message is invalid, or a picture can't be read.
    """
    return fused_prompt(model, processor, messages).for_engine()


def vllm_messages(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages of a conversation for the OpenAI-compatible server of vLLM, ``vllm serve --enable-mm-embeds``.

    Args:
        model: A Spa3-VLM.
        processor: Its processor.
        messages: See :func:`vllm_prompt`.

    Returns:
        The conversation with a content part of type ``image_embeds`` in place of each picture: ``image_embeds``, the
        base64 form of a NumPy file (a dictionary with ``image_grid_thw`` for families that need it), and ``uuid``, by
        which the server finds the keys and values of a scene that it has seen. It needs the tokens each time: vLLM
        0.32 keeps pictures for requests without them, but no embeddings.

    Raises:
        ValueError: As :func:`vllm_prompt`.
    """
    return fused_prompt(model, processor, messages).for_server()


@dataclass
class FusedPicture:
    """The image tokens of a picture.

    Attributes:
        tokens: (tokens, width) on the CPU; for Qwen3-VL, the features of its deepstack layers follow in each row.
        uuid: A digest of the tokens.
    """

    tokens: Tensor
    uuid: str


@dataclass
class FusedScene:
    """The image tokens of the pictures of a scene; see :func:`fused_scene`.

    Attributes:
        pictures: The pictures, in order.
        grids: (pictures, 3): time, height and width in patches, for families whose engines ask for it; or None.
        num_tokens: Number of tokens of a prompt up to the last picture.
        first_token: First token of a prompt.
    """

    pictures: list[FusedPicture]
    grids: Tensor | None
    num_tokens: int
    first_token: int

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return sum(picture.tokens.nbytes for picture in self.pictures)


@dataclass
class FusedPrompt:
    """A conversation whose pictures are image tokens.

    Attributes:
        messages: The conversation, with an item of type "image" for each picture.
        token_ids: Its tokens, with one placeholder for each picture.
        pictures: The pictures, in order.
        grids: As in :class:`FusedScene`.
        whole_ids: Its tokens, with a placeholder for each image token.
    """

    messages: list[dict[str, Any]]
    token_ids: list[int]
    pictures: list[FusedPicture]
    grids: Tensor | None
    whole_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the whole prompt."""
        return len(self.whole_ids)

    def for_engine(self) -> dict[str, Any]:
        """The argument of ``generate`` of an engine; see :func:`vllm_prompt`."""
        if not self.pictures:
            return {"prompt_token_ids": self.token_ids}
        data: Any = [picture.tokens for picture in self.pictures]
        if self.grids is not None:
            data = {"image_embeds": torch.cat(data), "image_grid_thw": self.grids}
        return {
            "prompt_token_ids": self.token_ids,
            "multi_modal_data": {"image": data},
            "multi_modal_uuids": {"image": [picture.uuid for picture in self.pictures]},
        }

    def for_server(self) -> list[dict[str, Any]]:
        """Messages for the server; see :func:`vllm_messages`."""
        parts: list[dict[str, Any]] = []
        for index, picture in enumerate(self.pictures):
            embeds: Any = _base64(picture.tokens)
            if self.grids is not None:
                embeds = {"image_embeds": embeds, "image_grid_thw": _base64(self.grids[index])}
            parts.append({"type": "image_embeds", "image_embeds": embeds, "uuid": picture.uuid})
        remaining = iter(parts)
        return [
            {**message, "content": [dict(i) if i["type"] == "text" else next(remaining) for i in message["content"]]}
            if isinstance(message["content"], list)
            else dict(message)
            for message in self.messages
        ]


@torch.no_grad()
def fused_prompt(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, messages: Sequence[Mapping[str, Any]]
) -> FusedPrompt:
    """The prompt of a conversation, in the form for engines and for servers.

    Args:
        model: A Spa3-VLM.
        processor: Its processor.
        messages: See :func:`vllm_prompt`.

    Raises:
        ValueError: As :func:`vllm_prompt`.
    """
    check_served(model)
    messages = processor.with_frames(messages)
    inputs = dict(prompt_inputs(processor, [messages]).to(execution_device(model)))
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    placeholder, whole = model.vlm.config.image_token_id, ids[0].tolist()
    short = _short_ids(processor, messages, whole[0])
    num_pictures, grids = short.count(placeholder), None
    if not num_pictures:
        return FusedPrompt(messages, short, [], None, short)
    with turn(model), in_eval_mode(model):
        inputs, _ = with_image_tokens(model, ids, mask, inputs)
    features = inputs["mm_encoder_outputs"]["image"]
    tokens = torch.cat([part.flatten(0, -2) for part in image_tokens(features)])
    for layer in getattr(features, "deepstack_features", None) or ():
        tokens = torch.cat([tokens, torch.cat(list(layer))], dim=-1)
    if model.vlm.config.model_type in GRID_FAMILIES:
        grids = inputs["image_grid_thw"].cpu()
        counts = (grids.prod(-1) // model.vlm.config.vision_config.spatial_merge_size**2).tolist()
    else:
        counts = _runs(whole, placeholder)
    if len(counts) != num_pictures or _expanded(short, placeholder, counts, processor) != whole:
        raise ValueError(
            f"The tokens of this conversation, {shorten(messages)}, differ from those of its text with its pictures, "
            "so vLLM would see another prompt. Ask with `model.generate`."
        )
    if grids is None and len(set(counts)) > 1:
        raise ValueError(
            f"The pictures have different numbers of tokens, {counts}, and vLLM needs equal ones for the VLM family "
            f"{model.vlm.config.model_type!r}. Give pictures of one size, or crop them to one."
        )
    pictures = [FusedPicture(part, _digest(part)) for part in tokens.detach().cpu().split(counts)]
    return FusedPrompt(messages, short, pictures, grids, whole)


def fused_scene(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, images: Sequence[Image], system: str | None
) -> FusedScene:
    """The image tokens of pictures, for any number of questions: see :func:`prompt_about`.

    Args:
        model: A Spa3-VLM.
        processor: Its processor.
        images: Pictures of the scene, at least one.
        system: The system prompt.

    Raises:
        ValueError: As :func:`vllm_prompt`.
    """
    prompt = fused_prompt(model, processor, conversation(images, PROBE, system))
    ids, placeholder = prompt.token_ids, model.vlm.config.image_token_id
    behind = ids[::-1].index(placeholder)  # number of tokens after the last picture
    return FusedScene(prompt.pictures, prompt.grids, prompt.num_tokens - behind, ids[0])


def prompt_about(
    model: Spa3VLMForConditionalGeneration,
    processor: Spa3VLMProcessor,
    scene: FusedScene,
    messages: Sequence[Mapping[str, Any]],
) -> FusedPrompt:
    """The prompt of a conversation about a scene.

    Args:
        model: The model that made the scene.
        processor: Its processor.
        scene: The result of :func:`fused_scene`.
        messages: The conversation without pictures: they belong before the content of the first user message.

    Raises:
        ValueError: A message is invalid.
    """
    processor.check_messages(messages)
    with_pictures, images = [dict(message) for message in messages], [{"type": "image"} for _ in scene.pictures]
    first = next(message for message in with_pictures if message["role"] == "user")
    content = first["content"]
    first["content"] = [*images, *([{"type": "text", "text": content}] if isinstance(content, str) else content)]
    short = _short_ids(processor, with_pictures, scene.first_token)
    counts = [len(picture.tokens) for picture in scene.pictures]
    whole = _expanded(short, model.vlm.config.image_token_id, counts, processor)
    return FusedPrompt(with_pictures, short, scene.pictures, scene.grids, whole)


def check_served(model: Any) -> None:
    """Raise for a model whose fused image tokens vLLM does not take.

    Raises:
        ValueError: The reason.
    """
    if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model has adapters of PEFT, which the exported VLM would not have. Merge them before: "
            "model.merge_and_unload(), or `spa3r merge`."
        )
    if not isinstance(model, Spa3VLMForConditionalGeneration):
        raise ValueError(f"`model` must be a Spa3VLMForConditionalGeneration, got {type(model).__name__}.")
    family = model.vlm.config.model_type
    if family not in (*GRID_FAMILIES, *LIST_FAMILIES):
        raise ValueError(
            f"vLLM is not known to take fused image tokens of the VLM family {family!r}. Use one of "
            f"{', '.join((*GRID_FAMILIES, *LIST_FAMILIES))}, or ask with `model.generate`."
        )
    if model.config.integration == "append":
        raise ValueError(
            "A model with `integration='append'` adds tokens beside those of pictures, which vLLM has no place for. "
            "Use a model with `integration='cross_attention'`, or ask with `model.generate`."
        )


def _short_ids(processor: Spa3VLMProcessor, messages: Sequence[Mapping[str, Any]], first: int) -> list[int]:
    """The tokens of a conversation's text, with one placeholder for each picture.

    `first` is the first token of whole prompts: the tokenizer may put it before a text.
    """
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = first == processor.tokenizer.bos_token_id != (ids or [None])[0]
    return [first, *ids] if begins else ids


def _wrapping(processor: Spa3VLMProcessor) -> tuple[list[int], list[int]]:
    """Tokens that the VLM's processor puts around those of a picture. The engine adds them too."""
    tokenizer, vlm_processor = processor.tokenizer, processor.vlm_processor
    names = (getattr(vlm_processor, f"{place}_image_token", None) for place in ("start", "end"))
    before, after = ([] if name is None else [tokenizer.convert_tokens_to_ids(name)] for name in names)
    return before, after


def _runs(ids: Sequence[int], token: int) -> list[int]:
    """Lengths of the runs of a token."""
    runs, previous = [], None
    for other in ids:
        if other == token:
            if previous == token:
                runs[-1] += 1
            else:
                runs.append(1)
        previous = other
    return runs


def _expanded(ids: Sequence[int], placeholder: int, counts: Sequence[int], processor: Spa3VLMProcessor) -> list[int]:
    """A prompt's tokens with as many placeholders for each picture as it has image tokens."""
    before, after = _wrapping(processor)
    remaining, expanded = iter(counts), []
    for token in ids:
        expanded += [*before, *[token] * next(remaining), *after] if token == placeholder else [token]
    return expanded


def _digest(tokens: Tensor) -> str:
    """Identifies fused image tokens. They depend on all pictures of a scene, so a picture's own digest would not do."""
    digest = hashlib.blake2b(f"{tokens.dtype} {tuple(tokens.shape)}".encode(), digest_size=16)
    digest.update(tokens.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _base64(tensor: Tensor) -> str:
    """The base64 form of a NumPy file, which is no pickle. NumPy has no bfloat16; float32 holds it exactly."""
    file = io.BytesIO()
    np.save(file, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


__all__ = ["export_vlm", "vllm_messages", "vllm_prompt"]
