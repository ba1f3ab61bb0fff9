"""The geometry backbone: golden tensors of the original, and what holds for every model."""

import pytest
import torch
from tiny import (
    BACK_ENDS,
    TARGETS,
    ModelTests,
    arranged,
    assert_close,
    by_scene,
    densely_masked,
    golden,
    golden_inputs,
    relative_error,
    vggt_config,
    view_inputs,
)
from transformers import AutoModel

from spa3r import VggtConfig, VggtModel
from spa3r.models.packing import ViewLayout, select_rows

EVERYTHING = {"output_cameras": True, "output_depth": True, "output_points": True}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("source", ("vggt-folder", "vggt-pt"))
@torch.no_grad()
def test_every_golden_tensor_through_the_converter(source, back_end, golden_folders):
    model = VggtModel.from_pretrained(golden_folders[source], attn_implementation=back_end)
    assert model.config.global_qk_norm == "layer_norm"
    inputs = golden_inputs("vggt")
    out = model(**inputs, output_layers=range(4), **EVERYTHING)
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    ours = {f"aggregated_tokens.{layer}": tokens for layer, tokens in enumerate(out.tokens)}
    ours |= {f"pose_enc.{index}": pose for index, pose in enumerate(out.pose_encodings)}
    ours |= {"extrinsics": out.extrinsics[:, :3], "intrinsics": out.intrinsics}
    ours |= {"depth": torch.stack(out.depth), "depth_conf": torch.stack(out.depth_confidence)}
    ours |= {
        "world_points": torch.stack(out.world_points),
        "world_points_conf": torch.stack(out.world_points_confidence),
    }
    ours["patch_embed.x_norm_patchtokens"] = model.patch_embedding(inputs["view_pixel_values"], layout)
    reference = golden("vggt", "outputs.")
    assert ours.keys() == reference.keys(), "a golden tensor is unchecked"
    assert_close({key: value.reshape(reference[key].shape) for key, value in ours.items()}, reference, 1e-5)


class TestVggtModel(ModelTests):
    model_class, auto_class = VggtModel, AutoModel
    some_key = "register_token"

    def config(self, **fields):
        return vggt_config(**fields)

    def outputs(self, model, inputs):
        out = model(**inputs, output_layers=(0, -1), **EVERYTHING)
        special = str(model.num_special_tokens)
        views = {key: out[key] for key in ("extrinsics", "intrinsics", "depth", "depth_confidence", "world_points")}
        views |= {"world_points_confidence": out.world_points_confidence, "poses": out.pose_encodings[-1]}
        tokens = {f"tokens.{index}": by_scene(tokens, inputs, special) for index, tokens in enumerate(out.tokens)}
        return tokens | {key: by_scene(value, inputs) for key, value in views.items()}

    def loss(self, model, inputs):
        return sum(value.square().mean() for values in self.outputs(model, inputs).values() for value in values)

    def test_is_trainable_on_its_own(self):
        model = self.make().train()
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(module.training for module in model.modules())

    @torch.no_grad()
    def test_only_what_is_asked_for_is_computed(self):
        model, inputs = self.make(), self.inputs()
        layers = []
        for index, layer in enumerate(model.global_layers):
            layer.register_forward_hook(lambda *_, index=index: layers.append(index))
        out = model(**inputs, output_layers=(0,))
        assert layers == [0] and list(out.keys()) == ["tokens"]
        assert torch.equal(out.tokens[0], model(**inputs, output_layers=(-1, 0)).tokens[1])

    @torch.no_grad()
    def test_many_views_of_one_size_pass_the_dense_heads_in_parts(self, monkeypatch):
        model, inputs = self.make(), self.inputs([[(2, 3)] * 5])
        whole = model(**inputs, output_depth=True).depth
        monkeypatch.setattr("spa3r.models.dense_head.DPT_PATCHES_AT_ONCE", 12)
        parts = model(**inputs, output_depth=True).depth
        assert relative_error(torch.stack(parts), torch.stack(whole)) <= 1e-5

    @pytest.mark.parametrize("heads", ([], ["camera"], ["depth"], ["camera", "point"]))
    def test_absent_heads_are_refused_and_present_ones_run(self, heads):
        model, inputs = self.make(heads=heads), self.inputs()
        for head, wanted in (("camera", "output_cameras"), ("depth", "output_depth"), ("point", "output_points")):
            if head in heads:
                model(**inputs, **{wanted: True})
            else:
                with pytest.raises(ValueError, match=f"This VggtModel has no {head} head"):
                    model(**inputs, **{wanted: True})
        with pytest.raises(ValueError, match="must have cameras, got none"):
            _ = model(**inputs).cameras

    @pytest.mark.parametrize("layer", (-3, 2))
    def test_layers_out_of_range_are_refused(self, layer):
        with pytest.raises(ValueError, match=rf"`output_layers` must lie in \[-2, 1\] for 2 layers, got {layer}"):
            self.make()(**self.inputs(), output_layers=(layer,))

    @torch.no_grad()
    def test_native_grid_takes_the_position_embedding_as_it_is(self):
        model = self.make()
        assert torch.equal(
            model.patch_embedding._position_embedding((5, 5)), model.patch_embedding.position_embedding[0, 1:]
        )

    def test_first_view_of_every_scene_has_its_own_tokens(self):
        inputs = view_inputs([[(2, 2)] * 2])
        inputs["view_pixel_values"] = inputs["view_pixel_values"][:4].repeat(2, 1)
        first, second = self.make()(**inputs, output_layers=(0,)).tokens[0].chunk(2)
        assert relative_error(first, second) > 1e-2


@pytest.mark.parametrize("back_end", BACK_ENDS)
@torch.no_grad()
def test_asymmetric_masking_without_a_mask_equals_a_dense_mask(back_end, monkeypatch):
    """Target views stand between context views; ours are sorted within each scene, the dense reference is not."""
    model, inputs = TestVggtModel().make(back_end), view_inputs(targets=TARGETS)
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    targets, counts = inputs["target_mask"].tolist(), layout.patches_per_view
    order = [
        view
        for first, count in zip(layout.first_views, layout.views_per_scene)
        for wanted in (False, True)
        for view in range(first, first + count)
        if targets[view] == wanted
    ]
    assert order != list(range(layout.num_views))
    out = model.forward_layout(
        select_rows(inputs["view_pixel_values"], counts, order),
        layout.select(order, layout.views_per_scene),
        output_layers=(0, 1),
        output_cameras=True,
        context_views=[row.count(0) for row in TARGETS],
    )
    dense = densely_masked(model, inputs, monkeypatch, output_layers=(0, 1), output_cameras=True)
    lengths = [model.num_special_tokens + count for count in counts]
    ours = {
        "tokens": [
            torch.cat(
                [tokens.split([lengths[view] for view in order])[order.index(view)] for view in range(len(order))]
            )
            for tokens in out.tokens
        ],
        "poses": out.pose_encodings[-1][torch.tensor(order).argsort()],
    }
    assert_close(ours, {"tokens": dense.tokens, "poses": dense.pose_encodings[-1]}, 1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda x: x | {"view_grid_hw": torch.zeros(0, 2, dtype=torch.long), "views_per_scene": torch.zeros(0)},
            r"must hold at least one view of one scene, got 0 views in 0 scenes.*Give the processor at least one image",
        ),
        (
            lambda x: x | {"views_per_scene": [2, 5, 6]},
            r"`views_per_scene` must add up to the number of views, 14 .*got \[2, 5, 6\], which adds up to 13",
        ),
        (
            lambda x: x | {"views_per_scene": [2, 12, 0]},
            r"`views_per_scene` must be at least 1 everywhere, got \[2, 12, 0\]. Leave scenes without views out",
        ),
        (
            lambda x: x | {"view_pixel_values": x["view_pixel_values"][1:]},
            r"`view_pixel_values` must have 154 rows, one for each patch of `view_grid_hw`, got shape \(153, 48\)",
        ),
        (
            lambda x: x | {"view_pixel_values": x["view_pixel_values"][:, 1:]},
            r"`view_pixel_values` must have 48 columns \(3 x 4 x 4 pixels a patch\), got 47. Use the processor",
        ),
        (
            lambda x: x | {"view_pixel_values": x["view_pixel_values"].to(torch.uint8)},
            r"`view_pixel_values` must be floating point, normalized .* got torch.uint8",
        ),
        (
            lambda x: x | {"view_grid_hw": [[0, 4], *x["view_grid_hw"].tolist()[1:]]},
            r"`view_grid_hw` must hold a \(height, width\) of at least \(1, 1\) patches .* got \[0, 4\]",
        ),
        (
            lambda x: x | {"view_grid_hw": [[1, 2, 3]]},
            r"`view_grid_hw` must hold a \(height, width\) .* got \[1, 2, 3\]",
        ),
        (lambda x: x | {"output_layers": ()}, "`output_layers` must name at least one of the 2 layers, got none"),
    ],
    ids=(
        "no views",
        "wrong sum",
        "empty scene",
        "patch count",
        "patch width",
        "integers",
        "no grid",
        "3 columns",
        "no layer",
    ),
)
def test_contradicting_inputs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        VggtModel(vggt_config())(**change(view_inputs()))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hidden_size": 18}, r"`hidden_size` must be a multiple of 4 x `num_attention_heads` = 8 .*got 18"),
        ({"patch_embedding_num_heads": 3}, r"`patch_embedding_num_heads` must divide the width 16 .*got 3"),
        ({"heads": ["camera", "nose"]}, r"`heads` may hold 'camera', 'depth' and 'point', got \['nose'\]"),
        ({"dpt_layers": [0, 1]}, r"`dpt_layers` and `dpt_channels` must have four entries each, got \[0, 1\]"),
        ({"dpt_layers": [0, 1, 2, 3]}, r"`dpt_layers` must be below `num_hidden_layers` = 2, got \[0, 1, 2, 3\]"),
    ],
)
def test_contradicting_sizes_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        vggt_config(**fields)


def test_published_sizes_are_the_defaults():
    config = VggtConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.global_qk_norm, list(config.dpt_layers)) == ("layer_norm", [4, 11, 17, 23])


@torch.no_grad()
def test_layouts_as_lists_and_as_tensors_are_the_same():
    model, inputs = TestVggtModel().make(), arranged(view_inputs(), [1])
    lists = {key: value.tolist() if key != "view_pixel_values" else value for key, value in inputs.items()}
    assert torch.equal(model(**inputs).tokens[0], model(**lists).tokens[0])
