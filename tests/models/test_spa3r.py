"""Spa3R: latents of scenes, feature fields of cameras, checkpoints with and without the frozen backbone."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import (
    BACK_ENDS,
    PATCH,
    SCENES,
    ModelTests,
    alive,
    arranged,
    assert_close,
    back_ends_in_use,
    field_by_scene,
    pretraining_config,
    realigned,
    relative_error,
    some_cameras,
    spa3r_config,
    vggt_config,
    view_inputs,
)
from transformers import AutoModel

from spa3r import Spa3RConfig, Spa3RForPreTraining, Spa3RModel, VggtModel
from spa3r.models.attention import Segments
from spa3r.models.cameras import pluecker_rays, pose_encoding_to_cameras
from spa3r.models.encodings import RotaryEncoding
from spa3r.models.packing import ViewLayout


class TestSpa3RModel(ModelTests):
    model_class, auto_class = Spa3RModel, AutoModel
    fields: dict = {}

    def config(self, **fields):
        return spa3r_config(**(self.fields | fields))

    def outputs(self, model, inputs):
        out = model(**inputs)
        return {"latents": list(out.latents), "encode": list(model.encode(**inputs)), **field_by_scene(out, inputs)}

    def loss(self, model, inputs):
        return sum(value.square().mean() for values in self.outputs(model, inputs).values() for value in values)

    def test_backbone_is_frozen_and_stays_in_eval_mode(self, tmp_path):
        fresh = self.make()
        fresh.save_pretrained(tmp_path)
        for model in (fresh, Spa3RModel.from_pretrained(tmp_path)):
            for change in (lambda m: m, lambda m: m.train(), lambda m: m.train(True), lambda m: m.eval().train()):
                change(model)
                assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
                assert not any(module.training for module in model.backbone.modules())
            assert all(module.training for part in (model.encoder, model.decoder) for module in part.modules())
            assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("backbone."))

    @torch.no_grad()
    def test_decode_is_the_second_half_of_forward(self):
        model, inputs = self.make(), self.inputs()
        whole = model(**inputs)
        grids, scenes = inputs["view_grid_hw"], inputs["views_per_scene"]
        field = model.decode(model.encode(**inputs), whole.extrinsics, whole.intrinsics, grids, scenes)
        assert_close(dict(field), {key: whole[key] for key in field}, 0.0)

    @torch.no_grad()
    def test_views_are_decoded_each_on_its_own(self):
        """Any number of cameras, of any grid, at any scene: the same as one at a time."""
        model = self.make()
        latents = model.encode(**self.inputs())
        views = view_inputs([[(2, 3)], [(4, 1), (2, 3), (3, 3)], [(5, 2), (1, 1)]])
        cameras, scene_of_view = some_cameras(views), [0, 1, 1, 1, 2, 2]
        packed = model.decode(latents, **cameras, view_grid_hw=views["view_grid_hw"], views_per_scene=[1, 3, 2])
        alone = [
            model.decode(
                latents[scene][None],
                cameras["extrinsics"][view][None],
                cameras["intrinsics"][view][None],
                views["view_grid_hw"][view][None],
                [1],
            )
            for view, scene in enumerate(scene_of_view)
        ]
        assert_close(dict(packed), {key: torch.cat([field[key] for field in alone]) for key in packed}, 1e-5)

    @torch.no_grad()
    def test_given_cameras_may_share_any_world_frame(self):
        """The library's world is the first view's camera, whatever frame the caller's cameras are in."""
        model, inputs = self.make(), self.inputs()
        cameras = some_cameras(inputs)
        world, _ = pose_encoding_to_cameras(torch.randn(1, 9), [(8, 8)])
        moved = cameras | {"extrinsics": cameras["extrinsics"] @ world}
        a, b = model(**inputs, **cameras), model(**inputs, **moved)
        assert_close(dict(b), dict(a), 2e-5)
        firsts = [0, *torch.tensor([len(scene) for scene in SCENES]).cumsum(0)[:-1].tolist()]
        assert relative_error(a.extrinsics[firsts], torch.eye(4).expand(3, 4, 4)) <= 1e-5
        assert relative_error(a.geometry_features, model(**inputs).geometry_features) > 1e-2, "cameras are ignored"

    @torch.no_grad()
    def test_order_of_context_views_after_the_first_does_not_matter_to_latents(self):
        model, inputs = self.make(), self.inputs([[(2, 3)] * 4])
        order = [0, 3, 1, 2]
        pixels = inputs["view_pixel_values"].view(4, 6, -1)[order].flatten(0, 1)
        assert relative_error(model.encode(**inputs | {"view_pixel_values": pixels}), model.encode(**inputs)) <= 1e-5

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"latents": torch.zeros(3, 6, 31)}, r"`latents` must have shape .*\(3, 6, 32\), got \(3, 6, 31\)"),
            ({"latents": torch.zeros(2, 6, 32)}, r"`latents` must have shape .*\(3, 6, 32\), got \(2, 6, 32\)"),
            ({"extrinsics": torch.zeros(14, 3, 4)}, r"`extrinsics` must have shape .*\(14, 4, 4\), got \(14, 3, 4\)"),
            ({"intrinsics": torch.zeros(13, 3, 3)}, r"`intrinsics` must have shape .*\(14, 3, 3\), got \(13, 3, 3\)"),
            ({"views_per_scene": [14]}, r"`latents` must have shape .*\(1, 6, 32\), got \(3, 6, 32\)"),
        ],
        ids=("width", "scenes", "extrinsics", "intrinsics", "views"),
    )  # fmt: skip
    def test_decode_refuses_wrong_shapes(self, change, words):
        model, inputs = self.make(), self.inputs()
        right = {"latents": torch.zeros(3, 6, 32), **some_cameras(inputs)}
        right |= {key: inputs[key] for key in ("view_grid_hw", "views_per_scene")}
        model.decode(**right)
        with pytest.raises(ValueError, match=words):
            model.decode(**(right | change))

    @pytest.mark.parametrize("given", ("extrinsics", "intrinsics"))
    def test_forward_refuses_half_a_camera(self, given):
        inputs = self.inputs()
        with pytest.raises(ValueError, match=rf"`intrinsics` must be given together, got only `{given}`"):
            self.make()(**inputs, **{given: some_cameras(inputs)[given]})

    def test_forward_refuses_wrong_cameras(self):
        inputs = self.inputs()
        cameras = some_cameras(arranged(inputs, [0]))
        with pytest.raises(
            ValueError, match=r"`extrinsics` must have shape \(views, 4, 4\) = \(14, 4, 4\), got \(2, 4, 4\)"
        ):
            self.make()(**inputs, **cameras)

    @pytest.mark.parametrize(
        ("compiler", "back_end"),
        (
            ("aot_eager", "sdpa"),
            *(pytest.param("inductor", name, marks=pytest.mark.slow) for name in BACK_ENDS),
        ),
    )
    @torch.no_grad()
    def test_encoder_and_decoder_compile_in_one_graph(self, compiler, back_end):
        model, inputs = self.make(back_end), self.inputs()
        layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
        features = torch.randn(len(inputs["view_pixel_values"]), model.config.geometry_hidden_size)
        cameras, latents = some_cameras(inputs), torch.randn(3, 6, 32)
        for module, arguments in (
            (model.encoder, (features, layout)),
            (model.decoder, (latents, cameras["extrinsics"], cameras["intrinsics"], layout)),
        ):
            torch._dynamo.reset()
            explanation = torch._dynamo.explain(module)(*arguments)
            assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
            compiled = torch.compile(module, fullgraph=True, backend=compiler)
            assert relative_error(compiled(*arguments), module(*arguments)) <= 1e-5


class TestPluecker(TestSpa3RModel):
    fields = {"camera_embedding": "pluecker"}

    @pytest.mark.slow
    def test_encoder_and_decoder_compile_in_one_graph(self):  # with one back end: it takes long
        super().test_encoder_and_decoder_compile_in_one_graph("aot_eager", "sdpa")

    @torch.no_grad()
    def test_the_decoder_is_layers_on_lines_with_the_encoders_positions(self):
        """Registers and latents at (0, 0), the patch (y, x) at (y + 1, x + 1); the cameras are in the rays alone."""
        model = self.make()
        latents, cameras = model.encode(**self.inputs([[(2, 2)]])), some_cameras(view_inputs([[(2, 3)]]))
        decoder = model.decoder
        rays = pluecker_rays(**cameras, grid_hw=(2, 3), patch_size=PATCH)[0]
        tokens = torch.cat([decoder.register_tokens[0], latents[0], decoder.ray_projection(rays)])
        prefix = len(tokens) - 6
        places = [(0, 0)] * prefix + [(y + 1, x + 1) for y in range(2) for x in range(3)]
        rotary = RotaryEncoding.from_positions(torch.tensor(places), 16, 100.0)
        for layer in decoder.layers:
            tokens = layer(tokens, Segments.within([len(tokens)]), rotary)
        field = model.decode(latents, **cameras, view_grid_hw=[(2, 3)], views_per_scene=[1])
        assert relative_error(field.last_hidden_state, decoder.norm(tokens)[prefix:]) <= 1e-6

    @torch.no_grad()
    def test_the_decoder_sees_the_same_line_through_another_camera(self):
        """A camera moved along the ray of its only patch: the same line, so the same feature."""
        model = self.make()
        latents = model.encode(**self.inputs([[(2, 2)]]))
        cameras = some_cameras(view_inputs([[(1, 1)]]))
        cameras["intrinsics"][:, :2, 2] = PATCH / 2  # the ray is the optical axis
        moved = cameras["extrinsics"].clone()
        moved[:, 2, 3] -= 1.7
        aside = moved.clone()
        aside[:, 0, 3] += 0.5
        here, there, aside = (
            model.decode(latents, e, cameras["intrinsics"], [(1, 1)], [1]).geometry_features
            for e in (cameras["extrinsics"], moved, aside)
        )
        assert relative_error(there, here) <= 1e-4 < 1e-2 < relative_error(aside, here)


@pytest.mark.parametrize("target", ("geometry", "semantic"))
@torch.no_grad()
def test_what_is_no_target_has_no_head(target):
    other = {"geometry": "semantic", "semantic": "geometry"}[target]
    both, one = (alive(Spa3RModel(spa3r_config(**fields))) for fields in ({}, {"targets": [target]}))
    assert getattr(one, f"{other}_head") is None
    gone = {key for key in both.state_dict() if key not in one.state_dict()}
    assert gone == {key for key in both.state_dict() if key.startswith(f"{other}_head.")}
    one.load_state_dict({key: value for key, value in both.state_dict().items() if key not in gone})
    out, field = both(**view_inputs()), one(**view_inputs())
    assert getattr(field, f"{other}_features") is None and f"{other}_features" not in field
    assert all(torch.equal(field[name], out[name]) for name in field)


# Which back end, where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, backbone, rest",
    [
        (None, "xformers", "xformers"),
        ("eager", "eager", "eager"),
        ("sdpa", "sdpa", "sdpa"),
        ("xformers", "xformers", "xformers"),
        ({"backbone_config": "eager", "": "sdpa"}, "eager", "sdpa"),
        ({"backbone_config": "sdpa"}, "sdpa", "xformers"),
    ],
)
def test_attention_back_end_by_string_or_by_part(choice, backbone, rest, tmp_path):
    pytest.importorskip("xformers")
    wanted = {"backbone": {backbone}, "encoder": {rest}, "decoder": {rest}}
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path)
    model = Spa3RModel.from_pretrained(tmp_path, attn_implementation=choice)
    assert back_ends_in_use(model) == wanted
    if choice is not None:
        model = Spa3RModel.from_pretrained(tmp_path)
        model.set_attn_implementation(choice)
        assert back_ends_in_use(model) == wanted


@pytest.mark.parametrize("choice", ("eager", {"backbone_config": "sdpa", "": "eager"}))
def test_attention_back_end_of_a_fetched_backbone(choice, tmp_path):
    wanted = {"eager"} if choice == "eager" else {"sdpa"}
    Spa3RModel(spa3r_config()).save_pretrained(tmp_path / "whole")
    Spa3RModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "slim", include_backbone=False)
    loaded = Spa3RModel.from_pretrained(tmp_path / "slim", attn_implementation=choice)
    changed = Spa3RModel.from_pretrained(tmp_path / "slim")
    changed.set_attn_implementation(choice)
    for model in (loaded, changed):
        assert back_ends_in_use(model) == {"backbone": wanted, "encoder": {"eager"}, "decoder": {"eager"}}


# Checkpoints ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(model) -> dict:
    return dict(model(**view_inputs()))


def keys_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_loads_from_a_pretraining_checkpoint(tmp_path):
    whole = alive(Spa3RForPreTraining(pretraining_config()))
    whole.save_pretrained(tmp_path)
    model = Spa3RModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, whole.spa3r.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert_close(outputs_of(realigned(model)), outputs_of(whole.spa3r), 0.0)


def test_pretraining_does_not_load_without_its_teacher(tmp_path):
    Spa3RModel(pretraining_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks keys of Spa3RForPreTraining: semantic_teacher\."):
        Spa3RForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize("home", ("vggt", "spa3r", "pretraining"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_without_backbone_names_it_and_fetches_it_again(home, dtype, tmp_path):
    home_folder, slim = tmp_path / "home", tmp_path / "slim"
    if home == "vggt":
        alive(VggtModel(vggt_config())).save_pretrained(home_folder)
        model = alive(Spa3RModel(spa3r_config()))
        model.backbone = VggtModel.from_pretrained(home_folder)
    else:
        full = Spa3RModel(spa3r_config()) if home == "spa3r" else Spa3RForPreTraining(pretraining_config())
        alive(full).save_pretrained(home_folder)
        model = Spa3RModel.from_pretrained(home_folder)
    model.save_pretrained(slim, include_backbone=False)
    assert not any(key.startswith("backbone.") for key in keys_in(slim))
    assert any(key.startswith("encoder.") for key in keys_in(slim))
    assert json.loads((slim / "config.json").read_text())["backbone_name_or_path"] == str(home_folder)
    assert model.config.backbone_name_or_path is None, "saving changed the model in memory"

    loaded = Spa3RModel.from_pretrained(slim, dtype=dtype)
    assert {p.dtype for n, p in loaded.named_parameters() if "camera_head" not in n} == {dtype}
    assert {p.dtype for p in loaded.backbone.camera_head.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.backbone.parameters()) and not loaded.backbone.training
    assert_close(outputs_of(realigned(loaded)), outputs_of(realigned(model)), 0.0 if dtype == torch.float32 else 0.1)
    loaded.save_pretrained(tmp_path / "again", include_backbone=False)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["backbone_name_or_path"] == str(home_folder)
    loaded.save_pretrained(tmp_path / "full")
    assert any(key.startswith("backbone.") for key in keys_in(tmp_path / "full"))
    assert_close(outputs_of(Spa3RModel.from_pretrained(tmp_path / "full")), outputs_of(loaded.float()), 0.02)


def test_a_backbone_without_a_home_is_not_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"doesn't say where they come from. Set `model.config.backbone_name_or_path`"):
        Spa3RModel(spa3r_config()).save_pretrained(tmp_path, include_backbone=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_model_without_its_backbone_says_so():
    model = Spa3RModel(spa3r_config(backbone_name_or_path="somewhere"))
    with pytest.raises(ValueError, match=r"This Spa3RModel has no backbone: its configuration names 'somewhere'"):
        model.encode(**view_inputs())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hidden_size": 40}, r"`hidden_size` must be a multiple of 8 x `num_attention_heads` = 16 .*got 40"),
        ({"mask_ratio": 1.0}, r"`mask_ratio` must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.1}, r"`mask_ratio` must be in \[0, 1\), got -0.1"),
        ({"targets": []}, r"`targets` must name at least one of 'geometry' and 'semantic', got none"),
    ],
)
def test_contradicting_choices_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        spa3r_config(**fields)


@pytest.mark.parametrize(
    "fields",
    (
        {"view_masking": "none"},
        {"loss_views": "context"},
        {"camera_embedding": "rays"},
        {"targets": ["geometry", "colour"]},
        {"targets": "geometry"},
    ),
)
def test_unknown_choices_are_refused(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        spa3r_config(**fields)


def test_released_sizes_are_the_defaults():
    config = Spa3RConfig()
    assert (config.hidden_size, config.num_latents, config.geometry_hidden_size) == (768, 256, 2048)
    assert (config.view_masking, config.loss_views, config.mask_ratio) == ("asymmetric", "all", 0.5)
    assert (config.targets, config.camera_embedding) == (("geometry", "semantic"), "prope")


def test_the_order_of_targets_means_nothing():
    turned = spa3r_config(targets=["semantic", "geometry", "semantic"])
    assert turned.targets == spa3r_config().targets == type(turned)(**json.loads(turned.to_json_string())).targets


def test_configurations_of_before_mean_what_they_meant(tmp_path):
    """A saved configuration that knows neither `targets` nor `camera_embedding`."""
    model = alive(Spa3RModel(spa3r_config()))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for field in ("targets", "camera_embedding"):
        saved.pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert_close(outputs_of(realigned(Spa3RModel.from_pretrained(tmp_path))), outputs_of(model), 0.0)
