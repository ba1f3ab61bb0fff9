"""Spa3-VLM: fuses a VLM's image tokens with a scene's latents before they enter the language model.

The parts are combined through hooks that transformers gives every VLM: ``get_image_features`` computes the image
tokens, and ``mm_encoder_outputs`` passes them back in. No VLM needs a subclass or a patch.

Appended tokens (``integration="append"``) can't be passed through that hook: families count the image tokens of a
picture, split them into blocks and compute their positions from its grid. The processor therefore inserts ordinary
tokens into the prompt as placeholders, so everything that a family derives from a prompt (positions, masks, token
types, padding) is correct without special cases. The model then only replaces the vectors of these tokens when the
input embeddings are looked up, with a forward hook on the embedding table that is active during one call. The
placeholder is the padding token: every vocabulary has one, no chat template writes it, and the attention mask tells it
from padding.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from spa3r.checks import shorten
from spa3r.disk import read_json_object
from spa3r.models.attention import Segments, packed_attention
from spa3r.models.base import (
    PackedPreTrainedModel,
    check_finite,
    finite_logits,
    only_nan,
    save_without,
    split_hub_kwargs,
)
from spa3r.models.configuration_base import check_foreign_sizes
from spa3r.models.layers import Mlp
from spa3r.models.packing import ViewLayout, as_list, check_tensor, whole_numbers
from spa3r.models.placement import execution_device, is_offloaded
from spa3r.models.quantization import adopt_quantization
from spa3r.models.released import ReleasedCheckpoint
from spa3r.models.spa3_vlm.asking import ask, encode_scene
from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
from spa3r.models.spa3_vlm.probe import probe_once
from spa3r.models.spa3_vlm.processing_spa3_vlm import VIEW_KEYS, Spa3VLMProcessor
from spa3r.models.spa3_vlm.released_spa3_vlm import translate_spa3_vlm
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.models.spa3_vlm.state import (
    OFFSETS,
    cache_name,
    keeps_offset,
    place_positions,
    position_offsets,
    positions_behind,
    remember_offset,
    turn,
)
from spa3r.models.spa3_vlm.vlm import (
    check_generate_keywords,
    check_keywords,
    check_vlm,
    encode_images,
    forward_keywords,
    image_tokens,
)
from spa3r.models.spa3r.image_processing_spa3r import Image
from spa3r.models.spa3r.modeling_spa3r import Spa3RModel

REPORT_KEYS = ("skipped", "num_rows")
"""Keys that :class:`~spa3r.data.Spa3VLMCollator` adds for logging; the model ignores them."""

OWN_KEYS = (*VIEW_KEYS, *REPORT_KEYS)

IGNORED = -100
"""Label of a token that is excluded from the loss."""


class Spa3VLMCrossAttention(nn.Module):
    """Cross-attention from a scene's image tokens (queries) to its projected spatial tokens (keys and values)."""

    is_causal = False
    config: PreTrainedConfig

    def __init__(self, config: Spa3VLMConfig):
        super().__init__()
        self.config = config
        width = config.get_text_config().hidden_size
        self.head_dim = width // config.adapter_num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-5)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-5)
        self.proj = nn.Linear(width, width)

    def forward(self, image_tokens: Tensor, latents: Tensor, segments: Segments) -> Tensor:
        """(sum of image tokens, h), (sum of latents, h) -> (sum of image tokens, h)."""
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim))
            for projection, tokens in ((self.q_proj, image_tokens), (self.k_proj, latents), (self.v_proj, latents))
        )
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        return self.proj(packed_attention(self, query, key, value, segments).flatten(-2))


class Spa3VLMAdapter(nn.Module):
    """Residual cross-attention with a gated bottleneck. Its last layer is initialized to zero (identity mapping)."""

    def __init__(self, config: Spa3VLMConfig):
        super().__init__()
        width = config.get_text_config().hidden_size
        self.projector = Mlp(config.spatial_hidden_size, width, width)
        self.cross_attention = Spa3VLMCrossAttention(config)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.bottleneck = Mlp(width, width // 4, width)
        self.gate = nn.Linear(width, width)

    def forward(
        self,
        image_tokens: Tensor,
        spatial_tokens: Tensor,
        tokens_per_scene: Sequence[int],
        spatial_tokens_per_scene: Sequence[int] | None = None,
    ) -> Tensor:
        """
        Args:
            image_tokens: (sum of tokens, h), all scenes concatenated.
            spatial_tokens: (scenes, L, D), latents; (sum of spatial tokens, D) if `spatial_tokens_per_scene` is given.
            tokens_per_scene: Number of image tokens of each scene.
            spatial_tokens_per_scene: Number of spatial tokens of each scene; None: L.

        Returns:
            (sum of tokens, h), the fused image tokens.
        """
        if spatial_tokens_per_scene is None:
            spatial_tokens_per_scene = [spatial_tokens.shape[1]] * len(spatial_tokens)
            spatial_tokens = spatial_tokens.flatten(0, 1)
        segments = Segments.across(tokens_per_scene, spatial_tokens_per_scene)
        keys = self.projector(spatial_tokens.to(self.norm.weight.dtype))
        attended = self.norm(self.cross_attention(image_tokens.to(keys.dtype), keys, segments))
        residual = self.bottleneck(attended) * self.gate(attended).sigmoid()
        return image_tokens + residual.to(image_tokens.dtype)


class Spa3VLMAppendAdapter(nn.Module):
    """Projects spatial tokens to prompt tokens. This is the only module that ``integration="append"`` adds to a VLM."""

    def __init__(self, config: Spa3VLMConfig):
        super().__init__()
        width = config.get_text_config().hidden_size
        self.projector = Mlp(config.spatial_hidden_size, width, width)

    def forward(self, spatial_tokens: Tensor) -> Tensor:  # (sum of spatial tokens, D) -> (sum of spatial tokens, h)
        return self.projector(spatial_tokens.to(self.projector.fc1.weight.dtype))


@dataclass
class AppendedTokens:
    """Vectors that replace embeddings in the prompt."""

    places: Tensor  # (batch, sequence, 1), bool
    vectors: Tensor  # (batch, sequence, h), values elsewhere are unused

    @contextmanager
    def entering(self, embeddings: nn.Module) -> Generator[None]:
        """Context manager: inside it, looking up the prompt's embeddings returns these vectors in their places."""
        thread, length, entered = threading.get_ident(), self.places.shape[1], False

        def enter(module: nn.Module, args: tuple, embedded: Tensor) -> Tensor:
            nonlocal entered
            # Models also look up single tokens. Prompts of other threads are left alone.
            if embedded.ndim != 3 or threading.get_ident() != thread:
                return embedded
            if embedded.shape[1] < length:
                if not entered:
                    raise ValueError(
                        f"Appended tokens need the whole prompt, {length} tokens, in one forward pass, got "
                        f"{embedded.shape[1]} of them. Leave `prefill_chunk_size` and earlier `past_key_values` out."
                    )
                return embedded  # the next tokens, one by one
            entered = True
            copies = len(embedded) // len(self.places)  # beams and samples: copies of a row are adjacent
            places, vectors = (part.repeat_interleave(copies, 0) for part in (self.places, self.vectors))
            prompt = torch.where(places.to(embedded.device), vectors.to(embedded), embedded[:, :length])
            return torch.cat([prompt, embedded[:, length:]], 1) if embedded.shape[1] > length else prompt

        handle = embeddings.register_forward_hook(enter)
        try:
            yield
            if not entered:
                raise RuntimeError("The VLM never looked its prompt up in its input embeddings: nothing was appended.")
        finally:
            handle.remove()


class Spa3VLMBackbone(nn.Module):
    """A Spa3-VLM without its head, as ``model.base_model``. Trainers that project hidden states themselves, such as
    TRL's, call it in place of the model.

    It owns no submodules: it runs those of the model.
    """

    _tp_plan = _pp_plan = None  # transformers reads these

    def __init__(self, model: Spa3VLMForConditionalGeneration):
        super().__init__()
        self._model = (model,)  # a tuple, so that the model is not registered as a submodule and counted twice

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput | tuple:
        """Like the model's ``forward``, with ``last_hidden_state`` (batch, sequence, h) for ``logits``, and no loss."""
        (model,) = self._model
        return model._run(model.vlm.base_model, input_ids, attention_mask, kwargs)


class Spa3VLMForConditionalGeneration(PackedPreTrainedModel, GenerationMixin):
    """Any vision-language model of transformers whose image tokens are fused with the latents of a Spa3R.

    ``model.vlm`` is the VLM, ``model.spa3r`` the Spa3R, and ``model.adapter`` connects them. The adapter and the
    language model are trained. Spa3R and the VLM's vision side (tower and projector) are frozen and stay in eval mode
    until their parameters are given ``requires_grad_(True)``.

    Before training, the adapter is the identity: logits equal the plain VLM's, bit for bit.

    ``config.integration`` and ``config.spatial_source`` are the paper's ablations. With ``"append"`` the adapter is
    only a projector and changes the logits from the first step; the processor must know them (``spatial_tokens``). With
    ``"backbone"`` only the backbone of the Spa3R is used. With ``"none"`` both ``spa3r`` and ``adapter`` are None.
    """

    config: Spa3VLMConfig
    vlm: PreTrainedModel
    spa3r: Spa3RModel | None
    adapter: Spa3VLMAdapter | Spa3VLMAppendAdapter | Any  # None with `spatial_source="none"`

    config_class = Spa3VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _keep_in_fp32_modules_strict = ["camera_head"]
    _released_kinds = ("spa3-vlm",)
    _no_split_modules = ["Spa3RModel", "Spa3VLMAdapter"]  # plus those of the VLM
    _skip_quantization = ("spa3r", "adapter")

    def __init__(self, config: Spa3VLMConfig, vlm: PreTrainedModel | None = None, spa3r: Spa3RModel | None = None):
        super().__init__(config)
        self.vlm = vlm if vlm is not None else AutoModelForImageTextToText.from_config(config.vlm_config)
        check_vlm(self.vlm.config.model_type, type(self.vlm))
        config.vlm_config = self.vlm.config  # the VLM may hold a copy: keep one
        self.spa3r = self.adapter = None
        if config.spatial_source != "none":
            self.spa3r = spa3r if spa3r is not None else Spa3RModel(config.spa3r_config)
            if self.spa3r.config.hidden_size != config.spa3r_config.hidden_size:
                raise ValueError(
                    f"`spa3r` must make latents of width {config.spa3r_config.hidden_size}, as `spa3r_config` says, "
                    f"got {self.spa3r.config.hidden_size}. Pass `spa3r.config` in the configuration."
                )
            config.spa3r_config = self.spa3r.config
            appends = config.integration == "append"
            self.adapter = Spa3VLMAppendAdapter(config) if appends else Spa3VLMAdapter(config)
            if appends and config.spatial_token_id is None:
                config.spatial_token_id = self._pad_token_id()
                if config.spatial_token_id is None:
                    raise ValueError(
                        "`spatial_token_id` must be given with `integration='append'`, since the VLM's configuration "
                        "names no padding token. Pass `processor.spatial_token_id` of its Spa3VLMProcessor."
                    )
        self.post_init()
        self._freeze()

    # Loading and saving

    @classmethod
    def from_vlm_and_spa3r(
        cls,
        vlm: str | Path | PreTrainedModel,
        spa3r: str | Path | Spa3RModel | None = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | dict | None = None,
        device_map: Any = None,
        revision: str | dict[str, str] | None = None,
        quantization_config: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Spa3VLMForConditionalGeneration:
        """Combine a VLM with a Spa3R; the adapter is newly initialized.

        Args:
            vlm: Folder or hub id of any VLM of transformers that takes ``mm_encoder_outputs``, or the model.
            spa3r: Folder or hub id of a Spa3R, or the model. Neither needed nor loaded with ``spatial_source="none"``.
            dtype: Dtype of the parts that are loaded here; the adapter gets the VLM's.
            attn_implementation: Attention back end of both, or ``{"vlm_config": ..., "spa3r_config": ...}``.
            device_map: Where the VLM is placed; Spa3R and adapter go to the VLM's first device.
            revision: Branch, tag or commit of the VLM's repository, or of both: ``{"vlm_config": ..., "spa3r_config":
                ...}``.
            quantization_config: Applied to the VLM, as in transformers. Spa3R and adapter are never quantized.
            trust_remote_code: Whether to run custom code from the VLM's repository.
            **kwargs: Other fields of :class:`Spa3VLMConfig`; and ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download`` for the hub. For anything else, load the parts yourself.

        Raises:
            TypeError: A keyword is unknown, or concerns loading a part that is passed as a model; or a part is neither
                a name nor a model of transformers.
            ValueError: The VLM's family can't be combined with a Spa3R (the message says why), or no Spa3R is given.
        """
        hub_kwargs, fields = split_hub_kwargs(kwargs, cls.config_class)
        alone = fields.get("spatial_source") == "none"
        if spa3r is None and not alone:
            raise ValueError(
                "`spa3r` must be the folder, hub id or model of a Spa3R, got None. Only the VLM alone, "
                "spatial_source='none', goes without."
            )
        by_part = attn_implementation if isinstance(attn_implementation, dict) else {}
        revisions = revision if isinstance(revision, dict) else {"vlm_config": revision}
        if unknown := sorted(revisions.keys() - {"vlm_config", "spa3r_config"}):
            raise ValueError(f"`revision` must have the keys 'vlm_config' and 'spa3r_config', got {unknown}.")
        for name, part, loading in (
            ("vlm", vlm, {"quantization_config": quantization_config, "trust_remote_code": trust_remote_code}),
            ("spa3r", spa3r, {}),
        ):
            _check_part(name, part, loading | {"revision": revisions.get(f"{name}_config")})
        if not isinstance(vlm, PreTrainedModel):
            vlm_hub = hub_kwargs | {"trust_remote_code": trust_remote_code}
            if revisions.get("vlm_config") is not None:
                vlm_hub["revision"] = revisions["vlm_config"]
            vlm_config = AutoConfig.from_pretrained(vlm, **vlm_hub)
            check_foreign_sizes("vlm.config", vlm_config)
            vlm_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(vlm_config), None)
            if vlm_class is not None or AutoModelForImageTextToText.__name__ not in (
                getattr(vlm_config, "auto_map", None) or {}
            ):
                check_vlm(vlm_config.model_type, vlm_class)  # before gigabytes are loaded
            vlm = AutoModelForImageTextToText.from_pretrained(
                vlm,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=by_part.get("vlm_config") if by_part else attn_implementation,
                quantization_config=quantization_config,
                **vlm_hub,
            )
        model_3d: Any = None if alone else spa3r
        if not alone and not isinstance(spa3r, PreTrainedModel):
            model_3d = Spa3RModel.from_pretrained(
                spa3r,
                dtype=vlm.dtype if dtype == "auto" else dtype,
                attn_implementation=by_part.get("spa3r_config") if by_part else attn_implementation,
                **hub_kwargs,
                **({} if revisions.get("spa3r_config") is None else {"revision": revisions["spa3r_config"]}),
            )
        # The dictionary form sets the adapter's implementation and leaves that of the loaded parts unchanged.
        own = by_part.get("") if by_part else attn_implementation
        parts = {"vlm_config": vlm.config, "spa3r_config": None if model_3d is None else model_3d.config}
        settings: dict[str, Any] = fields | parts | {"attn_implementation": {"": own}}
        config = Spa3VLMConfig(**settings)
        device = execution_device(vlm)  # tensors of an offloaded VLM have no real device
        if model_3d is not None and not is_offloaded(model_3d):
            model_3d = model_3d.to(device)
        model = cls(config, vlm=vlm, spa3r=model_3d)
        if model.adapter is not None:
            model.adapter.to(device=device, dtype=vlm.dtype)
        if placed := getattr(vlm, "hf_device_map", None):  # for save_pretrained and trainers, as after from_pretrained
            places = {f"vlm.{path}" if path else "vlm": place for path, place in placed.items()}
            places |= {part: device for part in ("spa3r", "adapter") if getattr(model, part) is not None}
            model.hf_device_map = places  # ty: ignore[invalid-assignment]  # no parameter or module
        adopt_quantization(model)
        return model.eval()

    @classmethod
    def _translate_released(cls, released: ReleasedCheckpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = super()._translate_released(released, kwargs)
        if kwargs.get("generation_config") is None and (file := released.file("generation_config.json")) is not None:
            arguments["generation_config"] = GenerationConfig.from_pretrained(file.parent)
        return arguments

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Spa3VLMConfig]:
        if (file := released.file("config.json")) is None:
            raise ValueError(f"{released.name} holds no config.json, the VLM's configuration. Fetch it again.")
        vlm_fields = read_json_object(file, "the VLM's configuration", "Fetch it again.")
        return translate_spa3_vlm(released.tensors(), vlm_fields, fields)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_backbone: bool = True, **kwargs: Any
    ) -> None:
        """Like transformers' ``save_pretrained``; optionally without Spa3R's frozen backbone.

        Args:
            save_directory: Target folder.
            *args: As in transformers.
            include_backbone: False leaves out the backbone; the configuration then records its source, and
                ``from_pretrained`` loads it from there.
            **kwargs: As in transformers.
        """
        # Keep the names in memory: trainers load what they saved by name, and the layout is ours.
        kwargs.setdefault("save_original_format", False)
        if self.spa3r is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with self.spa3r.naming_frozen_parts(include_backbone, save_directory) as left_out:
            paths = [f"spa3r.{path}" for path in left_out]
            save_without(super().save_pretrained, self, paths, save_directory, *args, **kwargs)

    def _finish_loading(self, hub_kwargs: dict[str, Any]) -> None:
        if self.spa3r is not None:
            self.spa3r._finish_loading(hub_kwargs)
        self._freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(self.adapter, Spa3VLMAdapter) and module is self.adapter.bottleneck.fc2:
            init.zeros_(module.weight)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Modules that stay in float32. Names that the VLM gives (``gate.weight``) apply to the VLM alone."""
        of_vlm = self.vlm._get_dtype_plan(dtype)
        others = {name: kept for name, kept in super()._get_dtype_plan(dtype).items() if name not in of_vlm}
        return others | {f"vlm.*{name}": kept for name, kept in of_vlm.items()}

    # Submodules

    @property
    def base_model(self) -> nn.Module:
        """The model without its head: takes the model's arguments and returns hidden states."""
        return Spa3VLMBackbone(self)

    @property
    def generation_config(self) -> GenerationConfig | Any:
        """The VLM's generation configuration; None before the VLM exists."""
        return self.vlm.generation_config if "vlm" in self._modules else None

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "vlm" in self._modules:  # PreTrainedModel's constructor sets a default before the VLM exists
            self.vlm.generation_config = value

    def get_input_embeddings(self) -> nn.Module:  # ty: ignore[incompatible-method-override]  # the base class has none
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The VLM's language model head."""
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.vlm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.vlm.get_decoder()

    def _language_modules(self) -> set[nn.Module]:
        parts = (self.vlm.get_decoder(), self.vlm.get_output_embeddings(), self.vlm.get_input_embeddings())
        return {part for part in parts if part is not None}

    def vision_modules(self) -> list[nn.Module]:
        """The VLM's vision side: its largest modules that contain no part of the language model."""
        language = self._language_modules()

        def walk(module: nn.Module) -> Iterator[nn.Module]:
            for child in module.children():
                if child in language:
                    continue
                if language & set(child.modules()):
                    yield from walk(child)
                else:
                    yield child

        return list(walk(self.vlm))

    def vision_parameters(self) -> list[nn.Parameter]:
        """The VLM's parameters outside its language model: vision tower, projector, learned separators."""
        language = {id(parameter) for part in self._language_modules() for parameter in part.parameters()}
        return [parameter for parameter in self.vlm.parameters() if id(parameter) not in language]

    def _pad_token_id(self) -> int | None:
        configs = (self.config.get_text_config(), self.vlm.config, self.generation_config)
        ids = (getattr(config, "pad_token_id", None) for config in configs)
        return next((token_id for token_id in ids if token_id is not None and token_id >= 0), None)

    def _freeze(self) -> None:
        if self.spa3r is not None:
            self.spa3r.requires_grad_(False)
        for parameter in self.vision_parameters():
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Like ``nn.Module.train``; frozen parts stay in eval mode."""
        super().train(mode)
        for module in (self.spa3r, *self.vision_modules()):
            if module is not None and not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    # Forward and generate

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        view_pixel_values: Tensor | None = None,
        view_grid_hw: Tensor | Sequence[Sequence[int]] | None = None,
        views_per_scene: Tensor | Sequence[int] | None = None,
        image_tokens_per_scene: Tensor | Sequence[int] | None = None,
        spatial_tokens_per_scene: Tensor | Sequence[int] | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the VLM's forward on fused image tokens.

        Args:
            input_ids: (batch, sequence), one scene per row, with the VLM's image placeholders.
            attention_mask: (batch, sequence); or (batch, 1, sequence, sequence), added to the attention logits, for
                example when several questions share pictures and must not attend to each other.
            view_pixel_values: (sum of N, 3 * p * p), patches of all views of all rows.
            view_grid_hw: (views, 2), patch grid of every view.
            views_per_scene: (batch,), number of views of each row; 0 for a text-only row.
            image_tokens_per_scene: (batch,), number of image placeholders in each row; None: counted in `input_ids`.
            spatial_tokens_per_scene: (batch,), number of places for appended tokens in each row, with
                ``integration="append"``; None: counted in `input_ids`.
            labels: (batch, sequence), token ids; -100 excludes a token from the loss.
            **kwargs: Everything else that the processor returned for the VLM (``pixel_values`` and so on), and any
                other argument of the VLM's forward.
        Returns:
            The VLM's own output: ``loss`` (with labels), ``logits``, ``past_key_values``, ...

        Raises:
            TypeError: Neither this method nor the VLM knows a keyword; the VLM would ignore it.
            ValueError: Pictures come without views or vice versa, or counts contradict each other.
        """
        kwargs |= {
            "view_pixel_values": view_pixel_values,
            "view_grid_hw": view_grid_hw,
            "views_per_scene": views_per_scene,
            "image_tokens_per_scene": image_tokens_per_scene,
            "spatial_tokens_per_scene": spatial_tokens_per_scene,
        }
        return self._run(
            self.vlm, input_ids, attention_mask, kwargs | {"labels": labels}, is_training=labels is not None
        )

    # Only the called functions are compiled. The lines here handle Python numbers, locks and caches.
    @torch.compiler.disable(recursive=False)
    def _run(
        self,
        part: nn.Module,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
        is_training: bool = True,
    ) -> ModelOutput | tuple:
        """Run the VLM, or its part without the head, on fused image tokens."""
        check_keywords(self, kwargs, {*OWN_KEYS, *forward_keywords(self.vlm)})
        with turn(self):
            inputs, appended = self._fuse(input_ids, attention_mask, kwargs)
            positions, offsets = self._positions(input_ids, attention_mask, inputs, keep=not is_training)
            inputs |= positions | {"input_ids": input_ids, "attention_mask": attention_mask}
            output = part(**inputs) if appended is None else self._run_appending(part, inputs, appended)
        if not is_training and isinstance(output, dict) and "logits" in output:
            check_finite(self, only_nan(output["logits"][:, -1]), "logits")
        if offsets is not None:
            outputs = output.values() if isinstance(output, dict) else output
            remember_offset(next((value for value in outputs if isinstance(value, Cache)), None), offsets)
        is_idle = self.adapter is not None and "mm_encoder_outputs" not in inputs
        if is_training and is_idle and torch.is_grad_enabled():
            # Distributed training expects a gradient for every parameter, even for a text-only batch.
            idle = 0.0 * sum(parameter.sum() for parameter in self.adapter.parameters() if parameter.requires_grad)
            if isinstance(output, tuple):
                return (output[0] + idle, *output[1:])
            first = next(iter(output))  # the loss, or the hidden states without a head
            output[first] = output[first] + idle
        return output

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Tensor | ModelOutput:
        """Run the VLM's ``generate`` on fused image tokens; all its features are supported.

        A batch of :class:`~spa3r.data.Spa3VLMCollator` is accepted: with `labels`, the prompt of each row is the part
        before its last answer, or the whole row if it has no answers. Prompts are padded on the left, so generated
        tokens follow them directly.

        Args:
            inputs: (batch, sequence), the prompt; may also be passed as ``input_ids=``.
            generation_config: As in transformers; None: the VLM's.
            **kwargs: Outputs of the processor or the collator, and any argument of the VLM's ``generate``.

        Raises:
            TypeError: Neither this method nor the VLM knows a keyword.
            ValueError: A row has a picture after its last answer.
        """
        check_generate_keywords(self, kwargs, generation_config, OWN_KEYS)
        input_ids = kwargs.pop("input_ids", inputs)
        if kwargs.get("labels") is not None:
            kwargs = self._prompts(kwargs | {"input_ids": input_ids})
            input_ids = kwargs.pop("input_ids")
        mask = kwargs.get("attention_mask")
        with turn(self):
            kwargs, appended = self._fuse(input_ids, mask, kwargs)
            kwargs |= self._positions_of_whole_prompt(input_ids, mask, kwargs)
            vlm: Any = self.vlm
            with self._entering(appended):
                output = vlm.generate(
                    input_ids=input_ids,
                    generation_config=generation_config,
                    logits_processor=finite_logits(self, kwargs.pop("logits_processor", None)),
                    **kwargs,
                )
        cache = getattr(output, cache_name(self.vlm), None) if isinstance(output, ModelOutput) else _cache_in(kwargs)
        if cache is not None and input_ids is not None and not hasattr(cache, OFFSETS):
            remember_offset(cache, position_offsets(self.vlm, input_ids, mask, kwargs))
        return output

    # Scenes

    def encode_scene(
        self, processor: Spa3VLMProcessor, images: Image | Sequence[Image], *, system: str | None = None
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
        return encode_scene(self, processor, images, system)

    def ask(
        self,
        scene: EncodedScene,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        batch_size: int | None = None,
        **generate_kwargs: Any,
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
        many = [questions] if isinstance(questions, str) else questions
        answers = ask(self, scene, many, max_new_tokens=max_new_tokens, batch_size=batch_size, **generate_kwargs)
        return answers[0] if isinstance(questions, str) else answers

    @torch.compiler.disable
    def _positions(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: dict[str, Any], keep: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Position arguments for `forward` where the family would otherwise reuse those of an earlier prompt; and the
        offsets of this prompt, if it starts here and `keep` says that its cache may be used again."""
        if not keeps_offset(self.vlm) or inputs.get("position_ids") is not None:
            return {}, None
        given: Any = inputs.get("inputs_embeds") if input_ids is None else input_ids
        cache = _cache_in(inputs)
        rows, new = given.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        if seen:
            if "mm_encoder_outputs" in inputs:
                raise ValueError(
                    f"Pictures must come with the first tokens of a prompt, got some behind the {seen} tokens of a "
                    "cache. Pass the whole prompt without a cache, or `position_ids`."
                )
            positions = positions_behind(self.vlm, cache, None, attention_mask, (rows, seen + new))
            return {"position_ids": positions[..., -new:].to(given.device)}, None
        none = torch.zeros(1, 1, dtype=torch.long, device=given.device)
        if input_ids is None:
            places = torch.arange(new, device=given.device).expand(rows, new)
            return {"position_ids": place_positions(self.vlm, places, none)}, none
        if not keep or self.training or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            return {}, None
        return {}, position_offsets(self.vlm, input_ids, attention_mask, inputs)

    def _positions_of_whole_prompt(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Position arguments for `generate`, for the same reason."""
        cache = _cache_in(inputs)
        seen = 0 if cache is None or not keeps_offset(self.vlm) else cache.get_seq_length()
        if not seen or input_ids is None or inputs.get("position_ids") is not None:
            return {}
        types, offsets = inputs.get("mm_token_type_ids"), None
        if types is not None and types.any():
            if types[:, seen:].any():
                return {}  # the family computes all positions from the prompt
            offsets = position_offsets(self.vlm, input_ids, attention_mask, inputs)
        positions = positions_behind(self.vlm, cache, offsets, attention_mask, (len(input_ids), input_ids.shape[1]))
        return {"position_ids": positions.to(input_ids.device)}

    @torch.compiler.disable  # code compiled in an earlier call doesn't check for new hooks
    def _run_appending(self, part: nn.Module, inputs: dict[str, Any], appended: AppendedTokens) -> ModelOutput | tuple:
        with self._entering(appended):
            return part(**inputs)

    def _prompts(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A collated batch without its last answers: padded on the left, with the same length."""
        batch = dict(batch)
        labels, input_ids = batch.pop("labels"), batch["input_ids"]
        mask = batch.setdefault("attention_mask", torch.ones_like(input_ids))
        is_answer = labels != IGNORED
        places = torch.arange(labels.shape[1], device=labels.device)
        begins = is_answer & ~torch.nn.functional.pad(is_answer, (1, 0))[:, :-1]
        ends = torch.where(is_answer.any(1), (begins * places).max(1).values, mask.sum(1))  # of the prompts
        if ((input_ids == self.vlm.config.image_token_id) & (places >= ends[:, None]) & mask.bool()).any():
            raise ValueError(
                "A row has a picture behind its last answer, which is where its prompt ends. Leave out what follows "
                "the last answer."
            )
        shifted = places - (labels.shape[1] - ends)[:, None]  # source index of each token; below 0: padding
        pad = self._pad_token_id()
        padding = {"input_ids": input_ids[:, :1] if pad is None else pad}
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape == labels.shape and not value.is_floating_point():
                moved = value.gather(1, shifted.clamp(min=0))
                batch[name] = torch.where(shifted < 0, padding.get(name, 0), moved)
        return batch

    def _entering(self, appended: AppendedTokens | None) -> AbstractContextManager:
        return nullcontext() if appended is None else appended.entering(self.get_input_embeddings())

    # Ragged: shapes are Python numbers that change with each scene. `torch.compile` runs it uncompiled.
    @torch.compiler.disable
    def _fuse(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], AppendedTokens | None]:
        """The VLM's arguments, with fused image tokens in place of pixels and views; and tokens to append, if any."""
        kwargs = {key: value for key, value in kwargs.items() if key not in REPORT_KEYS}
        self._check_inputs(input_ids, attention_mask, kwargs)
        back_end = self.config.get_text_config()._attn_implementation
        if kwargs.get("output_attentions") and back_end != "eager":
            raise ValueError(
                f"`output_attentions` needs the VLM's `attn_implementation` to be 'eager', got {back_end!r}, which "
                'keeps no weights. Call `model.vlm.set_attn_implementation("eager")` before.'
            )
        views = {key: kwargs.pop(key, None) for key in VIEW_KEYS}
        if views["spatial_tokens_per_scene"] is not None and self.config.integration != "append":
            raise ValueError(
                "The processor made places for appended tokens (`spatial_tokens_per_scene`), and nothing is appended: "
                f"the model's `integration` is {self.config.integration!r} and its `spatial_source` "
                f"{self.config.spatial_source!r}. Set `processor.spatial_tokens = model.config.spatial_tokens`."
            )
        if kwargs.get("pixel_values") is None:
            if views["view_pixel_values"] is not None and len(views["view_pixel_values"]):
                raise ValueError(
                    "`view_pixel_values` came without the VLM's own `pixel_values`, so there are no image tokens to "
                    "fuse. Pass everything that Spa3VLMProcessor returned."
                )
            kwargs.pop("pixel_values", None)
            return kwargs, None
        if views["view_pixel_values"] is None and self.spa3r is not None:
            raise ValueError(
                "`pixel_values` came without `view_pixel_values`, `view_grid_hw` and `views_per_scene`. Make the "
                "inputs with Spa3VLMProcessor, or call `model.vlm` to run the VLM alone."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_parameters())):
            features: Any = encode_images(self.vlm, kwargs)
        pixels = {name: value for name, value in kwargs.items() if name.startswith("pixel")}
        kwargs.pop("pixel_values")
        tokens_per_row = self._tokens_per_row(input_ids, views["image_tokens_per_scene"])
        spatial = None if self.spa3r is None else self._encode_views(self.spa3r, views, tokens_per_row)
        appended = None
        if self.config.integration == "append" and spatial is not None:
            given = views["spatial_tokens_per_scene"]
            appended, spatial = self._append(*spatial, input_ids, attention_mask, given), None
        fused = copy.copy(features)
        fused.pooler_output = self._fuse_tokens(features.pooler_output, tokens_per_row, spatial)
        for tokens in image_tokens(fused):
            check_finite(self, tokens, "image tokens", **pixels, **views)
        if (deepstack := getattr(features, "deepstack_features", None)) is not None:
            fused.deepstack_features = [_regroup(layer, tokens_per_row) for layer in deepstack]
        kwargs |= {"mm_encoder_outputs": {"image": fused}}
        probe_once(self.vlm, input_ids, attention_mask, kwargs)
        return kwargs, appended

    def _check_inputs(self, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Raise for invalid inputs before any work. Tensor values are not checked."""
        cure = "Pass what Spa3VLMProcessor returned."
        if input_ids is not None:
            check_tensor("input_ids", input_ids, cure)
            if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
                raise ValueError(
                    "`input_ids` must be whole numbers of shape (batch, sequence) and type torch.int64, got "
                    f"{shorten(input_ids)} and type {input_ids.dtype}. {cure}"
                )
            if input_ids.is_meta and not self.device.type == "meta":
                raise ValueError(f"`input_ids` must be on the model's device, {self.device}, got meta. {cure}")
            self._check_ids(input_ids, cure)
        for name, value in (
            ("attention_mask", attention_mask),
            ("labels", kwargs.get("labels")),
            ("pixel_values", kwargs.get("pixel_values")),
            ("view_pixel_values", kwargs.get("view_pixel_values")),
        ):
            # Some families take pictures of several sizes as a list, and attention masks have other forms too.
            others = {"pixel_values": list, "attention_mask": dict | BlockMask}.get(name, Tensor)
            if value is not None and not isinstance(value, Tensor | others):
                raise ValueError(f"`{name}` must be a tensor, got {shorten(value)}. {cure}")
            is_by_token = name == "labels" or (name == "attention_mask" and _cache_in(kwargs) is None)
            if not is_by_token or input_ids is None or not isinstance(value, Tensor):
                continue
            if value.ndim == 2 and value.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(value.shape)}. "
                    f"{cure}"
                )
        views = kwargs.get("view_pixel_values")
        if views is not None and views.is_meta and self.device.type != "meta":
            raise ValueError(f"`view_pixel_values` must have values, got a tensor on the meta device. {cure}")
        if views is not None and len(views) and self.spa3r is not None:
            for name in ("view_grid_hw", "views_per_scene"):
                if kwargs.get(name) is None:
                    raise ValueError(f"`view_pixel_values` must come with `{name}`, got None. {cure}")
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            raise ValueError(f"`input_ids` (or `inputs_embeds`) must be given, got None. {cure}")
        for name in ("views_per_scene", "image_tokens_per_scene", "spatial_tokens_per_scene"):
            if kwargs.get(name) is not None:
                counts = whole_numbers(name, kwargs[name])
                if min(counts, default=0) < 0:
                    raise ValueError(f"`{name}` must hold whole numbers of at least 0, got {shorten(counts)}. {cure}")
                kwargs[name] = counts

    def _check_ids(self, input_ids: Tensor, cure: str) -> None:
        """Raise for ids that the VLM has no embedding for. Checked on the CPU only; elsewhere it would synchronize."""
        count = getattr(self.vlm.get_input_embeddings(), "num_embeddings", None)  # a sharded weight may be empty here
        if count is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        # Families replace the placeholder of a picture before they look up embeddings: its id may be beyond the last.
        known = (input_ids >= 0) & (input_ids < count) | (input_ids == self.vlm.config.image_token_id)
        if not known.all():
            row, place = (~known).nonzero()[0].tolist()
            raise ValueError(
                f"`input_ids` must hold whole numbers from 0 to {count - 1}, the VLM's tokens, got "
                f"{input_ids[row, place].item()} at place {place} of row {row}. {cure}"
            )

    def _tokens_per_row(self, input_ids: Tensor | None, given: Tensor | Sequence[int] | None) -> list[int]:
        given = None if given is None else as_list(given)
        if input_ids is None or input_ids.device.type != "cpu":
            if given is not None:
                return given  # counting would synchronize host and device
            if input_ids is None:
                raise ValueError(
                    "`image_tokens_per_scene` must be given where `input_ids` is not (with `inputs_embeds`)."
                )
        counted = input_ids.eq(self.vlm.config.image_token_id).sum(dim=1).tolist()
        if given is not None and given != counted:
            raise ValueError(
                "`image_tokens_per_scene` must say how many image placeholders each row of `input_ids` has, "
                f"{counted}, got {given}. Pass what Spa3VLMProcessor returned."
            )
        return counted

    def _encode_views(
        self, spa3r: Spa3RModel, views: dict[str, Any], tokens_per_row: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """Packed spatial tokens of the rows that have views, and the number of tokens of each row."""
        counts = as_list(views["views_per_scene"])
        if len(counts) != len(tokens_per_row):
            raise ValueError(
                f"`views_per_scene` must have one entry for each of the {len(tokens_per_row)} rows of `input_ids` "
                f"(0 for a text-only row), got {len(counts)}."
            )
        for row, (count, tokens) in enumerate(zip(counts, tokens_per_row)):
            if (count > 0) != (tokens > 0):
                raise ValueError(
                    f"Row {row} has {count} views and {tokens} image tokens; a row has both or neither. Don't truncate "
                    "image placeholders, and pass what Spa3VLMProcessor returned."
                )
        pixels, grids = views["view_pixel_values"].to(spa3r.device), views["view_grid_hw"]
        views_per_scene = [count for count in counts if count]
        if self.config.spatial_source == "backbone":
            tokens = spa3r._backbone_features(pixels, grids, views_per_scene)
            layout = ViewLayout.from_inputs(grids, views_per_scene)
            per_scene = iter(layout.per_scene(layout.patches_per_view))
            return tokens, [next(per_scene) if count else 0 for count in counts]
        trainable = any(parameter.requires_grad for parameter in spa3r.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            latents = spa3r._encode(pixels, grids, views_per_scene)
        return latents.flatten(0, 1), [latents.shape[1] if count else 0 for count in counts]

    def _append(
        self,
        spatial_tokens: Tensor,
        wanted: Sequence[int],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        given: Tensor | Sequence[int] | None,
    ) -> AppendedTokens:
        """Put the projected spatial tokens into the places that the processor reserved: `wanted` in each row."""
        token_id: Any = self.config.spatial_token_id
        if attention_mask is not None and attention_mask.dim() == 4:  # padding doesn't attend to itself
            attention_mask = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0] == 0
        if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise ValueError(
                "`integration='append'` must have `input_ids` and an `attention_mask` of the same shape (or none), got "
                f"{None if input_ids is None else tuple(input_ids.shape)} and "
                f"{None if attention_mask is None else tuple(attention_mask.shape)}. Pass what Spa3VLMProcessor "
                "returned."
            )
        places: Tensor = input_ids.eq(token_id)
        if attention_mask is not None:  # padding uses the same token
            places &= attention_mask.bool().to(places.device)
        # Counting would synchronize host and device.
        counted = as_list(given) if given is not None and places.device.type != "cpu" else places.sum(1).tolist()
        if counted != list(wanted):
            raise ValueError(
                "Each row of `input_ids` must hold a place for each token that is appended to its scene, "
                f"{list(wanted)}, got {counted} of token {token_id}. Set `processor.spatial_tokens = "
                f"model.config.spatial_tokens` (here {self.config.spatial_tokens!r}) before making inputs, don't "
                "truncate these tokens, and see that `config.spatial_token_id` is `processor.spatial_token_id`."
            )
        projected = self.adapter(spatial_tokens)
        places = places[..., None].to(projected.device)
        vectors = projected.new_zeros(*places.shape[:2], projected.shape[-1]).masked_scatter(places, projected)
        return AppendedTokens(places, vectors)

    def _fuse_tokens(
        self,
        features: Tensor | Sequence[Tensor],
        tokens_per_row: Sequence[int],
        spatial: tuple[Tensor, list[int]] | None,
    ) -> Tensor | list[Tensor]:
        """Fused image tokens in the form that the VLM expects: one tensor, or a list with one item per row.

        `spatial` holds packed spatial tokens and the number of each row; None returns the image tokens unchanged.
        """
        if isinstance(features, Tensor):
            tokens = features.flatten(0, -2)
        else:
            tokens = torch.cat([part.flatten(0, -2) for part in features])
        if len(tokens) != sum(tokens_per_row):
            raise ValueError(
                f"The pictures give {len(tokens)} image tokens and `input_ids` has {sum(tokens_per_row)} image "
                "placeholders. Don't truncate image placeholders, and pass what Spa3VLMProcessor returned."
            )
        fused = tokens
        if spatial is not None:
            spatial_tokens, spatial_per_row = spatial
            per_scene = ([count for count in counts if count] for counts in (tokens_per_row, spatial_per_row))
            fused = self.adapter(tokens, spatial_tokens.to(tokens.device), *per_scene)
        # One item per row: some families expand lists for beams item by item; one item per picture would mix rows up.
        return (
            fused.reshape(features.shape) if isinstance(features, Tensor) else list(fused.split(list(tokens_per_row)))
        )


def _check_part(name: str, part: Any, loading: dict[str, Any]) -> None:
    """A part is a name or a model; loading arguments are allowed with a name only."""
    if isinstance(part, PreTrainedModel):
        if given := sorted(key for key, value in loading.items() if value is not None):
            raise TypeError(
                f"{', '.join(map(repr, given))} must be left out where `{name}` is a model, which is loaded already. "
                f"Pass it to the model's own from_pretrained, or pass the name of a folder or repository as `{name}`."
            )
    elif part is not None and not isinstance(part, str | Path):
        wrapped = hasattr(part, "get_base_model")
        raise TypeError(
            f"`{name}` must be a folder, a hub id or a model of transformers, got {type(part).__name__}."
            + (f" Pass `{name}.get_base_model()`, whose layers keep the adapters." if wrapped else "")
        )


def _cache_in(inputs: dict[str, Any]) -> Cache | None:
    """The cache among a model's inputs, under its current name or that of earlier transformers versions."""
    return next((inputs[name] for name in ("cache", "past_key_values") if inputs.get(name) is not None), None)


def _regroup(features: Sequence[Tensor], tokens_per_row: Sequence[int]) -> list[Tensor]:
    """The deepstack features of one layer, one item per row like the fused tokens."""
    return list(torch.cat(list(features)).split(list(tokens_per_row)))


Spa3VLM = Spa3VLMForConditionalGeneration

__all__ = ["Spa3VLM", "Spa3VLMForConditionalGeneration"]
