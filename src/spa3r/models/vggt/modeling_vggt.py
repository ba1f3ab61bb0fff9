"""VGGT on packed views: patch embedding, alternating frame and global attention, camera, depth and point heads.

Two memory savings over the original: only requested layers are kept, and the dense heads process a few views at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import maybe_autocast

from spa3r.checks import is_count, shorten
from spa3r.models.attention import Segments
from spa3r.models.base import PackedPreTrainedModel, packed_forward
from spa3r.models.cameras import pose_encoding_to_cameras
from spa3r.models.encodings import RotaryEncoding
from spa3r.models.layers import Mlp, make_layers
from spa3r.models.packing import ViewLayout, prepend_tokens, split_prefix, to_device
from spa3r.models.placement import loaded_weights
from spa3r.models.released import ReleasedCheckpoint
from spa3r.models.vggt.configuration_vggt import VggtConfig
from spa3r.models.vggt.released_vggt import translate_vggt

HALF_PRECISION = (torch.float16, torch.bfloat16)

DPT_PATCHES_AT_ONCE = 8 * 37 * 28
"""Patches per batch of a dense head, those of eight views of 518 x 392; limits its memory."""


@dataclass
class VggtModelOutput(ModelOutput):
    """Output of :class:`VggtModel`; cameras, depth and points on request.

    Attributes:
        tokens: One (sum of (1 + registers + N), 2C) tensor per layer of ``output_layers``: the outputs of the frame
            layer and the global layer, concatenated; [camera | registers | patches] for every view.
        pose_encodings: One (views, 9) float32 tensor for each refinement; the last is the result.
        extrinsics: (views, 4, 4) float32, camera-from-world.
        intrinsics: (views, 3, 3) float32, pixels.
        depth: An (H, W) float32 map for every view, in the unit of the extrinsics.
        depth_confidence: An (H, W) map for every view, at least 1.
        world_points: An (H, W, 3) float32 map for every view.
        world_points_confidence: An (H, W) map for every view, at least 1.
    """

    tokens: tuple[Tensor, ...]
    pose_encodings: tuple[Tensor, ...] | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None
    depth: tuple[Tensor, ...] | None = None
    depth_confidence: tuple[Tensor, ...] | None = None
    world_points: tuple[Tensor, ...] | None = None
    world_points_confidence: tuple[Tensor, ...] | None = None

    @property
    def cameras(self) -> tuple[Tensor, Tensor]:
        """``extrinsics`` and ``intrinsics``.

        Raises:
            ValueError: The output has none.
        """
        if self.extrinsics is None or self.intrinsics is None:
            raise ValueError("The output must have cameras, got none. Ask for them with `output_cameras=True`.")
        return self.extrinsics, self.intrinsics


class VggtPatchEmbedding(nn.Module):
    """DINOv2 ViT with registers, one segment per view; returns the normalized patch tokens."""

    def __init__(self, config: VggtConfig):
        super().__init__()
        width = config.hidden_size
        self.grid_size = config.image_size // config.patch_size
        self.projection = nn.Linear(3 * config.patch_size**2, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))
        self.layers = make_layers(
            config.patch_embedding_num_layers,
            config,
            width,
            config.patch_embedding_num_heads,
            config.mlp_ratio,
            layer_norm_eps=1e-6,
            layer_scale=config.layer_scale_init,
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixel_values: Tensor, layout: ViewLayout) -> Tensor:  # (sum of N, 3 * p * p) -> (sum of N, C)
        embeddings = {grid: self._position_embedding(grid) for grid in set(layout.grid_hw)}
        patches = self.projection(pixel_values.to(self.norm.weight.dtype))  # a quantized Linear's dtype is another
        patches = patches + torch.cat([embeddings[grid] for grid in layout.grid_hw])
        prefix = torch.cat([self.cls_token + self.position_embedding[:, :1], self.register_tokens], dim=1)
        tokens = prepend_tokens(
            prefix.expand(layout.num_views, -1, -1).to(patches.dtype), patches, layout.patches_per_view
        )
        segments = Segments.within([prefix.shape[1] + count for count in layout.patches_per_view])
        for layer in self.layers:
            tokens = layer(tokens, segments)
        return self.norm(split_prefix(tokens, layout.patches_per_view, prefix.shape[1])[1])

    def _position_embedding(self, grid_hw: tuple[int, int]) -> Tensor:  # -> (h * w, C)
        learned = self.position_embedding[0, 1:]
        if grid_hw == (self.grid_size, self.grid_size):
            return learned
        square = learned.float().reshape(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(square, size=grid_hw, mode="bicubic", antialias=True)
        return resized[0].flatten(1).t().to(learned.dtype)


class VggtCameraHead(nn.Module):
    """Refines a pose encoding of every view from the camera tokens of its scene."""

    def __init__(self, config: VggtConfig):
        super().__init__()
        width = 2 * config.hidden_size
        self.num_iterations = config.camera_num_iterations
        self.token_norm = nn.LayerNorm(width)
        self.empty_pose = nn.Parameter(torch.zeros(1, 9))
        self.pose_embedding = nn.Linear(9, width)
        self.modulation = nn.Linear(width, 3 * width)
        self.adaptive_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.layers = make_layers(
            config.camera_num_layers,
            config,
            width,
            config.camera_num_heads,
            config.mlp_ratio,
            layer_norm_eps=1e-5,
            layer_scale=config.layer_scale_init,
        )
        self.norm = nn.LayerNorm(width)
        self.output = Mlp(width, config.hidden_size, 9)

    def forward(self, camera_tokens: Tensor, views_per_scene: Sequence[int]) -> tuple[Tensor, ...]:
        """(views, 2C) -> (views, 9) per refinement: translation, quaternion (x, y, z, w), fov_h, fov_w."""
        segments = Segments.within(views_per_scene)
        # Half precision degrades only the poses, and the head is small: always use float32.
        with maybe_autocast(camera_tokens.device.type, enabled=False):
            tokens = self.token_norm(camera_tokens.to(self.token_norm.weight.dtype))
            normed = self.adaptive_norm(tokens)
            pose = self.empty_pose.expand(len(tokens), -1)
            raw, poses = 0.0, []
            for _ in range(self.num_iterations):
                shift, scale, gate = self.modulation(nn.functional.silu(self.pose_embedding(pose))).chunk(3, dim=-1)
                hidden = gate * (normed * (1 + scale) + shift) + tokens
                for layer in self.layers:
                    hidden = layer(hidden, segments)
                raw = raw + self.output(self.norm(hidden))
                poses.append(torch.cat([raw[:, :7], nn.functional.relu(raw[:, 7:])], dim=-1).float())
                pose = raw.detach()  # no gradients through earlier refinements
            return tuple(poses)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Like ``nn.Module._apply``, which moves and casts, but never casts to half precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device, torch.float32) if result.dtype in HALF_PRECISION else result

        return super()._apply(keep_precision, recurse)


class VggtResidualUnit(nn.Module):
    """Two convolutions with a skip from after the first ReLU (in-place in the original; the weights depend on it)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:  # (B, channels, h, w) -> the same
        rectified = maps.relu()
        return rectified + self.conv2(self.conv1(rectified).relu())


class VggtFusionBlock(nn.Module):
    """Adds a finer map to the coarse one and resizes the sum."""

    def __init__(self, channels: int, has_skip: bool):
        super().__init__()
        self.skip_unit = VggtResidualUnit(channels) if has_skip else None
        self.unit = VggtResidualUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, channels, h, w), and the finer map of the same shape -> (B, channels, *size)."""
        if self.skip_unit is not None and skip is not None:
            maps = maps + self.skip_unit(skip)
        return self.projection(_resize(self.unit(maps), size))


class VggtDenseHead(nn.Module):
    """DPT: four layers' patch tokens -> a map of `out_channels` channels at the views' own size."""

    def __init__(self, config: VggtConfig, out_channels: int):
        super().__init__()
        channels, features = config.dpt_channels, config.dpt_features
        self.patch_size = config.patch_size
        self.norm = nn.LayerNorm(2 * config.hidden_size)
        self.projections = nn.ModuleList(nn.Conv2d(2 * config.hidden_size, width, 1) for width in channels)
        self.resizers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, features, 3, padding=1, bias=False) for width in channels)
        self.fusions = nn.ModuleList(VggtFusionBlock(features, has_skip=index < 3) for index in range(4))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Conv2d(features // 2, 32, 3, padding=1)
        self.output_conv3 = nn.Conv2d(32, out_channels, 1)

    def forward(
        self, layer_patches: Sequence[Tensor], layout: ViewLayout
    ) -> list[Tensor]:  # four (sum of N, 2C) -> of every view (out_channels, H, W), float32
        parts = [patches.split(list(layout.patches_per_view)) for patches in layer_patches]

        def maps(grid_hw: tuple[int, int], views: list[int]) -> Iterator[Tensor]:
            at_once = max(1, DPT_PATCHES_AT_ONCE // (grid_hw[0] * grid_hw[1]))
            for start in range(0, len(views), at_once):
                chunk = views[start : start + at_once]
                layers = [torch.stack([part[view] for view in chunk]) for part in parts]
                yield from self._forward_grid(layers, grid_hw).float()

        return layout.map_grids(maps)

    def _forward_grid(self, layers: Sequence[Tensor], grid_hw: tuple[int, int]) -> Tensor:  # four (B, N, 2C)
        image_hw = (grid_hw[0] * self.patch_size, grid_hw[1] * self.patch_size)
        maps = []
        for tokens, projection, resizer, lateral in zip(layers, self.projections, self.resizers, self.laterals):
            normed = self.norm(tokens.to(self.norm.weight.dtype)).transpose(1, 2).unflatten(-1, grid_hw)
            maps.append(lateral(resizer(_add_position_embedding(projection(normed), image_hw))))
        fused = maps[3]
        for index in (3, 2, 1, 0):
            size = maps[index - 1].shape[-2:] if index else (2 * fused.shape[-2], 2 * fused.shape[-1])
            fused = self.fusions[index](fused, maps[index] if index < 3 else None, size)
        fused = _add_position_embedding(_resize(self.output_conv1(fused), image_hw), image_hw)
        return self.output_conv3(self.output_conv2(fused).relu())


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:  # (B, c, h, w) -> (B, c, *size)
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _add_position_embedding(maps: Tensor, image_hw: tuple[int, int]) -> Tensor:  # (B, c, h, w) -> the same
    """Add 0.1 x the sine-cosine embedding of each cell's position in the picture, whose diagonal has length 2."""
    channels, height, width = maps.shape[1:]
    aspect = image_hw[1] / image_hw[0]
    diagonal = (aspect**2 + 1) ** 0.5
    device = torch.device("cpu") if maps.device.type == "mps" else maps.device  # MPS has no float64

    def embed(span: float, count: int) -> Tensor:  # -> (count, c / 2)
        limit = span * (count - 1) / count
        # The grid is float32 as in the original; only the angles are float64.
        places = torch.linspace(-limit, limit, count, dtype=torch.float32, device=device).double()
        exponents = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels // 4)
        angles = places[:, None] * 100.0**-exponents
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    columns = embed(aspect / diagonal, width)[None].expand(height, -1, -1)
    rows = embed(1 / diagonal, height)[:, None].expand(-1, width, -1)
    return maps + 0.1 * torch.cat([columns, rows], dim=-1).permute(2, 0, 1).to(maps.device, maps.dtype)


class VggtModel(PackedPreTrainedModel):
    """The geometry backbone: tokens, cameras, depth and points of unposed views, any number of scenes at once.

    The published weights of VGGT-1B have a license of their own, which forbids commercial use; a variant for commercial
    use exists. Neither is part of this package.
    """

    config_class = VggtConfig
    base_model_prefix = "vggt"
    config: VggtConfig
    main_input_name = "view_pixel_values"
    _keep_in_fp32_modules_strict = ["camera_head"]
    _released_kinds = ("vggt",)

    def __init__(self, config: VggtConfig):
        super().__init__(config)
        width = config.hidden_size
        self.num_special_tokens = 1 + config.num_register_tokens
        self.patch_embedding = VggtPatchEmbedding(config)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_register_tokens, width))
        self.frame_layers, self.global_layers = (
            make_layers(
                config.num_hidden_layers,
                config,
                width,
                config.num_attention_heads,
                config.mlp_ratio,
                layer_norm_eps=1e-5,
                qk_norm=qk_norm,
                layer_scale=config.layer_scale_init,
            )
            for qk_norm in ("layer_norm", config.global_qk_norm)
        )
        self.camera_head = VggtCameraHead(config).float() if "camera" in config.heads else None
        self.depth_head = VggtDenseHead(config, 2) if "depth" in config.heads else None
        self.point_head = VggtDenseHead(config, 4) if "point" in config.heads else None
        self.post_init()

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, Tensor], VggtConfig]:
        return translate_vggt(released.tensors(), fields)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VggtPatchEmbedding):
            init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
            init.normal_(module.cls_token, std=1e-6)
            init.normal_(module.register_tokens, std=1e-6)
        elif isinstance(module, VggtCameraHead):
            init.zeros_(module.empty_pose)
        elif isinstance(module, VggtModel):
            init.normal_(module.camera_token, std=1e-6)
            init.normal_(module.register_token, std=1e-6)

    @packed_forward
    def forward(
        self,
        view_pixel_values: Tensor,
        view_grid_hw: Tensor | Sequence[Sequence[int]],
        views_per_scene: Tensor | Sequence[int],
        output_layers: Sequence[int] = (-1,),
        output_cameras: bool = False,
        output_depth: bool = False,
        output_points: bool = False,
    ) -> VggtModelOutput:
        """
        Args:
            view_pixel_values: (sum of N, 3 * p * p), flattened patches of all views (channel, row, column), normalized
                with ImageNet's mean and standard deviation.
            view_grid_hw: (views, 2), patch grid of every view.
            views_per_scene: (scenes,), adding up to the number of views.
            output_layers: Indices of the layers whose tokens are returned; negative ones count from the end.
            output_cameras: Whether to run the camera head.
            output_depth: Whether to run the depth head.
            output_points: Whether to run the point head.

        Raises:
            ValueError: The inputs contradict each other, or the model doesn't have a requested head.
        """
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        self.check_device("view_pixel_values", view_pixel_values)
        return self.forward_layout(
            view_pixel_values, layout, output_layers, output_cameras, output_depth, output_points
        )

    def forward_layout(
        self,
        view_pixel_values: Tensor,
        layout: ViewLayout,
        output_layers: Sequence[int] = (-1,),
        output_cameras: bool = False,
        output_depth: bool = False,
        output_points: bool = False,
        context_views: Sequence[int] | None = None,
    ) -> VggtModelOutput:
        """Like :meth:`forward`, whose other arguments it takes, for a layout that is already validated.

        Args:
            layout: Patch grids and scenes.
            context_views: Number of context views of every scene, its first views. In the global layers they attend
                only to each other, while the scene's other views attend to all. None: all views attend to all.
        """
        count = self.config.num_hidden_layers
        if isinstance(output_layers, str) or not isinstance(output_layers, Sequence):
            raise ValueError(f"`output_layers` must be a list of layers' indices, got {shorten(output_layers)}.")
        if not len(output_layers):
            raise ValueError(f"`output_layers` must name at least one of the {count} layers, got none.")
        output_layers = [_layer_index(index, count) for index in output_layers]
        for head, wanted in (("camera", output_cameras), ("depth", output_depth), ("point", output_points)):
            if not isinstance(wanted, bool):
                name = {"camera": "cameras", "point": "points"}.get(head, head)
                raise ValueError(f"`output_{name}` must be True or False, got {shorten(wanted)}.")
            if wanted and getattr(self, f"{head}_head") is None:
                raise ValueError(
                    f"This VggtModel has no {head} head (`config.heads` = {list(self.config.heads)}). "
                    f"Load a checkpoint with one, or don't request its output."
                )
        dense_layers = self.config.dpt_layers if output_depth or output_points else ()
        wanted = {*output_layers, *dense_layers, *([count - 1] if output_cameras else [])}
        with loaded_weights(self):  # `forward` is not called here
            kept = self._aggregate(view_pixel_values, layout, wanted, context_views)
        output = VggtModelOutput(tokens=tuple(kept[index] for index in output_layers))
        if output_cameras and self.camera_head is not None:
            camera_tokens = split_prefix(kept[count - 1], layout.patches_per_view, self.num_special_tokens)[0][:, 0]
            output.pose_encodings = self.camera_head(camera_tokens, layout.views_per_scene)
            output.extrinsics, output.intrinsics = pose_encoding_to_cameras(
                output.pose_encodings[-1], layout.image_hw(self.config.patch_size)
            )
        if dense_layers:
            patches = [self.patch_tokens(kept[index], layout) for index in dense_layers]
            if output_depth and self.depth_head is not None:
                maps = self.depth_head(patches, layout)
                output.depth = tuple(view_map[0].exp() for view_map in maps)
                output.depth_confidence = tuple(1 + view_map[1].exp() for view_map in maps)
            if output_points and self.point_head is not None:
                maps = self.point_head(patches, layout)
                output.world_points = tuple(
                    (view_map[:3].sign() * view_map[:3].abs().expm1()).permute(1, 2, 0) for view_map in maps
                )
                output.world_points_confidence = tuple(1 + view_map[3].exp() for view_map in maps)
        return output

    def patch_tokens(self, tokens: Tensor, layout: ViewLayout) -> Tensor:
        """The patch tokens among a layer's tokens: (sum of (1 + registers + N), 2C) -> (sum of N, 2C)."""
        return split_prefix(tokens, layout.patches_per_view, self.num_special_tokens)[1]

    def _aggregate(
        self, view_pixel_values: Tensor, layout: ViewLayout, layers: set[int], context_views: Sequence[int] | None
    ) -> dict[int, Tensor]:
        """The tokens of the requested layers; those of other layers are not kept."""
        patches = self.patch_embedding(view_pixel_values, layout)
        special = torch.cat([self.camera_token, self.register_token], dim=2)[0]  # (first view | others, 5, C)
        first_views = set(layout.first_views)
        is_first = to_device([view in first_views for view in range(layout.num_views)], torch.bool, patches.device)
        prefix = torch.where(is_first[:, None, None], *special)
        tokens = prepend_tokens(prefix.to(patches.dtype), patches, layout.patches_per_view)

        lengths = [self.num_special_tokens + count for count in layout.patches_per_view]
        view_segments = Segments.within(lengths)
        scene_segments = _global_segments(layout, lengths, context_views)
        positions = RotaryEncoding.from_positions(
            layout.token_positions(self.num_special_tokens, layout.patches_per_view, patches.device),
            self.config.hidden_size // self.config.num_attention_heads,
            self.config.rope_theta,
        )

        kept = {}
        for index in range(max(layers) + 1):
            frame = self.frame_layers[index](tokens, view_segments, positions)
            tokens = self.global_layers[index](frame, scene_segments, positions)
            if index in layers:
                kept[index] = torch.cat([frame, tokens], dim=-1)
        return kept


def _layer_index(index: int, count: int) -> int:
    if not is_count(index, -count, count - 1):
        raise ValueError(
            f"`output_layers` must lie in [{-count}, {count - 1}] for {count} layers, got {shorten(index)}."
        )
    return index % count


def _global_segments(layout: ViewLayout, lengths: Sequence[int], context_views: Sequence[int] | None) -> Segments:
    """Attention segments of the global layers: context attends to context, targets attend to the whole scene."""
    scene_lengths = layout.per_scene(lengths)
    if context_views is None:
        return Segments.within(scene_lengths)
    query_lengths, key_ranges, start = [], [], 0
    for scene, (first, length, context) in enumerate(zip(layout.first_views, scene_lengths, context_views)):
        seen = sum(lengths[first : first + context])
        query_lengths.append(seen)
        key_ranges.append((start, seen))
        if context < layout.views_per_scene[scene]:
            query_lengths.append(length - seen)
            key_ranges.append((start, length))
        start += length
    return Segments(tuple(query_lengths), tuple(key_ranges))


__all__ = ["VggtModel", "VggtModelOutput"]
