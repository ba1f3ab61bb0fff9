"""Encode a scene once and ask many questions about it.

The part of a prompt before the question is the same for all questions about a scene: the system prompt and the
pictures, nearly all of the tokens. Its keys and values are kept, and each question continues from them, so the vision
tower, Spa3R and the language model's pass over the pictures run once.

Tokens are exactly those of a whole prompt. The prefix ends after the last token of the pictures, which no tokenizer
merges with what follows. The tokens after it are taken from a whole prompt about one tiny picture.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from spa3r.checks import check_count, is_count, shorten
from spa3r.disk import write_whole
from spa3r.models.base import finite_logits
from spa3r.models.spa3_vlm.fingerprints import PROBE, model_fingerprint, processor_fingerprint
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3_vlm.state import (
    cache_name,
    in_eval_mode,
    longest_shared_length,
    place_positions,
    position_offsets,
    turn,
)
from spa3r.models.spa3r.image_processing_spa3r import Image, Spa3RImageProcessor

if TYPE_CHECKING:
    from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration

MAX_BATCH_SIZE = 32
"""Default number of questions in a batch."""

UNSHARED_PREFIXES = {"paligemma": "its pictures look at the question"}
"""Families whose prefix depends on the question, with the reason."""

PADDABLE_LAYERS = {"DynamicLayer", "DummyLayer"}
"""Cache layers that handle padding with a mask. Sliding windows count padding, and recurrent states absorb it."""

CACHE_LAYERS = PADDABLE_LAYERS | {
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Cache layers that can be expanded to many rows: they hold only tensors with a row dimension, and counters."""

FORMAT = "spa3r scene 2"
ROOM = 64
"""Number of tokens that a layer can grow by before it is copied again."""


@dataclass(repr=False)
class EncodedScene:
    """The result of :meth:`~spa3r.Spa3VLMForConditionalGeneration.encode_scene`.

    Attributes:
        processor: The processor that made it; it also processes the questions.
        views: The pictures as passed to Spa3R.
        input_ids: (prefix,), the prompt up to the question.
        image_tokens: (sum of image tokens, h), fused.
        cache: The language model's keys and values of the prefix; the model's own kind of cache, with one row.
        rope_delta: Offset from a token's index to its rotary position after the pictures, in families whose pictures
            have three-dimensional positions; None in others.
        system: The system prompt, or None.
        model_fingerprint: Identifies the model that encoded it.
        processor_fingerprint: Identifies its processor.
    """

    processor: Spa3VLMProcessor
    views: list[PIL.Image.Image]
    input_ids: Tensor
    image_tokens: Tensor
    cache: Cache
    rope_delta: int | None
    system: str | None
    model_fingerprint: str
    processor_fingerprint: str

    def __len__(self) -> int:
        """Number of tokens of the prefix."""
        return len(self.input_ids)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.views)} views, {len(self.image_tokens)} image tokens, a prefix of "
            f"{len(self)} tokens, {self.num_bytes / 2**20:.1f} MiB)"
        )

    @property
    def cache_num_bytes(self) -> int:
        """Bytes of the keys and values. Each question of a batch needs the same amount again."""
        return sum(value.nbytes for state in _states(self.cache) for value in state.values() if _is_tensor(value))

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that the scene holds; used by :class:`SceneCache`."""
        pixels = sum(3 * view.width * view.height for view in self.views)
        return self.cache_num_bytes + self.image_tokens.nbytes + self.input_ids.nbytes + pixels

    def to(self, device: torch.device | str) -> EncodedScene:
        """A copy on another device, for example to keep it in host memory. Questions work from any device."""
        moved = copy.copy(self)
        moved.image_tokens, moved.cache = self.image_tokens.to(device), _changed(self.cache, lambda t: t.to(device))
        return moved

    # Files

    def save(self, file: str | os.PathLike) -> None:
        """Write a safetensors file atomically.

        Args:
            file: Target file; its folder is created if needed.

        Raises:
            WriteError: The file can't be written.
        """
        tensors = {"input_ids": self.input_ids, "image_tokens": self.image_tokens}
        tensors |= {f"views.{i}": torch.from_numpy(np.array(view)) for i, view in enumerate(self.views)}
        layers = []
        for i, (layer, state) in enumerate(zip(self.cache.layers, _states(self.cache))):
            tensors |= {f"cache.{i}.{name}": value for name, value in state.items() if _is_tensor(value)}
            layers.append([type(layer).__name__, {k: v for k, v in state.items() if not _is_tensor(v)}])
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {
            "views": len(self.views),
            "rope_delta": self.rope_delta,
            "system": self.system,
            "model_fingerprint": self.model_fingerprint,
            "processor_fingerprint": self.processor_fingerprint,
            "layers": layers,
        }
        about["digest"] = _digest(content, about)
        write_whole(file, save(content, metadata={"format": FORMAT, "scene": json.dumps(about)}))

    @classmethod
    def load(
        cls,
        file: str | os.PathLike,
        model: Spa3VLMForConditionalGeneration,
        processor: Spa3VLMProcessor,
        device: torch.device | str | None = None,
    ) -> EncodedScene:
        """Load a scene written by :meth:`save`.

        Args:
            file: The file to read.
            model: The model that encoded it, or the same one loaded again.
            processor: Its processor, with the same settings.
            device: Target device of the tensors; None: the model's.

        Raises:
            ValueError: The file is not a scene, is damaged or changed, or is of another model or processor.
        """
        device = model.device if device is None else device
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{file} must be a scene as `EncodedScene.save` writes it ({FORMAT!r}), got "
                        f"{shorten(metadata.get('format'))}. Encode the scene and save it again."
                    )
                about = _read_about(metadata.get("scene"), str(file))
                digest, said = about.pop("digest"), dict(about)
                layers, count = about.pop("layers"), about.pop("views")
                _check_origin(about, model, processor, str(file))
                tensors = {name: content.get_tensor(name) for name in content.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{file} can't be read as safetensors ({error}). It is truncated or damaged: encode the scene again."
            ) from error
        cache = _empty_cache(model.vlm)
        if [type(layer).__name__ for layer in cache.layers] != [name for name, _ in layers]:
            raise ValueError(
                f"{file} was written with another version of transformers, whose caches are of another kind. Encode "
                "the scene again."
            )
        if fault := _fault(tensors, layers, count, cache, model):
            raise ValueError(f"{file} is damaged or was changed: {fault}. Encode the scene again.")
        if digest != _digest(tensors, said):
            raise ValueError(f"{file} is damaged or was changed: it is not what was saved. Encode the scene again.")
        for i, (layer, (_, state)) in enumerate(zip(cache.layers, layers)):
            prefix = f"cache.{i}."
            own = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
            _set_state(layer, state | own)
        views = [PIL.Image.fromarray(tensors[f"views.{i}"].numpy()) for i in range(count)]
        return cls(processor, views, tensors["input_ids"], tensors["image_tokens"].to(device), cache, **about)


def _read_about(text: str | None, file: str) -> dict[str, Any]:
    """Metadata of a scene's file: all entries, with the right types."""
    try:
        about = json.loads(text or "null")
        is_right = about.keys() >= ABOUT.keys() and all(
            type(value) in ABOUT.get(key, ()) for key, value in about.items()
        )
        for name, state in about["layers"] if is_right else ():
            is_right = (
                is_right and isinstance(name, str) and all(type(value) in (int, bool) for value in state.values())
            )
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{file} is damaged or was changed: what it says about its scene must be the entries "
            f"{', '.join(sorted(ABOUT))}, each of its type. Encode the scene again."
        )
    return about


ABOUT = {
    "views": (int,),
    "rope_delta": (int, type(None)),
    "system": (str, type(None)),
    "model_fingerprint": (str,),
    "processor_fingerprint": (str,),
    "layers": (list,),
    "digest": (str,),
}
"""Metadata entries of a scene's file, and their types."""


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Hash of a scene's tensors (on the CPU) and of the metadata of its file."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fault(
    tensors: dict[str, Tensor],
    layers: list[tuple[str, dict[str, int | bool]]],
    count: int,
    cache: Cache,
    model: Spa3VLMForConditionalGeneration,
) -> str | None:
    """What is wrong with the tensors and numbers of a scene's file; None if nothing is."""
    names = {"input_ids", "image_tokens", *(f"views.{i}" for i in range(min(count, len(tensors))))}
    if count < 1 or not names <= tensors.keys() or len(names) != 2 + count:
        return f"it lacks tensors of its prompt or of its {count} views"
    text = model.config.get_text_config()
    ids, image_tokens = tensors["input_ids"], tensors["image_tokens"]
    if ids.ndim != 1 or ids.dtype != torch.long or not len(ids) or not 0 <= ids.min() <= ids.max() < text.vocab_size:
        return f"`input_ids` must be a row of tokens below {text.vocab_size}, got {shorten(ids)}"
    wanted = (int((ids == model.vlm.config.image_token_id).sum()), text.hidden_size)
    if tuple(image_tokens.shape) != wanted or not image_tokens.is_floating_point():
        return f"`image_tokens` must be {wanted}, one for each placeholder, got {shorten(image_tokens)}"
    for i in range(count):
        view = tensors[f"views.{i}"]
        if view.ndim != 3 or view.shape[-1] != 3 or view.dtype != torch.uint8 or not view.numel():
            return f"`views.{i}` must be (height, width, 3) bytes, got {shorten(view)}"
    for i, (layer, (_, numbers)) in enumerate(zip(cache.layers, layers)):
        own = {name.removeprefix(f"cache.{i}."): t for name, t in tensors.items() if name.startswith(f"cache.{i}.")}
        names |= {f"cache.{i}.{name}" for name in own}
        if fault := _layer_fault(layer, numbers, own, len(ids)):
            return f"layer {i} of its cache {fault}"
    if foreign := sorted(tensors.keys() - names):
        return f"it holds {shorten(foreign[0])}, which no scene has"
    return None


def _layer_fault(layer: Any, numbers: dict[str, int | bool], tensors: dict[str, Tensor], length: int) -> str | None:
    """What is wrong with a saved cache layer of a prefix of `length` tokens; None if nothing is."""
    for name in (*numbers, *tensors):  # names must be existing data attributes
        attribute, _, index = name.partition(".")
        known = attribute in vars(layer) and attribute not in ("dtype", "device")
        if not known or isinstance(vars(layer)[attribute], dict) != bool(index) or not f"0{index}".isdecimal():
            return f"has {shorten(name)}, which none has"
    kept = {name: tensors.get(name) for name in ("keys", "values")} if isinstance(layer, DynamicLayer) else {}
    shapes = {None if t is None or t.ndim != 4 else (t.shape[0], *t.shape[1:3]) for t in kept.values()}
    if kept and (len(shapes) != 1 or None in shapes or next(iter(shapes))[0] != 1):
        return "must have keys and values (1, heads, tokens, width) of equal shape"
    if kept and type(layer) is DynamicLayer and next(iter(shapes))[2] != length:
        return f"must hold the {length} tokens of the prompt, got {next(iter(shapes))[2]}"
    if numbers.get("cumulative_length", length) != length:
        return f"must have seen the {length} tokens of the prompt, got {numbers['cumulative_length']}"
    return None


class SceneMixin:
    """Scene methods of :class:`~spa3r.Spa3VLMForConditionalGeneration`: encode a scene and ask about it."""

    @torch.no_grad()
    def encode_scene(
        self, processor: Spa3VLMProcessor, images: Sequence[Image], *, system: str | None = None
    ) -> EncodedScene:
        """Compute everything about a scene that doesn't depend on the question, for :meth:`ask`.

        Args:
            processor: The model's processor.
            images: Pictures of the scene, at least one, in any form that the processor takes. For a video, pass its
                sampled frames (:func:`spa3r.media.videos.sample_frames`).
            system: The system prompt; None: the chat template's default, if any.

        Returns:
            The scene, on the model's device. The training mode of the modules is restored.

        Raises:
            ValueError: There is no picture, the family's prompts have no prefix that questions share, or the processor
                doesn't belong to the model.
        """
        images = [images] if isinstance(images, str | Path | PIL.Image.Image) else list(images)
        if not images:
            raise ValueError("`images` must hold at least one picture of the scene, got none.")
        check_shares_prefix(self.vlm)
        inputs = processor.apply_chat_template(
            [_conversation(images, PROBE, system)], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        ids = inputs["input_ids"]
        length = _prefix_length(ids[0], _picture_ids(self, processor), processor)
        _check_probe(self, processor, ids[0], length, system)
        _check_length(self.vlm, length)
        views = processor.view_image_processor.unpack(inputs["view_pixel_values"], inputs["view_grid_hw"])
        inputs = {
            key: value[:, :length] if isinstance(value, Tensor) and value.shape == ids.shape else value
            for key, value in inputs.to(self.device).items()
            if key != "labels"  # PaliGemma's
        }
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
        parameters = inspect.signature(self.vlm.forward).parameters
        name = cache_name(self.vlm)
        cache = _empty_cache(self.vlm)
        last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        with turn(self), in_eval_mode(self):
            inputs, appended = self._fuse(ids, mask, inputs)
            with self._entering(appended):
                self.vlm(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}, **last, **inputs)
        features = inputs["mm_encoder_outputs"]["image"].pooler_output
        features = [features] if isinstance(features, Tensor) else features
        delta = position_offsets(self.vlm, ids, mask, inputs)
        return EncodedScene(
            processor=processor,
            views=[PIL.Image.fromarray(view) for view in views],
            input_ids=ids[0].cpu(),
            image_tokens=torch.cat([tokens.flatten(0, -2) for tokens in features]),
            cache=cache,
            rope_delta=None if delta is None else int(delta.reshape(-1)[0]),
            system=system,
            model_fingerprint=model_fingerprint(self),
            processor_fingerprint=processor_fingerprint(processor),
        )

    @torch.no_grad()
    def ask(
        self,
        scene: EncodedScene,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        batch_size: int | None = None,
        **generate_kwargs,
    ) -> list[str] | str:
        """Answer questions about a scene, greedily by default.

        Each answer equals that of ``generate`` on a prompt with the pictures and this question alone.

        Args:
            scene: The result of :meth:`encode_scene`; it can be used any number of times.
            questions: One question, or a list.
            max_new_tokens: Maximum length of an answer.
            batch_size: Questions per batch; each needs ``scene.cache_num_bytes`` of memory. None: all, up to 32. In
                families whose caches don't support padding (sliding windows, linear attention, convolutions), only
                questions with the same number of tokens share a batch.
            **generate_kwargs: Any other argument of the VLM's ``generate``, except those about caches and the number
                of answers.

        Returns:
            A list of answers in the questions' order; for a single question, its answer.

        Raises:
            TypeError: ``generate`` doesn't take a keyword.
            ValueError: The scene belongs to another model, a question is empty or contains a special token, or an
                argument is out of range.
        """
        if not isinstance(scene, EncodedScene):
            raise ValueError(f"`scene` must be what `encode_scene` returned, got {shorten(scene)}.")
        if not isinstance(questions, str | Sequence):
            raise ValueError(f"`questions` must be a text or a list of texts, got {shorten(questions)}.")
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        many = [questions] if isinstance(questions, str) else list(questions)
        _check_questions(many, scene.processor)
        if batch_size is None:
            batch_size = MAX_BATCH_SIZE
        elif not is_count(batch_size):
            raise ValueError(f"`batch_size` must be at least 1, got {shorten(batch_size)}.")
        if taken := sorted(generate_kwargs.keys() & TAKEN):
            raise ValueError(
                f"`ask` must decide itself about {', '.join(map(repr, taken))}, since questions go on from the scene's "
                "cache and have one answer each. Leave it out, or call `generate` on whole prompts."
            )
        self._check_generate_keywords(generate_kwargs, generate_kwargs.get("generation_config"))
        _check_origin(vars(scene), self, scene.processor, "`scene`")
        if not many:
            return []
        tails = _tails(self, scene, many)
        _check_length(self.vlm, len(scene) + max(map(len, tails)) + max_new_tokens)
        pads = all(type(layer).__name__ in PADDABLE_LAYERS for layer in scene.cache.layers)
        answers: dict[int, str] = {}
        with turn(self), in_eval_mode(self):
            for batch in _batches([len(tail) for tail in tails], batch_size, pads):
                words = self._go_on(scene, [tails[i] for i in batch], max_new_tokens, generate_kwargs)
                texts = scene.processor.batch_decode(words, skip_special_tokens=True)
                answers |= {i: text.strip() for i, text in zip(batch, texts)}
        return answers[0] if isinstance(questions, str) else [answers[i] for i in range(len(many))]

    def _go_on(
        self, scene: EncodedScene, tails: Sequence[list[int]], max_new_tokens: int, generate_kwargs: dict[str, Any]
    ) -> Tensor:
        """(questions, new tokens), the tokens generated after the prefix and each question."""
        length, longest = len(scene), max(map(len, tails))
        # Padding lies between prefix and question and uses a token that the prefix contains anyway. Processors that
        # depend on the prompt's tokens, such as a repetition penalty, then give the same result as without padding.
        pad = next(token for token in scene.input_ids.tolist() if token not in _picture_ids(self, scene.processor))
        ids = torch.full((len(tails), length + longest), pad)
        ids[:, :length] = scene.input_ids
        mask = torch.ones_like(ids)
        for row, tail in enumerate(tails):
            ids[row, -len(tail) :] = torch.tensor(tail)
            mask[row, length : -len(tail)] = 0
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if scene.rope_delta is not None:
            positions = place_positions(self.vlm, positions, torch.tensor([[scene.rope_delta]]))
        arguments = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens} | generate_kwargs
        copies = len(tails) * arguments["num_beams"]
        output = self.vlm.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.to(self.device),
            **{cache_name(self.vlm): _shared(scene.cache, copies)},
            logits_processor=finite_logits(self, arguments.pop("logits_processor", None)),
            **arguments,
        )
        return output[:, ids.shape[1] :]


TAKEN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "cache_implementation", "use_cache"),
    *("num_return_sequences", "return_dict_in_generate", "inputs_embeds", "prefill_chunk_size", "assistant_model"),
    "prompt_lookup_num_tokens",
}
"""Arguments of ``generate`` that :meth:`SceneMixin.ask` sets itself or doesn't support."""


class SceneCache(MutableMapping[Hashable, EncodedScene]):
    """Thread-safe mapping from names to scenes with a size limit; the least recently used scenes are evicted first.

    .. code-block:: python

        scenes = SceneCache(max_bytes=8 * 2**30)
        scene = scenes.get_or_encode("room", lambda: model.encode_scene(processor, photos))

    Args:
        max_bytes: Limit for all scenes together (``num_bytes`` of each). A single larger scene is not kept.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int):
        if not is_count(max_bytes, 0):
            raise ValueError(f"`max_bytes` must be 0 or more, got {shorten(max_bytes)}.")
        self.max_bytes = max_bytes
        self._scenes: OrderedDict[Hashable, EncodedScene] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Total size of the cached scenes."""
        with self._lock:
            return sum(scene.num_bytes for scene in self._scenes.values())

    def __getitem__(self, name: Hashable) -> EncodedScene:
        with self._lock:
            scene = self._scenes[name]
            self._scenes.move_to_end(name)
            return scene

    def __setitem__(self, name: Hashable, scene: EncodedScene) -> None:
        with self._lock:
            self._scenes.pop(name, None)
            if scene.num_bytes > self.max_bytes:
                return
            self._scenes[name] = scene
            while self.num_bytes > self.max_bytes:
                self._scenes.popitem(last=False)

    def __delitem__(self, name: Hashable) -> None:
        with self._lock:
            del self._scenes[name]

    def __contains__(self, name: object) -> bool:  # doesn't count as a use
        return name in self._scenes

    def __iter__(self) -> Iterator[Hashable]:
        with self._lock:
            return iter(list(self._scenes))

    def __len__(self) -> int:
        return len(self._scenes)

    def get_or_encode(self, name: Hashable, encode: Callable[[], EncodedScene]) -> EncodedScene:
        """Return the scene of this name; if it is missing, call `encode`, keep the result and return it.

        Args:
            name: Any hashable key.
            encode: Called without arguments.
        """
        with self._lock:
            if name in self._scenes:
                return self[name]
            scene = self[name] = encode()
            return scene


class PrefixLayer(DynamicLayer):
    """Keys and values of a prefix shared by many rows: copied once, into a buffer that has room to grow.

    A :class:`DynamicLayer` with as many rows would copy all of the prefixes again with each new token.

    Args:
        prefix: A layer with one row; it is not changed.
    """

    def __init__(self, prefix: DynamicLayer):
        super().__init__()
        self.keys, self.values = prefix.keys, prefix.values
        self.dtype, self.device = prefix.keys.dtype, prefix.keys.device
        self.is_initialized = True
        self._key_store = self._value_store = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(rows, heads, new tokens, d) each -> (rows, heads, all tokens, d)."""
        self._key_store, self.keys = _append(self._key_store, self.keys, key_states)
        self._value_store, self.values = _append(self._value_store, self.values, value_states)
        return self.keys, self.values


def _append(store: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The buffer with `new` appended after `held`, and the part of it that is in use."""
    start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
    # There is no buffer yet, it is too small, or it is stale because beams were reordered.
    if store is None or end > store.shape[-2] or held.data_ptr() != store.data_ptr():
        store = new.new_empty(*new.shape[:2], end + ROOM, new.shape[-1])
        store[:, :, :start] = held
    store[:, :, start:end] = new
    return store, store[:, :, :end]


# Caches


def _empty_cache(vlm: PreTrainedModel) -> Cache:
    """An empty cache as ``generate`` makes it."""
    cache = DynamicCache(config=vlm.config.get_text_config(decoder=True))
    unknown = sorted({type(layer).__name__ for layer in cache.layers} - CACHE_LAYERS)
    if unknown:
        raise ValueError(
            f"The cache of the VLM family {vlm.config.model_type!r} has layers that questions can't share: "
            f"{', '.join(unknown)}. Ask with `model.generate` on whole prompts."
        )
    return cache


def check_shares_prefix(vlm: PreTrainedModel) -> None:
    """Raise for a VLM whose picture tokens depend on the question.

    Args:
        vlm: A VLM of transformers.

    Raises:
        ValueError: The prefix can't be shared; the message gives the reason.
    """
    family = vlm.config.model_type
    reason = UNSHARED_PREFIXES.get(family)
    if vlm.config.is_encoder_decoder:
        reason = "its encoder reads pictures and question together"
    if reason:
        raise ValueError(
            f"A scene can't be encoded once for many questions with the VLM family {family!r}: {reason}. Ask with "
            "`model.generate` on whole prompts, or use a causal family such as qwen2_5_vl, qwen3_vl or internvl."
        )


def _check_length(vlm: PreTrainedModel, length: int) -> None:
    """A prefix has the keys of a whole prompt only as long as RoPE's frequencies don't depend on the length."""
    limit = longest_shared_length(vlm)
    if limit is not None and length > limit:
        raise ValueError(
            f"A scene with its question and answer must have at most {limit} tokens with this VLM, whose RoPE changes "
            f"its frequencies beyond, got {length}. Give fewer or smaller pictures, or ask with `model.generate` on "
            "whole prompts."
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _state(layer: Any) -> dict[str, Any]:
    """A layer's state as a flat dictionary of tensors, numbers and booleans."""
    state = {}
    for name, value in vars(layer).items():
        items = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        state |= {key: item for key, item in items.items() if isinstance(item, Tensor | int | bool)}
    return state


def _states(cache: Cache) -> list[dict[str, Any]]:
    return [_state(layer) for layer in cache.layers]


def _set_state(layer: Any, state: dict[str, Any]) -> None:
    """The inverse of :func:`_state`."""
    for key, value in state.items():
        name, _, index = key.partition(".")
        if index:
            getattr(layer, name)[int(index)] = value
        else:
            setattr(layer, name, value)
        if isinstance(value, Tensor) and value.ndim > 1:
            layer.dtype, layer.device = value.dtype, value.device


def _changed(cache: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A copy of the cache with changed tensors; the given one is not changed."""
    changed = copy.copy(cache)
    changed.layers = [_changed_layer(layer, change) for layer in cache.layers]
    return changed


def _changed_layer(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    changed = copy.copy(layer)
    vars(changed).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    _set_state(changed, {key: change(value) for key, value in _state(layer).items() if _is_tensor(value)})
    return changed


def _shared(cache: Cache, rows: int) -> Cache:
    """A cache of `rows` rows that all start from the given one's single row."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(rows, 0) if tensor.ndim > 1 else tensor

    shared = copy.copy(cache)
    shared.layers = [
        PrefixLayer(layer) if type(layer) is DynamicLayer else _changed_layer(layer, repeat) for layer in cache.layers
    ]
    return shared


# Prompts


def _conversation(images: Sequence[Image], question: str, system: str | None) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*before, {"role": "user", "content": content}]


def _picture_ids(model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor) -> set[int]:
    """Tokens whose embeddings are replaced by other vectors."""
    ids = {model.vlm.config.image_token_id}
    return ids | ({processor.spatial_token_id} if processor.spatial_tokens is not None else set())


def _prefix_length(ids: Tensor, picture_ids: set[int], processor: Spa3VLMProcessor) -> int:
    """Length of a prompt up to the last picture token, including special tokens directly after it."""
    tokens, special = ids.tolist(), set(processor.tokenizer.get_added_vocab().values())
    length = max((place + 1 for place, token in enumerate(tokens) if token in picture_ids), default=0)
    while length and length < len(tokens) and tokens[length] in special:
        length += 1
    return length


def _check_questions(questions: Sequence[str], processor: Spa3VLMProcessor) -> None:
    for question in questions:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`questions` must be texts that are not empty, got {question!r}.")
    if questions:
        processor.check_messages([{"role": "user", "content": question} for question in questions])


def _ask_about_one_tiny_picture(
    processor: Spa3VLMProcessor, questions: Sequence[str], system: str | None
) -> list[list[int]]:
    """Whole prompts with minimal pictures, since the tokens after a picture don't depend on it."""
    side = processor.view_image_processor.patch_size
    processor = copy.copy(processor)
    processor.images = "native"
    processor.view_image_processor = Spa3RImageProcessor(size=side, patch_size=side)
    picture = PIL.Image.new("RGB", (56, 56))
    conversations = [_conversation([picture], question, system) for question in questions]
    inputs = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)
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


def _tails(model: Spa3VLMForConditionalGeneration, scene: EncodedScene, questions: Sequence[str]) -> list[list[int]]:
    """The tokens of each question's prompt after the prefix."""
    prompts = _ask_about_one_tiny_picture(scene.processor, questions, scene.system)
    tails = _tails_behind(prompts, scene.input_ids.tolist(), _picture_ids(model, scene.processor))
    if tails is None:
        raise ValueError(
            "A question must leave the prompt before it as it is, and one of these changes it. It begins with a "
            "special token of the VLM: put a word before that, or ask with `model.generate` on a whole prompt."
        )
    return tails


def _check_probe(
    model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, ids: Tensor, length: int, system: str | None
) -> None:
    """Check that the chat template puts the question after the pictures, followed by nothing that depends on them."""
    prompt, picture_ids = ids.tolist(), _picture_ids(model, processor)
    tails = None
    if length:
        others = _ask_about_one_tiny_picture(processor, [PROBE], system)
        tails = _tails_behind(others, prompt[:length], picture_ids)
    if tails != [prompt[length:]] or PROBE not in processor.decode(prompt[length:]):
        raise ValueError(
            f"The prompts of the VLM family {model.vlm.config.model_type!r} have no part that all questions about a "
            "scene share: its chat template must put the question behind the pictures, and say nothing there that "
            "depends on them. Ask with `model.generate` on whole prompts."
        )


def _batches(lengths: Sequence[int], batch_size: int, pads: bool) -> Iterator[list[int]]:
    """Group questions of similar length; of equal length if padding is not supported."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if pads else [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


# Fingerprints


OTHER = {"model": "other weights, other active adapters (LoRA), another dtype", "processor": "another tokenizer"}


def _check_origin(
    scene: dict[str, Any], model: Spa3VLMForConditionalGeneration, processor: Spa3VLMProcessor, name: str
) -> None:
    """Raise for a scene of another model or processor."""
    for part, given, wanted in (
        ("model", scene["model_fingerprint"], model_fingerprint(model)),
        ("processor", scene["processor_fingerprint"], processor_fingerprint(processor)),
    ):
        if given != wanted:
            raise ValueError(
                f"{name} must be a scene of this {part} (fingerprint {wanted}), got one of another {part} ({given}): "
                f"{OTHER[part]} or other settings. "
                f"Use the {part} that encoded it, or encode the scene again."
            )


__all__ = ["EncodedScene", "SceneCache"]
