"""Rotary and projective position encodings against their definitions and the golden tensors."""

import pytest
import torch
from tiny import BACK_ENDS, assert_close, golden, relative_error, spa3r_config

from spa3r.models.attention import Segments, packed_attention
from spa3r.models.cameras import pose_encoding_to_cameras
from spa3r.models.encodings import ProjectiveEncoding, RotaryEncoding, projection_matrices

GRID, PATCH = (4, 5), 14
PATCHES = GRID[0] * GRID[1]


class Caller(torch.nn.Module):
    """A layer as the back ends see it: it names one."""

    is_causal = False

    def __init__(self, back_end: str):
        super().__init__()
        self.config = spa3r_config()
        self.config._attn_implementation = back_end


def grid_positions() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]))


def encoding_of(extrinsics, intrinsics, leading: int, head_dim: int) -> ProjectiveEncoding:
    """Views of one grid one after the other, each behind `leading` tokens without a camera."""
    hw = torch.tensor([[GRID[0] * PATCH, GRID[1] * PATCH]] * len(extrinsics))
    matrices = [
        torch.cat([torch.cat([torch.eye(4).expand(leading, 4, 4), view.expand(PATCHES, 4, 4)]) for view in matrix])
        for matrix in projection_matrices(extrinsics, intrinsics, hw)
    ]
    positions = torch.cat([torch.zeros(leading, 2, dtype=torch.long), grid_positions()]).repeat(len(extrinsics), 1)
    return ProjectiveEncoding.from_cameras(*matrices, positions, head_dim, 100.0)


def attend(encoding, segments, back_end, query, key, value):  # each (S, heads, head_dim)
    return encoding.decode(packed_attention(Caller(back_end), *encoding.encode(query, key, value), segments))


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_golden_tensor_of_prope(back_end):
    """One camera behind 6 tokens without a camera, three times in one batch; two cameras in one sequence."""
    tensors = golden("prope")
    extrinsics, intrinsics = tensors.pop("extrinsics")[:, 0], tensors.pop("intrinsics")[:, 0]
    packed = {name: tensor.transpose(1, 2).flatten(0, 1) for name, tensor in tensors.items()}  # heads behind tokens
    ours = {
        "out": attend(
            encoding_of(extrinsics, intrinsics, 6, 16),
            Segments.within([6 + PATCHES] * 3),
            back_end,
            *(packed.pop(name) for name in "qkv"),
        ),
        "out_two_cameras": attend(
            encoding_of(extrinsics[:2], intrinsics[:2], 0, 16),
            Segments.within([2 * PATCHES]),
            back_end,
            *(packed.pop(f"{name}_two_cameras") for name in "qkv"),
        ),
    }
    assert ours.keys() == packed.keys(), "a golden tensor is unchecked"
    assert_close(ours, packed, 1e-5)


def test_rotation_is_as_defined():
    """Half of the head turns by y, half by x; channel k pairs with channel k + d/2 at frequency 100^(-2k/d)."""
    head_dim, d = 16, 8
    positions = torch.tensor([[0, 0], [1, 0], [0, 1], [3, 7]])
    tokens = torch.randn(4, 2, head_dim)
    wanted = tokens.double().clone()
    for token, position in enumerate(positions.tolist()):
        for half, place in enumerate(position):
            for k in range(d // 2):
                angle = torch.tensor(place * 100.0 ** (-2 * k / d), dtype=torch.float64)
                a, b = (tokens[token, :, half * d + k + part * d // 2].double() for part in (0, 1))
                wanted[token, :, half * d + k] = a * angle.cos() - b * angle.sin()
                wanted[token, :, half * d + k + d // 2] = b * angle.cos() + a * angle.sin()
    encoding = RotaryEncoding.from_positions(positions, head_dim, 100.0)
    query, key, value = encoding.encode(tokens, tokens, tokens)
    assert relative_error(query, wanted) <= 1e-6 and torch.equal(key, query)
    assert torch.equal(value, tokens) and torch.equal(encoding.decode(tokens), tokens)
    assert torch.equal(query[0], tokens[0]), "(0, 0) is no rotation"


def test_rotary_scores_depend_on_differences_of_positions_only():
    query, key = torch.randn(2, PATCHES, 2, 16)
    scores = []
    for shift in (0, 5):
        encoding = RotaryEncoding.from_positions(grid_positions() + shift, 16, 100.0)
        q, k, _ = encoding.encode(query, key, key)
        scores.append(torch.einsum("qhd,khd->hqk", q, k))
    assert relative_error(scores[1], scores[0]) <= 1e-5


def random_cameras(count: int):
    pose = torch.randn(count, 9)
    pose[:, 7:] = 0.5 + torch.rand(count, 2)
    return pose_encoding_to_cameras(pose, [(GRID[0] * PATCH, GRID[1] * PATCH)] * count)


def test_projection_and_its_inverse():
    """P = lift(K) @ extrinsics, with K in units of the image and the principal point from the middle."""
    extrinsics, intrinsics = random_cameras(9)
    intrinsics[:, 0, 2] += 3
    hw = torch.tensor([[56, 70]] * 9)
    projection, inverse = projection_matrices(extrinsics, intrinsics, hw)
    assert relative_error(projection @ inverse, torch.eye(4).expand(9, 4, 4)) <= 1e-5
    scale = torch.tensor([[1 / 70, 0, -0.5], [0, 1 / 56, -0.5], [0, 0, 1]])
    wanted = torch.eye(4).repeat(9, 1, 1)
    wanted[:, :3, :3] = scale @ intrinsics
    assert relative_error(projection, wanted @ extrinsics) <= 1e-5


def test_projective_attention_does_not_see_the_world_frame():
    """Another world frame for all cameras changes nothing; another camera does."""
    extrinsics, intrinsics = random_cameras(2)
    world, _ = random_cameras(1)
    query, key, value = torch.randn(3, 2 * PATCHES, 2, 16)
    segments = Segments.within([2 * PATCHES])

    def run(extrinsics):
        return attend(encoding_of(extrinsics, intrinsics, 0, 16), segments, "sdpa", query, key, value)

    plain = run(extrinsics)
    assert relative_error(run(extrinsics @ world), plain) <= 1e-4
    assert relative_error(run(torch.cat([extrinsics[:1], extrinsics[1:] @ world])), plain) > 1e-2


def test_tokens_without_a_camera_are_left_as_they_are():
    encoding = encoding_of(*random_cameras(1), 6, 16)
    tokens = torch.randn(6 + PATCHES, 2, 16)
    for encoded in (*encoding.encode(tokens, tokens, tokens), encoding.decode(tokens)):
        assert torch.equal(encoded[:6], tokens[:6])
        assert relative_error(encoded[6:], tokens[6:]) > 0.1


@pytest.mark.parametrize("kind", ("rotary", "projective"))
def test_encodings_keep_the_dtype_and_compute_translations_in_float32(kind):
    tokens = torch.randn(PATCHES, 2, 16).bfloat16()
    if kind == "rotary":
        encoding = RotaryEncoding.from_positions(grid_positions(), 16, 100.0)
    else:
        encoding = encoding_of(*random_cameras(1), 0, 16)
    exact = encoding.encode(*[tokens.float()] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoding.encode(tokens, tokens, tokens)
    for ours, wanted in zip(half, exact):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, wanted) <= (3e-3 if kind == "projective" else 6e-3)
