"""Predictive Spatial Field Modeling: golden tensors, masking that leaks nothing, losses, frozen parts."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import (
    BACK_ENDS,
    SCENES,
    TARGETS,
    ModelTests,
    alive,
    arranged,
    assert_close,
    by_scene,
    densely_masked,
    field_by_scene,
    golden,
    golden_inputs,
    patch_counts,
    pretraining_config,
    relative_error,
    spa3r_config,
    teacher_config,
    vggt_config,
    view_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments
from transformers.models.dinov3_vit import DINOv3ViTModel

from spa3r import Spa3RForPreTraining, Spa3VLM, VggtModel
from spa3r.models.spa3r.modeling_spa3r import ATTENTION_KERNELS

LOSSES = ("geometry_l1", "geometry_cosine", "semantic_l1", "semantic_cosine", "depth_probe")
GOLDEN_OUTPUTS = {
    "view_mask": "target_mask",
    "context_features": "context_features",
    "latents": "latents",
    "intrinsics": "intrinsics",
    "decoded_patch_tokens": "last_hidden_state",
    "pred_geo": "geometry_features",
    "pred_sem": "semantic_features",
    "pred_depth": "depth",
    "target_geo": "geometry_targets",
    "target_sem": "semantic_targets",
}
GOLDEN_LOSSES = dict(zip(("geo/l1", "geo/cos", "sem/l1", "sem/cos", "depth_prob"), LOSSES))


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("source", ("spa3r-ckpt", "spa3r-safetensors"))
@pytest.mark.parametrize("masking", ("asymmetric", "separate"))
@torch.no_grad()
def test_every_golden_tensor_through_the_converter(masking, source, back_end, golden_folders):
    reference = golden(f"spa3r_{masking}", "outputs.")
    losses = golden(f"spa3r_{masking}", "losses.")
    model = Spa3RForPreTraining.from_pretrained(
        golden_folders[source], view_masking=masking, attn_implementation=back_end
    )
    assert model.config.backbone_config.global_qk_norm == "rms_norm"
    sorted_poses = []
    camera_head = model.spa3r.backbone.camera_head
    camera_head.register_forward_hook(lambda module, args, poses: sorted_poses.append(poses[-1]))
    inputs = golden_inputs("spa3r_asymmetric")
    mask = reference["view_mask"].bool()
    out = model(**inputs, target_mask=mask.flatten())

    (poses,) = sorted_poses  # the backbone saw the context of each scene first
    order = (mask.int() + 2 * torch.arange(len(mask))[:, None]).flatten().argsort(stable=True)
    ours = {name: out[attribute] for name, attribute in GOLDEN_OUTPUTS.items()}
    ours |= {"extrinsics": out.extrinsics[:, :3], "pose": poses[order.argsort()]}
    if "predict_latents" in reference:
        ours["predict_latents"] = model.spa3r.encode(**inputs)
    assert ours.keys() == reference.keys(), "a golden tensor is unchecked"
    assert_close({key: value.reshape(reference[key].shape) for key, value in ours.items()}, reference, 1e-5)
    assert_close({name: out.losses[term][None] for name, term in GOLDEN_LOSSES.items()}, losses, 1e-5)
    assert out.losses.keys() == set(LOSSES) and torch.equal(out.loss, sum(out.losses.values()))


class PreTrainingTests(ModelTests):
    model_class, auto_class = Spa3RForPreTraining, AutoModelForPreTraining
    some_key = "spa3r.encoder.query_tokens"
    targets = TARGETS
    fields: dict = {}

    def config(self, **fields):
        return pretraining_config(**(self.fields | fields))

    def outputs(self, model, inputs):
        out = model(**inputs)
        context = out.context_features.split(
            [
                sum(count for count, target in zip(counts, targets) if not target)
                for counts, targets in zip(
                    self.scenes_of(patch_counts(inputs), inputs), self.scenes_of(out.target_mask.tolist(), inputs)
                )
            ]
        )
        targets = {
            name: by_scene(out[name], inputs, "patch")
            for name in ("geometry_targets", "semantic_targets", "depth_targets")
            if name in out
        }
        losses = {f"losses.{name}": list(value) for name, value in out.losses_per_scene.items()}
        field = field_by_scene(out, inputs)
        return field | targets | losses | {"latents": list(out.latents), "context_features": list(context)}

    def loss(self, model, inputs):
        return model(**inputs).loss

    @staticmethod
    def scenes_of(per_view, inputs):
        views = iter(per_view)
        return [[next(views) for _ in range(count)] for count in inputs["views_per_scene"].tolist()]


class TestSpa3RForPreTraining(PreTrainingTests):
    masking = "asymmetric"

    def config(self, **fields):
        return super().config(**({"view_masking": self.masking} | fields))

    # Masking ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("back_end", BACK_ENDS)
    @torch.no_grad()
    def test_features_equal_those_under_a_dense_mask(self, back_end, monkeypatch):
        model, inputs = self.make(back_end), self.inputs()
        out = model(**inputs)
        rows = inputs["target_mask"].repeat_interleave(torch.tensor(patch_counts(inputs)))
        backbone, plain = model.spa3r.backbone, {k: v for k, v in inputs.items() if k != "target_mask"}
        layout_rows = [backbone.num_special_tokens + count for count in patch_counts(inputs)]
        dense = densely_masked(backbone, inputs, monkeypatch).tokens[0].split(layout_rows)
        dense = torch.cat([view[backbone.num_special_tokens :] for view in dense])
        unmasked = backbone(**plain).tokens[0].split(layout_rows)
        unmasked = torch.cat([view[backbone.num_special_tokens :] for view in unmasked])
        targets = {"asymmetric": dense, "separate": unmasked}[self.masking]
        assert_close(
            {"context": out.context_features, "targets": out.geometry_targets},
            {"context": dense[~rows], "targets": targets},
            1e-5,
        )
        assert relative_error(unmasked[~rows], dense[~rows]) > 1e-2, "the mask makes no difference"

    @pytest.mark.parametrize("value", (3.0, float("nan")), ids=("other pixels", "NaN"))
    @torch.no_grad()
    def test_nothing_of_a_target_view_reaches_context_or_latents(self, value):
        model, inputs = self.make(), self.inputs()
        rows = inputs["target_mask"].repeat_interleave(torch.tensor(patch_counts(inputs)))
        before = model(**inputs)
        after = model(**inputs | {"view_pixel_values": inputs["view_pixel_values"].masked_fill(rows[:, None], value)})
        assert torch.equal(after.context_features, before.context_features)
        assert torch.equal(after.latents, before.latents)
        assert relative_error(after.geometry_targets[rows].nan_to_num(), before.geometry_targets[rows]) > 1e-2

    @torch.no_grad()
    def test_context_reaches_target_views(self):
        model, inputs = self.make(), self.inputs()
        rows = inputs["target_mask"].repeat_interleave(torch.tensor(patch_counts(inputs)))
        before = model(**inputs)
        pixels = inputs["view_pixel_values"].clone()
        pixels[: patch_counts(inputs)[0]] += 1  # the first scene's context view
        after = model(**inputs | {"view_pixel_values": pixels})
        scene = torch.arange(len(rows)) < sum(patch_counts(inputs)[:2])
        assert relative_error(after.geometry_targets[rows & scene], before.geometry_targets[rows & scene]) > 1e-2
        assert torch.equal(after.geometry_targets[~scene], before.geometry_targets[~scene])

    @pytest.mark.parametrize("ratio", (0.0, 0.25, 0.5, 0.75, 0.99))
    @torch.no_grad()
    def test_random_masks_have_the_stated_share_of_targets(self, ratio):
        model = self.make(mask_ratio=ratio)
        inputs = self.inputs([[(1, 1)] * views for views in (1, 2, 5, 12)])
        masks = [self.scenes_of(model(**inputs).target_mask.tolist(), inputs) for _ in range(3)]
        for mask in masks:
            assert [row.count(False) for row in mask] == [max(1, int(len(row) * (1 - ratio))) for row in mask]
            assert not any(row[0] for row in mask)
        assert ratio not in (0.25, 0.5, 0.75) or len({str(mask) for mask in masks}) > 1
        torch.manual_seed(3)
        first = model(**inputs).target_mask
        torch.manual_seed(3)
        assert torch.equal(model(**inputs).target_mask, first)

    # Losses -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("loss_views", ("all", "target"))
    @torch.no_grad()
    def test_losses_per_scene_are_those_alone_and_the_batch_is_their_mean_by_patches(self, loss_views):
        model, inputs = self.make(loss_views=loss_views), self.inputs()
        packed = model(**inputs)
        alone = [model(**arranged(inputs, [scene])) for scene in range(len(SCENES))]
        counted = [
            sum(count for count, target in zip(counts, targets) if target or loss_views == "all")
            for counts, targets in zip(self.scenes_of(patch_counts(inputs), inputs), TARGETS)
        ]
        assert packed.losses.keys() == set(LOSSES)
        for term in LOSSES:
            of_scenes = torch.stack([scene.losses[term] for scene in alone])
            assert relative_error(packed.losses_per_scene[term], of_scenes) <= 1e-5
            mean = (of_scenes * torch.tensor(counted)).sum() / sum(counted)
            assert relative_error(packed.losses[term], mean) <= 1e-5
        assert relative_error(packed.loss, sum(packed.losses.values())) == 0

    @torch.no_grad()
    def test_losses_are_what_they_are_called(self):
        model, inputs = self.make(loss_views="target"), self.inputs()
        out = model(**inputs)
        rows = inputs["target_mask"].repeat_interleave(torch.tensor(patch_counts(inputs)))
        for name in ("geometry", "semantic"):
            ours, wanted = out[f"{name}_features"][rows].double(), out[f"{name}_targets"][rows].double()
            gap = (ours - wanted).abs()
            smooth = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
            cosine = (ours * wanted).sum(-1) / (ours.norm(dim=-1) * wanted.norm(dim=-1))
            assert relative_error(out.losses[f"{name}_l1"], smooth) <= 1e-5
            assert relative_error(out.losses[f"{name}_cosine"], (1 - cosine).mean()) <= 1e-5

    @torch.no_grad()
    def test_a_scene_without_counted_views_has_no_loss_and_spoils_none(self):
        model = self.make(loss_views="target")
        inputs = self.inputs([[SCENES[0][0]], [(2, 2)] * 3], [[0], [0, 1, 1]])
        out = model(**inputs)
        alone = model(**arranged(inputs, [1]))
        for term in LOSSES:
            assert out.losses_per_scene[term].isnan().tolist() == [True, False]
            assert relative_error(out.losses[term], alone.losses[term]) <= 1e-5

    @pytest.mark.parametrize("heads", (["camera"], ["depth"]))
    @torch.no_grad()
    def test_without_a_depth_head_there_is_no_probe_and_given_cameras_need_no_camera_head(self, heads):
        model, inputs = self.make(backbone_config=vggt_config(heads=heads)), self.inputs()
        if "camera" in heads:
            out = model(**inputs)
            assert out.depth_targets is None and out.losses.keys() == set(LOSSES[:-1])
        else:
            with pytest.raises(ValueError, match="This VggtModel has no camera head"):
                model(**inputs)
            other = self.make()(**inputs)
            given = model(**inputs, extrinsics=other.extrinsics, intrinsics=other.intrinsics)
            assert given.loss.isfinite() and "depth_probe" in given.losses

    @torch.no_grad()
    def test_predicted_cameras_given_back_change_nothing(self):
        model, inputs = self.make(), self.inputs()
        out = model(**inputs)
        first_views = [0, 2, 7]
        world = out.extrinsics[first_views].repeat_interleave(inputs["views_per_scene"], 0)
        relative = out.extrinsics @ torch.linalg.inv(world)
        given = [model(**inputs, extrinsics=e, intrinsics=out.intrinsics) for e in (out.extrinsics, relative)]
        assert relative_error(given[0].extrinsics, relative) <= 1e-5
        assert_close(dict(given[0].losses), dict(given[1].losses), 1e-5)

    # Frozen parts -----------------------------------------------------------------------------------------------------

    def test_frozen_parts_stay_frozen(self, tmp_path):
        fresh = self.make()
        fresh.save_pretrained(tmp_path)
        for model in (fresh, Spa3RForPreTraining.from_pretrained(tmp_path)):
            for change in (lambda m: m, lambda m: m.train(), lambda m: m.train(True), lambda m: m.spa3r.train()):
                change(model)
                for part in (model.spa3r.backbone, model.semantic_teacher):
                    assert not any(parameter.requires_grad for parameter in part.parameters())
                    assert not any(module.training for module in part.modules())
            assert model.spa3r.encoder.training and model.spa3r.decoder.layers[0].training
            trainable = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
            assert trainable == {"encoder", "decoder", "geometry_head", "semantic_head", "depth_probe"}

    def test_the_depth_probe_trains_nothing_but_itself(self):
        model = self.make().train()
        model(**self.inputs()).losses["depth_probe"].backward()
        reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {"depth_probe"}

    def test_a_few_steps_of_training_lower_the_loss(self):
        model, inputs = self.make().train(), self.inputs()
        frozen = {
            key: value.clone() for key, value in model.state_dict().items() if "backbone" in key or "teacher" in key
        }
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(5):
            losses.append(model(**inputs).loss)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())

    # Errors -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "mask, words",
        [
            ([[0, 1], [0, 1, 0, 1, 1], [1] * 7], r"must be False for the first view.* of scenes \[2\]. Reorder"),
            ([[1, 1], [1, 1, 0, 1, 1], [0] * 7], r"it is True for the first view of scenes \[0, 1\]"),
            ([[0, 1]], r"`target_mask` must have one entry for each of the 14 views, got 2"),
        ],
        ids=("one", "two", "length"),
    )  # fmt: skip
    def test_wrong_target_masks_are_refused(self, mask, words):
        with pytest.raises(ValueError, match=words):
            self.make()(**self.inputs() | {"target_mask": [bool(v) for scene in mask for v in scene]})

    def test_a_target_loss_without_targets_is_refused(self):
        inputs = self.inputs([[(2, 2)], [(2, 2)]])
        with pytest.raises(ValueError, match=r"`loss_views='target'` needs at least one target view in the batch"):
            self.make(loss_views="target")(**inputs)

    def test_pretraining_without_a_teacher_is_refused(self):
        with pytest.raises(
            ValueError, match=r"`semantic_teacher_config` must be set to pretrain.*from_backbone_and_dinov3"
        ):
            Spa3RForPreTraining(spa3r_config())


class TestSeparateMasking(TestSpa3RForPreTraining):
    masking = "separate"


# Choices --------------------------------------------------------------------------------------------------------------


class TestGeometryAlone(PreTrainingTests):
    fields = {"targets": ["geometry"], "semantic_teacher_config": None}
    half_tolerance = {torch.bfloat16: 0.03, torch.float16: 0.006}  # other random numbers; the probe's depth is worst


class TestSemanticAlone(PreTrainingTests):
    fields = {"targets": ["semantic"]}


class TestPluecker(PreTrainingTests):
    fields = {"camera_embedding": "pluecker"}


class TestTargetLoss(PreTrainingTests):
    fields = {"loss_views": "target", "mask_ratio": 0.75}

    def test_one_view_and_many(self):  # one view alone has no target
        super().test_one_view_and_many(64)


def both_ways(inputs: dict, **fields) -> tuple:
    """The outputs of two models of the same weights, the second with other choices."""
    models = [alive(Spa3RForPreTraining(pretraining_config(**choices))) for choices in ({}, fields)]
    weights = models[0].state_dict()
    models[1].load_state_dict({key: weights[key] for key in models[1].state_dict()})
    with torch.no_grad():
        return tuple(model(**inputs) for model in models)


def tensors(out, *but: str) -> dict:
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor) and key not in but}


def test_loss_views_changes_the_losses_and_nothing_else():
    everything, targets = both_ways(view_inputs(targets=TARGETS), loss_views="target")
    assert_close(tensors(targets, "loss"), tensors(everything, "loss"), 0.0)
    assert all(relative_error(targets.losses[term], everything.losses[term]) > 1e-4 for term in LOSSES)


def test_mask_ratio_changes_which_views_are_drawn_and_nothing_else():
    usual, other = both_ways(view_inputs(targets=TARGETS), mask_ratio=0.75)
    assert_close(tensors(other), tensors(usual), 0.0)
    torch.manual_seed(0)
    usual, other = both_ways(view_inputs([[(2, 2)] * 8]), mask_ratio=0.75)
    assert (usual.target_mask.sum(), other.target_mask.sum()) == (4, 6)


def test_view_masking_changes_what_targets_know_and_nothing_of_the_context():
    """With the same weights, either way the context knows of the context alone, and so the latents are the same."""
    inputs = view_inputs(targets=TARGETS)
    asymmetric, separate = both_ways(inputs, view_masking="separate")
    given = {"extrinsics": asymmetric.extrinsics, "intrinsics": asymmetric.intrinsics}
    asymmetric, separate = both_ways(inputs | given, view_masking="separate")
    same = ("context_features", "latents", "geometry_features", "semantic_features", "semantic_targets", "depth")
    assert_close(*({name: out[name] for name in same} for out in (separate, asymmetric)), 1e-5)
    assert relative_error(separate.geometry_targets, asymmetric.geometry_targets) > 1e-2


@pytest.mark.parametrize("target", ("geometry", "semantic"))
def test_a_target_left_out_takes_its_terms_along_and_changes_no_other(target):
    other = {"geometry": "semantic", "semantic": "geometry"}[target]
    both, one = both_ways(view_inputs(targets=TARGETS), targets=[target])
    assert f"{other}_features" not in one and f"{other}_targets" not in one
    assert one.losses.keys() == {f"{target}_l1", f"{target}_cosine", "depth_probe"} == one.losses_per_scene.keys()
    assert_close(tensors(one, "loss"), {key: both[key] for key in tensors(one, "loss")}, 0.0)
    assert_close(dict(one.losses), {term: both.losses[term] for term in one.losses}, 0.0)
    assert torch.equal(one.loss, sum(one.losses.values())) and one.loss < both.loss


def test_without_semantic_targets_there_is_no_teacher(tmp_path):
    alive(VggtModel(vggt_config())).save_pretrained(tmp_path / "vggt")
    fields = {"hidden_size": 32, "num_attention_heads": 2, "num_latents": 6, "targets": ("geometry",)}
    for dinov3 in (None, tmp_path / "no such folder"):
        model = Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path / "vggt", dinov3, **fields)
        assert model.semantic_teacher is None and model.frozen_modules().keys() == {"spa3r.backbone"}
        assert model.config.semantic_teacher_config is None and model.config.semantic_teacher_name_or_path is None
        assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"spa3r"}
    inputs = view_inputs(targets=TARGETS)
    model.train()(**inputs).loss.backward()
    model.save_pretrained(tmp_path / "slim", include_backbone=False)
    loaded = Spa3RForPreTraining.from_pretrained(tmp_path / "slim", attn_implementation="sdpa")
    assert relative_error(loaded(**inputs).loss, model.eval()(**inputs).loss) <= 1e-6
    with pytest.raises(ValueError, match=r"`semantic_teacher_config` must be set.*leave 'semantic' out of `targets`"):
        Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path / "vggt", **(fields | {"targets": ["semantic"]}))


@pytest.mark.parametrize("dtype", ("auto", torch.bfloat16), ids=("fp32", "bf16"))
def test_from_backbone_and_dinov3_and_back_without_the_frozen_parts(dtype, tmp_path):
    vggt, dinov3 = alive(VggtModel(vggt_config())), alive(DINOv3ViTModel(teacher_config()))
    vggt.save_pretrained(tmp_path / "vggt")
    dinov3.save_pretrained(tmp_path / "dinov3")
    sizes = spa3r_config().to_diff_dict()
    fields = {key: sizes[key] for key in ("hidden_size", "num_attention_heads", "num_latents", "num_encoder_layers")}
    model = Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path / "vggt", tmp_path / "dinov3", dtype=dtype, **fields)
    assert (model.config.num_latents, model.config.semantic_hidden_size) == (6, 16)
    for part, source in ((model.spa3r.backbone, vggt), (model.semantic_teacher, dinov3)):
        wanted = source.state_dict()
        assert all(torch.equal(tensor, wanted[key].to(tensor.dtype)) for key, tensor in part.state_dict().items())
        assert not any(p.requires_grad for p in part.parameters()) and not part.training
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = view_inputs(targets=TARGETS)
    loss = model.train()(**inputs).loss
    loss.backward()
    assert loss.isfinite()

    model.save_pretrained(tmp_path / "slim", include_backbone=False)
    with safe_open(tmp_path / "slim" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "backbone" in key or "teacher" in key]
    saved = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert saved["backbone_name_or_path"] == str(tmp_path / "vggt")
    assert saved["semantic_teacher_name_or_path"] == str(tmp_path / "dinov3")
    loaded = Spa3RForPreTraining.from_pretrained(tmp_path / "slim", attn_implementation="sdpa")
    if dtype == "auto":
        assert relative_error(loaded(**inputs).loss, loss) <= 1e-5
    loaded.save_pretrained(tmp_path / "whole")
    whole = Spa3RForPreTraining.from_pretrained(tmp_path / "whole")
    assert relative_error(whole(**inputs).loss, loaded(**inputs).loss) <= 1e-6


def test_fresh_weights_start_as_stated():
    """Truncated normal 0.02, biases 0, registers 1e-6."""
    model = Spa3RForPreTraining(pretraining_config(hidden_size=64, num_attention_heads=4, num_latents=32)).spa3r
    for name, parameter in (*model.encoder.named_parameters(), *model.decoder.named_parameters()):
        if name.endswith("register_tokens"):
            assert 0 < parameter.std() < 3e-6, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert (parameter == 1).all(), name


@torch.no_grad()
def test_teacher_sees_the_view_resized_without_antialiasing(golden_folders):
    """A view larger than the teacher's 224 x 224 (the golden ones are smaller), through transformers' DINOv3."""
    model = Spa3RForPreTraining.from_pretrained(golden_folders["spa3r-ckpt"])
    (height, width), p = (19, 23), 14
    images = torch.randn(1, 3, height * p, width * p)
    patches = images.view(3, height, p, width, p).permute(1, 3, 0, 2, 4).reshape(-1, 3 * p * p)
    teacher = AutoModel.from_config(model.config.semantic_teacher_config).eval()
    teacher.load_state_dict(golden("spa3r_asymmetric", "teacher."))
    resized = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=False)
    tokens = teacher(pixel_values=resized).last_hidden_state[:, 5:].transpose(1, 2).unflatten(-1, (14, 14))
    tokens = torch.nn.functional.interpolate(tokens, (height, width), mode="bilinear")[0].flatten(1).t()
    ours = model(patches, [(height, width)], [1]).semantic_targets
    assert relative_error(ours, tokens) <= 1e-5


def test_a_whole_model_lends_both_frozen_parts(tmp_path):
    alive(Spa3RForPreTraining(pretraining_config())).save_pretrained(tmp_path / "whole")
    whole = Spa3RForPreTraining.from_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "slim", include_backbone=False)
    slim = Spa3RForPreTraining.from_pretrained(tmp_path / "slim")
    assert type(slim.semantic_teacher) is type(whole.semantic_teacher)
    inputs = view_inputs(targets=TARGETS)
    assert torch.equal(slim(**inputs).loss, whole(**inputs).loss)


def test_frozen_parts_without_a_home_are_not_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"`include_backbone=False` leaves the frozen parts out"):
        Spa3RForPreTraining(pretraining_config()).save_pretrained(tmp_path, include_backbone=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_frozen_parts_are_not_destroyed_by_saving_over_their_home(tmp_path):
    model = Spa3RForPreTraining(pretraining_config())
    model.save_pretrained(tmp_path)
    loaded = Spa3RForPreTraining.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is where they come from: saving there would destroy them\. Choose another"):
        loaded.save_pretrained(tmp_path, include_backbone=False)
    again = Spa3RForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again.spa3r.backbone.camera_token, model.spa3r.backbone.camera_token)


def test_a_part_that_was_never_loaded_goes_on_being_named(tmp_path):
    whole = Spa3RForPreTraining(pretraining_config())
    whole.spa3r.backbone.save_pretrained(tmp_path / "vggt")
    model = Spa3RForPreTraining(pretraining_config(backbone_name_or_path=str(tmp_path / "vggt")))
    assert model.spa3r.backbone is None
    model.save_pretrained(tmp_path / "spa3r")
    loaded = Spa3RForPreTraining.from_pretrained(tmp_path / "spa3r")
    assert torch.equal(loaded.spa3r.backbone.camera_token, whole.spa3r.backbone.camera_token)


def test_without_a_depth_head_the_probe_is_not_trained():
    """A trainable parameter without a gradient stops distributed training."""
    config = pretraining_config()
    config.backbone_config.heads = ["camera"]
    model = Spa3RForPreTraining(config).train()
    model(**view_inputs()).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable and all(parameter.grad is not None for parameter in trainable)


def test_under_autocast_it_trains():
    model, inputs = alive(Spa3RForPreTraining(pretraining_config())).train(), view_inputs()
    mask = [False, *[True] * (len(inputs["view_grid_hw"]) - 1)]
    for first in inputs["views_per_scene"].cumsum(0)[:-1].tolist():
        mask[first] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, target_mask=mask)
    output.loss.backward()
    reference = model(**inputs, target_mask=mask)
    assert output.extrinsics.dtype == torch.float32 and output.loss.dtype == torch.float32
    assert relative_error(output.loss, reference.loss) < 2e-2
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_token_goes_to_the_hub_and_unheard_keywords_are_refused(tmp_path):
    whole = Spa3RForPreTraining(pretraining_config())
    whole.spa3r.backbone.save_pretrained(tmp_path / "vggt")
    whole.semantic_teacher.save_pretrained(tmp_path / "dinov3")
    fields = {"hidden_size": 48, "num_attention_heads": 3, "num_latents": 8, "token": "a_secret"}
    model = Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path / "vggt", tmp_path / "dinov3", **fields)
    assert "a_secret" not in model.config.to_json_string(use_diff=False)
    with pytest.raises(TypeError, match="Unknown keywords 'num_latent': wanted fields of Spa3RConfig or one of"):
        Spa3RForPreTraining.from_backbone_and_dinov3(tmp_path / "vggt", tmp_path / "dinov3", num_latent=8)


def test_trainer_evaluates_it(tmp_path):
    """Without being told of labels."""
    model, inputs = alive(Spa3RForPreTraining(pretraining_config())), view_inputs()
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(model, arguments, data_collator=lambda rows: rows[0], eval_dataset=[inputs, inputs])
    assert 0 < trainer.evaluate()["eval_loss"] < 100


@pytest.mark.parametrize("wrong_class", [VggtModel, Spa3VLM])
def test_the_checkpoint_of_another_model_is_refused_before_one_is_built(wrong_class, tmp_path):
    Spa3RForPreTraining(pretraining_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds a model of type 'spa3r', and {wrong_class.__name__}.* loads"):
        wrong_class.from_pretrained(tmp_path)


def test_a_home_that_moved_is_named_with_its_cure(tmp_path):
    model = Spa3RForPreTraining(pretraining_config())
    model.spa3r.backbone.save_pretrained(tmp_path / "vggt")
    model.semantic_teacher.save_pretrained(tmp_path / "dinov3")
    model.config.backbone_name_or_path = str(tmp_path / "vggt")
    model.config.semantic_teacher_name_or_path = str(tmp_path / "dinov3")
    model.save_pretrained(tmp_path / "spa3r", include_backbone=False)
    (tmp_path / "vggt").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"source of its backbone, which can't be loaded.*backbone_name_or_path=\.\.\."
    ):
        Spa3RForPreTraining.from_pretrained(tmp_path / "spa3r")
    found = Spa3RForPreTraining.from_pretrained(tmp_path / "spa3r", backbone_name_or_path=str(tmp_path / "moved"))
    assert torch.equal(found.spa3r.backbone.camera_token, model.spa3r.backbone.camera_token)


def test_cameras_may_be_arrays():
    model, inputs = alive(Spa3RForPreTraining(pretraining_config())).spa3r.eval(), view_inputs()
    with torch.no_grad():
        out = model(**inputs)
        cameras = {"extrinsics": out.extrinsics, "intrinsics": out.intrinsics}
        arrays = {name: tensor.numpy() for name, tensor in cameras.items()}
        layout = (inputs["view_grid_hw"], inputs["views_per_scene"])
        assert torch.equal(model(**inputs, **arrays).depth, model(**inputs, **cameras).depth)
        ours = model.decode(out.latents, arrays["extrinsics"], arrays["intrinsics"], *layout)
        assert torch.equal(ours.depth, model.decode(out.latents, *cameras.values(), *layout).depth)


@pytest.mark.parametrize("part", ("backbone", "semantic_teacher"))
def test_a_frozen_part_that_was_not_loaded_is_named(part):
    config = pretraining_config()
    setattr(config, f"{part}_name_or_path", "elsewhere")
    words = (
        rf"This Spa3R\w+ has no {part.replace('_', ' ')}: its configuration names 'elsewhere'\. Load it with from_pre"
    )
    with pytest.raises(ValueError, match=words):
        Spa3RForPreTraining(config)(**view_inputs())


def test_a_checkpoint_that_names_itself_as_a_home_is_refused(tmp_path):
    model = Spa3RForPreTraining(pretraining_config())
    model.config.backbone_name_or_path = model.config.semantic_teacher_name_or_path = str(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "spa3r", include_backbone=False)
    file = tmp_path / "spa3r" / "config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "elsewhere"), str(tmp_path / "spa3r")))
    with pytest.raises(
        ValueError, match=r"names itself as the source of its backbone, which it doesn't hold\. Set its location"
    ):
        Spa3RForPreTraining.from_pretrained(tmp_path / "spa3r")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_checkpointing_does_not_run_attention_again():
    model = alive(Spa3RForPreTraining(pretraining_config()))
    model.set_attn_implementation("sdpa")
    inputs, calls = view_inputs(targets=TARGETS), []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func in ATTENTION_KERNELS)
            return func(*args, **(kwargs or {}))

    def forward_calls() -> int:
        calls.clear()
        with Counting():
            model.train()(**inputs).loss.backward()
        return sum(calls)

    plain = forward_calls()
    assert plain > 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert forward_calls() == plain, "attention ran again"
    nothing_kept = {"use_reentrant": False, "context_fn": torch.utils.checkpoint.noop_context_fn}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=nothing_kept)
    assert forward_calls() > plain, "the check sees no attention in backward"
