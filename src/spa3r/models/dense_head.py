"""The dense head of the backbones, a DPT: patch tokens of four layers -> maps at the views' own size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.packing import ViewLayout

DPT_PATCHES_AT_ONCE = 37 * 37
"""Patches per batch of a dense head, those of a view of 518 x 518; limits its memory."""


class ResidualUnit(nn.Module):
    """Two convolutions with a skip; from after the first ReLU where the original computes that in place."""

    def __init__(self, channels: int, rectified_skip: bool):
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:  # (B, channels, h, w) -> the same
        rectified = maps.relu()
        return (rectified if self.rectified_skip else maps) + self.conv2(self.conv1(rectified).relu())


class FusionBlock(nn.Module):
    """Adds a finer map to the coarse one and resizes the sum."""

    def __init__(self, channels: int, has_skip: bool, rectified_skip: bool):
        super().__init__()
        self.skip_unit = ResidualUnit(channels, rectified_skip) if has_skip else None
        self.unit = ResidualUnit(channels, rectified_skip)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """(B, channels, h, w), and the finer map of the same shape -> (B, channels, *size)."""
        if self.skip_unit is not None and skip is not None:
            maps = maps + self.skip_unit(skip)
        return self.projection(_resize(self.unit(maps), size))


class DenseHead(nn.Module):
    """DPT: four layers' patch tokens -> a map of `out_channels` channels at the views' own size.

    Args:
        config: The backbone's configuration: widths, channels and the patch size.
        out_channels: Channels of the map.
        angles_dtype: Dtype of the angles of the position embedding.
        rectified_skip: Whether residual units add their input after the ReLU. Weights depend on both, and the defaults
            are VGGT's.
    """

    def __init__(
        self,
        config: BackboneConfig,
        out_channels: int,
        angles_dtype: torch.dtype = torch.float64,
        rectified_skip: bool = True,
    ):
        super().__init__()
        self.angles_dtype = angles_dtype
        channels, features = config.dpt_channels, config.dpt_features
        self.patch_size = config.patch_size
        self.norm = nn.LayerNorm(config.feature_size)
        self.projections = nn.ModuleList(nn.Conv2d(config.feature_size, width, 1) for width in channels)
        self.resizers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, features, 3, padding=1, bias=False) for width in channels)
        self.fusions = nn.ModuleList(FusionBlock(features, index < 3, rectified_skip) for index in range(4))
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
            maps.append(lateral(resizer(_add_position_embedding(projection(normed), image_hw, self.angles_dtype))))
        fused = maps[3]
        for index in (3, 2, 1, 0):
            size = maps[index - 1].shape[-2:] if index else (2 * fused.shape[-2], 2 * fused.shape[-1])
            fused = self.fusions[index](fused, maps[index] if index < 3 else None, size)
        fused = _resize(self.output_conv1(fused), image_hw)
        fused = _add_position_embedding(fused, image_hw, self.angles_dtype)
        return self.output_conv3(self.output_conv2(fused).relu())


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:  # (B, c, h, w) -> (B, c, *size)
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _add_position_embedding(
    maps: Tensor, image_hw: tuple[int, int], angles_dtype: torch.dtype
) -> Tensor:  # (B, c, h, w) -> the same
    """Add, in place, 0.1 x the sine-cosine embedding of each cell's position in the picture of diagonal 2."""
    channels, height, width = maps.shape[1:]
    aspect = image_hw[1] / image_hw[0]
    diagonal = (aspect**2 + 1) ** 0.5
    device = torch.device("cpu") if maps.device.type == "mps" else maps.device  # MPS has no float64

    def embed(span: float, count: int) -> Tensor:  # -> (count, c / 2)
        limit = span * (count - 1) / count
        # The grid is float32 as in the originals; only the angles may be float64.
        places = torch.linspace(-limit, limit, count, dtype=torch.float32, device=device).to(angles_dtype)
        exponents = torch.arange(channels // 4, dtype=angles_dtype, device=device) / (channels // 4)
        angles = places[:, None] * 100.0**-exponents
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    def angles_of(span: float, count: int) -> Tensor:  # -> (c / 2, count)
        return (0.1 * embed(span, count)).t().to(maps.device, maps.dtype)

    half = channels // 2  # in place, since a copy at the size of pictures is large
    maps[:, :half] += angles_of(aspect / diagonal, width)[:, None]
    maps[:, half:] += angles_of(1 / diagonal, height)[:, :, None]
    return maps
