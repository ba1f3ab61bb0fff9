"""Depth Anything 3: golden tensors of the original, known cameras, context views, and what holds for every model."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    BACK_ENDS,
    GOLDEN_DEPTH_ANYTHING_3_FIELDS,
    PATCH,
    SMALL,
    TALL,
    WIDE,
    ModelTests,
    arranged,
    assert_close,
    by_scene,
    depth_anything_3_config,
    golden,
    packed_images,
    relative_error,
    some_cameras,
    view_inputs,
)
from transformers import AutoModel

from spa3r import DepthAnything3Config, DepthAnything3Model, Spa3RImageProcessor, VggtModel, convert_checkpoint
from spa3r.models.cameras import (
    cameras_to_pose_encoding,
    invert_extrinsics,
    pose_encoding_to_cameras,
    relative_to_first_view,
)
from spa3r.models.depth_anything_3.released_depth_anything_3 import depth_anything_3_config as inferred
from spa3r.models.packing import ViewLayout, split_prefix

EVERYTHING = {"output_cameras": True, "output_depth": True}


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("strategy", ("first", "saddle_balanced"))
@torch.no_grad()
def test_every_golden_tensor_through_the_converter(strategy, back_end, golden_folders):
    model = DepthAnything3Model.from_pretrained(
        golden_folders["depth-anything-3-folder"], attn_implementation=back_end, reference_view=strategy
    )
    inputs = packed_images(golden("depth_anything_3", "inputs.")["images_normalised"])
    out = model(**inputs, output_layers=(2, 3, 4, 5), **EVERYTHING)
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    ours = {}
    for layer, tokens in zip((2, 3, 4, 5), out.tokens):
        camera, patches = split_prefix(tokens, layout.patches_per_view, 1)
        ours |= {f"camera_tokens.{layer}": camera, f"patch_tokens.{layer}": patches}
    (pose,) = out.pose_encodings
    world_from_camera, intrinsics = pose_encoding_to_cameras(pose, layout.image_hw(14))
    extrinsics = invert_extrinsics(world_from_camera)
    ours |= {"pose_encoding": pose, "extrinsics": extrinsics[:, :3], "intrinsics": intrinsics}
    ours |= {"depth": torch.stack(out.depth), "depth_conf": torch.stack(out.depth_confidence)}
    reference = golden("depth_anything_3", f"outputs.{strategy}.")
    assert ours.keys() == reference.keys(), "a golden tensor is unchecked"
    assert_close({key: value.reshape(reference[key].shape) for key, value in ours.items()}, reference, 1e-5)
    # The contract's world is the camera of the first view, whichever the reference is.
    assert relative_error(out.extrinsics, relative_to_first_view(extrinsics, layout.views_per_scene)) <= 1e-5
    assert relative_error(out.extrinsics[::5], torch.eye(4).expand(2, 4, 4)) <= 1e-5
    assert torch.equal(out.intrinsics, intrinsics)


def test_the_two_choices_of_the_reference_differ():
    ours = [golden("depth_anything_3", f"outputs.{name}.")["pose_encoding"] for name in ("first", "saddle_balanced")]
    assert relative_error(*ours) > 1e-2


def test_from_pretrained_takes_the_folder_of_the_hub(golden_folders, tmp_path):
    """With the hub's own config.json, which is no configuration of transformers."""
    save_file(golden("depth_anything_3", "weights."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "da3-tiny", "config": {}}))
    model = DepthAnything3Model.from_pretrained(tmp_path, **GOLDEN_DEPTH_ANYTHING_3_FIELDS)
    reference = DepthAnything3Model.from_pretrained(golden_folders["depth-anything-3-folder"])
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in reference.state_dict().items())
    processor = Spa3RImageProcessor.from_pretrained(tmp_path)
    assert (processor.size, processor.patch_size) == (70, 14)
    with pytest.raises(ValueError, match=r"holds a Depth Anything 3 .*VggtModel expects a VGGT. Load it with DepthAny"):
        VggtModel.from_pretrained(tmp_path)


class TestDepthAnything3Model(ModelTests):
    model_class, auto_class = DepthAnything3Model, AutoModel
    some_key = "camera_token"
    half_tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}

    def config(self, **fields):
        return depth_anything_3_config(**fields)

    def outputs(self, model, inputs):
        cameras = dict(zip(("extrinsics", "intrinsics"), cameras_of(inputs)))
        outputs = {}
        for name, given in (("", {}), ("known.", cameras)):
            out = model(**inputs, **given, output_layers=(0, 2, -1), **EVERYTHING)
            views = {key: out[key] for key in ("extrinsics", "intrinsics", "depth", "depth_confidence")}
            views |= {"poses": out.pose_encodings[-1]}
            outputs |= {f"{name}tokens.{index}": by_scene(rows, inputs, "1") for index, rows in enumerate(out.tokens)}
            outputs |= {f"{name}{key}": by_scene(value, inputs) for key, value in views.items()}
        return outputs

    def loss(self, model, inputs):
        return sum(value.square().mean() for values in self.outputs(model, inputs).values() for value in values)

    @torch.no_grad()
    def test_only_what_is_asked_for_is_computed(self):
        model, inputs = self.make(), self.inputs()
        layers = []
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda *_, index=index: layers.append(index))
        out = model(**inputs, output_layers=(1,))
        assert layers == [0, 1] and list(out.keys()) == ["tokens"]
        assert torch.equal(out.tokens[0], model(**inputs, output_layers=(-1, 1)).tokens[1])

    @pytest.mark.parametrize("heads", ([], ["camera"], ["depth"]))
    def test_absent_heads_are_refused_and_present_ones_run(self, heads):
        model, inputs = self.make(heads=heads), self.inputs()
        for head, wanted in (("camera", "output_cameras"), ("depth", "output_depth"), ("point", "output_points")):
            if head in heads:
                model(**inputs, **{wanted: True})
            else:
                with pytest.raises(ValueError, match=f"This DepthAnything3Model has no {head} head"):
                    model(**inputs, **{wanted: True})
        if "camera" not in heads:
            with pytest.raises(ValueError, match=r"has no encoder of known cameras.*give no cameras"):
                model(**inputs, **some_cameras(inputs))

    def test_gated_layers_are_trained_saved_and_loaded(self, tmp_path):
        model = self.make(use_gated_mlp=True).train()
        self.loss(model, self.inputs()).backward()
        assert all(layer.mlp.fc1.weight.grad.any() for layer in model.layers)
        model.eval().save_pretrained(tmp_path)
        loaded = DepthAnything3Model.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert_close(self.run(loaded, self.inputs()), self.run(model, self.inputs()), 1e-6)

    @pytest.mark.slow
    @torch.no_grad()
    def test_layers_compile_in_one_graph(self):
        model, inputs = self.make(), self.inputs([[SMALL] * 3])
        arguments = (inputs["view_pixel_values"], ViewLayout.from_inputs([SMALL] * 3, [3]), {3}, None)
        torch._dynamo.reset()
        compiled = torch.compile(model._aggregate, fullgraph=True, backend="eager")(*arguments)
        assert relative_error(compiled[3], model._aggregate(*arguments)[3]) <= 1e-6


def cameras_of(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A camera for every view that depends on nothing but the view's pixels, so that scenes can be rearranged."""
    parts = inputs["view_pixel_values"].float().split(inputs["view_grid_hw"].prod(-1).tolist())
    pose = torch.stack([part.flatten()[:9] for part in parts])
    pose[:, 7:] = 0.8
    return pose_encoding_to_cameras(pose, (inputs["view_grid_hw"] * PATCH).tolist())


# Context views --------------------------------------------------------------------------------------------------------

CONTEXT = [2, 3, 4]
SORTED = ((WIDE, WIDE, TALL), (TALL, WIDE, SMALL, TALL, WIDE), (SMALL, WIDE, TALL, TALL, SMALL, WIDE, SMALL))


def context_rows(tokens, inputs) -> torch.Tensor:
    """The tokens of the context views, the first ones of every scene."""
    rows = iter(tokens.split([1 + count for count in inputs["view_grid_hw"].prod(-1).tolist()]))
    scenes = [[next(rows) for _ in range(count)] for count in inputs["views_per_scene"].tolist()]
    return torch.cat([view for scene, seen in zip(scenes, CONTEXT) for view in scene[:seen]])


def only_context(inputs) -> dict:
    """The batch of the context views alone."""
    first, kept = 0, []
    for count, seen in zip(inputs["views_per_scene"].tolist(), CONTEXT):
        kept += range(first, first + seen)
        first += count
    parts = inputs["view_pixel_values"].split(inputs["view_grid_hw"].prod(-1).tolist())
    return {
        "view_pixel_values": torch.cat([parts[view] for view in kept]),
        "view_grid_hw": inputs["view_grid_hw"][kept],
        "views_per_scene": torch.tensor(CONTEXT),
    }


def aggregated(model, inputs, cameras, context=CONTEXT):
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    return model.forward_layout(
        inputs["view_pixel_values"], layout, output_layers=range(4), context_views=context, **cameras
    ).tokens


@pytest.mark.parametrize("known", (False, True), ids=("unknown", "known cameras"))
@pytest.mark.parametrize("back_end", BACK_ENDS)
@torch.no_grad()
def test_targets_leak_nothing(back_end, known):
    """Neither pixels nor cameras of a target change a context feature by a bit; without `context_views` they do."""
    model, inputs = TestDepthAnything3Model().make(back_end), view_inputs(SORTED)
    lengths = inputs["view_grid_hw"].prod(-1).tolist()
    extrinsics, intrinsics = cameras_of(inputs)
    cameras = {"extrinsics": extrinsics, "intrinsics": intrinsics} if known else {}
    before = [context_rows(tokens, inputs) for tokens in aggregated(model, inputs, cameras)]
    mixed = [context_rows(tokens, inputs) for tokens in aggregated(model, inputs, cameras, None)]
    is_target = torch.tensor([place >= seen for c, seen in zip((3, 5, 7), CONTEXT) for place in range(c)])
    for seed in range(8):  # enough for every target to be a scene's most ordinary view once
        generator = torch.Generator().manual_seed(seed)
        noise = 10 * torch.randn(inputs["view_pixel_values"].shape, generator=generator)
        changed = torch.where(
            is_target.repeat_interleave(torch.tensor(lengths))[:, None], noise, inputs["view_pixel_values"]
        )
        others = inputs | {"view_pixel_values": changed}
        if known:
            moved = extrinsics.clone()
            moved[is_target, :3, 3] += 5
            cameras["extrinsics"] = moved
        after = [context_rows(tokens, inputs) for tokens in aggregated(model, others, cameras)]
        assert all(torch.equal(one, other) for one, other in zip(before, after))
        leaking = [context_rows(tokens, inputs) for tokens in aggregated(model, others, cameras, None)]
        assert relative_error(leaking[-1], mixed[-1]) > 1e-3


@pytest.mark.parametrize("strategy", ("first", "saddle_balanced"))
@torch.no_grad()
def test_context_views_are_as_they_would_be_alone(strategy):
    model, inputs = TestDepthAnything3Model().make(reference_view=strategy), view_inputs(SORTED)
    alone = only_context(inputs)
    layout = ViewLayout.from_inputs(alone["view_grid_hw"], alone["views_per_scene"])
    reference = model.forward_layout(alone["view_pixel_values"], layout, output_layers=range(4)).tokens
    ours = tuple(context_rows(tokens, inputs) for tokens in aggregated(model, inputs, {}))
    assert_close({"tokens": ours}, {"tokens": reference}, 1e-5)


@torch.no_grad()
def test_targets_see_the_whole_scene():
    model, inputs = TestDepthAnything3Model().make(), view_inputs(SORTED)
    before = aggregated(model, inputs, {})[-1]
    changed = inputs | {"view_pixel_values": inputs["view_pixel_values"].clone()}
    changed["view_pixel_values"][:15] += 1  # the first view of the first scene, whose only target is its third
    after = aggregated(model, changed, {})[-1]
    target = slice(2 * 16, 2 * 16 + 13)
    assert relative_error(after[target], before[target]) > 1e-3
    assert torch.equal(after[45:], before[45:])  # other scenes see nothing of it


# Known cameras --------------------------------------------------------------------------------------------------------


def test_pose_encodings_go_there_and_back():
    pose = torch.randn(64, 9)
    pose[:, 7:] = torch.rand(64, 2) * 2 + 0.1
    pose[0, 3:7] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # half a turn
    sizes = [(28, 42)] * 64
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, sizes)
    again = cameras_to_pose_encoding(extrinsics, intrinsics, sizes)
    assert (again[:, 3:7].norm(dim=-1) - 1).abs().max() < 1e-6 and (again[:, 6] >= 0).all()
    back = pose_encoding_to_cameras(again, sizes)
    assert relative_error(back[0], extrinsics) <= 1e-6 and relative_error(back[1], intrinsics) <= 1e-6


@torch.no_grad()
def test_known_cameras_matter_but_neither_world_nor_unit_does():
    """A rigid motion of the world changes nothing; twice the unit doubles translations and depth."""
    model, inputs = TestDepthAnything3Model().make(), arranged(view_inputs(), [1, 2])
    extrinsics, intrinsics = cameras_of(inputs)

    def run(extrinsics):
        return model(**inputs, extrinsics=extrinsics, intrinsics=intrinsics, **EVERYTHING)

    plain, unknown = run(extrinsics), model(**inputs, **EVERYTHING)
    assert relative_error(plain.tokens[0], unknown.tokens[0]) > 1e-2
    motion, _ = pose_encoding_to_cameras(torch.tensor([[3.0, -2, 5, 0.3, 0.1, -0.5, 0.7, 1, 1]]), [(4, 4)])
    moved = run(extrinsics @ motion)
    assert_close({"tokens": moved.tokens, "depth": moved.depth}, {"tokens": plain.tokens, "depth": plain.depth}, 1e-4)
    larger = extrinsics.clone()
    larger[:, :3, 3] *= 2
    larger = run(larger)
    assert relative_error(larger.tokens[0], plain.tokens[0]) <= 1e-4
    assert relative_error(larger.depth[0], 2 * plain.depth[0]) <= 1e-4
    assert relative_error(larger.extrinsics[:, :3, 3], 2 * plain.extrinsics[:, :3, 3]) <= 1e-4


def test_half_given_or_wrong_cameras_are_refused():
    model, inputs = TestDepthAnything3Model().make(), view_inputs()
    cameras = some_cameras(inputs)
    with pytest.raises(ValueError, match=r"must be given together, got only `extrinsics`. Pass both, or neither"):
        model(**inputs, extrinsics=cameras["extrinsics"])
    with pytest.raises(ValueError, match=r"`extrinsics` must have shape \(views, 4, 4\)"):
        model(**inputs, extrinsics=cameras["extrinsics"][1:], intrinsics=cameras["intrinsics"])


# Reference view and sizes ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_view_of_a_scene_is_its_reference():
    inputs = view_inputs(SORTED)
    layout = ViewLayout.from_inputs(inputs["view_grid_hw"], inputs["views_per_scene"])
    for strategy in ("first", "saddle_balanced"):
        model = TestDepthAnything3Model().make(reference_view=strategy)
        chosen = set()
        for seed in range(20):
            cls = torch.randn(layout.num_views, 16, generator=torch.Generator().manual_seed(seed))
            scenes = model._is_reference(cls, layout, None).split([3, 5, 7])
            assert [int(scene.sum()) for scene in scenes] == [1, 1, 1]
            chosen.add(tuple(int(scene.int().argmax()) for scene in scenes))
            context = model._is_reference(cls, layout, CONTEXT).split([3, 5, 7])
            assert all(scene[:seen].sum() == 1 and not scene[seen:].any() for scene, seen in zip(context, CONTEXT))
            assert context[0][0]  # two context views: the first
        assert (chosen == {(0, 0, 0)}) == (strategy == "first")


def size(width: int, heads: int, inner: int, features: int, channels: list[int], **others) -> dict:
    fields = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner}
    return fields | {"dpt_features": features, "dpt_channels": channels} | others


LARGE = {"num_hidden_layers": 24, "alternating_start": 8, "dpt_layers": [11, 15, 19, 23]}
GIANT = {"num_hidden_layers": 40, "alternating_start": 13, "dpt_layers": [19, 27, 33, 39], "use_gated_mlp": True}
SIZES = {
    "small": size(384, 6, 1536, 64, [48, 96, 192, 384]),
    "base": {},
    "large": size(1024, 16, 4096, 256, [256, 512, 1024, 1024], **LARGE),
    "giant": size(1536, 24, 4096, 256, [256, 512, 1024, 1024], **GIANT),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_inferred_from_released_tensors(name):
    """Names and shapes of a released model of this size, without data, give its configuration."""
    config = DepthAnything3Config(**SIZES[name])
    with torch.device("meta"):
        model = DepthAnything3Model(config)
    found = inferred(model.state_dict(), {})
    volatile = ("dtype", "architectures", "transformers_version", "_attn_implementation_autoset")
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in volatile} for c in (found, config))
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in ours.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()
    }
    assert config.feature_size == {"small": 768, "base": 1536, "large": 2048, "giant": 3072}[name]
    (mlp,) = {type(layer.mlp).__name__ for layer in model.layers}
    assert mlp == ("GatedMlp" if name == "giant" else "Mlp")


def test_gated_layers_are_converted_by_name(tmp_path):
    weights = golden("depth_anything_3", "weights.")
    for layer in range(6):
        name = f"model.backbone.pretrained.blocks.{layer}.mlp"
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            del weights[f"{name}.{part}"]
        weights |= {f"{name}.w12.weight": torch.randn(80, 32), f"{name}.w12.bias": torch.randn(80)}
        weights |= {f"{name}.w3.weight": torch.randn(32, 40), f"{name}.w3.bias": torch.randn(32)}
    weights["model.gs_head.norm.weight"] = torch.ones(1)  # Giant's Gaussian splats
    save_file(weights, tmp_path / "model.safetensors")
    folder = convert_checkpoint(tmp_path, tmp_path / "ours", "depth-anything-3", GOLDEN_DEPTH_ANYTHING_3_FIELDS)
    model = DepthAnything3Model.from_pretrained(folder)
    assert model.config.use_gated_mlp and model.config.intermediate_size == 40
    assert torch.equal(model.layers[5].mlp.fc1.bias, weights["model.backbone.pretrained.blocks.5.mlp.w12.bias"])


def test_released_files_of_another_kind_are_refused(tmp_path):
    weights = golden("depth_anything_3", "weights.")
    save_file({k: v for k, v in weights.items() if "camera_token" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"for several views .*has no camera token: it is one for single pictures"):
        DepthAnything3Model.from_pretrained(tmp_path, **GOLDEN_DEPTH_ANYTHING_3_FIELDS)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of 6 layers must come with `dpt_layers`"):
        DepthAnything3Model.from_pretrained(tmp_path)
    save_file(weights | {"model.stranger": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"keys that the converter doesn't know: stranger"):
        DepthAnything3Model.from_pretrained(tmp_path, **GOLDEN_DEPTH_ANYTHING_3_FIELDS)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hidden_size": 18}, r"`hidden_size` must be a multiple of 4 x `num_attention_heads` = 8 .*got 18"),
        ({"camera_encoder_num_heads": 3}, r"`camera_encoder_num_heads` must divide `hidden_size` = 16, got 3"),
        ({"heads": ["camera", "point"]}, r"`heads` may hold 'camera' and 'depth', got \['point'\]"),
        ({"alternating_start": 4}, r"`alternating_start` must be below `num_hidden_layers` = 4, got 4"),
        ({"dpt_layers": [0, 1, 2, 4]}, r"`dpt_layers` must be below `num_hidden_layers` = 4"),
        ({"reference_view": "middle"}, r"`reference_view` of DepthAnything3Config must be .*got 'middle'"),
    ],
)
def test_contradicting_sizes_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        depth_anything_3_config(**fields)


@torch.no_grad()
def test_native_grid_takes_the_position_embedding_as_it_is():
    embedding = TestDepthAnything3Model().make().embedding
    assert torch.equal(embedding._position_embedding((5, 5)), embedding.position_embedding[0, 1:])
    assert embedding._position_embedding((7, 3)).shape == (21, 16)
