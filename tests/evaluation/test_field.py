"""Metrics of held-out views: every number from plain maths, honest baselines, shuffles that really shuffle."""

import json
import math
import weakref

import pytest
import torch
from tiny import SCENES, TARGETS, alive, arranged, patch_counts, pretraining_config, relative_error, view_inputs

from spa3r import Spa3RForPreTraining
from spa3r.evaluation import FieldReport, Measure, evaluate_field
from spa3r.evaluation.field import _resized, _Scene, _scenes_with_targets, field_metrics, pose_distances
from spa3r.models.cameras import homogeneous, invert_extrinsics, pose_encoding_to_cameras

METRICS = ("geometry_cosine", "geometry_error", "semantic_cosine", "semantic_error", "depth_error")
PREDICTORS = ("model", "context_mean", "nearest_view", "shuffled_latents", "shuffled_cameras")


@pytest.fixture(scope="module")
def model() -> Spa3RForPreTraining:
    return alive(Spa3RForPreTraining(pretraining_config()))


@pytest.fixture(scope="module")
def batch() -> dict:
    """Three scenes, without the views that would need resizing."""
    scenes = [[(2, 3)] * len(scene) for scene in SCENES]
    return view_inputs(scenes, TARGETS)


def cameras(count: int, seed: int = 5) -> dict:
    pose = torch.randn(count, 9, generator=torch.Generator().manual_seed(seed))
    pose[:, 7:] = 0.8
    extrinsics, intrinsics = pose_encoding_to_cameras(pose, [(8, 12)] * count)
    return {"extrinsics": extrinsics, "intrinsics": intrinsics}


def means(report: FieldReport) -> dict:
    return {name: {metric: m.mean for metric, m in row.items()} for name, row in report.rows.items()}


# The maths ------------------------------------------------------------------------------------------------------------


def numbers(predicted: dict, true: dict) -> dict:
    """Of one scene, in loops over patches."""
    found = {}
    for name in ("geometry", "semantic"):
        pairs = list(zip(predicted[name].double(), true[name].double(), strict=True))
        cosines = [(p @ t / (p @ p).sqrt() / (t @ t).sqrt()).item() for p, t in pairs]
        wrong, size = (sum(x.square().sum().item() for x in xs) for xs in ([p - t for p, t in pairs], true[name]))
        found |= {f"{name}_cosine": sum(cosines) / len(cosines), f"{name}_error": math.sqrt(wrong / size)}
    depths = [(abs(p - t) / t).item() for p, t in zip(predicted["depth"], true["depth"], strict=True)]
    return found | {"depth_error": sum(depths) / len(depths)}


def rotation_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    turn = a[:3, :3].double() @ torch.linalg.inv(b[:3, :3].double())
    return torch.linalg.matrix_norm(torch.eye(3) - turn).div(math.sqrt(8)).asin().mul(2).item()


@pytest.mark.parametrize("given", (False, True), ids=("predicted", "given"))
@torch.no_grad()
def test_every_number_is_what_it_is_called(given, model, batch):
    batch = batch | (cameras(14) if given else {})
    report = evaluate_field(model, [batch])
    out = model(**batch)
    parts = {
        f"{source}_{name}": out[f"{name}{suffix}"].split(patch_counts(batch))
        for source, suffix in (("true", "_targets"), ("predicted", "_features"))
        for name in ("geometry", "semantic")
    }
    parts |= {"true_depth": out.depth_targets.split(patch_counts(batch)), "predicted_depth": out.depth.split([6] * 14)}

    def of(source, views):
        names = ("geometry", "semantic", "depth")
        return {name: torch.cat([parts[f"{source}_{name}"][view] for view in views]) for name in names}

    wanted = {predictor: [] for predictor in PREDICTORS}
    first = 0
    for scene, mask in enumerate(TARGETS):
        targets = [first + view for view, target in enumerate(mask) if target]
        context = [first + view for view, target in enumerate(mask) if not target]
        true, known = of("true", targets), of("true", context)  # one pass, masked: as the encoder saw the context
        mean = {name: values.mean(0, keepdim=True).expand_as(true[name]) for name, values in known.items()}
        centers = [(-e[:3, :3].T @ e[:3, 3]) for e in out.extrinsics]
        views = range(first, first + len(mask))
        widest = max((centers[a] - centers[b]).norm() for a in views for b in views)
        nearest = [
            min(
                context,
                key=lambda view, target=target: (
                    rotation_angle(out.extrinsics[target], out.extrinsics[view])
                    + (centers[target] - centers[view]).norm() / widest
                ),
            )
            for target in targets
        ]

        def decode(latents, poses, targets=targets):
            field = model.spa3r.decode(
                latents[None], out.extrinsics[poses], out.intrinsics[targets], [(2, 3)] * len(targets), [len(targets)]
            )
            return {"geometry": field.geometry_features, "semantic": field.semantic_features, "depth": field.depth}

        moved = [first + (view - first - max(1, len(mask) // 2)) % len(mask) for view in targets]
        assert all(one != other for one, other in zip(moved, targets))
        fields = {
            "model": of("predicted", targets),
            "context_mean": mean,
            "nearest_view": of("true", nearest),
            "shuffled_latents": decode(out.latents[scene - 1 if scene else 1], targets),
            "shuffled_cameras": decode(out.latents[scene], moved),
        }
        for predictor, field in fields.items():
            wanted[predictor].append(numbers(field, true))
        first += len(mask)

    assert report.num_scenes == 3 and report.num_views == 7 and report.skipped == 0
    assert set(report.rows) == set(PREDICTORS)
    for predictor, scenes in wanted.items():
        assert set(report.rows[predictor]) == set(METRICS)
        for metric in METRICS:
            values = torch.tensor([scene[metric] for scene in scenes], dtype=torch.float64)
            measure = report.rows[predictor][metric]
            assert measure.scenes == 3
            assert measure.mean == pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5), (predictor, metric)
            assert measure.standard_error == pytest.approx((values.std() / 3**0.5).item(), rel=1e-3, abs=1e-5)


def test_fields_whose_numbers_are_known():
    true = {"geometry": torch.tensor([[4.0, 3.0], [0.0, 5.0]]), "depth": torch.tensor([1.0, 4.0])}
    predicted = {"geometry": torch.tensor([[3.0, 4.0], [5.0, 0.0]]), "depth": torch.tensor([1.5, 3.0])}
    wanted = {"geometry_cosine": (24 / 25 + 0) / 2, "geometry_error": math.sqrt((2 + 50) / 50), "depth_error": 0.375}
    assert field_metrics(predicted, true) == pytest.approx(wanted)
    one_row = {"geometry": torch.tensor([[0.0, 1.0]]), "depth": torch.tensor([2.0])}
    wanted = {"geometry_cosine": (3 / 5 + 1) / 2, "geometry_error": math.sqrt((20 + 16) / 50), "depth_error": 0.75}
    assert field_metrics(one_row, true) == pytest.approx(wanted)


def test_a_measure_is_the_mean_and_its_standard_error():
    measure = Measure()
    assert math.isnan(measure.mean) and math.isnan(measure.standard_error)
    measure.add(1e6 + 1)
    assert measure.mean == 1e6 + 1 and math.isnan(measure.standard_error)
    for value in (1e6 + 2, 1e6 + 6):
        measure.add(value)
    assert measure.mean == pytest.approx(1e6 + 3)
    assert measure.standard_error == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2 = 7


def made_report(**values) -> FieldReport:
    report = FieldReport(num_scenes=1)
    for predictor, metrics in values.items():
        for metric, value in metrics.items():
            report.rows[predictor].setdefault(metric, Measure()).add(value)
    return report


def test_gap_closed_is_counted_from_the_best_baseline():
    report = made_report(
        model={"geometry_cosine": 0.9, "geometry_error": 0.3, "semantic_cosine": 0.5},
        context_mean={"geometry_cosine": 0.6, "geometry_error": 0.4, "semantic_cosine": 0.6},
        nearest_view={"geometry_cosine": 0.2, "geometry_error": 0.5, "semantic_cosine": 0.2},
        shuffled_cameras={"geometry_cosine": 0.8, "geometry_error": 0.1, "semantic_cosine": 0.9},  # no baseline
    )
    assert set(report.best_baseline.values()) == {"context_mean"}
    assert report.gap_closed == pytest.approx(
        {"geometry_cosine": 0.75, "geometry_error": 0.25, "semantic_cosine": -0.25}
    )
    assert report.gap_closed_from_shuffles == pytest.approx(
        {"geometry_cosine": 0.5, "geometry_error": -2.0, "semantic_cosine": -4.0}
    )
    better = {"nearest_view": {"geometry_cosine": 0.8, "geometry_error": 0.35, "semantic_cosine": 1.0}}
    report = made_report(**{name: {k: m.mean for k, m in row.items()} for name, row in report.rows.items()} | better)
    assert report.gap_closed["geometry_cosine"] == pytest.approx(0.5)
    assert report.gap_closed["geometry_error"] == pytest.approx(1 / 7)
    assert math.isnan(report.gap_closed["semantic_cosine"]), "a perfect baseline leaves no gap"
    assert report.to_dict()["gap_closed"]["semantic_cosine"] is None


class PerfectModel(Spa3RForPreTraining):
    """It knows the answers."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.geometry_features, out.semantic_features, out.depth = (
            out.geometry_targets.clone(),
            out.semantic_targets.clone(),
            out.depth_targets.clone(),
        )
        return out


def test_a_perfect_predictor_closes_the_gap(batch):
    report = evaluate_field(alive(PerfectModel(pretraining_config())), [batch])
    row = means(report)["model"]
    assert row == pytest.approx({m: float(m.endswith("cosine")) for m in METRICS}, abs=1e-6)
    assert report.gap_closed == pytest.approx(dict.fromkeys(METRICS, 1.0), abs=1e-5)
    assert report.rows["context_mean"]["geometry_cosine"].mean < 0.99
    assert report.table().count("100 %") == 10


# Objects --------------------------------------------------------------------------------------------------------------


def test_objects_are_right_where_their_class_mean_is_nearest(model, batch):
    batch = batch | cameras(14)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (14 * 6,), generator=generator)
    labels[6:12] = -1  # the only target view of the first scene
    assert TARGETS[0] == (0, 1)
    with torch.no_grad():
        out = model(**batch)
    class_means = out.semantic_targets[torch.randperm(14 * 6, generator=generator)[:4]]
    report = evaluate_field(model, [batch | {"patch_classes": labels}], class_means=class_means)

    def right(features, views) -> float:
        chosen = [(view, i) for view in views for i in range(6) if labels[6 * view + i] >= 0]
        hits = [
            min(range(4), key=lambda c, v=v, i=i: (features(v, i) - class_means[c]).norm().item()) == labels[6 * v + i]
            for v, i in chosen
        ]
        return sum(map(int, hits)) / len(hits)

    targets = [[3, 5, 6], [9, 11, 13]]  # of the two other scenes
    for name, source in (("model", out.semantic_features), ("true_features", out.semantic_targets)):
        wanted = [right(lambda view, i, source=source: source[6 * view + i], views) for views in targets]
        measure = report.rows[name]["object_accuracy"]
        assert measure.scenes == 2 and measure.mean == pytest.approx(sum(wanted) / 2), name
    assert set(report.rows) == {*PREDICTORS, "true_features"} and set(report.rows["true_features"]) == {
        "object_accuracy"
    }
    assert all(report.rows[name]["object_accuracy"].scenes == 2 for name in PREDICTORS)
    table = report.table()
    assert "object accuracy ↑" in table and "| true features " in table
    plain = evaluate_field(model, [batch])
    assert {m: v for m, v in means(report)["model"].items() if m != "object_accuracy"} == means(plain)["model"]


def test_the_true_features_are_the_perfect_accuracy():
    report = made_report(
        model={"object_accuracy": 0.7},
        context_mean={"object_accuracy": 0.1},
        nearest_view={"object_accuracy": 0.4},
        shuffled_latents={"object_accuracy": 0.5},
    )
    report._add("true_features", {"object_accuracy": 0.9})
    assert report.gap_closed == pytest.approx({"object_accuracy": 0.3 / 0.5})
    assert report.gap_closed_from_shuffles == pytest.approx({"object_accuracy": 0.2 / 0.4})


def test_classes_that_do_not_fit_are_refused(model, batch):
    class_means = torch.randn(3, model.config.semantic_hidden_size)
    for labels, got in (
        (None, "none"),
        (torch.zeros(5, dtype=torch.long), r"\(5,\) from 0 to 0"),
        (torch.full((84,), 3), r"\(84,\) from 3 to 3"),
    ):
        extra = {} if labels is None else {"patch_classes": labels}
        with pytest.raises(ValueError, match=rf"must hold `patch_classes`, \(84,\) from -1 to 2, got {got}"):
            evaluate_field(model, [batch | extra], class_means=class_means)
    with pytest.raises(ValueError, match=r"`class_means` must be \(classes, .*\), .* got \(3, 2\)"):
        evaluate_field(model, [batch], class_means=torch.zeros(3, 2))
    geometry = alive(Spa3RForPreTraining(pretraining_config(targets=["geometry"])))
    with pytest.raises(ValueError, match=r"must be None for a model without a semantic target"):
        evaluate_field(geometry, [batch], class_means=class_means)


# Shuffles and baselines -----------------------------------------------------------------------------------------------


def test_latents_come_from_another_scene(model, batch):
    """A copy of the scene has the same latents; any other scene has not."""
    same = evaluate_field(model, [arranged(batch, [1, 1])])
    assert means(same)["shuffled_latents"] == means(same)["model"]
    other = evaluate_field(model, [arranged(batch, [1, 2])])
    assert means(other)["shuffled_latents"] != pytest.approx(means(other)["model"], abs=1e-6)


def test_cameras_come_from_other_views(model, batch):
    """Where all cameras stand at one place, shuffling changes nothing."""
    given = cameras(14)
    same = given | {"extrinsics": given["extrinsics"][:1].expand(14, 4, 4)}
    report = evaluate_field(model, [batch | same])
    assert means(report)["shuffled_cameras"] == means(report)["model"]
    report = evaluate_field(model, [batch | given])
    assert means(report)["shuffled_cameras"] != pytest.approx(means(report)["model"], abs=1e-6)


@pytest.mark.parametrize("masking", ("asymmetric", "separate"))
def test_baselines_know_nothing_of_the_target_views(masking, batch):
    """Other pixels in the target views change the truth, not what is compared with it."""
    model = alive(Spa3RForPreTraining(pretraining_config(view_masking=masking)))
    given = cameras(14)
    rows = batch["target_mask"].repeat_interleave(6)
    seen = []
    for pixels in (batch["view_pixel_values"], batch["view_pixel_values"].masked_fill(rows[:, None], float("nan"))):
        report = evaluate_field(model, [batch | given | {"view_pixel_values": pixels}])
        assert math.isnan(report.rows["context_mean"]["geometry_cosine"].mean) == bool(pixels.isnan().any())
        inputs = batch | given | {"view_pixel_values": pixels}
        with torch.no_grad():
            scenes = [_Scene(model, scene) for scene in _scenes_with_targets([inputs], FieldReport())]
            seen.append([dict(scene.predictions()) for scene in scenes])
    for before, after in zip(*seen):
        for baseline in ("context_mean", "nearest_view"):
            for name in ("geometry", "semantic"):
                assert torch.equal(before[baseline][name], after[baseline][name]), (baseline, name)


def test_distances_of_poses():
    turn = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # a quarter
    poses = [homogeneous(torch.eye(3)), homogeneous(turn), *(homogeneous(torch.eye(3)) for _ in range(2))]
    centers = torch.tensor([[0.0, 0, 0], [0, 0, 0], [3, 0, 0], [0, 4, 0]])
    for pose, center in zip(poses, centers):
        pose[:3, 3] = center
    extrinsics = invert_extrinsics(torch.stack(poses))
    quarter = math.pi / 2
    wanted = torch.tensor(
        [
            [0, quarter, 0.6, 0.8],
            [quarter, 0, quarter + 0.6, quarter + 0.8],
            [0.6, quarter + 0.6, 0, 1],
            [0.8, quarter + 0.8, 1, 0],
        ]
    )
    torch.testing.assert_close(pose_distances(extrinsics).float(), wanted)
    world = pose_encoding_to_cameras(torch.randn(1, 9), [(8, 8)])[0]
    scaled = extrinsics.clone()
    scaled[:, :3, 3] *= 7
    for same in (extrinsics @ world, scaled):  # neither the world frame nor the unit matters
        torch.testing.assert_close(pose_distances(same).float(), wanted, atol=1e-3, rtol=1e-3)
    assert pose_distances(extrinsics[:1].expand(2, 4, 4)).abs().max() == 0


def test_another_patch_grid_is_resized():
    values = torch.arange(6.0)[:, None].expand(6, 2) * torch.tensor([1.0, -1.0])
    assert _resized(values, (2, 3), (2, 3)) is values
    rows = _resized(values, (2, 3), (4, 3))
    torch.testing.assert_close(rows[:, 0].view(4, 3)[:, 0], torch.tensor([0, 0.75, 2.25, 3]))
    torch.testing.assert_close(rows[:, 1], -rows[:, 0])
    torch.testing.assert_close(_resized(values[:, 0], (2, 3), (4, 3)), rows[:, 0])


# Batches --------------------------------------------------------------------------------------------------------------


def test_the_batch_composition_changes_nothing(model):
    whole = view_inputs(SCENES, TARGETS)  # of many patch grids
    alone = [arranged(whole, [scene]) for scene in range(3)]
    one, two, three = (
        evaluate_field(model, batches).to_dict()
        for batches in ([whole], [arranged(whole, [0, 1]), alone[2]], iter(alone))
    )
    assert one == two == three
    assert one["rows"]["shuffled_latents"]["depth_error"]["scenes"] == 3


def test_other_entries_are_ignored_and_arrays_are_taken(model, batch):
    given = batch | cameras(14)
    told = {"scenes": ["a", "b", "c"], "skipped": [], "num_pictures": 14}
    arrays = {name: given[name].numpy() for name in ("extrinsics", "intrinsics", "view_grid_hw", "target_mask")}
    assert evaluate_field(model, [given | told | arrays]).to_dict() == evaluate_field(model, [given]).to_dict()


def test_scenes_without_targets_are_skipped_and_counted(model, batch):
    lonely = view_inputs([[(2, 3)], [(2, 3)] * 3], [[0], [0, 0, 0]])
    mixed = view_inputs([[(2, 3)], *([(2, 3)] * len(scene) for scene in SCENES)], [[0], *TARGETS])
    mixed["view_pixel_values"] = torch.cat([torch.ones(6, 48), batch["view_pixel_values"]])
    report = evaluate_field(model, [lonely, mixed, lonely])
    assert (report.num_scenes, report.skipped) == (3, 5)
    assert means(report) == means(evaluate_field(model, [batch]))


@pytest.mark.parametrize("loss_views", ("all", "target"))
def test_nothing_to_measure_is_an_error(loss_views):
    model = alive(Spa3RForPreTraining(pretraining_config(loss_views=loss_views)))
    lonely = view_inputs([[(2, 3)], [(2, 3)] * 3], [[0], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"at least one scene with a target view, .* none among 2 scenes. Give scenes"):
        evaluate_field(model, [lonely])
    with pytest.raises(ValueError, match="none among 0 scenes"):
        evaluate_field(model, [])


def test_batches_without_a_mask_are_refused(model):
    words = r"must hold `target_mask`, got view_pixel_values, view_grid_hw, views_per_scene. .*False for the first view"
    with pytest.raises(ValueError, match=words):
        evaluate_field(model, [view_inputs()])


def test_it_stops_after_so_many_scenes_and_fetches_no_more(model, batch):
    fetched, told = [], []

    def batches():
        for number in range(3):
            fetched.append(number)
            yield batch

    report = evaluate_field(model, batches(), max_scenes=2, progress=told.append)
    assert report.num_scenes == 2 and fetched == [0] and told == [1, 2]
    assert report.to_dict() == evaluate_field(model, [arranged(batch, [0, 1])]).to_dict()
    assert evaluate_field(model, batches(), max_scenes=4).num_scenes == 4
    with pytest.raises(ValueError, match=r"`max_scenes` must be at least 1, or None for all scenes, got 0"):
        evaluate_field(model, [batch], max_scenes=0)


def test_no_scene_is_kept(model, batch):
    living = []

    def batches():
        for scene in (0, 1, 2, 0, 1, 2):
            inputs = arranged(batch, [scene])
            inputs["view_pixel_values"] = inputs["view_pixel_values"].clone()
            living.append(weakref.ref(inputs["view_pixel_values"]))
            yield inputs
            del inputs
            assert sum(reference() is not None for reference in living) <= 1

    assert evaluate_field(model, batches()).num_scenes == 6


def test_one_scene_alone_has_no_latents_to_take(model, batch):
    report = evaluate_field(model, [arranged(batch, [1])])
    assert report.rows["shuffled_latents"] == {} and set(report.rows["model"]) == set(METRICS)
    line = next(line for line in report.table().splitlines() if "another scene" in line)
    assert line.count("–") == 5 and "±" not in report.table()
    assert report.to_dict()["rows"]["model"]["depth_error"]["standard_error"] is None


# The model is left as it was ------------------------------------------------------------------------------------------


def test_modes_and_gradients_are_left_as_they_were(batch):
    model = alive(Spa3RForPreTraining(pretraining_config())).train()
    model.spa3r.decoder.eval()
    modes = [module.training for module in model.modules()]
    report = evaluate_field(model, [batch])
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError):
        evaluate_field(model, [{}])
    assert [module.training for module in model.modules()] == modes
    assert report.to_dict() == evaluate_field(model.eval(), [batch]).to_dict()


def test_in_half_precision(model, batch):
    half = Spa3RForPreTraining(pretraining_config())
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    half.spa3r.backbone.camera_head.float()
    given = batch | cameras(14)
    ours, exact = (evaluate_field(m.eval(), [given]) for m in (half, model))
    for predictor, row in means(ours).items():
        assert row == pytest.approx(means(exact)[predictor], abs=0.05), predictor


# What it says ---------------------------------------------------------------------------------------------------------


def test_the_report_is_json_and_a_table(model, batch):
    report = evaluate_field(model, [batch])
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["rows"].keys() == set(PREDICTORS) and told["num_scenes"] == 3 and told["num_views"] == 7
    assert told["rows"]["model"]["geometry_cosine"]["mean"] == report.rows["model"]["geometry_cosine"].mean
    assert set(told["gap_closed"]) == set(told["best_baseline"]) == set(METRICS)
    lines = report.table().splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 9
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines if "---" not in line)
    cell = report.rows["nearest_view"]["semantic_error"]
    assert f"{cell.mean:.3f} ± {cell.standard_error:.3f}" in lines[4]
    assert f"{100 * report.gap_closed['geometry_cosine']:.0f} %" in lines[-2]
    assert f"{100 * report.gap_closed_from_shuffles['geometry_cosine']:.0f} %" in lines[-1]


def test_resizing_is_used_between_views_of_different_grids(model):
    """Only one context view, of another size: it is the nearest one."""
    inputs = view_inputs([[(2, 3), (4, 3)]], [[0, 1]])
    report = evaluate_field(model, [inputs])
    with torch.no_grad():
        out = model(**inputs)
    known, true = out.semantic_targets.split([6, 12])
    copied = torch.nn.functional.interpolate(known.t().view(1, -1, 2, 3), (4, 3), mode="bilinear").flatten(2)[0].t()
    assert report.rows["nearest_view"]["semantic_error"].mean == pytest.approx(relative_error(copied, true), rel=1e-5)
