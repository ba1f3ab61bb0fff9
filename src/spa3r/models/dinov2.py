"""The patches of a DINOv2 ViT, the stem of the backbones: projection and learned positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spa3r.models.configuration_backbone import BackboneConfig
from spa3r.models.packing import ViewLayout


class Dinov2Embedding(nn.Module):
    """Projects the patches of views and adds the position embedding, resized to each view's grid."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        width = config.hidden_size
        self.grid_size = config.image_size // config.patch_size
        self.projection = nn.Linear(3 * config.patch_size**2, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, width))

    def embed(self, pixel_values: Tensor, layout: ViewLayout) -> Tensor:  # (sum of N, 3 * p * p) -> (sum of N, C)
        """The patch tokens of all views."""
        embeddings = {grid: self._position_embedding(grid) for grid in set(layout.grid_hw)}
        patches = self.projection(pixel_values.to(self.cls_token.dtype))  # a quantized Linear's dtype is another
        return patches + torch.cat([embeddings[grid] for grid in layout.grid_hw])

    @property
    def cls(self) -> Tensor:
        """(1, 1, C), the cls token of every view, with its position."""
        return self.cls_token + self.position_embedding[:, :1]

    def _resize_options(self, grid_hw: tuple[int, int]) -> dict[str, Any]:
        """Arguments of ``interpolate`` that resize the position embedding to a grid."""
        return {"size": grid_hw, "antialias": True}

    def _position_embedding(self, grid_hw: tuple[int, int]) -> Tensor:  # -> (h * w, C)
        learned = self.position_embedding[0, 1:]
        if grid_hw == (self.grid_size, self.grid_size):
            return learned
        square = learned.float().reshape(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(square, mode="bicubic", **self._resize_options(grid_hw))
        return resized[0].flatten(1).t().to(learned.dtype)
