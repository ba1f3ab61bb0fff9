"""The plain formulation of encoding, with a model's own weights: what the benchmarks compare with.

One scene of equal views at a time; the features of all layers are kept; tables of positions are rebuilt in every layer;
masking is one boolean matrix over all tokens. The maths are those of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spa3r import Spa3RModel, VggtModel


def rotate(tokens: Tensor, positions: Tensor, base: float) -> Tensor:  # (B, heads, S, d), (S, 2) -> the same
    half = tokens.shape[-1] // 2
    frequencies = base ** -(torch.arange(0, half, 2, device=tokens.device).float() / half)
    parts = []
    for part, place in zip(tokens.split(half, dim=-1), positions.float().unbind(-1)):
        angles = (place[:, None] * frequencies).repeat(1, 2)
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        parts.append(part * angles.cos().to(part.dtype) + turned * angles.sin().to(part.dtype))
    return torch.cat(parts, dim=-1)


def layer_output(
    layer: nn.Module, tokens: Tensor, positions: Tensor | None, base: float, mask: Tensor | None = None
) -> Tensor:  # (B, S, C), (S, 2), (S, S) -> (B, S, C)
    attention = layer.attention
    batch, length, width = tokens.shape
    qkv = attention.qkv(layer.norm1(tokens)).view(batch, length, 3, -1, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if positions is not None:
        query, key = rotate(query, positions, base), rotate(key, positions, base)
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    attended = attention.proj(attended.transpose(1, 2).reshape(batch, length, width))
    tokens = tokens + layer.layer_scale1 * attended
    return tokens + layer.layer_scale2 * layer.mlp(layer.norm2(tokens))


def grid_positions(views: int, grid: tuple[int, int], special: int, device: torch.device) -> Tensor:
    rows, columns = (torch.arange(1, side + 1, device=device) for side in grid)
    patches = torch.cartesian_prod(rows, columns)
    return torch.cat([patches.new_zeros(special, 2), patches]).repeat(views, 1)


def backbone_layers(
    model: VggtModel, pixels: Tensor, views: int, grid: tuple[int, int], targets: list[bool] | None = None
) -> list[Tensor]:  # (V * N, 3 * p * p) -> of every layer (V, special + N, 2C)
    embedding, config = model.patch_embedding, model.config
    patches = embedding.projection(pixels.to(embedding.norm.weight.dtype)).view(views, grid[0] * grid[1], -1)
    patches = patches + embedding._position_embedding(grid)
    cls = embedding.cls_token + embedding.position_embedding[:, :1]
    tokens = torch.cat([torch.cat([cls, embedding.register_tokens], dim=1).expand(views, -1, -1), patches], dim=1)
    for layer in embedding.layers:
        tokens = layer_output(layer, tokens, None, 0)
    patches = embedding.norm(tokens)[:, 1 + config.num_register_tokens :]

    special = torch.cat([model.camera_token, model.register_token], dim=2)[0]
    special = special[torch.tensor([0] + [1] * (views - 1), device=pixels.device)]
    tokens = torch.cat([special, patches], dim=1)
    count, length, width = tokens.shape
    mask = None
    if targets is not None:
        target = torch.tensor(targets, device=pixels.device).repeat_interleave(length)
        mask = target[:, None] | ~target
    layers = []
    for frame, over_all in zip(model.frame_layers, model.global_layers):
        own = grid_positions(1, grid, model.num_special_tokens, pixels.device)
        framed = layer_output(frame, tokens, own, config.rope_theta)
        own = grid_positions(views, grid, model.num_special_tokens, pixels.device)
        tokens = layer_output(over_all, framed.view(1, -1, width), own, config.rope_theta, mask).view(count, length, -1)
        layers.append(torch.cat([framed, tokens], dim=-1))
    return layers


def encode(model: Spa3RModel, pixels: Tensor, views: int, grid: tuple[int, int]) -> Tensor:  # -> (1, L, D)
    layers = backbone_layers(model.backbone, pixels, views, grid)
    features = layers[-1][:, model.backbone.num_special_tokens :].flatten(0, 1)[None]
    return encode_features(model, features, views, grid)


def encode_features(model: Spa3RModel, features: Tensor, views: int, grid: tuple[int, int]) -> Tensor:
    encoder, config = model.encoder, model.config
    prefix = torch.cat([encoder.register_tokens, encoder.query_tokens], dim=1)
    tokens = torch.cat([prefix, encoder.input_projection(features)], dim=1)
    for layer in encoder.layers:
        patches = grid_positions(views, grid, 0, features.device)
        positions = torch.cat([patches.new_zeros(prefix.shape[1], 2), patches])
        tokens = layer_output(layer, tokens, positions, config.rope_theta)
    return encoder.norm(tokens[:, config.num_register_tokens : prefix.shape[1]])
