"""Encoded scenes: their files, and a cache of many of them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache, DynamicLayer

from spa3r.checks import is_count, shorten
from spa3r.disk import write_whole
from spa3r.models.placement import execution_device
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint, processor_fingerprint
from spa3r.models.spa3_vlm.prefix_cache import changed, empty_cache, set_state, states
from spa3r.models.spa3_vlm.vlm import vlm_of

FORMAT = "spa3r scene 2"


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

    processor: ProcessorMixin
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
        return sum(
            value.nbytes for state in states(self.cache) for value in state.values() if isinstance(value, Tensor)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that the scene holds; used by :class:`SceneCache`."""
        pixels = sum(3 * view.width * view.height for view in self.views)
        return self.cache_num_bytes + self.image_tokens.nbytes + self.input_ids.nbytes + pixels

    def to(self, device: torch.device | str) -> EncodedScene:
        """A copy on another device, for example to keep it in host memory. Questions work from any device."""
        moved = copy.copy(self)
        moved.image_tokens, moved.cache = self.image_tokens.to(device), changed(self.cache, lambda t: t.to(device))
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
        for i, (layer, state) in enumerate(zip(self.cache.layers, states(self.cache))):
            tensors |= {f"cache.{i}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
            layers.append([type(layer).__name__, {k: v for k, v in state.items() if not isinstance(v, Tensor)}])
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
        model: PreTrainedModel,
        processor: ProcessorMixin,
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
        device = execution_device(model) if device is None else device
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{file} must be a scene as `EncodedScene.save` writes it ({FORMAT!r}), got "
                        f"{shorten(metadata.get('format'))}. Encode the scene and save it again."
                    )
                about = _read_about(metadata.get("scene"), str(file))
                digest, recorded = about.pop("digest"), dict(about)
                layers, count = about.pop("layers"), about.pop("views")
                check_origin(about, model, processor, str(file))
                tensors = {name: content.get_tensor(name) for name in content.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{file} can't be read as safetensors ({error}). It is truncated or damaged: encode the scene again."
            ) from error
        cache = empty_cache(vlm_of(model))
        if [type(layer).__name__ for layer in cache.layers] != [name for name, _ in layers]:
            raise ValueError(
                f"{file} was written with another version of transformers, whose caches are of another kind. Encode "
                "the scene again."
            )
        if fault := _fault(tensors, layers, count, cache, model):
            raise ValueError(f"{file} is damaged or was changed: {fault}. Encode the scene again.")
        if digest != _digest(tensors, recorded):
            raise ValueError(f"{file} is damaged or was changed: it is not what was saved. Encode the scene again.")
        for i, (layer, (_, state)) in enumerate(zip(cache.layers, layers)):
            prefix = f"cache.{i}."
            own = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
            set_state(layer, state | own)
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
    model: PreTrainedModel,
) -> str | None:
    """What is wrong with the tensors and numbers of a scene's file; None if nothing is."""
    names = {"input_ids", "image_tokens", *(f"views.{i}" for i in range(min(count, len(tensors))))}
    if count < 1 or not names <= tensors.keys() or len(names) != 2 + count:
        return f"it lacks tensors of its prompt or of its {count} views"
    text = model.config.get_text_config()
    ids, image_tokens = tensors["input_ids"], tensors["image_tokens"]
    if ids.ndim != 1 or ids.dtype != torch.long or not len(ids) or not 0 <= ids.min() <= ids.max() < text.vocab_size:
        return f"`input_ids` must be a row of tokens below {text.vocab_size}, got {shorten(ids)}"
    wanted = (int((ids == vlm_of(model).config.image_token_id).sum()), text.hidden_size)
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
    if isinstance(layer, DynamicLayer):
        keys, values = tensors.get("keys"), tensors.get("values")
        shapes = [None if t is None or t.ndim != 4 else t.shape[:3] for t in (keys, values)]
        if keys is None or shapes[0] is None or shapes[0] != shapes[1] or keys.shape[0] != 1:
            return "must have keys and values (1, heads, tokens, width) of equal shape"
        if type(layer) is DynamicLayer and keys.shape[2] != length:
            return f"must hold the {length} tokens of the prompt, got {keys.shape[2]}"
    if numbers.get("cumulative_length", length) != length:
        return f"must have seen the {length} tokens of the prompt, got {numbers['cumulative_length']}"
    return None


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


OTHER = {"model": "other weights, other active adapters (LoRA), another dtype", "processor": "another tokenizer"}


def check_origin(scene: dict[str, Any], model: PreTrainedModel, processor: ProcessorMixin, name: str) -> None:
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
