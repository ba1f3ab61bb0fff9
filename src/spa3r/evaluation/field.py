"""How well a Spa3R predicts the features of unseen views, compared with fair baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from spa3r.models.cameras import invert_extrinsics
from spa3r.models.packing import ViewLayout, as_list
from spa3r.models.spa3r.modeling_spa3r import Spa3RField, Spa3RForPreTraining
from spa3r.tables import Table

Predictor = Literal["model", "context_mean", "nearest_view", "shuffled_latents", "shuffled_cameras", "true_features"]
Metric = Literal[
    "geometry_cosine", "geometry_error", "semantic_cosine", "semantic_error", "depth_error", "object_accuracy"
]

TITLES: dict[Predictor, str] = {
    "model": "model",
    "context_mean": "mean of the context",
    "nearest_view": "nearest context view",
    "shuffled_latents": "another scene's latents",
    "shuffled_cameras": "shuffled cameras",
    "true_features": "true features",
}
BASELINES: tuple[Predictor, ...] = ("context_mean", "nearest_view")
"""Baselines that need no model."""

SHUFFLES: tuple[Predictor, ...] = ("shuffled_latents", "shuffled_cameras")
"""The model without the scene, or without the cameras: what it has learned about all scenes in general."""

HIGHER_IS_BETTER: tuple[Metric, ...] = ("geometry_cosine", "semantic_cosine", "object_accuracy")

FEATURE_METRICS: dict[str, tuple[Metric, Metric]] = {
    "geometry": ("geometry_cosine", "geometry_error"),
    "semantic": ("semantic_cosine", "semantic_error"),
}
Fields = dict[str, Tensor]
"""Tensors by target: ``"geometry"`` and ``"semantic"`` features (patches, C), ``"depth"`` (patches,)."""


@dataclass
class Measure:
    """Running mean and spread of one number over scenes, without storing the values.

    Attributes:
        scenes: Number of scenes measured.
        mean: Mean over these scenes; NaN for none.
        squares: Sum of the squared distances from the mean (Welford).
    """

    scenes: int = 0
    mean: float = math.nan
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Add the number of one scene."""
        self.scenes += 1
        before = self.mean if self.scenes > 1 else 0.0
        self.mean = before + (value - before) / self.scenes
        self.squares += (value - before) * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over scenes; NaN for fewer than two scenes."""
        return math.sqrt(self.squares / (self.scenes - 1) / self.scenes) if self.scenes > 1 else math.nan


@dataclass
class FieldReport:
    """What :func:`evaluate_field` returns.

    Attributes:
        rows: For every predictor (``"model"``, ``"context_mean"``, ``"nearest_view"``, ``"shuffled_latents"``,
            ``"shuffled_cameras"``) the metrics by name (``"geometry_cosine"``, ``"geometry_error"``,
            ``"semantic_cosine"``, ``"semantic_error"``, ``"depth_error"``). A metric is missing if the model has no
            such target. With `class_means`, ``"object_accuracy"``, also of ``"true_features"``.
        num_scenes: Number of scenes measured.
        num_views: Number of their target views.
        skipped: Number of scenes left out because they have no target view.
    """

    rows: dict[Predictor, dict[Metric, Measure]] = field(
        default_factory=lambda: {name: {} for name in TITLES if name != "true_features"}
    )
    num_scenes: int = 0
    num_views: int = 0
    skipped: int = 0

    @property
    def best_baseline(self) -> dict[Metric, Predictor]:
        """For every metric the better of ``"context_mean"`` and ``"nearest_view"``."""
        best = {}
        for metric in self.rows["model"]:
            sign = 1 if metric in HIGHER_IS_BETTER else -1
            best[metric] = max(BASELINES, key=lambda baseline: sign * self.rows[baseline][metric].mean)
        return best

    @property
    def gap_closed(self) -> dict[Metric, float]:
        """Share of the gap from the best baseline to perfect prediction: 1 is perfect, 0 no better than the baseline.

        (model - best) / (1 - best) for a cosine, (best - model) / best for an error; NaN where the baseline is perfect.
        The accuracy of the true features counts as perfect.
        """
        return {metric: self._gap_from([baseline], metric) for metric, baseline in self.best_baseline.items()}

    @property
    def gap_closed_from_shuffles(self) -> dict[Metric, float]:
        """As :attr:`gap_closed`, from the best of the baselines and the two shuffles: what the scene and its cameras
        add to what is known without one of them."""
        return {metric: self._gap_from([*BASELINES, *SHUFFLES], metric) for metric in self.rows["model"]}

    def _gap_from(self, predictors: Sequence[Predictor], metric: Metric) -> float:
        sign, perfect = (1, 1.0) if metric in HIGHER_IS_BETTER else (-1, 0.0)
        if metric == "object_accuracy":
            perfect = self.rows["true_features"][metric].mean
        means = [self.rows[predictor][metric].mean for predictor in predictors if metric in self.rows[predictor]]
        best = max((mean for mean in means if not math.isnan(mean)), key=lambda mean: sign * mean)
        return (self.rows["model"][metric].mean - best) / (perfect - best) if best != perfect else math.nan

    def _add(self, predictor: Predictor, numbers: dict[Metric, float]) -> None:
        for metric, number in numbers.items():
            self.rows.setdefault(predictor, {}).setdefault(metric, Measure()).add(number)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON; None for numbers that could not be measured."""
        return {
            "num_scenes": self.num_scenes,
            "num_views": self.num_views,
            "skipped": self.skipped,
            "rows": {
                predictor: {
                    metric: {
                        "mean": _or_none(measure.mean),
                        "standard_error": _or_none(measure.standard_error),
                        "scenes": measure.scenes,
                    }
                    for metric, measure in measures.items()
                }
                for predictor, measures in self.rows.items()
            },
            "best_baseline": self.best_baseline,
            "gap_closed": {metric: _or_none(gap) for metric, gap in self.gap_closed.items()},
            "gap_closed_from_shuffles": {m: _or_none(gap) for m, gap in self.gap_closed_from_shuffles.items()},
        }

    def table(self) -> Table:
        """The report as a table; ± is the standard error over scenes."""
        metrics = list(self.rows["model"])
        head = ["", *(f"{m.replace('_', ' ')} {'↑' if m in HIGHER_IS_BETTER else '↓'}" for m in metrics)]
        rows = []
        for predictor, measures in self.rows.items():
            rows.append([TITLES[predictor], *(_cell(measures.get(metric, Measure())) for metric in metrics)])
        for title, gaps in (("gap closed", self.gap_closed), ("from the shuffles too", self.gap_closed_from_shuffles)):
            rows.append([title, *("–" if math.isnan(gap) else f"{100 * gap:.0f} %" for gap in gaps.values())])
        return Table(head, rows)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(measure: Measure) -> str:
    if not measure.scenes:
        return "–"
    return f"{measure.mean:.3f}" + (f" ± {measure.standard_error:.3f}" if measure.scenes > 1 else "")


def evaluate_field(
    model: Spa3RForPreTraining,
    batches: Iterable[Mapping[str, Any]],
    max_scenes: int | None = None,
    progress: Callable[[int], object] | None = None,
    class_means: Tensor | None = None,
) -> FieldReport:
    """Measure the predicted fields of target views, in eval mode and without gradients.

    Every number is computed per scene, over the patches of all of its target views, and then averaged over scenes:

    - *cosine*: mean over patches of the cosine similarity of predicted and true features; 1 is perfect.
    - *error*: ``||predicted - true|| / ||true||``, over all patches at once; 0 is perfect.
    - *depth error*: mean over patches of ``|predicted - true| / true``: the depth probe against the backbone's depth.
    - *object accuracy*, with `class_means`: share of the patches with a class, that of an object, to which the mean of
      this class is nearest by Euclidean distance among the means of all classes, for the predicted semantic features.
      Scenes whose target views have no such patch are left out of it. The true features are an upper bound.

    Predictors:

    - *model*: decoded from the scene's latents at the target's camera.
    - *context_mean*: the mean of the context's features (and depth), the same for every patch.
    - *nearest_view*: the values of the nearest context view at the same patch, resized bilinearly if its patch grid
      differs. For the distance of two views see :func:`pose_distances`.
    - *shuffled_latents*: the model with the latents of another scene, the previous one; the first scene uses those
      of the second. With only one scene the row stays empty.
    - *shuffled_cameras*: the model with the poses shifted by half of the scene's views, in a circle, so that no view
      keeps its own. Intrinsics stay, since they belong to the view's size.

    The two baselines use the context views only: geometry features are those that the encoder saw, which contain
    no information about the target views; semantic features are the teacher's; depths are the backbone's targets (with
    ``view_masking="separate"`` from its pass over all views).

    Scenes are processed one at a time: results do not depend on the batch, and memory use stays constant.

    Args:
        model: The model, on any device. Its modules keep their train or eval mode.
        batches: Dictionaries of the model's inputs: ``view_pixel_values``, ``view_grid_hw``, ``views_per_scene``,
            ``target_mask``, and if cameras are known ``extrinsics`` and ``intrinsics``; with `class_means` also
            ``patch_classes``, (sum of N,), the class of every patch that shows an object, as an index into them, and -1
            for all others. Other entries are ignored.
        max_scenes: Maximum number of measured scenes. None: all.
        progress: Called after each scene with the number of scenes measured so far.
        class_means: (classes, C), means of the teacher's features of each class on other scenes.

    Raises:
        ValueError: A batch has no ``target_mask``, or no scene has a target view; or with `class_means`: the model has
            no semantic target, or ``patch_classes`` are missing or don't match.
    """
    if class_means is not None:
        _check_class_means(model, class_means)
    if max_scenes is not None and max_scenes < 1:
        raise ValueError(f"`max_scenes` must be at least 1, or None for all scenes, got {max_scenes}.")
    report = FieldReport()
    first = before = None
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for inputs in _scenes_with_targets(batches, report, class_means):
                scene = _Scene(model, inputs, class_means)
                for predictor, fields in scene.predictions():
                    report._add(predictor, scene.metrics(fields))
                report._add("true_features", scene.object_accuracy(scene.true))
                if before is not None:
                    report._add("shuffled_latents", scene.metrics(scene.decode(latents=before)))
                    if first is not None:  # it had to wait for another scene
                        report._add("shuffled_latents", first.metrics(first.decode(latents=scene.latents)))
                first = scene if before is None else None
                before = scene.latents
                report.num_scenes += 1
                report.num_views += len(scene.targets)
                if progress is not None:
                    progress(report.num_scenes)
                if report.num_scenes == max_scenes:
                    break
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not report.num_scenes:
        raise ValueError(
            "`batches` must hold at least one scene with a target view, and there is none among "
            f"{report.skipped} scenes. Give scenes of at least 2 views, with some of them True in `target_mask`."
        )
    return report


def _check_class_means(model: Spa3RForPreTraining, class_means: Tensor) -> None:
    if "semantic" not in model.config.targets:
        raise ValueError(
            f"`class_means` must be None for a model without a semantic target, got one of {model.config.targets}."
        )
    width = model.config.semantic_hidden_size
    if class_means.ndim != 2 or class_means.shape[1] != width:
        raise ValueError(
            f"`class_means` must be (classes, {width}), means of the teacher's features, got "
            f"{tuple(class_means.shape)}."
        )


def _patch_classes(batch: Mapping[str, Any], patches: int, classes: int) -> Tensor:
    labels = batch.get("patch_classes")
    if not isinstance(labels, Tensor) or labels.shape != (patches,) or not -1 <= labels.min() <= labels.max() < classes:
        got = "none" if labels is None else f"{tuple(labels.shape)} from {labels.min()} to {labels.max()}"
        raise ValueError(
            f"With `class_means` every batch must hold `patch_classes`, ({patches},) from -1 to {classes - 1}, got "
            f"{got}."
        )
    return labels


def _scenes_with_targets(
    batches: Iterable[Mapping[str, Any]], report: FieldReport, class_means: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """The inputs of one scene after the other; scenes without a target view are counted and left out."""
    for batch in batches:
        if batch.get("target_mask") is None:
            raise ValueError(
                f"Every batch must hold `target_mask`, got {', '.join(batch)}. It says which views are to be predicted "
                "(True): set it yourself, False for the first view of every scene."
            )
        layout = ViewLayout.from_inputs(batch["view_grid_hw"], batch["views_per_scene"])
        is_target = [bool(target) for target in as_list(batch["target_mask"])]
        counts = list(layout.patches_per_view)
        pixels = batch["view_pixel_values"].split(counts)
        labels = None
        if class_means is not None:
            labels = _patch_classes(batch, sum(counts), len(class_means)).split(counts)
        for start, count in zip(layout.first_views, layout.views_per_scene):
            views = slice(start, start + count)
            if not any(is_target[views]):
                report.skipped += 1
                continue
            cameras = {name: batch[name][views] for name in ("extrinsics", "intrinsics") if batch.get(name) is not None}
            classes = {} if labels is None else {"patch_classes": torch.cat(labels[views])}
            yield (
                cameras
                | classes
                | {
                    "view_pixel_values": torch.cat(pixels[views]),
                    "view_grid_hw": layout.grid_hw[views],
                    "views_per_scene": [count],
                    "target_mask": is_target[views],
                }
            )


class _Scene:
    """One scene, processed once: the true fields of its target views, and those of every predictor."""

    classes: Tensor | None = None  # of the patches of the target views
    class_means: Tensor | None = None

    def __init__(self, model: Spa3RForPreTraining, inputs: dict[str, Any], class_means: Tensor | None = None) -> None:
        self.model, self.grids = model, inputs["view_grid_hw"]
        labels = inputs.pop("patch_classes", None)
        self.targets = [view for view, target in enumerate(inputs["target_mask"]) if target]
        self.context = [view for view, target in enumerate(inputs["target_mask"]) if not target]
        inputs["view_pixel_values"] = inputs["view_pixel_values"].to(model.device)
        output = model(**inputs)
        self.latents, self.extrinsics, self.intrinsics = output.latents, output.extrinsics, output.intrinsics
        counts = [height * width for height, width in self.grids]
        truth = {
            "geometry": output.geometry_targets,
            "semantic": output.semantic_targets,
            "depth": output.depth_targets,
        }
        views = {name: values.split(counts) for name, values in truth.items() if values is not None}
        self.true = self._of_targets(views)
        if class_means is not None and labels is not None:
            parts = labels.to(model.device).split(counts)
            self.classes = torch.cat([parts[view] for view in self.targets])
            self.class_means = class_means.to(model.device).float()
        self.predicted = self._of_targets({name: values.split(counts) for name, values in _by_target(output).items()})
        self.known = {name: [values[view] for view in self.context] for name, values in views.items()}
        if "geometry" in self.known:
            self.known["geometry"] = output.context_features.split([counts[view] for view in self.context])

    def _of_targets(self, views: dict[str, Sequence[Tensor]]) -> Fields:
        return {name: torch.cat([values[view] for view in self.targets]) for name, values in views.items()}

    def metrics(self, predicted: Fields) -> dict[Metric, float]:
        """The metrics of a prediction of the target views."""
        return field_metrics(predicted, self.true) | self.object_accuracy(predicted)

    def object_accuracy(self, predicted: Fields) -> dict[Metric, float]:
        """The share of object patches with the right nearest class mean; empty if there are none."""
        if self.classes is None or self.class_means is None or not (is_object := self.classes >= 0).any():
            return {}
        features = predicted["semantic"].float().expand(len(self.classes), -1)[is_object]
        nearest = torch.cdist(features, self.class_means).argmin(-1)
        return {"object_accuracy": (nearest == self.classes[is_object]).float().mean().item()}

    def predictions(self) -> Iterator[tuple[Predictor, Fields]]:
        """All predictors except the one that needs another scene."""
        yield "model", self.predicted
        means = {name: torch.cat(list(views)).float().mean(0, keepdim=True) for name, views in self.known.items()}
        yield "context_mean", means
        distances = pose_distances(self.extrinsics)[self.targets][:, self.context]
        nearest = distances.argmin(-1).tolist()  # for every target view an index into the context
        yield "nearest_view", {name: self._copied(views, nearest) for name, views in self.known.items()}
        yield "shuffled_cameras", self.decode(extrinsics=self.extrinsics.roll(max(1, len(self.grids) // 2), 0))

    def _copied(self, views: Sequence[Tensor], nearest: list[int]) -> Tensor:
        """For every target view the values of its nearest context view at the same patch."""
        grids = [(self.grids[self.context[near]], self.grids[view]) for near, view in zip(nearest, self.targets)]
        return torch.cat([_resized(views[near], *grid) for near, grid in zip(nearest, grids)])

    def decode(self, latents: Tensor | None = None, extrinsics: Tensor | None = None) -> Fields:
        """The field of the target views, with latents or poses other than the scene's."""
        field = self.model.spa3r.decode(
            self.latents if latents is None else latents,
            (self.extrinsics if extrinsics is None else extrinsics)[self.targets],
            self.intrinsics[self.targets],
            [self.grids[view] for view in self.targets],
            [len(self.targets)],
        )
        return _by_target(field)


def field_metrics(predicted: Fields, true: Fields) -> dict[Metric, float]:
    """The metrics of one scene; a prediction may have a single row that applies to all patches."""
    numbers: dict[Metric, Tensor] = {}
    for name, wanted in true.items():
        ours, wanted = torch.broadcast_tensors(predicted[name].float(), wanted.float())
        if name == "depth":
            numbers["depth_error"] = ((ours - wanted).abs() / wanted).mean()
        else:
            cosine, error = FEATURE_METRICS[name]
            numbers[cosine] = cosine_similarity(ours, wanted, dim=-1).mean()
            numbers[error] = (ours - wanted).norm() / wanted.norm()
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist()))  # a single device synchronization


def _by_target(field: Spa3RField) -> Fields:
    fields = {"geometry": field.geometry_features, "semantic": field.semantic_features, "depth": field.depth}
    return {name: values for name, values in fields.items() if values is not None}


def _resized(values: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:  # (N,) or (N, C)
    """Resize features or depth to another patch grid, bilinearly."""
    if grid == wanted:
        return values
    image = values.float().reshape(1, *grid, -1).movedim(-1, 1)
    return interpolate(image, size=wanted, mode="bilinear").flatten(2)[0].t().reshape(-1, *values.shape[1:])


def pose_distances(extrinsics: Tensor) -> Tensor:  # (V, 4, 4) -> (V, V)
    """Distances between the views of one scene, independent of its unit.

    The angle between two cameras (radians) plus the distance of their centers, scaled so that the largest distance of
    two centers is 1. If all cameras are at the same place, only the angle counts.
    """
    extrinsics = extrinsics.cpu().double()  # single precision is coarse near an angle of 0
    rotation, centers = extrinsics[:, :3, :3], invert_extrinsics(extrinsics)[:, :3, 3]
    relative = rotation[:, None] @ rotation.transpose(-2, -1)
    angles = ((relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos()
    distances = torch.cdist(centers, centers)
    return angles + distances / distances.max().clamp(min=1e-12)
