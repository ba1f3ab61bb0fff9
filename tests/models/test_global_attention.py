"""The approximations of global attention: equal to a dense formulation, alone and packed, and blind to target views."""

import pytest
import torch
from attention_definition import Caller, tensors
from tiny import (
    BACK_ENDS,
    SCENES,
    alive,
    arranged,
    assert_close,
    by_scene,
    relative_error,
    spa3r_config,
    vggt_config,
    view_inputs,
)

from spa3r import Spa3RModel, VggtConfig, VggtModel
from spa3r.models.attention import Segments
from spa3r.models.global_attention import MergedAttention, SubsetAttention
from spa3r.models.packing import ViewLayout
from spa3r.models.spa3_vlm.fingerprints import model_fingerprint

LENGTHS = [6, 4, 9, 6, 5, 7]  # tokens of every view, 2 of them special
VIEWS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
SEGMENTS = {
    "scenes": Segments.within([19, 18]),
    "context and targets": Segments((10, 9, 18), ((0, 10), (0, 19), (19, 18))),
}
APPROXIMATIONS = {"merged": {"global_merge_ratio": 0.6}, "subset": {"global_num_views": 3}}


def views_of(first: int, length: int) -> list[int]:
    starts = [sum(LENGTHS[:view]) for view in range(len(LENGTHS))]
    return [view for view, start in enumerate(starts) if first <= start < first + length]


def dense_attention(query, key, value, segments, weights):
    """softmax(q k^T / sqrt(d) + log weight) v; `weights(segment, query's view)` (Sk,) is 0 for an unseen key."""
    logs = torch.full((len(query), len(key)), float("-inf"), dtype=torch.float64)
    start = 0
    for index, count in enumerate(segments.query_lengths):
        for row in range(start, start + count):
            logs[row] = weights(index, int(VIEWS[row])).double().log()
        start += count
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * query.shape[-1] ** -0.5 + logs
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_subset_is_a_dense_mask(segments, back_end):
    patches = [torch.randn(length - 2, 8) for length in LENGTHS]
    means = torch.stack([rows.mean(0) / rows.mean(0).norm() for rows in patches])

    def weights(index, view):
        seen = views_of(*segments.key_ranges[index])
        wanted = {seen[0], view}
        for other in sorted(seen, key=lambda other: -float(means[view] @ means[other])):
            if len(wanted) < 2:
                wanted.add(other)
        return sum((VIEWS == other).float() for other in wanted)

    plan = SubsetAttention.plan(segments, LENGTHS, patches, 2)
    inputs = tensors(segments)
    output, wanted = plan(Caller(back_end), *inputs, segments), dense_attention(*inputs, segments, weights)
    assert relative_error(output, wanted) <= 1e-6
    assert len(plan.parts) > 1 and all(len(places) <= sum(LENGTHS) for _, places, _ in plan.parts)
    cotangent = torch.randn_like(output)
    ours, dense = (torch.autograd.grad(o, inputs, c) for o, c in ((output, cotangent), (wanted, cotangent.double())))
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(ours, dense))


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_merged_is_dense_attention_to_means(segments, back_end, monkeypatch):
    """Reference: one row of means per key range, each counted as often as tokens are in it."""
    monkeypatch.setattr("spa3r.models.global_attention.SIMILARITIES_AT_ONCE", 64)  # in several parts
    inputs = query, key, value = tensors(segments)
    plan = MergedAttention.plan(segments, LENGTHS, 2, 0.6, query.device)
    starts = [sum(LENGTHS[:view]) for view in range(len(LENGTHS))]
    outputs, begin = [], 0
    for (first, length), count, kept, merged in zip(
        segments.key_ranges, segments.query_lengths, plan.kept, plan.merged
    ):
        views = views_of(first, length)
        own = set(range(first, first + length))
        assert {*kept.tolist(), *merged.tolist()} == own and len(kept) + len(merged) == len(own)
        assert {*range(first, first + LENGTHS[views[0]])} <= {*kept.tolist()}
        assert {starts[view] + special for view in views for special in (0, 1)} <= {*kept.tolist()}
        assert len(merged) == int(0.6 * sum(LENGTHS[view] - 2 for view in views[1:]))
        groups = {place: [place] for place in kept.tolist()}
        for place in merged.tolist():
            similarity = [torch.cosine_similarity(key[place].mean(0), key[other].mean(0), dim=0) for other in groups]
            groups[list(groups)[int(torch.stack(similarity).argmax())]].append(place)
        keys, values = (torch.stack([x[rows].double().mean(0) for rows in groups.values()]) for x in (key, value))
        sizes = torch.tensor([len(rows) for rows in groups.values()]).double()
        scores = torch.einsum("qhd,khd->hqk", query[begin : begin + count].double(), keys) * query.shape[-1] ** -0.5
        outputs.append(torch.einsum("hqk,khd->qhd", (scores + sizes.log()).softmax(-1), values))
        begin += count
    output, wanted = plan(Caller(back_end), *inputs, segments), torch.cat(outputs)
    assert relative_error(output, wanted) <= 1e-6
    cotangent = torch.randn_like(output)
    ours, dense = (torch.autograd.grad(o, inputs, c) for o, c in ((output, cotangent), (wanted, cotangent.double())))
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(ours, dense))


def test_merging_equal_tokens_changes_nothing():
    segments, lengths = Segments.within([24]), [8, 8, 8]
    query, key, value = tensors(segments)
    key, value = (torch.cat([x[:2], x[2:3].expand(22, -1, -1)]) for x in (key, value))
    plan = MergedAttention.plan(segments, lengths, 1, 1.0, query.device)
    assert len(plan.merged[0]) == 14
    exact = dense_attention_of_one_segment(query, key, value)
    assert relative_error(plan(Caller("sdpa"), query, key, value, segments), exact) <= 1e-6


def dense_attention_of_one_segment(query, key, value):
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * query.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())


def make(back_end: str = "sdpa", **fields) -> VggtModel:
    model = alive(VggtModel(vggt_config(**fields)))
    model.set_attn_implementation(back_end)
    return model


def outputs(model, inputs) -> dict:
    out = model(**inputs, output_layers=(0, -1), output_cameras=True, output_depth=True)
    special = str(model.num_special_tokens)
    tokens = {f"tokens.{index}": by_scene(tokens, inputs, special) for index, tokens in enumerate(out.tokens)}
    return tokens | {"extrinsics": by_scene(out.extrinsics, inputs), "depth": by_scene(out.depth, inputs)}


@pytest.mark.parametrize("fields", ({"global_attention": "merged"}, {"global_attention": "subset"}), ids=str)
@torch.no_grad()
def test_nothing_left_out_is_full_attention(fields):
    inputs = view_inputs()
    exact = outputs(make(), inputs)
    nothing = {"global_merge_ratio": 0, "global_num_views": 7}
    assert_close(outputs(make(**fields, **nothing), inputs), exact, 1e-6)
    some = outputs(make(**fields, global_num_views=5, global_merge_ratio=0.9), inputs)
    if fields["global_attention"] == "subset":  # scenes of 2 and 5 views see everything, the one of 7 doesn't
        assert_close({k: v[:2] for k, v in some.items()}, {k: v[:2] for k, v in exact.items()}, 1e-5)
    assert relative_error(some["tokens.0"][2], exact["tokens.0"][2]) > 1e-3


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("kind", APPROXIMATIONS)
@torch.no_grad()
def test_a_scene_is_the_same_packed_and_alone(kind, back_end):
    model, inputs = make(back_end, global_attention=kind, **APPROXIMATIONS[kind]), view_inputs()
    packed = outputs(model, inputs)
    alone = [outputs(model, arranged(inputs, [scene])) for scene in range(len(SCENES))]
    assert_close(packed, {key: [part[key][0] for part in alone] for key in packed}, 1e-5)


@pytest.mark.parametrize("kind", APPROXIMATIONS)
@torch.no_grad()
def test_target_pixels_change_no_context_feature(kind):
    model, inputs = make(global_attention=kind, **APPROXIMATIONS[kind]), view_inputs([[(2, 3)] * 8, [(3, 2)] * 7])
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    is_target = torch.tensor([0] * 5 + [1] * 3 + [0] * 4 + [1] * 3).bool()  # context first, as the callers sort them
    rows = is_target.repeat_interleave(6)
    before, after = (
        model.forward_layout(pixels, layout, (0, 1), context_views=(5, 4)).tokens
        for pixels in (
            inputs["view_pixel_values"],
            torch.where(rows[:, None], torch.randn(len(rows), 1), inputs["view_pixel_values"]),
        )
    )
    tokens = is_target.repeat_interleave(model.num_special_tokens + 6)
    for old, new in zip(before, after):
        assert torch.equal(old[~tokens], new[~tokens])
        assert relative_error(new[tokens], old[tokens]) > 1e-2
    context = model.forward_layout(
        inputs["view_pixel_values"][~rows], layout.select([*range(5), *range(8, 12)], (5, 4)), (0, 1)
    )
    assert_close({"tokens": [x[~tokens] for x in before]}, {"tokens": context.tokens}, 1e-5)


@pytest.mark.parametrize("kind", APPROXIMATIONS)
def test_gradients_reach_all_parameters(kind):
    model = make(global_attention=kind, **APPROXIMATIONS[kind], heads=[]).train()
    model(**view_inputs()).tokens[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", APPROXIMATIONS)
def test_the_choice_is_saved_and_in_the_fingerprint(kind, tmp_path):
    model = alive(Spa3RModel(spa3r_config()))
    model.save_pretrained(tmp_path)
    exact = model_fingerprint(model)
    fields = {"global_attention": kind, **APPROXIMATIONS[kind]}
    approximate = Spa3RModel.from_pretrained(tmp_path, backbone_config=fields)
    model.backbone.config.global_attention = kind  # or later, on the loaded model
    prints = {exact, model_fingerprint(approximate), model_fingerprint(model)}
    assert len(prints) == 3
    latents = approximate.encode(**view_inputs())
    assert relative_error(latents, Spa3RModel.from_pretrained(tmp_path).encode(**view_inputs())) > 1e-4
    approximate.save_pretrained(tmp_path / "saved")
    again = Spa3RModel.from_pretrained(tmp_path / "saved")
    assert {name: getattr(again.backbone.config, name) for name in fields} == fields
    assert model_fingerprint(again) == model_fingerprint(approximate)
    assert torch.equal(again.encode(**view_inputs()), latents)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"global_attention": "sparse"}, r"`global_attention` of VggtConfig must be .*'full', 'merged', 'subset'"),
        ({"global_merge_ratio": 1.5}, r"`global_merge_ratio` of VggtConfig must be a number from 0 to 1, got 1.5"),
        ({"global_num_views": 1}, r"`global_num_views` of VggtConfig must be a whole number from 2 to .*, got 1"),
    ],
)
def test_wrong_choices_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VggtConfig(**fields)
