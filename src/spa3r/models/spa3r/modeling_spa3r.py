"""Spa3R: an encoder of unposed views into one latent, a decoder of the feature field, and their training loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from spa3r.checks import is_count, shorten
from spa3r.models.attention import Segments
from spa3r.models.backbone import BackboneOutput, BackbonePreTrainedModel, backbone_class
from spa3r.models.base import PackedPreTrainedModel, check_finite, packed_forward, save_without, split_hub_kwargs
from spa3r.models.cameras import camera_rays, check_cameras, pluecker_rays, relative_to_first_view
from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.cost import naming_what_fits
from spa3r.models.depth_anything_3.modeling_depth_anything_3 import DepthAnything3Model
from spa3r.models.encodings import ProjectiveEncoding, RotaryEncoding, projection_matrices
from spa3r.models.layers import Mlp, make_layers
from spa3r.models.packing import ViewLayout, as_list, check_tensor, prepend_tokens, select_rows, split_prefix, to_device
from spa3r.models.released import HUB_KWARGS, Kind, ReleasedCheckpoint, find_released
from spa3r.models.spa3r.configuration_spa3r import Spa3RConfig
from spa3r.models.spa3r.released_spa3r import for_pretraining, translate_spa3r
from spa3r.models.vggt.modeling_vggt import VggtModel

logger = logging.get_logger(__name__)

ATTENTION_KERNELS = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
]
"""Kernels of PyTorch whose results gradient checkpointing keeps."""

SEMANTIC_IMAGE_SIZE = 224
"""Side in pixels of the square that views are resized to for the semantic teacher."""


@dataclass
class Spa3RField(ModelOutput):
    """A feature field at the patches of some views.

    Attributes:
        last_hidden_state: (sum of N, D), the decoder's normalized ray tokens.
        geometry_features: (sum of N, F), predicted backbone features; None if ``config.targets`` lacks them.
        semantic_features: (sum of N, semantic_hidden_size), predicted teacher features, or None.
        depth: (sum of N,), depth predicted by the probe, in the backbone's unit.
    """

    last_hidden_state: Tensor
    geometry_features: Tensor | None = None
    semantic_features: Tensor | None = None
    depth: Tensor | None = None


@dataclass
class Spa3RModelOutput(Spa3RField):
    """Output of :class:`Spa3RModel`: the latents, the cameras, and the field at these cameras.

    Attributes:
        latents: (scenes, L, D).
        extrinsics: (views, 4, 4) float32.
        intrinsics: (views, 3, 3) float32, pixels.
    """

    latents: Tensor | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None


@dataclass
class Spa3RForPreTrainingOutput(Spa3RModelOutput):
    """Output of :class:`Spa3RForPreTraining`.

    Attributes:
        loss: The sum of the terms.
        losses: The terms by name: ``geometry_l1``, ``geometry_cosine``, ``semantic_l1``, ``semantic_cosine``,
            ``depth_probe``; means over all patches of the views selected by ``config.loss_views``. Features that
            ``config.targets`` lacks have no terms.
        losses_per_scene: The same terms, each (scenes,): means over one scene's patches; NaN where a scene has none.
        target_mask: (views,) bool on the CPU, True = target.
        context_features: (sum of N over context views, F), the encoder's input, view by view.
        geometry_targets: (sum of N, F), or None if ``config.targets`` lacks them.
        semantic_targets: (sum of N, semantic_hidden_size), or None if ``config.targets`` lacks them.
        depth_targets: (sum of N,), or None if the backbone has no depth head.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    losses_per_scene: dict[str, Tensor] | None = None
    target_mask: Tensor | None = None
    context_features: Tensor | None = None
    geometry_targets: Tensor | None = None
    semantic_targets: Tensor | None = None
    depth_targets: Tensor | None = None


def _make_layers(config: Spa3RConfig, count: int) -> nn.ModuleList:
    width, heads = config.hidden_size, config.num_attention_heads
    return make_layers(count, config, width, heads, config.mlp_ratio, config.layer_norm_eps, qk_norm="rms_norm")


def _rotary_encoding(
    config: Spa3RConfig, layout: ViewLayout, num_prefix: int, lengths: Sequence[int], device: torch.device
) -> RotaryEncoding:
    """RoPE of segments of patches, each after a prefix at (0, 0). Positions are per view, so views have no order."""
    positions = layout.token_positions(num_prefix, lengths, device)
    return RotaryEncoding.from_positions(positions, config.hidden_size // config.num_attention_heads, config.rope_theta)


class Spa3REncoder(nn.Module):
    """Encodes a scene's backbone features into its latents."""

    def __init__(self, config: Spa3RConfig):
        super().__init__()
        self.config = config
        self.input_projection = nn.Linear(config.geometry_hidden_size, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_latents, config.hidden_size))
        self.layers = _make_layers(config, config.num_encoder_layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, features: Tensor, layout: ViewLayout) -> Tensor:  # (sum of N, F) -> (scenes, L, D)
        scenes = len(layout.views_per_scene)
        patches_per_scene = layout.per_scene(layout.patches_per_view)
        tokens = self.input_projection(features.to(self.norm.weight.dtype))
        prefix = torch.cat([self.register_tokens, self.query_tokens], dim=1).expand(scenes, -1, -1)
        tokens = prepend_tokens(prefix.to(tokens.dtype), tokens, patches_per_scene)
        rotary = _rotary_encoding(self.config, layout, prefix.shape[1], patches_per_scene, tokens.device)
        segments = Segments.within([prefix.shape[1] + count for count in patches_per_scene])
        for layer in self.layers:
            tokens = layer(tokens, segments, rotary)
        latents, _ = split_prefix(tokens, patches_per_scene, prefix.shape[1])
        return self.norm(latents[:, self.config.num_register_tokens :])


class Spa3RDecoder(nn.Module):
    """Decodes the features along a camera's rays from a scene's latents, each view independently."""

    def __init__(self, config: Spa3RConfig):
        super().__init__()
        self.config = config
        self.ray_projection = nn.Linear(3 if config.camera_embedding == "prope" else 6, config.hidden_size)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.layers = _make_layers(config, config.num_decoder_layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, latents: Tensor, extrinsics: Tensor, intrinsics: Tensor, layout: ViewLayout
    ) -> Tensor:  # (scenes, L, D), (views, 4, 4), (views, 3, 3) -> (sum of N, D)
        config = self.config
        lengths = layout.patches_per_view
        prope = config.camera_embedding == "prope"

        def rays(grid: tuple[int, int], views: list[int]) -> Tensor:
            own_intrinsics = torch.stack([intrinsics[view] for view in views])
            if prope:
                return camera_rays(own_intrinsics, grid, config.patch_size)
            own_extrinsics = torch.stack([extrinsics[view] for view in views])
            return pluecker_rays(own_extrinsics, own_intrinsics, grid, config.patch_size)

        ray_tokens = self.ray_projection(torch.cat(layout.map_grids(rays)).to(self.norm.weight.dtype))
        scenes = zip(latents.split(1), layout.views_per_scene)
        prefix = torch.cat(
            [
                self.register_tokens.to(ray_tokens.dtype).expand(layout.num_views, -1, -1),
                # Copies of whole scenes: in backward, one index per view would allocate a full tensor of zeros each.
                torch.cat([own.expand(count, -1, -1) for own, count in scenes]).to(ray_tokens.dtype),
            ],
            dim=1,
        )
        tokens = prepend_tokens(prefix, ray_tokens, lengths)
        segments = Segments.within([prefix.shape[1] + count for count in lengths])
        if prope:
            encoding = self._projective_encoding(extrinsics, intrinsics, layout, prefix.shape[1])
        else:  # a Plücker ray gives a position in the world, but not in the picture
            encoding = _rotary_encoding(config, layout, prefix.shape[1], lengths, ray_tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, segments, encoding)
        return self.norm(split_prefix(tokens, lengths, prefix.shape[1])[1])

    def _projective_encoding(
        self, extrinsics: Tensor, intrinsics: Tensor, layout: ViewLayout, num_prefix: int
    ) -> ProjectiveEncoding:
        """PRoPE of the ray tokens; registers and latents have no camera: identity and position 0."""
        device, lengths = extrinsics.device, layout.patches_per_view
        counts = [count for length in lengths for count in (num_prefix, length)]
        repeats = to_device(counts, torch.long, device)
        image_hw = to_device(layout.image_hw(self.config.patch_size), torch.float32, device)

        def per_token(matrices: Tensor) -> Tensor:  # (views, 4, 4) -> (S, 4, 4)
            identity = torch.eye(4, device=device).expand_as(matrices)
            pairs = torch.stack([identity, matrices], dim=1).flatten(0, 1)
            return pairs.repeat_interleave(repeats, dim=0, output_size=sum(counts))

        projection, inverse = projection_matrices(extrinsics, intrinsics, image_hw)
        positions = layout.token_positions(num_prefix, lengths, device, first=0)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return ProjectiveEncoding.from_cameras(
            per_token(projection), per_token(inverse), positions, head_dim, self.config.rope_theta
        )


class Spa3RPreTrainedModel(PackedPreTrainedModel):
    """Base class of the Spa3R models: keeps the frozen parts frozen and can exclude them from checkpoints."""

    config_class = Spa3RConfig
    config: Spa3RConfig
    base_model_prefix = "spa3r"
    main_input_name = "view_pixel_values"
    _keep_in_fp32_modules_strict = ["camera_head"]
    _released_kinds = ("spa3r", "spa3-vlm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Spa3REncoder | Spa3RDecoder):
            init.normal_(module.register_tokens, std=1e-6)
        if isinstance(module, Spa3REncoder):
            init.trunc_normal_(module.query_tokens, std=self.config.initializer_range)

    def _set_gradient_checkpointing(  # ty: ignore[incompatible-method-override]  # arguments differ between versions
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Like transformers' method, but results of attention are kept: they are as large as the input of a layer, and
        with eight views take 40 % of its operations."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant") is False and "context_fn" not in options:
            keeping = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
            gradient_checkpointing_func = partial(gradient_checkpointing_func, context_fn=keeping)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def frozen_modules(self) -> dict[str, PreTrainedModel | None]:
        """The parts that are never trained, by their path in the model; None for one that is not loaded."""
        raise NotImplementedError

    def _freeze(self) -> None:
        for module in self.frozen_modules().values():
            if module is not None:
                module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Like ``nn.Module.train``; the frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules().values():
            if module is not None:
                module.eval()
        return self

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_backbone: bool = True, **kwargs: Any
    ) -> None:
        """Like transformers' ``save_pretrained``; optionally without the frozen parts.

        Args:
            save_directory: Target folder.
            *args: As in transformers.
            include_backbone: False excludes the frozen parts (backbone, semantic teacher); the configuration then
                records their sources, and ``from_pretrained`` loads them from there.
            **kwargs: As in transformers.

        Raises:
            ValueError: A part is to be excluded, but its source is unknown.
        """
        with self.naming_frozen_parts(include_backbone, save_directory) as left_out:
            save_without(super().save_pretrained, self, left_out, save_directory, *args, **kwargs)

    @contextmanager
    def naming_frozen_parts(self, include_backbone: bool, save_directory: str | os.PathLike) -> Generator[list[str]]:
        """Context manager: while a checkpoint is written, the configuration names the frozen parts that it lacks.

        Args:
            include_backbone: False excludes all frozen parts. A part that was never loaded is always excluded.
            save_directory: Target folder of the checkpoint.
        """
        parts = self.frozen_modules()
        sources = {
            path: None if include_backbone and module is not None else self._source_of(path, module, save_directory)
            for path, module in parts.items()
        }
        fields = {path: f"{path.rpartition('.')[2]}_name_or_path" for path in parts}
        before = {field: getattr(self.config, field) for field in fields.values()}
        try:
            for path, source in sources.items():
                setattr(self.config, fields[path], source)
            yield [path for path, source in sources.items() if source is not None]
        finally:  # restore the configuration in memory
            for field, name in before.items():
                setattr(self.config, field, name)

    def _source_of(self, path: str, module: PreTrainedModel | None, save_directory: str | os.PathLike) -> str:
        """Source of a frozen part: as configured, or where the part or the model was loaded from."""
        field = f"{path.rpartition('.')[2]}_name_or_path"
        name = getattr(self.config, field) or (module.config.name_or_path if module is not None else "")
        name = str(name or self.config.name_or_path)
        if not name:
            raise ValueError(
                "`include_backbone=False` leaves the frozen parts out, and the configuration doesn't say where they "
                f"come from. Set `model.config.{field}` to a folder or hub id, or save with include_backbone=True."
            )
        folder = Path(name)
        if folder.is_dir() and folder.resolve() == Path(save_directory).resolve():
            raise ValueError(
                f"`include_backbone=False` leaves the frozen parts out, and {name} is where they come from: saving "
                "there would destroy them. Choose another folder."
            )
        return str(folder.resolve()) if folder.is_dir() else name  # absolute: valid in any working directory

    def _finish_loading(self, hub_kwargs: dict[str, Any]) -> None:
        """Load the frozen parts that the checkpoint only names, then freeze."""
        for path, module in self.frozen_modules().items():
            if module is None:
                owner, _, part = path.rpartition(".")
                name = getattr(self.config, f"{part}_name_or_path")
                back_end = getattr(self.config, f"{part}_config")._attn_implementation
                loaded = _load_frozen_part(part, name, dtype=self.dtype, attn_implementation=back_end, **hub_kwargs)
                if part == "backbone":
                    _check_backbone(self.config, loaded.config, str(name))
                setattr(self.get_submodule(owner), part, loaded.to(self.device))
                setattr(self.config, f"{part}_config", loaded.config)  # the same object that its layers read
        self._freeze()


RELEASED_BACKBONES: dict[Kind, type[BackbonePreTrainedModel]] = {
    "vggt": VggtModel,
    "depth-anything-3": DepthAnything3Model,
}


def load_backbone(name: str | Path, **kwargs: Any) -> BackbonePreTrainedModel:
    """Load a geometry backbone of any type, in our layout or the released one.

    Args:
        name: Folder, file or hub id.
        **kwargs: As in ``from_pretrained``.

    Raises:
        ValueError: It holds another model.
    """
    hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
    if (released := find_released(name, tuple(RELEASED_BACKBONES), "a backbone", **hub)) is not None:
        return RELEASED_BACKBONES[released.kind].from_pretrained(name, **kwargs)
    config = AutoConfig.from_pretrained(name, **hub)
    if not isinstance(config, BackboneConfig):
        raise ValueError(
            f"{name} must hold a geometry backbone, such as a VggtModel or a DepthAnything3Model, got a model of type "
            f"{config.model_type!r}."
        )
    return backbone_class(config).from_pretrained(name, **kwargs)


def _check_backbone(config: Spa3RConfig, given: Any, what: str) -> None:
    """Check that a backbone has the type, the features and the patches of the one that a Spa3R was trained on.

    Raises:
        ValueError: One of them differs.
    """

    def described(backbone: BackboneConfig) -> str:
        return (
            f"{backbone.model_type!r} with features of width {backbone.feature_size} and patches of "
            f"{backbone.patch_size} pixels"
        )

    wanted = config.backbone_config
    if described(wanted) != described(given):
        raise ValueError(
            f"The backbone of this Spa3R must be the one that it was trained on, a {described(wanted)}, got {what}, a "
            f"{described(given)}. Take that backbone, or pretrain a Spa3R on this one."
        )


def _load_frozen_part(part: str, name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a backbone or teacher from its own checkpoint, or from that of a whole Spa3R that contains it."""
    hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
    kinds = (*RELEASED_BACKBONES, *Spa3RPreTrainedModel._released_kinds)
    if (released := find_released(name, kinds, f"its {part}", **hub)) is not None:
        if released.kind in RELEASED_BACKBONES:
            return load_backbone(name, **kwargs)
        return _part_of_spa3r(part, name, **kwargs)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except OSError as error:
        raise ValueError(
            f"The checkpoint names {name} as the source of its {part}, which can't be loaded ({error}). Set its "
            f"location with from_pretrained(..., {part}_name_or_path=...)."
        ) from error
    if config.model_type != "spa3r":
        return (load_backbone if part == "backbone" else AutoModel.from_pretrained)(name, **kwargs)
    if getattr(config, f"{part}_name_or_path") == name:
        raise ValueError(
            f"The checkpoint {name} names itself as the source of its {part}, which it doesn't hold. Set its location "
            f"with from_pretrained(..., {part}_name_or_path=...)."
        )
    return _part_of_spa3r(part, name, **kwargs)


def _part_of_spa3r(part: str, name: str, **kwargs: Any) -> PreTrainedModel:
    owner = Spa3RModel if part == "backbone" else Spa3RForPreTraining
    return getattr(owner.from_pretrained(name, **kwargs), part)


class Spa3RModel(Spa3RPreTrainedModel):
    """Encodes unposed views into latents, and decodes the feature field of any camera from them.

    The backbone is frozen and stays in eval mode. If ``config.backbone_name_or_path`` is set, its weights are stored
    elsewhere: ``from_pretrained`` loads them, while the constructor leaves ``backbone`` empty.
    """

    _keys_to_ignore_on_load_unexpected = [r"^semantic_teacher\."]

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Spa3RConfig]:
        weights, _, config = translate_spa3r(released.tensors(), fields)
        return weights, config

    def __init__(self, config: Spa3RConfig):
        super().__init__(config)
        self.backbone: Any = None
        if config.backbone_name_or_path is None:
            self.backbone = backbone_class(config.backbone_config)(config.backbone_config)
        self.encoder = Spa3REncoder(config)
        self.decoder = Spa3RDecoder(config)
        width = config.hidden_size
        inner = int(width * config.mlp_ratio)
        self.geometry_head = Mlp(width, inner, config.geometry_hidden_size) if "geometry" in config.targets else None
        self.semantic_head = Mlp(width, inner, config.semantic_hidden_size) if "semantic" in config.targets else None
        self.depth_probe = Mlp(width, inner, 1)
        self.post_init()
        self._freeze()

    def frozen_modules(self) -> dict[str, PreTrainedModel | None]:
        return {"backbone": self.backbone}

    @packed_forward
    def forward(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> Spa3RModelOutput:
        """Encode all views, then decode the field at their cameras.

        Args:
            view_pixel_values: (sum of N, 3 * p * p), from the image processor.
            view_grid_hw: (views, 2), from the image processor.
            views_per_scene: (scenes,), from the image processor.
            extrinsics: (views, 4, 4) of known cameras, in any world frame shared by a scene's views; requires
                `intrinsics`. None: the backbone predicts both.
            intrinsics: (views, 3, 3), pixels of the processed views.
        """
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        given = self._given_cameras(extrinsics, intrinsics, layout, view_pixel_values.device)
        features, backbone = self._run_backbone(view_pixel_values, layout, output_cameras=given is None)
        latents = self.encoder(features, layout)
        extrinsics, intrinsics = given or backbone.cameras
        field = self._decode(latents, extrinsics, intrinsics, layout)
        return Spa3RModelOutput(**field, latents=latents, extrinsics=extrinsics, intrinsics=intrinsics)

    def encode(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> Tensor:  # -> (scenes, L, D)
        """Encode every scene into its latents; all views are context. Takes the image processor's output.

        Raises:
            ValueError: There are no views, or the inputs contradict each other.
        """
        latents = self._encode(view_pixel_values, view_grid_hw, views_per_scene)
        check_finite(self, latents, "latents", view_pixel_values=view_pixel_values)
        return latents

    def _encode(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> Tensor:  # -> (scenes, L, D)
        """:meth:`encode` without checking the result: training skips steps that are not finite."""
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        with naming_what_fits(self, layout):
            return self.encoder(self._run_backbone(view_pixel_values, layout)[0], layout)

    def backbone_features(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> Tensor:  # -> (sum of N, F)
        """The encoder's input: the frozen backbone's last-layer features of every patch, computed with attention
        across all views of a scene. Takes the image processor's output.

        Raises:
            ValueError: There are no views, or the inputs contradict each other.
        """
        features = self._backbone_features(view_pixel_values, view_grid_hw, views_per_scene)
        check_finite(self, features, "features", view_pixel_values=view_pixel_values)
        return features

    def _backbone_features(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> Tensor:  # -> (sum of N, F)
        """:meth:`backbone_features` without checking the result."""
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        with naming_what_fits(self, layout):
            return self._run_backbone(view_pixel_values, layout)[0]

    def decode(
        self,
        latents: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
    ) -> Spa3RField:
        """Decode the feature field at any cameras.

        Args:
            latents: (scenes, L, D), from :meth:`encode`.
            extrinsics: (views, 4, 4), camera-from-world; the world frame is that of the scene's first encoded view.
            intrinsics: (views, 3, 3), pixels of a picture of `view_grid_hw` patches.
            view_grid_hw: (views, 2), patch grid of every camera.
            views_per_scene: (scenes,), number of cameras of each scene.

        Raises:
            ValueError: A shape doesn't fit; the message says which.
        """
        layout = ViewLayout.from_inputs(view_grid_hw, views_per_scene)
        wanted = (len(layout.views_per_scene), self.config.num_latents, self.config.hidden_size)
        check_tensor("latents", latents, "Pass what `encode` of this model returned.")
        if tuple(latents.shape) != wanted:
            raise ValueError(
                f"`latents` must have shape (scenes, num_latents, hidden_size) = {wanted}, got {tuple(latents.shape)}. "
                "Pass what `encode` of this model returned."
            )
        if not latents.is_floating_point():
            raise ValueError(f"`latents` must be floating point, as `encode` returns them, got {latents.dtype}.")
        self.check_device("latents", latents)
        extrinsics, intrinsics = check_cameras(extrinsics, intrinsics, layout.num_views, latents.device)
        field = self._decode(latents, extrinsics, intrinsics, layout)
        check_finite(self, field.last_hidden_state, "field", latents=latents)
        return field

    def _decode(self, latents: Tensor, extrinsics: Tensor, intrinsics: Tensor, layout: ViewLayout) -> Spa3RField:
        tokens = self.decoder(latents, extrinsics, intrinsics, layout)
        return Spa3RField(
            last_hidden_state=tokens,
            geometry_features=None if self.geometry_head is None else self.geometry_head(tokens),
            semantic_features=None if self.semantic_head is None else self.semantic_head(tokens),
            depth=self.depth_probe(tokens.detach())[:, 0],  # the probe must not shape the features
        )

    def _given_cameras(
        self, extrinsics: Tensor | None, intrinsics: Tensor | None, layout: ViewLayout, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        if extrinsics is None and intrinsics is None:
            return None
        if extrinsics is None or intrinsics is None:
            raise ValueError(
                "`extrinsics` and `intrinsics` must be given together, got only "
                f"{'`intrinsics`' if extrinsics is None else '`extrinsics`'}. Pass both, or neither to have the "
                "backbone predict them."
            )
        extrinsics, intrinsics = check_cameras(extrinsics, intrinsics, layout.num_views, device)
        return relative_to_first_view(extrinsics, layout.views_per_scene), intrinsics.float()

    def _run_backbone(
        self, view_pixel_values: Tensor, layout: ViewLayout, **kwargs: Any
    ) -> tuple[Tensor, BackboneOutput]:
        """The last layer's patch features (sum of N, F), and the backbone's output without tokens, which would hold
        the features twice. Always without gradients."""
        if self.backbone is None:
            raise ValueError(
                f"This {type(self).__name__} has no backbone: its configuration names "
                f"{self.config.backbone_name_or_path!r}. Load it with from_pretrained, or set `model.backbone`."
            )
        if self.backbone.config is not self.config.backbone_config:  # set by the user
            _check_backbone(self.config, self.backbone.config, "another")
        self.backbone.check_device("view_pixel_values", view_pixel_values)
        with torch.no_grad():
            output = self.backbone.forward_layout(view_pixel_values, layout, **kwargs)
            (tokens,), output.tokens = output.tokens, ()
            return self.backbone.patch_tokens(tokens, layout), output


class Spa3RForPreTraining(Spa3RPreTrainedModel):
    """Predictive Spatial Field Modeling: predicts the features of views that are hidden from the encoder.

    Trains the encoder, the decoder and the heads of ``spa3r``; the backbone and the semantic teacher are frozen. The
    teacher exists only if ``"semantic"`` is among ``config.targets``.
    """

    def __init__(self, config: Spa3RConfig):
        super().__init__(config)
        self.spa3r = Spa3RModel(config)
        self.semantic_teacher = None
        if "semantic" in config.targets:
            if config.semantic_teacher_config is None:
                raise ValueError(
                    "`semantic_teacher_config` must be set to pretrain: the semantic targets are a DINOv3's features. "
                    "Give a DINOv3ViTConfig, use Spa3RForPreTraining.from_backbone_and_dinov3, or leave 'semantic' out "
                    "of `targets`."
                )
            if config.semantic_teacher_name_or_path is None:
                self.semantic_teacher = AutoModel.from_config(config.semantic_teacher_config)
        self.post_init()
        self._freeze()

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Spa3RConfig]:
        weights, teacher, config = translate_spa3r(released.tensors(), fields)
        return for_pretraining(weights, teacher if "semantic" in config.targets else {}), config

    @classmethod
    def from_backbone_and_dinov3(
        cls, backbone: str | Path, dinov3: str | Path | None = None, dtype: torch.dtype | str = "auto", **kwargs: Any
    ) -> Spa3RForPreTraining:
        """A newly initialized Spa3R with two pretrained frozen parts.

        Args:
            backbone: Folder or hub id of a geometry backbone: a :class:`VggtModel`, a :class:`DepthAnything3Model`, or
                one's own (:doc:`/guides/backbones`).
            dinov3: Folder or hub id of transformers' DINOv3ViTModel. Not loaded, and may be None, if `targets` lacks
                ``"semantic"``.
            dtype: Dtype of the loaded parts; the trained parts are float32.
            **kwargs: Other fields of :class:`Spa3RConfig`; and ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download`` for the hub.

        Raises:
            TypeError: A keyword is unknown.
            ValueError: The backbone is none.
        """
        hub_kwargs, fields = split_hub_kwargs(kwargs, Spa3RConfig)
        loaded = load_backbone(backbone, dtype=dtype, **hub_kwargs)
        teacher = None
        if dinov3 is not None and "semantic" in fields.get("targets", ["semantic"]):
            teacher = AutoModel.from_pretrained(dinov3, dtype=dtype, **hub_kwargs)
            fields |= {"semantic_teacher_config": teacher.config, "semantic_teacher_name_or_path": str(dinov3)}
        model = cls(Spa3RConfig(backbone_config=loaded.config, backbone_name_or_path=str(backbone), **fields))
        model.spa3r.backbone, model.semantic_teacher = loaded, teacher
        model._freeze()
        return model

    def _freeze(self) -> None:
        super()._freeze()
        heads = self.config.backbone_config.heads
        if "depth" not in heads:
            self.spa3r.depth_probe.requires_grad_(False)
            logger.warning_once(
                "The depth probe is not trained, and the field's depth means nothing: the backbone must have a depth "
                f"head to pretrain it, got the heads {list(heads)}. Take a checkpoint with one if you need depth."
            )

    def frozen_modules(self) -> dict[str, PreTrainedModel | None]:
        parts: dict[str, PreTrainedModel | None] = {"spa3r.backbone": self.spa3r.backbone}
        if "semantic" in self.config.targets:
            parts["semantic_teacher"] = self.semantic_teacher
        return parts

    @packed_forward
    def forward(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
        target_mask: Tensor | Sequence[bool] | None = None,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        return_loss: bool = True,
    ) -> Spa3RForPreTrainingOutput:
        """
        Args:
            view_pixel_values: (sum of N, 3 * p * p), from the image processor.
            view_grid_hw: (views, 2), from the image processor.
            views_per_scene: (scenes,), from the image processor.
            target_mask: (views,) bool, True = target; each scene's first view must be context. None: sampled with
                ``config.mask_ratio`` from PyTorch's CPU generator.
            extrinsics: (views, 4, 4) of known cameras in any world frame shared by a scene's views; requires
                `intrinsics`. None: the backbone predicts both.
            intrinsics: (views, 3, 3), pixels of the processed views.
            return_loss: Has no effect: the loss is always returned. ``Trainer.evaluate`` looks for this argument to
                compute a loss without labels.

        Raises:
            ValueError: The inputs contradict each other, or the loss covers no view.
        """
        model, config = self.spa3r, self.config
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        given = model._given_cameras(extrinsics, intrinsics, layout, view_pixel_values.device)
        targets = self._target_views(target_mask, layout)

        split = layout.split_context(targets)
        asymmetric = config.view_masking == "asymmetric"
        sorted_features, backbone = model._run_backbone(
            select_rows(view_pixel_values, layout.patches_per_view, split.order),
            split.sorted_layout,
            output_cameras=given is None,
            output_depth="depth" in config.backbone_config.heads,
            context_views=split.context_layout.views_per_scene if asymmetric else None,
        )
        features = select_rows(sorted_features, split.sorted_layout.patches_per_view, split.places)
        if asymmetric:
            context_features = select_rows(features, layout.patches_per_view, split.context_views)
        else:
            context_pixels = select_rows(view_pixel_values, layout.patches_per_view, split.context_views)
            context_features, _ = model._run_backbone(context_pixels, split.context_layout)

        latents = model.encoder(context_features, split.context_layout)
        if given is None:
            extrinsics, intrinsics = (
                torch.stack([cameras[place] for place in split.places]) for cameras in backbone.cameras
            )
        else:
            extrinsics, intrinsics = given
        field = model._decode(latents, extrinsics, intrinsics, layout)
        geometry_targets = features if "geometry" in config.targets else None
        semantic_targets = None
        if "semantic" in config.targets:
            semantic_targets = self._semantic_targets(view_pixel_values, layout)
        depth_targets = None
        if backbone.depth is not None:
            depth_targets = _depth_at_patches([backbone.depth[place] for place in split.places], layout)

        errors = field_errors(field, geometry_targets, semantic_targets, depth_targets)
        counted = [config.loss_views == "all" or target for target in targets]
        losses, losses_per_scene = _reduce(errors, layout, counted)
        return Spa3RForPreTrainingOutput(
            loss=reduce(add, losses.values()),
            losses=losses,
            losses_per_scene=losses_per_scene,
            target_mask=torch.tensor(targets),
            latents=latents,
            extrinsics=extrinsics,
            intrinsics=intrinsics,
            context_features=context_features,
            geometry_targets=geometry_targets,
            semantic_targets=semantic_targets,
            depth_targets=depth_targets,
            **field,
        )

    def _target_views(self, target_mask: Tensor | Sequence[bool] | None, layout: ViewLayout) -> list[bool]:
        if target_mask is None:
            targets = []
            for count in layout.views_per_scene:
                num_context = max(1, int(count * (1 - self.config.mask_ratio)))
                context = {0, *(1 + i for i in torch.randperm(count - 1)[: num_context - 1].tolist())}
                targets += [view not in context for view in range(count)]
        else:
            if getattr(target_mask, "is_meta", False):
                raise ValueError("`target_mask` must have values, got a tensor on the meta device. Pass bools.")
            targets = as_list(target_mask)
            if wrong := [target for target in targets if not (is_count(target, 0, 1) or isinstance(target, bool))]:
                raise ValueError(
                    f"`target_mask` must hold True or False for every view, got {shorten(wrong[0])}. Pass bools."
                )
            targets = [bool(target) for target in targets]
            if len(targets) != layout.num_views:
                raise ValueError(
                    f"`target_mask` must have one entry for each of the {layout.num_views} views, got {len(targets)}."
                )
            if wrong := [scene for scene, first in enumerate(layout.first_views) if targets[first]]:
                raise ValueError(
                    f"`target_mask` must be False for the first view of every scene, which is always context; it is "
                    f"True for the first view of scenes {wrong}. Reorder the views or change the mask."
                )
        if self.config.loss_views == "target" and not any(targets):
            raise ValueError(
                "`loss_views='target'` needs at least one target view in the batch, and there is none. "
                "Give scenes of at least 2 views, or use loss_views='all'."
            )
        return targets

    @torch.no_grad()
    def _semantic_targets(self, view_pixel_values: Tensor, layout: ViewLayout) -> Tensor:  # -> (sum of N, width)
        """The teacher's normalized patch tokens of the resized view, resized to the view's own grid."""
        config, patch, teacher = self.config, self.config.patch_size, self.semantic_teacher
        if teacher is None:
            raise ValueError(
                "This Spa3RForPreTraining has no semantic teacher: its configuration names "
                f"{config.semantic_teacher_name_or_path!r}. Load it with from_pretrained, or set "
                "`model.semantic_teacher`."
            )
        teacher_grid = SEMANTIC_IMAGE_SIZE // config.semantic_teacher_config.patch_size
        parts = view_pixel_values.split(list(layout.patches_per_view))

        def semantic_features(grid: tuple[int, int], views: list[int]) -> Tensor:
            pixels = torch.stack([parts[view] for view in views]).float()
            images = rearrange(pixels, "v (h w) (c p q) -> v c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
            images = nn.functional.interpolate(images, size=(SEMANTIC_IMAGE_SIZE,) * 2, mode="bilinear")
            tokens = teacher(pixel_values=images.to(teacher.dtype)).last_hidden_state
            tokens = tokens[:, -(teacher_grid**2) :].float().transpose(1, 2).unflatten(-1, (teacher_grid,) * 2)
            tokens = nn.functional.interpolate(tokens, size=grid, mode="bilinear")
            return tokens.flatten(2).transpose(1, 2).contiguous()

        return torch.cat(layout.map_grids(semantic_features))


def _depth_at_patches(depth: Sequence[Tensor], layout: ViewLayout) -> Tensor:  # of every view (H, W) -> (sum of N,)
    def resized(grid: tuple[int, int], views: list[int]) -> Tensor:
        maps = torch.stack([depth[view] for view in views])[:, None]
        return nn.functional.interpolate(maps, size=grid, mode="nearest").flatten(1)

    return torch.cat(layout.map_grids(resized))


def field_errors(
    field: Spa3RField, geometry: Tensor | None, semantic: Tensor | None, depth: Tensor | None
) -> dict[str, Tensor]:  # -> of every term (sum of N,)
    """The loss terms of every patch, in float32: smooth-L1 (beta 1) over channels, and 1 - cosine.

    Features that the field or the targets lack have no terms.
    """
    errors = {}
    pairs = {"geometry": (field.geometry_features, geometry), "semantic": (field.semantic_features, semantic)}
    for name, (predicted, target) in pairs.items():
        if predicted is None or target is None:
            continue
        predicted, target = predicted.float(), target.float()
        errors[f"{name}_l1"] = nn.functional.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
        errors[f"{name}_cosine"] = 1 - nn.functional.cosine_similarity(predicted, target, dim=-1)
    if field.depth is not None and depth is not None:
        errors["depth_probe"] = nn.functional.smooth_l1_loss(field.depth.float(), depth.float(), reduction="none")
    return errors


def _reduce(
    errors: dict[str, Tensor], layout: ViewLayout, counted: Sequence[bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over the patches of the selected views: of the whole batch, and of every scene (NaN if it has none)."""
    counts = [patches * use for patches, use in zip(layout.patches_per_view, counted)]
    terms = torch.stack(list(errors.values()))  # (terms, patches)
    of_views = _segment_sums(terms, layout.patches_per_view)
    of_views = of_views.where(to_device(counted, torch.bool, terms.device), 0)
    of_scenes = _segment_sums(of_views, layout.views_per_scene)
    per_scene = of_scenes / to_device(layout.per_scene(counts), terms.dtype, terms.device)
    return (
        dict(zip(errors, (of_scenes.sum(1) / sum(counts)).unbind())),
        dict(zip(errors, per_scene.detach().unbind())),
    )


def _segment_sums(values: Tensor, lengths: Sequence[int]) -> Tensor:  # (n, sum of lengths) -> (n, segments)
    if len(set(lengths)) == 1:
        return values.unflatten(1, (len(lengths), -1)).sum(2)
    return torch.stack([part.sum(1) for part in values.split(list(lengths), dim=1)], dim=1)


__all__ = ["Spa3RForPreTraining", "Spa3RForPreTrainingOutput", "Spa3RField", "Spa3RModel", "Spa3RModelOutput"]
