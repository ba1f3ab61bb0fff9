"""Layers in chunks of tokens: the same numbers as at once, in memory that grows with the tokens once."""

import pytest
import torch
from attention_definition import SEGMENTS
from tiny import BACK_ENDS, TARGETS, alive, assert_close, relative_error, spa3r_config, vggt_config, view_inputs

from spa3r import Spa3RModel, VggtModel
from spa3r.models import dense_head, layers
from spa3r.models.attention import Segments
from spa3r.models.cost import LiveBytes
from spa3r.models.encodings import RotaryEncoding
from spa3r.models.packing import ViewLayout, join_rows, spans

WIDTH = 16
CHAINED = Segments((4, 3, 5, 2), ((0, 4), (0, 7), (7, 5), (7, 7)))
"""Two scenes, in each of which targets attend to context."""


def small_chunks(monkeypatch, rows: int = 3, width: int = 4 * WIDTH) -> None:
    monkeypatch.setattr(layers, "CPU_CHUNK_BYTES", rows * width * 4)


def test_parts_attend_only_to_themselves_and_are_joined_up_to_a_size():
    assert CHAINED.parts(1) == (
        (0, 7, Segments((4, 3), ((0, 4), (0, 7)))),
        (7, 14, Segments((5, 2), ((0, 5), (0, 7)))),
    )
    assert CHAINED.parts(14) == ((0, 14, CHAINED),)
    views = Segments.within([2, 3, 4, 1])
    assert [part[:2] for part in views.parts(1)] == [(0, 2), (2, 5), (5, 9), (9, 10)]
    assert [part[:2] for part in views.parts(5)] == [(0, 5), (5, 10)]
    assert views.parts(5)[1][2] == Segments.within([4, 1])
    backward = Segments((2, 2, 2), ((0, 2), (2, 2), (0, 6)))  # the last attends to all before it
    assert backward.parts(1) == ((0, 6, backward),)


def test_query_chunks_keep_the_keys():
    assert Segments((5, 2), ((0, 5), (0, 7))).query_chunks(3) == (
        (0, 3, Segments((3,), ((0, 5),))),
        (3, 5, Segments((2,), ((0, 5),))),
        (5, 7, Segments((2,), ((0, 7),))),
    )
    assert spans(10, 4) == [(0, 4), (4, 8), (8, 10)] and spans(4, 4) == [(0, 4)]


def test_rows_are_joined():
    rows = torch.arange(10.0).view(5, 2)
    joined = join_rows(((rows[a:b], -rows[a:b]) for a, b in spans(5, 2)), 5)
    assert torch.equal(joined[0], rows) and torch.equal(joined[1], -rows)
    assert join_rows([(rows,)], 5)[0] is rows  # no copy


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("rows", (1, 3, 8))
@torch.no_grad()
def test_a_layer_in_chunks_is_the_layer_at_once(rows, back_end, monkeypatch):
    layer = alive(VggtModel(vggt_config())).global_layers[0]
    layer.attention.config._attn_implementation = back_end
    for segments in (SEGMENTS["uniform"], SEGMENTS["ragged"], SEGMENTS["one"], CHAINED):
        count = sum(segments.query_lengths)
        tokens = torch.randn(count, WIDTH)
        positions = RotaryEncoding.from_positions(torch.randint(9, (count, 2)), WIDTH // 2, 100.0)
        for encoding in (None, positions):
            wanted = layer(tokens, segments, encoding)
            with monkeypatch.context() as patch:
                small_chunks(patch, rows)
                assert relative_error(layer(tokens, segments, encoding), wanted) <= 1e-6


@pytest.mark.parametrize("asymmetric", (False, True))
@torch.no_grad()
def test_a_backbone_in_chunks_is_the_backbone_at_once(asymmetric, monkeypatch):
    model, inputs = alive(VggtModel(vggt_config())), view_inputs()
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])

    def run() -> dict:
        context = [row.count(0) for row in TARGETS] if asymmetric else None
        everything = {"output_cameras": True, "output_depth": True, "output_points": True}
        out = model.forward_layout(inputs["view_pixel_values"], layout, (0, 1), **everything, context_views=context)
        return {key: out[key] for key in ("tokens", "extrinsics", "depth", "world_points")}

    wanted = run()
    small_chunks(monkeypatch, 20)
    monkeypatch.setattr(dense_head, "DPT_PATCHES_AT_ONCE", 1)
    assert_close(run(), wanted, 2e-6)


@torch.no_grad()
def test_latents_and_fields_in_chunks_are_those_at_once(monkeypatch):
    model, inputs = alive(Spa3RModel(spa3r_config())), view_inputs()
    wanted = model(**inputs)
    small_chunks(monkeypatch)
    keys = ("latents", "geometry_features", "semantic_features", "depth")
    assert_close({key: model(**inputs)[key] for key in keys}, {key: wanted[key] for key in keys}, 5e-6)


def test_under_autocast_chunks_change_no_dtype(monkeypatch):
    model, inputs = alive(VggtModel(vggt_config())), view_inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(**inputs).tokens[0]
        small_chunks(monkeypatch)
        ours = model(**inputs).tokens[0]
    assert ours.dtype == wanted.dtype and relative_error(ours, wanted) <= 1e-2


@torch.no_grad()
def test_memory_grows_with_the_tokens_once():
    """Of a layer's intermediate results only queries, keys and values are held: four times the tokens' own size, the
    input included; two times in a layer whose segments are short."""
    config = vggt_config(hidden_size=64)
    model = VggtModel(config)
    width = 64 * 4

    def slope(layer, short: bool) -> float:
        def peak(tokens: int) -> int:
            lengths = [512] * (tokens // 512) if short else [tokens]
            rows = torch.randn(tokens, 64)
            with LiveBytes([*model.parameters()]) as count:
                count.add(rows)
                layer(rows, Segments.within(lengths))
            return count.peak

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "CPU_CHUNK_BYTES", 512 * 4 * width)
            return (peak(8192) - peak(4096)) / (4096 * width)

    assert slope(model.frame_layers[0], short=True) <= 2.05
    assert slope(model.global_layers[0], short=False) <= 4.05
