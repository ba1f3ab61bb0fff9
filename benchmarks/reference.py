"""The plain formulation of encoding, pretraining and prefill, with a model's own weights: what benchmarks compare with.

One scene of equal views at a time; the features of all layers are kept; tables of positions are rebuilt in every layer;
masking is one boolean matrix over all tokens. The maths are those of the library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spa3r import Spa3RForPreTraining, Spa3RModel, Spa3VLM, VggtModel
from spa3r.models.cameras import camera_rays
from spa3r.models.encodings import projection_matrices
from spa3r.models.packing import ViewLayout
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMAdapter

DENSE_VIEWS = 8
"""Views that the depth head takes at once, as in VGGT's code."""


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


def project(tokens: Tensor, matrices: Tensor, grid: tuple[int, int], base: float, sign: int) -> Tensor:
    """PRoPE of the last tokens of every view, those of its patches: (V, heads, S, d), (V, 4, 4) -> (V, heads, S, d)."""
    count, quarter = grid[0] * grid[1], tokens.shape[-1] // 4
    prefix, patches = tokens.split([tokens.shape[2] - count, count], dim=2)
    projective, *rotated = patches.split([2 * quarter, quarter, quarter], dim=-1)
    projective = torch.einsum("vij,vhnkj->vhnki", matrices, projective.unflatten(-1, (-1, 4))).flatten(-2)
    frequencies = base ** -(torch.arange(quarter // 2, device=tokens.device).float() / (quarter // 2))
    rows, columns = torch.cartesian_prod(*(torch.arange(side, device=tokens.device) for side in grid)).unbind(-1)
    parts = [projective]
    for part, place in zip(rotated, (columns, rows)):
        angles = place[:, None] * frequencies
        first, second = part.chunk(2, dim=-1)
        cos, sin = angles.cos(), sign * angles.sin()
        parts += [first * cos + second * sin, second * cos - first * sin]
    return torch.cat([prefix, torch.cat(parts, dim=-1).to(prefix.dtype)], dim=2)


def layer_output(
    layer: nn.Module,
    tokens: Tensor,
    positions: Tensor | None,
    base: float,
    mask: Tensor | None = None,
    cameras: tuple[Tensor, Tensor] | None = None,
    grid: tuple[int, int] = (0, 0),
) -> Tensor:  # (B, S, C), (S, 2), (S, S), two (B, 4, 4) -> (B, S, C)
    attention = layer.attention
    batch, length, width = tokens.shape
    qkv = attention.qkv(layer.norm1(tokens)).view(batch, length, 3, -1, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if positions is not None:
        query, key = rotate(query, positions, base), rotate(key, positions, base)
    if cameras is not None:
        projection, inverse = cameras
        query = project(query, projection.mT, grid, base, 1)
        key, value = (project(part, inverse, grid, base, 1) for part in (key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if cameras is not None:
        attended = project(attended, cameras[0], grid, base, -1)
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


def decode(
    model: Spa3RModel, latents: Tensor, extrinsics: Tensor, intrinsics: Tensor, grid: tuple[int, int]
) -> Tensor:  # (1, L, D), (V, 4, 4), (V, 3, 3) -> (V, N, D)
    decoder, config = model.decoder, model.config
    views, patch = len(extrinsics), config.patch_size
    rays = decoder.ray_projection(camera_rays(intrinsics, grid, patch).to(decoder.norm.weight.dtype))
    prefix = torch.cat([decoder.register_tokens, latents.to(rays.dtype)], dim=1).expand(views, -1, -1)
    tokens = torch.cat([prefix, rays], dim=1)
    for layer in decoder.layers:
        image_hw = torch.tensor([[patch * side for side in grid]] * views, device=latents.device)
        cameras = projection_matrices(extrinsics, intrinsics, image_hw)
        tokens = layer_output(layer, tokens, None, config.rope_theta, cameras=cameras, grid=grid)
    return decoder.norm(tokens[:, prefix.shape[1] :])


def pretraining_losses(
    model: Spa3RForPreTraining, pixels: Tensor, views: int, grid: tuple[int, int], context: int
) -> dict[str, Tensor]:
    """The loss terms of one scene whose first `context` views are context, over all views.

    With ``view_masking="separate"``, as in the released configuration, the backbone runs over the context views, then
    over all views; with ``"asymmetric"`` once, with a mask.
    """
    spa3r, backbone = model.spa3r, model.spa3r.backbone
    special, cells = backbone.num_special_tokens, grid[0] * grid[1]
    with torch.no_grad():
        if model.config.view_masking == "separate":
            layers = backbone_layers(backbone, pixels[: context * cells], context, grid)
            context_features = layers[-1][:, special:]
            layers = backbone_layers(backbone, pixels, views, grid)
        else:
            layers = backbone_layers(backbone, pixels, views, grid, [view >= context for view in range(views)])
            context_features = layers[-1][:context, special:]
        poses = backbone.camera_head(layers[-1][:, 0], [views])[-1]
        layout = ViewLayout.from_inputs([grid] * views, [views])
        extrinsics, intrinsics = backbone._cameras(poses, layout)
        dense = [layers[index][:, special:] for index in backbone.config.dpt_layers]
        depth = torch.cat(
            [
                backbone.depth_head._forward_grid([part[start : start + DENSE_VIEWS] for part in dense], grid)
                for start in range(0, views, DENSE_VIEWS)
            ]
        )[:, :1].exp()
        depth = nn.functional.interpolate(depth.float(), size=grid, mode="nearest").flatten()
        geometry = layers[-1][:, special:].flatten(0, 1)
        semantic = model._semantic_targets(pixels, layout)
    del layers, dense  # a fair reference holds no layer that it does not use any more

    latents = encode_features(spa3r, context_features.flatten(0, 1)[None], context, grid)
    tokens = decode(spa3r, latents, extrinsics, intrinsics, grid).flatten(0, 1)
    losses = {}
    for name, head, target in (
        ("geometry", spa3r.geometry_head, geometry),
        ("semantic", spa3r.semantic_head, semantic),
    ):
        predicted, target = head(tokens).float(), target.float()
        losses[f"{name}_l1"] = nn.functional.smooth_l1_loss(predicted, target)
        losses[f"{name}_cosine"] = (1 - nn.functional.cosine_similarity(predicted, target, dim=-1)).mean()
    probed = spa3r.depth_probe(tokens.detach())[:, 0].float()
    losses["depth_probe"] = nn.functional.smooth_l1_loss(probed, depth)
    return losses


def fuse(adapter: Spa3VLMAdapter, image_tokens: Tensor, latents: Tensor) -> Tensor:  # (T, h), (1, L, D) -> (T, h)
    attention = adapter.cross_attention
    keys = adapter.projector(latents)

    def heads(tokens: Tensor) -> Tensor:  # (1, n, h) -> (1, heads, n, head_dim)
        return tokens.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = attention.q_norm(heads(attention.q_proj(image_tokens[None])))
    key, value = attention.k_norm(heads(attention.k_proj(keys))), heads(attention.v_proj(keys))
    attended = nn.functional.scaled_dot_product_attention(query, key, value)
    attended = adapter.norm(attention.proj(attended.transpose(1, 2).flatten(-2)))[0]
    return image_tokens + adapter.bottleneck(attended) * adapter.gate(attended).sigmoid()


def prefill(model: Spa3VLM, inputs: dict[str, Tensor]) -> Tensor:  # -> (1, S, vocabulary)
    """The logits of every token of a prompt about one scene of equal views."""
    inputs = dict(inputs)
    pixels, grids = inputs.pop("view_pixel_values"), inputs.pop("view_grid_hw").tolist()
    for name in ("views_per_scene", "image_tokens_per_scene"):
        inputs.pop(name)
    features = model.vlm.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    tokens = torch.cat(list(features.pooler_output))
    latents = encode(model.spa3r, pixels, len(grids), tuple(grids[0]))
    features.pooler_output = [fuse(model.adapter, tokens, latents)]
    return model.vlm(**inputs, mm_encoder_outputs={"image": features}, use_cache=True).logits
