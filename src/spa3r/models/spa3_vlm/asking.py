"""Encode a scene once and ask many questions about it, with a Spa3-VLM or any VLM of transformers.

The part of a prompt before the question is the same for all questions about a scene: the system prompt and the
pictures, nearly all of the tokens. Its keys and values are kept, and each question continues from them, so the vision
tower, Spa3R and the language model's pass over the pictures run once.

Tokens are exactly those of a whole prompt. The prefix ends after the last token of the pictures, which no tokenizer
merges with what follows. The tokens after it are taken from a whole prompt about one tiny picture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from spa3r.checks import check_count, is_count, shorten
from spa3r.media.images import Image, as_scenes, to_rgb
from spa3r.models.base import check_finite, finite_logits
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.fingerprints import PROBE, model_fingerprint, processor_fingerprint
from spa3r.models.spa3_vlm.prefix_cache import (
    PADDABLE_LAYERS,
    check_length,
    check_shares_prefix,
    empty_cache,
    repeated,
)
from spa3r.models.spa3_vlm.probe import probe_once
from spa3r.models.spa3_vlm.processing_spa3_vlm import VIEW_KEYS, Spa3VLMProcessor, check_messages, prompt_inputs
from spa3r.models.spa3_vlm.scenes import EncodedScene, check_origin
from spa3r.models.spa3_vlm.state import cache_name, in_eval_mode, place_positions, position_offsets, turn
from spa3r.models.spa3_vlm.vlm import check_generate_keywords, encode_images, image_tokens, vlm_of
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor

MAX_BATCH_SIZE = 32
"""Default number of questions in a batch."""

MAX_NEW_TOKENS = 128
"""Default maximum length of an answer."""

TAKEN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "cache_implementation", "use_cache"),
    *("num_return_sequences", "return_dict_in_generate", "inputs_embeds", "prefill_chunk_size", "assistant_model"),
    *("prompt_lookup_num_tokens", "max_length", "min_length"),
}
"""Arguments of ``generate`` that :func:`ask` sets itself or doesn't support. Lengths of a prompt and its answer would
count padding."""


@torch.no_grad()
def encode_scene(
    model: PreTrainedModel, processor: ProcessorMixin, images: Image | Sequence[Image], system: str | None = None
) -> EncodedScene:
    """:meth:`~spa3r.Spa3VLMForConditionalGeneration.encode_scene`, also with a VLM of transformers and its processor.

    Args:
        model: A Spa3-VLM or a VLM.
        processor: A :class:`~spa3r.Spa3VLMProcessor`, or for a VLM its own processor.
        images: Pictures of the scene, at least one.
        system: The system prompt.

    Raises:
        ValueError: There is no picture or more than one scene, or the prompts have no prefix that questions share.
    """
    pictures, *others = as_scenes(images)
    if others:
        raise ValueError(
            f"`images` must be the pictures of one scene, got {1 + len(others)} scenes. Encode each on its own."
        )
    check_shares_prefix(vlm_of(model))
    if not isinstance(processor, Spa3VLMProcessor):
        pictures = [to_rgb(picture) for picture in pictures]
    inputs = prompt_inputs(processor, [conversation(pictures, PROBE, system)])
    ids = inputs["input_ids"][0]
    length = _prefix_length(ids, _picture_ids(model, processor), processor)
    _check_probe(model, processor, ids, length, system)
    return _encode(model, processor, inputs, length, pictures, system)


@torch.no_grad()
def encode_prompt(
    model: PreTrainedModel, processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]]
) -> tuple[EncodedScene, list[int]]:
    """Encode a whole conversation, with pictures anywhere or none, for an answer to its last message.

    Args:
        model: A Spa3-VLM or a VLM.
        processor: A :class:`~spa3r.Spa3VLMProcessor`, or for a VLM its own processor.
        messages: The conversation; its pictures are of one scene.

    Returns:
        All tokens of the prompt but the last, encoded, and the last one, as :func:`continuations` returns it.

    Raises:
        ValueError: A message is invalid, a picture can't be read, or the VLM's pictures depend on the question.
    """
    check_shares_prefix(vlm_of(model))
    inputs = prompt_inputs(processor, [messages])
    ids = inputs["input_ids"][0].tolist()
    return _encode(model, processor, inputs, len(ids) - 1, [], None), ids[-1:]


def _encode(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Any,
    length: int,
    views: list[Any],
    system: str | None,
) -> EncodedScene:
    """The first tokens of a prompt, encoded. `views` are those of a VLM without Spa3R."""
    vlm, ids = vlm_of(model), inputs["input_ids"]
    check_length(vlm, length)
    if isinstance(processor, Spa3VLMProcessor):
        arrays: list[Any] = []
        if len(inputs["view_pixel_values"]):
            arrays = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
        views = [PIL.Image.fromarray(array) for array in arrays]
    inputs = {
        key: value[:, :length] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for key, value in inputs.to(execution_device(model)).items()
        if key != "labels"  # PaliGemma's
    }
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    cache = empty_cache(vlm)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(vlm.forward).parameters else {}
    with turn(model), in_eval_mode(model):
        inputs, appended = with_image_tokens(model, ids, mask, inputs)
        with appended:
            vlm(input_ids=ids, attention_mask=mask, use_cache=True, **{cache_name(vlm): cache}, **last, **inputs)
    delta = position_offsets(vlm, ids, mask, inputs)
    features = inputs.get("mm_encoder_outputs")
    tokens = [t.flatten(0, -2) for t in image_tokens(features["image"])] if features else []
    return EncodedScene(
        processor=processor,
        views=views,
        input_ids=ids[0].cpu(),
        image_tokens=torch.cat(tokens) if tokens else torch.empty(0, vlm.config.get_text_config().hidden_size),
        cache=cache,
        rope_delta=None if delta is None else int(delta.reshape(-1)[0]),
        system=system,
        model_fingerprint=model_fingerprint(model),
        processor_fingerprint=processor_fingerprint(processor),
    )


def check_batch_size(batch_size: int | None) -> int:
    """The number of questions per batch, :data:`MAX_BATCH_SIZE` for None.

    Raises:
        ValueError: It is not a whole number of at least 1.
    """
    if batch_size is None:
        return MAX_BATCH_SIZE
    if not is_count(batch_size):
        raise ValueError(f"`batch_size` must be at least 1, got {shorten(batch_size)}.")
    return batch_size


def with_image_tokens(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, inputs: dict[str, Any]
) -> tuple[dict[str, Any], AbstractContextManager]:
    """The VLM's arguments with image tokens in place of pixels, and the context in which it has to run."""
    if vlm_of(model) is not model:
        spa3_vlm: Any = model
        inputs, appended = spa3_vlm._fuse(ids, mask, inputs)
        return inputs, spa3_vlm._entering(appended)
    inputs = {key: value for key, value in inputs.items() if key not in VIEW_KEYS}
    if inputs.get("pixel_values") is None:
        return inputs, nullcontext()
    features = encode_images(model, inputs)
    for tokens in image_tokens(features):
        check_finite(model, tokens, "image tokens", **inputs)
    del inputs["pixel_values"]
    inputs |= {"mm_encoder_outputs": {"image": features}}
    probe_once(model, ids, mask, inputs)
    return inputs, nullcontext()


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    scene: EncodedScene,
    questions: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """:meth:`~spa3r.Spa3VLMForConditionalGeneration.ask` with a list of questions, also of a VLM of transformers.

    Args:
        model: The model that encoded the scene.
        scene: The result of :func:`encode_scene`.
        questions: A list.
        max_new_tokens: Maximum length of an answer.
        batch_size: Questions per batch.
        **generate_kwargs: Other arguments of ``generate``.

    Raises:
        TypeError: ``generate`` doesn't take a keyword.
        ValueError: The scene belongs to another model, or an argument is invalid.
    """
    if not isinstance(scene, EncodedScene):
        raise ValueError(f"`scene` must be what `encode_scene` returned, got {shorten(scene)}.")
    if not isinstance(questions, Sequence):
        raise ValueError(f"`questions` must be a text or a list of texts, got {shorten(questions)}.")
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    vlm, processor = vlm_of(model), scene.processor
    check_questions(processor, questions)
    batch_size = check_batch_size(batch_size)
    if taken := sorted(generate_kwargs.keys() & TAKEN):
        raise ValueError(
            f"`ask` must decide itself about {', '.join(map(repr, taken))}, since questions go on from the scene's "
            "cache and have one answer each. Leave it out, or call `generate` on whole prompts."
        )
    check_generate_keywords(model, generate_kwargs, generate_kwargs.get("generation_config"))
    check_origin(vars(scene), model, processor, "`scene`")
    if not questions:
        return []
    tails = continuations(model, scene, [conversation([], question, scene.system) for question in questions])
    check_length(vlm, len(scene) + max(map(len, tails)) + max_new_tokens)
    pads = all(type(layer).__name__ in PADDABLE_LAYERS for layer in scene.cache.layers)
    answers: dict[int, str] = {}
    with turn(model), in_eval_mode(model):
        for batch in _batches([len(tail) for tail in tails], batch_size, pads):
            words = _continue(model, scene, [tails[i] for i in batch], max_new_tokens, generate_kwargs)
            texts = processor.batch_decode(words, skip_special_tokens=True)
            answers |= {i: text.strip() for i, text in zip(batch, texts)}
    return [answers[i] for i in range(len(questions))]


def check_questions(processor: ProcessorMixin, questions: Sequence[str]) -> None:
    """Raise for questions that are no texts, empty, or contain a special token.

    Raises:
        ValueError: A question can't be asked.
    """
    for question in questions:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`questions` must be texts that are not empty, got {question!r}.")
    if questions:
        check_messages(processor, [{"role": "user", "content": question} for question in questions])


def _continue(
    model: PreTrainedModel,
    scene: EncodedScene,
    tails: Sequence[list[int]],
    max_new_tokens: int,
    generate_kwargs: dict[str, Any],
) -> Tensor:
    """(questions, new tokens), the tokens generated after the prefix and each question."""
    vlm: Any = vlm_of(model)
    device, length, longest = execution_device(model), len(scene), max(map(len, tails))
    # Padding lies between prefix and question and uses a token that the prefix contains anyway. Processors that
    # depend on the prompt's tokens, such as a repetition penalty, then give the same result as without padding.
    pad = text_token(model, scene)
    ids = torch.full((len(tails), length + longest), pad)
    ids[:, :length] = scene.input_ids
    mask = torch.ones_like(ids)
    for row, tail in enumerate(tails):
        ids[row, -len(tail) :] = torch.tensor(tail)
        mask[row, length : -len(tail)] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if scene.rope_delta is not None:
        positions = place_positions(vlm, positions, torch.tensor([[scene.rope_delta]]))
    arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens} | generate_kwargs
    output = vlm.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        **{cache_name(vlm): repeated(scene.cache, len(tails) * arguments["num_beams"])},
        logits_processor=finite_logits(model, arguments.pop("logits_processor", None)),
        **arguments,
    )
    return output[:, ids.shape[1] :]


def _batches(lengths: Sequence[int], batch_size: int, pads: bool) -> Iterator[list[int]]:
    """Group questions of similar length; of equal length if padding is not supported."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if pads else [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


# Prompts


def conversation(images: Sequence[Image], question: str, system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a question about pictures: the system prompt, if given, and the pictures with the question."""
    before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return behind_pictures(images, [*before, {"role": "user", "content": [{"type": "text", "text": question}]}])


def behind_pictures(images: Sequence[Image], messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with pictures before the content of the first user message.

    Raises:
        ValueError: There is no user message.
    """
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("The messages must hold one of the role 'user', got none. Ask something.")
    content = messages[first]["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    pictures = [{"type": "image", "image": image} for image in images]
    asked = {**messages[first], "content": [*pictures, *items]}
    return [*map(dict, messages[:first]), asked, *map(dict, messages[first + 1 :])]


def _picture_ids(model: PreTrainedModel, processor: ProcessorMixin) -> set[int]:
    """Tokens whose embeddings are replaced by other vectors."""
    appends = isinstance(processor, Spa3VLMProcessor) and processor.spatial_tokens is not None
    return {vlm_of(model).config.image_token_id} | ({processor.spatial_token_id} if appends else set())


def text_token(model: PreTrainedModel, scene: EncodedScene) -> int:
    """A token of the prefix whose embedding is not replaced, for padding."""
    picture_ids = _picture_ids(model, scene.processor)
    return next(token for token in scene.input_ids.tolist() if token not in picture_ids)


def _prefix_length(ids: Tensor, picture_ids: set[int], processor: ProcessorMixin) -> int:
    """Length of a prompt up to the last picture token, including special tokens directly after it."""
    tokens, special = ids.tolist(), set(processor.tokenizer.get_added_vocab().values())
    length = max((place + 1 for place, token in enumerate(tokens) if token in picture_ids), default=0)
    while length and length < len(tokens) and tokens[length] in special:
        length += 1
    return length


def _prompts_about_one_tiny_picture(
    processor: ProcessorMixin, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[int]]:
    """Whole prompts with minimal pictures, since the tokens after a picture don't depend on it."""
    if isinstance(processor, Spa3VLMProcessor):
        side = processor.view_image_processor.patch_size
        processor = copy.copy(processor)
        processor.image_mode = "native"
        processor.view_image_processor = Spa3RImageProcessor(size=side, patch_size=side)
    picture = PIL.Image.new("RGB", (56, 56))
    inputs = prompt_inputs(processor, [behind_pictures([picture], messages) for messages in conversations])
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]


def _tails_behind(prompts: Sequence[list[int]], prefix: Sequence[int], picture_ids: set[int]) -> list[list[int]] | None:
    """Tokens after the prefix in prompts about other pictures; None if their pictures end in different tokens."""
    ending = len(prefix) - max(place + 1 for place, token in enumerate(prefix) if token in picture_ids)
    tails = []
    for prompt in prompts:
        end = max(place + 1 for place, token in enumerate(prompt) if token in picture_ids) + ending
        if prompt[end - ending : end] != list(prefix[len(prefix) - ending :]):
            return None
        tails.append(prompt[end:])
    return tails


def continuations(
    model: PreTrainedModel, scene: EncodedScene, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[list[int]]:
    """The tokens of conversations about a scene after the scene's prefix.

    Args:
        model: The model that encoded the scene.
        scene: The result of :func:`encode_scene`.
        conversations: Messages without the scene's pictures, which belong before the first user message. They begin
            with the scene's system prompt, if it has one.

    Raises:
        ValueError: A conversation changes the prompt before its first question, or a message is invalid.
    """
    prompts = _prompts_about_one_tiny_picture(scene.processor, conversations)
    tails = _tails_behind(prompts, scene.input_ids.tolist(), _picture_ids(model, scene.processor))
    if tails is None:
        raise ValueError(
            "A question must leave the prompt before it as it is, and one of these changes it. It begins with a "
            "special token of the VLM: put a word before that, or ask with `model.generate` on a whole prompt."
        )
    return tails


def _check_probe(
    model: PreTrainedModel, processor: ProcessorMixin, ids: Tensor, length: int, system: str | None
) -> None:
    """Check that the chat template puts the question after the pictures, followed by nothing that depends on them."""
    prompt, tails = ids.tolist(), None
    if length:
        others = _prompts_about_one_tiny_picture(processor, [conversation([], PROBE, system)])
        tails = _tails_behind(others, prompt[:length], _picture_ids(model, processor))
    if tails != [prompt[length:]] or PROBE not in processor.decode(prompt[length:]):
        raise ValueError(
            f"The prompts of the VLM family {vlm_of(model).config.model_type!r} have no part that all questions about "
            "a scene share: its chat template must put the question behind the pictures, and say nothing there that "
            "depends on them. Ask with `model.generate` on whole prompts."
        )
