"""VGGT on packed views: patch embedding, alternating frame and global attention, camera, depth and point heads.

Memory savings over the original: only requested layers are kept, layers run in chunks of tokens (see
:class:`~spa3r.models.layers.TransformerLayer`), and the dense heads process few views at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from spa3r.models.attention import Segments
from spa3r.models.backbone import BackbonePreTrainedModel, global_segments
from spa3r.models.dense_head import DenseHead
from spa3r.models.dinov2 import Dinov2Embedding
from spa3r.models.encodings import RotaryEncoding
from spa3r.models.global_attention import Approximation, MergedAttention, SubsetAttention
from spa3r.models.layers import Float32Module, Mlp, make_layers
from spa3r.models.packing import ViewLayout, prepend_tokens, split_prefix, to_device
from spa3r.models.released import ReleasedCheckpoint
from spa3r.models.vggt.configuration_vggt import VggtConfig
from spa3r.models.vggt.released_vggt import translate_vggt


class VggtPatchEmbedding(Dinov2Embedding):
    """DINOv2 ViT with registers, one segment per view; returns the normalized patch tokens."""

    def __init__(self, config: VggtConfig):
        super().__init__(config)
        width = config.hidden_size
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
        patches = self.embed(pixel_values, layout)
        prefix = torch.cat([self.cls, self.register_tokens], dim=1)
        tokens = prepend_tokens(
            prefix.expand(layout.num_views, -1, -1).to(patches.dtype), patches, layout.patches_per_view
        )
        segments = Segments.within([prefix.shape[1] + count for count in layout.patches_per_view])
        for layer in self.layers:
            tokens = layer(tokens, segments)
        return self.norm(split_prefix(tokens, layout.patches_per_view, prefix.shape[1])[1])


class VggtCameraHead(Float32Module):
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


class VggtModel(BackbonePreTrainedModel):
    """The geometry backbone: tokens, cameras, depth and points of unposed views, any number of scenes at once.

    The published weights of VGGT-1B have a license of their own, which forbids commercial use; a variant for commercial
    use exists. Neither is part of this package.
    """

    config_class = VggtConfig
    base_model_prefix = "vggt"
    config: VggtConfig  # ty: ignore[incompatible-mutable-override]  # narrower, and never replaced
    _released_kinds = ("vggt",)

    def __init__(self, config: VggtConfig):
        super().__init__(config)
        width = config.hidden_size
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
        self.depth_head = DenseHead(config, 2) if "depth" in config.heads else None
        self.point_head = DenseHead(config, 4) if "point" in config.heads else None
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
            init.normal_(module.register_tokens, std=1e-6)
        elif isinstance(module, VggtCameraHead):
            init.zeros_(module.empty_pose)
        elif isinstance(module, VggtModel):
            init.normal_(module.camera_token, std=1e-6)
            init.normal_(module.register_token, std=1e-6)

    def _aggregate(
        self, view_pixel_values: Tensor, layout: ViewLayout, layers: set[int], context_views: Sequence[int] | None
    ) -> dict[int, Tensor]:
        """The tokens of the requested layers; those of other layers are not kept."""
        patches = self.patch_embedding(view_pixel_values, layout)
        lengths = [self.num_special_tokens + count for count in layout.patches_per_view]
        view_segments = Segments.within(lengths)
        scene_segments = global_segments(layout, lengths, context_views)
        approximation = self._approximation(scene_segments, lengths, patches, layout)
        special = torch.cat([self.camera_token, self.register_token], dim=2)[0]  # (first view | others, 5, C)
        first_views = set(layout.first_views)
        is_first = to_device([view in first_views for view in range(layout.num_views)], torch.bool, patches.device)
        prefix = torch.where(is_first[:, None, None], *special)
        tokens = prepend_tokens(prefix.to(patches.dtype), patches, layout.patches_per_view)
        del patches  # memory that the layers need
        positions = RotaryEncoding.from_positions(
            layout.token_positions(self.num_special_tokens, layout.patches_per_view, tokens.device),
            self.config.hidden_size // self.config.num_attention_heads,
            self.config.rope_theta,
        )

        kept = {}
        for index in range(max(layers) + 1):
            tokens = self.frame_layers[index](tokens, view_segments, positions)  # frees the layer's input
            frame = tokens if index in layers else None
            tokens = self.global_layers[index](tokens, scene_segments, positions, approximation)
            if frame is not None:
                kept[index] = torch.cat([frame, tokens], dim=-1)
        return kept

    def _approximation(
        self, segments: Segments, lengths: Sequence[int], patches: Tensor, layout: ViewLayout
    ) -> Approximation | None:
        """What the global layers compute in place of attention across all views; None: exactly that."""
        config = self.config
        if config.global_attention == "merged":
            return MergedAttention.plan(
                segments, lengths, self.num_special_tokens, config.global_merge_ratio, patches.device
            )
        if config.global_attention == "subset":
            embeddings = patches.split(list(layout.patches_per_view))
            return SubsetAttention.plan(segments, lengths, embeddings, config.global_num_views)
        return None


__all__ = ["VggtModel"]
