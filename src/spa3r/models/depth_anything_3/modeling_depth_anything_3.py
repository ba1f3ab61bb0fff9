"""Depth Anything 3 on packed views: one ViT whose later layers alternate between a view and its scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from spa3r.models.attention import Segments
from spa3r.models.backbone import BackboneOutput, BackbonePreTrainedModel, global_segments
from spa3r.models.base import packed_forward
from spa3r.models.cameras import (
    cameras_to_pose_encoding,
    check_cameras,
    homogeneous,
    invert_extrinsics,
    relative_to_first_view,
)
from spa3r.models.dense_head import DenseHead
from spa3r.models.depth_anything_3.configuration_depth_anything_3 import DepthAnything3Config
from spa3r.models.depth_anything_3.released_depth_anything_3 import translate_depth_anything_3
from spa3r.models.dinov2 import Dinov2Embedding
from spa3r.models.encodings import RotaryEncoding
from spa3r.models.layers import Float32Module, GatedMlp, Mlp, TransformerLayer, make_layers
from spa3r.models.packing import ViewLayout, prepend_tokens, split_prefix
from spa3r.models.released import ReleasedCheckpoint

MIN_VIEWS_FOR_CHOICE = 3
"""Views from which on the reference view is chosen; with fewer it is the first."""

MIN_CAMERA_DISTANCE = 0.1
"""Lowest median distance of known cameras from the first that translations are divided by."""


class DepthAnything3Embedding(Dinov2Embedding):
    """The first layer's tokens: [cls | patches] of every view."""

    def forward(self, pixel_values: Tensor, layout: ViewLayout) -> Tensor:  # -> (sum of (1 + N), C)
        patches = self.embed(pixel_values, layout)
        cls = self.cls.to(patches.dtype).expand(layout.num_views, -1, -1)
        return prepend_tokens(cls, patches, layout.patches_per_view)

    def _resize_options(self, grid_hw: tuple[int, int]) -> dict[str, Any]:
        # DINOv2's older rule: the scale decides where the filter samples, and 0.1 keeps the size from rounding down.
        return {"scale_factor": tuple((side + 0.1) / self.grid_size for side in grid_hw)}


class DepthAnything3CameraHead(Float32Module):
    """Predicts a pose encoding of every view from its camera token."""

    def __init__(self, config: DepthAnything3Config):
        super().__init__()
        width = config.feature_size
        self.hidden1 = nn.Linear(width, width)
        self.hidden2 = nn.Linear(width, width)
        self.translation = nn.Linear(width, 3)
        self.quaternion = nn.Linear(width, 4)
        self.field_of_view = nn.Linear(width, 2)

    def forward(self, camera_tokens: Tensor, views_per_scene: Sequence[int]) -> tuple[Tensor, ...]:
        """(views, 2C) -> one (views, 9): translation, quaternion (x, y, z, w) of world-from-camera, fov_h, fov_w."""
        with maybe_autocast(camera_tokens.device.type, enabled=False):
            hidden = self.hidden1(camera_tokens.to(self.hidden1.weight.dtype)).relu()
            hidden = self.hidden2(hidden).relu()
            parts = (self.translation(hidden), self.quaternion(hidden), self.field_of_view(hidden).relu())
            return (torch.cat(parts, dim=-1).float(),)


class DepthAnything3CameraEncoder(Float32Module):
    """Encodes known cameras into the camera tokens of their views."""

    def __init__(self, config: DepthAnything3Config):
        super().__init__()
        width = config.hidden_size
        self.pose_embedding = Mlp(9, width // 2, width)
        self.token_norm = nn.LayerNorm(width)
        self.layers = make_layers(
            config.camera_encoder_num_layers,
            config,
            width,
            config.camera_encoder_num_heads,
            mlp_ratio=4,
            layer_norm_eps=1e-5,
            layer_scale=0.01,
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pose_encodings: Tensor, segments: Segments) -> Tensor:  # (views, 9) -> (views, C)
        with maybe_autocast(pose_encodings.device.type, enabled=False):
            tokens = self.token_norm(self.pose_embedding(pose_encodings.to(self.norm.weight.dtype)))
            for layer in self.layers:
                tokens = layer(tokens, segments)
            return self.norm(tokens)


class DepthAnything3Model(BackbonePreTrainedModel):
    """Depth Anything 3 (arXiv 2511.10647): tokens, cameras and depth of views with or without known cameras.

    The weights of Small and Base are published under Apache-2.0, those of Large and Giant for non-commercial use only.
    None of them is part of this package.
    """

    config_class = DepthAnything3Config
    base_model_prefix = "depth_anything_3"
    config: DepthAnything3Config  # ty: ignore[incompatible-mutable-override]  # narrower, and never replaced
    _keep_in_fp32_modules_strict = ["camera_head", "camera_encoder"]
    _skip_quantization = (".*camera_head", ".*camera_encoder")
    _released_kinds = ("depth-anything-3",)

    def __init__(self, config: DepthAnything3Config):
        super().__init__(config)
        self.embedding = DepthAnything3Embedding(config)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, config.hidden_size))
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                layer_norm_eps=1e-6,
                qk_norm="layer_norm" if index >= config.alternating_start else None,
                layer_scale=config.layer_scale_init,
                mlp=GatedMlp if config.use_gated_mlp else Mlp,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        has_camera = "camera" in config.heads
        self.camera_encoder = DepthAnything3CameraEncoder(config).float() if has_camera else None
        self.camera_head = DepthAnything3CameraHead(config).float() if has_camera else None
        has_depth = "depth" in config.heads
        self.depth_head = DenseHead(config, 2, torch.float32, rectified_skip=False) if has_depth else None
        self.point_head = None
        self.post_init()

    @classmethod
    def _from_released(
        cls, released: ReleasedCheckpoint, fields: dict[str, Any]
    ) -> tuple[dict[str, Tensor], DepthAnything3Config]:
        return translate_depth_anything_3(released.tensors(), fields)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthAnything3Model):
            init.normal_(module.camera_token)

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
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> BackboneOutput:
        """
        Args:
            view_pixel_values: (sum of N, 3 * p * p), flattened patches of all views (channel, row, column), normalized
                with ImageNet's mean and standard deviation.
            view_grid_hw: (views, 2), patch grid of every view.
            views_per_scene: (scenes,), adding up to the number of views.
            output_layers: Indices of the layers whose tokens are returned; negative ones count from the end. The second
                half of a patch token is normalized, the rest is not.
            output_cameras: Whether to run the camera head.
            output_depth: Whether to run the depth head.
            output_points: Must be False: there is no point head.
            extrinsics: (views, 4, 4) of known cameras, in any world frame shared by a scene's views; requires
                `intrinsics`. The outputs are then in the unit of these cameras. None: nothing is known.
            intrinsics: (views, 3, 3), pixels of the processed views.

        Raises:
            ValueError: The inputs contradict each other, or the model doesn't have a requested head.
        """
        layout = ViewLayout.from_pixels(view_pixel_values, view_grid_hw, views_per_scene, self.config.patch_size)
        self.check_device("view_pixel_values", view_pixel_values)
        return self.forward_layout(
            view_pixel_values,
            layout,
            output_layers,
            output_cameras,
            output_depth,
            output_points,
            extrinsics=extrinsics,
            intrinsics=intrinsics,
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
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
    ) -> BackboneOutput:
        """Like :meth:`forward`, whose other arguments it takes, for a layout that is already validated.

        Args:
            layout: Patch grids and scenes.
            context_views: Number of context views of every scene, its first views. In the global layers they attend
                only to each other, while the scene's other views attend to all; the reference view is one of them.
                None: all views attend to all.
        """
        wanted = (output_layers, output_cameras, output_depth, output_points, context_views)
        if extrinsics is None and intrinsics is None:
            return self._run(view_pixel_values, layout, *wanted)
        if extrinsics is None or intrinsics is None:
            raise ValueError(
                "`extrinsics` and `intrinsics` must be given together, got only "
                f"{'`intrinsics`' if extrinsics is None else '`extrinsics`'}. Pass both, or neither."
            )
        if self.camera_encoder is None:
            raise ValueError(
                "This DepthAnything3Model has no encoder of known cameras, which comes with the camera head "
                f"(`config.heads` = {list(self.config.heads)}). Load a checkpoint with one, or give no cameras."
            )
        extrinsics, intrinsics = check_cameras(extrinsics, intrinsics, layout.num_views, view_pixel_values.device)
        poses, units = _normalized_poses(
            extrinsics, intrinsics, layout, layout.image_hw(self.config.patch_size), context_views
        )
        segments = global_segments(layout, [1] * layout.num_views, context_views)
        output = self._run(view_pixel_values, layout, *wanted, camera_tokens=self.camera_encoder(poses, segments))
        if output.extrinsics is not None:
            rotation, translation = output.extrinsics[:, :3, :3], output.extrinsics[:, :3, 3:] * units[:, None, None]
            output.extrinsics = homogeneous(torch.cat([rotation, translation], dim=-1))
        if output.depth is not None:
            output.depth = tuple(depth * unit for depth, unit in zip(output.depth, units))
        return output

    def _cameras(self, pose_encodings: Tensor, layout: ViewLayout) -> tuple[Tensor, Tensor]:
        # The pose encoding is world-from-camera, and its world is the camera of the reference view.
        world_from_camera, intrinsics = super()._cameras(pose_encodings, layout)
        return relative_to_first_view(invert_extrinsics(world_from_camera), layout.views_per_scene), intrinsics

    def _aggregate(
        self,
        view_pixel_values: Tensor,
        layout: ViewLayout,
        layers: set[int],
        context_views: Sequence[int] | None,
        camera_tokens: Tensor | None = None,  # (views, C)
    ) -> dict[int, Tensor]:
        config, lengths = self.config, layout.patches_per_view
        tokens = frame = self.embedding(view_pixel_values, layout)
        token_counts = [1 + count for count in lengths]
        view_segments = Segments.within(token_counts)
        scene_segments = global_segments(layout, token_counts, context_views)
        positions = layout.token_positions(1, lengths, tokens.device)
        head_dim = config.hidden_size // config.num_attention_heads
        # Across views all patches have one position: a place in a picture means nothing in another.
        frame_rotary, scene_rotary = (
            RotaryEncoding.from_positions(places, head_dim, config.rope_theta)
            for places in (positions, positions.clamp(max=1))
        )
        kept = {}
        for index in range(max(layers) + 1):
            if index == config.alternating_start - 1 and camera_tokens is None:
                cls = split_prefix(tokens, lengths, 1)[0][:, 0]
                is_reference = self._is_reference(cls, layout, context_views)
                camera_tokens = torch.where(is_reference[:, None], *self.camera_token[0])
            if index == config.alternating_start and camera_tokens is not None:
                patches = split_prefix(tokens, lengths, 1)[1]
                tokens = prepend_tokens(camera_tokens[:, None].to(patches.dtype), patches, lengths)
            if index >= config.alternating_start and index % 2 == 1:
                tokens = self.layers[index](tokens, scene_segments, scene_rotary)
            else:
                rotary = frame_rotary if index >= config.alternating_start else None
                tokens = frame = self.layers[index](tokens, view_segments, rotary)
            if index in layers:
                camera, patches = split_prefix(tokens, lengths, 1)
                normed = self.norm(patches)
                kept[index] = torch.cat([frame, prepend_tokens(camera.to(normed.dtype), normed, lengths)], dim=-1)
        return kept

    @torch.no_grad()
    def _is_reference(
        self, cls: Tensor, layout: ViewLayout, context_views: Sequence[int] | None
    ) -> Tensor:  # (views, C) -> (views,) bool
        """Whether each view is its scene's reference; targets never are: nothing of them may reach the context."""
        parts = []
        seen = layout.views_per_scene if context_views is None else context_views
        for first, count, candidates in zip(layout.first_views, layout.views_per_scene, seen):
            views = torch.arange(count, device=cls.device)
            if self.config.reference_view == "first" or candidates < MIN_VIEWS_FOR_CHOICE:
                parts.append(views == 0)
            else:
                parts.append(views == _most_ordinary(cls[first : first + candidates]))
        return torch.cat(parts)


def _most_ordinary(cls: Tensor) -> Tensor:  # (V, C) -> ()
    """Index of the view whose similarity to the others, norm and variance are the nearest to the middle of all."""
    with maybe_autocast(cls.device.type, enabled=False):
        cls = cls.float()
        norms = cls.norm(dim=-1)
        unit = cls / norms[:, None]
        similarity = ((unit @ unit.t()).sum(-1) - 1) / (len(cls) - 1)
        measures = torch.stack([similarity, norms, unit.var(dim=-1)])  # (3, V)
        lowest, highest = measures.aminmax(dim=-1, keepdim=True)
        return ((measures - lowest) / (highest - lowest + 1e-8) - 0.5).abs().sum(0).argmin()


def _normalized_poses(
    extrinsics: Tensor,
    intrinsics: Tensor,
    layout: ViewLayout,
    image_hw: Sequence[tuple[int, int]],
    context_views: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:  # (V, 4, 4), (V, 3, 3) -> (V, 9), (V,)
    """Pose encodings of known cameras, world-from-camera, and the unit of every view's scene.

    The world is the camera of the scene's first view, the unit the median distance of its (context) views from there;
    of two views that is the lower one, 0, as in the authors' code, and then :data:`MIN_CAMERA_DISTANCE`.
    """
    with maybe_autocast(extrinsics.device.type, enabled=False):
        poses = invert_extrinsics(relative_to_first_view(extrinsics, layout.views_per_scene))
        distances = poses[:, :3, 3].norm(dim=-1)
        seen = layout.views_per_scene if context_views is None else context_views
        units = torch.cat(
            [
                distances[first : first + candidates].median().clamp(min=MIN_CAMERA_DISTANCE).expand(count)
                for first, count, candidates in zip(layout.first_views, layout.views_per_scene, seen)
            ]
        )
        translation = poses[:, :3, 3:] / units[:, None, None]
        poses = homogeneous(torch.cat([poses[:, :3, :3], translation], dim=-1))
        return cameras_to_pose_encoding(poses, intrinsics.float(), image_hw), units


__all__ = ["DepthAnything3Model"]
