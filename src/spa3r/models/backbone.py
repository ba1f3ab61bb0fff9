"""What every geometry backbone is: packed views -> tokens, and on request cameras, depth and points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers import initialization as init
from transformers.utils import ModelOutput

from spa3r.checks import is_count, shorten
from spa3r.models.attention import Segments
from spa3r.models.base import PackedPreTrainedModel, packed_forward
from spa3r.models.cameras import pose_encoding_to_cameras
from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.dinov2 import Dinov2Embedding
from spa3r.models.packing import ViewLayout, split_prefix
from spa3r.models.placement import loaded_weights


@dataclass
class BackboneOutput(ModelOutput):
    """Output of a geometry backbone; cameras, depth and points on request.

    Attributes:
        tokens: One (sum of (special + N), F) tensor per layer of ``output_layers``, F = ``config.feature_size``:
            [camera | other special tokens | patches] for every view.
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


class BackbonePreTrainedModel(PackedPreTrainedModel):
    """Base class of the geometry backbones (:doc:`/guides/backbones`).

    A subclass writes ``_aggregate`` and has, where its configuration names them, ``camera_head``: camera tokens and
    ``views_per_scene`` -> pose encodings; ``depth_head`` and ``point_head``: patch tokens of the layers
    ``config.dpt_layers`` and the layout -> maps, such as a :class:`~spa3r.models.dense_head.DenseHead`.
    """

    config: BackboneConfig
    main_input_name = "view_pixel_values"
    _keep_in_fp32_modules_strict = ["camera_head"]

    camera_head: nn.Module | None
    depth_head: nn.Module | None
    point_head: nn.Module | None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Dinov2Embedding):
            init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
            init.normal_(module.cls_token, std=1e-6)

    @property
    def num_special_tokens(self) -> int:
        """Number of tokens before the patches of a view."""
        return self.config.num_special_tokens

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
    ) -> BackboneOutput:
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
    ) -> BackboneOutput:
        """Like :meth:`forward`, whose other arguments it takes, for a layout that is already validated.

        Args:
            layout: Patch grids and scenes.
            context_views: Number of context views of every scene, its first views. In the global layers they attend
                only to each other, while the scene's other views attend to all. None: all views attend to all.
        """
        wanted = (output_layers, output_cameras, output_depth, output_points)
        return self._run(view_pixel_values, layout, *wanted, context_views)

    def _run(
        self,
        view_pixel_values: Tensor,
        layout: ViewLayout,
        output_layers: Sequence[int],
        output_cameras: bool,
        output_depth: bool,
        output_points: bool,
        context_views: Sequence[int] | None,
        **inputs: Any,
    ) -> BackboneOutput:
        """:meth:`forward_layout` with further inputs of ``_aggregate``, of models that have some."""
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
                    f"This {type(self).__name__} has no {head} head (`config.heads` = {list(self.config.heads)}). "
                    f"Load a checkpoint with one, or don't request its output."
                )
        dense_layers = self.config.dpt_layers if output_depth or output_points else ()
        wanted = {*output_layers, *dense_layers, *([count - 1] if output_cameras else [])}
        with loaded_weights(self):  # `forward` is not called here
            kept = self._aggregate(view_pixel_values, layout, wanted, context_views, **inputs)
        output = BackboneOutput(tokens=tuple(kept[index] for index in output_layers))
        if output_cameras and self.camera_head is not None:
            camera_tokens = split_prefix(kept[count - 1], layout.patches_per_view, self.num_special_tokens)[0][:, 0]
            output.pose_encodings = self.camera_head(camera_tokens, layout.views_per_scene)
            output.extrinsics, output.intrinsics = self._cameras(output.pose_encodings[-1], layout)
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
        """The patch tokens among a layer's tokens: (sum of (special + N), F) -> (sum of N, F)."""
        return split_prefix(tokens, layout.patches_per_view, self.num_special_tokens)[1]

    def _cameras(self, pose_encodings: Tensor, layout: ViewLayout) -> tuple[Tensor, Tensor]:
        """Extrinsics (views, 4, 4) and intrinsics (views, 3, 3) of the camera head's result."""
        return pose_encoding_to_cameras(pose_encodings, layout.image_hw(self.config.patch_size))

    def _aggregate(
        self, view_pixel_values: Tensor, layout: ViewLayout, layers: set[int], context_views: Sequence[int] | None
    ) -> dict[int, Tensor]:
        """The tokens of the requested layers, as in :class:`BackboneOutput`; those of other layers are not kept."""
        raise NotImplementedError


def backbone_class(config: BackboneConfig) -> type[BackbonePreTrainedModel]:
    """The model of a configuration: that which ``AutoModel`` knows for its type."""
    return MODEL_MAPPING[type(config)]  # ty: ignore[invalid-explicit-return]  # one class for each of these types


def _layer_index(index: int, count: int) -> int:
    if not is_count(index, -count, count - 1):
        raise ValueError(
            f"`output_layers` must lie in [{-count}, {count - 1}] for {count} layers, got {shorten(index)}."
        )
    return index % count


def global_segments(layout: ViewLayout, lengths: Sequence[int], context_views: Sequence[int] | None) -> Segments:
    """Attention segments of global layers: context attends to context, targets attend to the whole scene.

    Args:
        layout: Patch grids and scenes.
        lengths: Number of tokens of every view.
        context_views: Number of context views of every scene, its first views; None: all views attend to all.
    """
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
