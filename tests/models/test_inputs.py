"""Wrong inputs of the models are refused with their names, before any work; nothing is rounded to a number."""

import math

import numpy as np
import pytest
import torch
from tiny import TARGETS, alive, pretraining_config, some_cameras, spa3r_config, vggt_config, view_inputs

from spa3r import Spa3RForPreTraining, Spa3RModel, VggtModel
from spa3r.models.cameras import check_cameras
from spa3r.models.packing import ViewLayout

SCENES = [[(2, 3), (2, 2)], [(1, 2)]]


@pytest.fixture(scope="module")
def models() -> dict:
    return {
        "vggt": alive(VggtModel(vggt_config())),
        "spa3r": alive(Spa3RModel(spa3r_config())),
        "pretraining": alive(Spa3RForPreTraining(pretraining_config())),
    }


def calls(models) -> dict:
    """Every public way in, by name."""
    vggt, spa3r = models["vggt"], models["spa3r"]
    ways = {"vggt": vggt, "spa3r": spa3r, "encode": spa3r.encode, "features": spa3r.backbone_features}
    return ways | {"pretraining": models["pretraining"]}


COUNTS = (
    *([2.0, 1.0], [1.9, 1.1], ["2", "1"], [True, True], [None, 1], "21", None, {}, [[2, 1]], 3.0, math.nan),
    *(torch.tensor([2.0, 1.0]), torch.tensor([True, True]), torch.tensor([[2, 1]]), np.array([2.0, 1.0])),
    *(torch.tensor([2, 1], device="meta"), np.array(["2", "1"]), [2 + 0j, 1]),
)
GRIDS = (
    *([[2.0, 3.0], [2, 2], [1, 2]], [["2", "3"], ["2", "2"], ["1", "2"]], [[True, 3], [2, 2], [1, 2]], None, 3, "abc"),
    *([[2, 3, 1], [2, 2, 1], [1, 2, 1]], [2, 3, 2], [[2, 3], None, [1, 2]], [[-2, -3], [2, 2], [1, 2]], {}),
    *(torch.tensor([[2.5, 3], [2, 2], [1, 2]]), torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3, 2).long()),
    *(np.ones((3, 2)), torch.ones(3, 2, device="meta").long(), [[10**9, 10**9], [2, 2], [1, 2]]),
)


@pytest.mark.parametrize("way", ("vggt", "spa3r", "encode", "features", "pretraining"))
def test_layouts_are_whole_numbers(models, way):
    call, inputs = calls(models)[way], view_inputs(SCENES)
    for name, values in (("views_per_scene", COUNTS), ("view_grid_hw", GRIDS)):
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`.* must .*, got ") as refused:
                call(**inputs | {name: value})
            assert len(str(refused.value)) < 400
    for value in (None, [1.0], "pixels", np.zeros((12, 48)), 3):
        with pytest.raises(ValueError, match="`view_pixel_values` must be a tensor, got "):
            call(**inputs | {"view_pixel_values": value})
    with pytest.raises(ValueError, match="`view_pixel_values` must be on the model's device, cpu, got meta"):
        call(**inputs | {"view_pixel_values": inputs["view_pixel_values"].to("meta")})
    with pytest.raises(ValueError, match="`view_pixel_values` must be floating point"):
        call(**inputs | {"view_pixel_values": inputs["view_pixel_values"].bool()})


@torch.no_grad()
def test_every_form_of_whole_numbers_is_the_same(models):
    inputs = view_inputs(SCENES)
    wanted = ViewLayout(((2, 3), (2, 2), (1, 2)), (2, 1))
    for form in (lambda t: t, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.int, lambda t: list(t.numpy())):
        grids, counts = form(inputs["view_grid_hw"]), form(inputs["views_per_scene"])
        layout = ViewLayout.from_inputs(grids, counts)
        assert layout == wanted and {type(n) for row in (*layout.grid_hw, layout.views_per_scene) for n in row} == {int}
    assert ViewLayout.from_inputs([(1, 2)], torch.tensor(1)) == ViewLayout.from_inputs([(1, 2)], 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output_layers": 1}, "`output_layers` must be a list of layers' indices, got 1"),
        ({"output_layers": "01"}, "`output_layers` must be a list of layers' indices, got '01'"),
        ({"output_layers": None}, "`output_layers` must be a list of layers' indices, got None"),
        ({"output_layers": [0.5]}, r"`output_layers` must lie in \[-2, 1\] for 2 layers, got 0.5"),
        ({"output_layers": [True]}, r"`output_layers` must lie in \[-2, 1\] for 2 layers, got True"),
        ({"output_cameras": "no"}, "`output_cameras` must be True or False, got 'no'"),
        ({"output_depth": 1}, "`output_depth` must be True or False, got 1"),
        ({"output_points": None}, "`output_points` must be True or False, got None"),
    ],
)
def test_what_vggt_is_asked_for(models, fields, words):
    with pytest.raises(ValueError, match=words):
        models["vggt"](**view_inputs(SCENES), **fields)


def test_target_masks_are_truth_values(models):
    inputs = view_inputs(SCENES)
    for value in ([0, 0.5, 0], ["no", "yes", "no"], [0, 2, 0], [None, True, False], torch.tensor([0.0, 0.2, 0])):
        with pytest.raises(ValueError, match="`target_mask` must hold True or False for every view, got "):
            models["pretraining"](**inputs, target_mask=value)
    for value in ([False, True, False], [0, 1, 0], torch.tensor([0, 1, 0]), np.array([False, True, False])):
        assert models["pretraining"](**inputs, target_mask=value).target_mask.tolist() == [False, True, False]


def changed(cameras, name, change) -> dict:
    """Cameras of which view 1 is spoilt."""
    tensor = cameras[name].clone()
    change(tensor[1])
    return cameras | {name: tensor}


WRONG_CAMERAS = {
    "zero extrinsics": ("extrinsics", torch.Tensor.zero_, r"have the last row \(0, 0, 0, 1\)"),
    "zero rotation": ("extrinsics", lambda c: c[:3, :3].zero_(), "be rigid"),
    "singular rotation": ("extrinsics", lambda c: c[0, :3].copy_(c[1, :3]), "be rigid"),
    "scaled": ("extrinsics", lambda c: c[:3, :3].mul_(1.5), "be rigid"),
    "mirrored": ("extrinsics", lambda c: c[0, :3].neg_(), "be rigid"),
    "NaN translation": ("extrinsics", lambda c: c[:3, 3].fill_(math.nan), "hold finite values"),
    "infinite": ("extrinsics", lambda c: c.fill_(-math.inf), "hold finite values"),
    "transposed": ("extrinsics", lambda c: c.copy_(c.T.clone() + torch.eye(4).roll(1, 0) * 0.5), "have the last row"),
    "zero intrinsics": ("intrinsics", torch.Tensor.zero_, r"have the last row \(0, 0, 1\)"),
    "zero focal length": ("intrinsics", lambda c: c[0, 0].zero_(), "have focal lengths above 0"),
    "negative focal length": ("intrinsics", lambda c: c[1, 1].neg_(), "have focal lengths above 0"),
    "skew": ("intrinsics", lambda c: c[0, 1].fill_(3.0), "have focal lengths above 0 and no skew"),
    "NaN center": ("intrinsics", lambda c: c[0, 2].fill_(math.nan), "hold finite values"),
}


@pytest.mark.parametrize("case", WRONG_CAMERAS)
@pytest.mark.parametrize("way", ("spa3r", "decode", "pretraining"))
def test_cameras_that_are_none(models, way, case):
    name, change, words = WRONG_CAMERAS[case]
    inputs = view_inputs(SCENES)
    cameras = changed(some_cameras(inputs), name, change)
    layout = {key: inputs[key] for key in ("view_grid_hw", "views_per_scene")}
    with pytest.raises(ValueError, match=rf"`{name}` must {words}.*, got .* for view 1\. Leave the view out"):
        if way == "decode":
            models["spa3r"].decode(torch.zeros(2, 6, 32), **cameras, **layout)
        else:
            models[way](**inputs, **cameras)


@pytest.mark.parametrize(
    "value", (None, "cameras", 3, [[1, 2], [3]], torch.ones(3, 4, 4).bool(), torch.ones(3, 4, 4, device="meta"))
)
def test_what_is_no_tensor_of_cameras(value):
    intrinsics = some_cameras(view_inputs(SCENES))["intrinsics"]
    with pytest.raises(ValueError, match=r"^`extrinsics` must "):
        check_cameras(value, intrinsics, 3, torch.device("cpu"))


def test_cameras_of_any_form(models):
    cameras = some_cameras(view_inputs(SCENES))
    for form in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t):
        given = check_cameras(*map(form, cameras.values()), 3, torch.device("cpu"))
        assert all(torch.allclose(g.float(), c, rtol=1e-2, atol=1e-2) for g, c in zip(given, cameras.values()))


@pytest.mark.parametrize("value", (None, [[0.0]], "latents", np.zeros((2, 6, 32)), torch.zeros(2, 6, 32).long()))
def test_latents_are_a_floating_point_tensor(models, value):
    inputs = view_inputs(SCENES)
    cameras = some_cameras(inputs)
    with pytest.raises(ValueError, match=r"`latents` must be (a tensor|floating point)"):
        models["spa3r"].decode(value, **cameras, view_grid_hw=inputs["view_grid_hw"], views_per_scene=[2, 1])


def test_a_pretraining_step_checks_and_goes_on(models):
    inputs = view_inputs(targets=TARGETS)
    assert models["pretraining"](**inputs, **some_cameras(inputs)).loss.isfinite()
