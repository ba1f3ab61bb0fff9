"""Views and feature fields as figures: a model's input, and its prediction for cameras of held-out views.

Every function returns an array or a new matplotlib ``Figure``. Nothing is shown, saved or cached: there is no global
state, and no display is needed.

    contact_sheet(views).savefig("views.png")
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spa3r.models.packing import as_list
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTrainingOutput

CELL = 1.75
"""Longer side of a picture in a contact sheet, in inches."""

MOST_CONTEXT, MOST_TARGETS = 10, 4
"""Maximum number of views in a field figure."""

PANEL, GAP, GROUP_GAP, MARGIN, CAPTION = 1.15, 0.06, 0.2, 0.15, 0.2
"""Inches in a field figure: side of a panel, between panels, between groups, at the edges, and below a panel."""

DPI = 150
MARK = "#d9480f"  # for marked views and warnings
GRAY = "#777777"


@dataclass(frozen=True)
class FeatureColors:
    """RGB colors of features: their three principal components, fitted once and applied to any number of fields.

    Attributes:
        mean: (C,), mean of the features that it was fitted on.
        directions: (C, 3), orthonormal, by decreasing variance; the entry of largest magnitude in each is positive.
        low: (3,), values mapped to 0 in each direction.
        high: (3,), values mapped to 1.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> FeatureColors:
        """Fit principal components to (N, C) features. The darkest and brightest percent are clipped."""
        features = features.detach().cpu().double()
        mean = features.mean(0)
        covariance = (features - mean).T @ (features - mean)
        directions = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(-1)
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        share = torch.tensor([0.01, 0.99], dtype=torch.float64)
        low, high = ((features - mean) @ directions).quantile(share, dim=0)
        return cls(mean, directions, low, high)

    def __call__(self, features: Tensor) -> np.ndarray:  # (..., C) -> (..., 3)
        """Colors in [0, 1]; values outside the fitted range are clipped."""
        places = (features.detach().cpu().double() - self.mean) @ self.directions
        return ((places - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1).numpy()


def contact_sheet(
    views: Sequence[np.ndarray],
    title: str = "",
    labels: Sequence[str] | None = None,
    marked: Collection[int] = (),
    note: str = "",
) -> Figure:
    """All views of a scene on one page.

    Args:
        views: Pictures (H, W, 3) uint8, of any sizes.
        title: Title of the page.
        labels: Label of every view; None: numbers from 0.
        marked: Indices of views to highlight with a colored frame and label.
        note: A warning below the title, for example that a model is untrained.
    """
    if not len(views):
        raise ValueError("`views` must hold at least one picture, got none.")
    if labels is not None and len(labels) != len(views):
        raise ValueError(f"`labels` must have one entry for each of the {len(views)} views, got {len(labels)}.")
    views = [np.asarray(view) for view in views]  # also converts PIL images
    columns = math.ceil(math.sqrt(len(views) * 1.3))
    rows = math.ceil(len(views) / columns)
    aspect = max(view.shape[0] / view.shape[1] for view in views)
    figure = _figure(max(columns * CELL, 5), rows * (CELL * aspect + 0.3), title, note)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, view in enumerate(views):
        _picture(axes[index], view, labels[index] if labels else str(index), MARK if index in marked else None)
    for empty in axes[len(views) :]:
        empty.set_axis_off()
    return figure


def field_figure(
    views: Sequence[np.ndarray],
    output: Spa3RForPreTrainingOutput,
    grid_hw: Sequence[Sequence[int]] | Tensor,
    true_depth: Sequence[np.ndarray] | None = None,
    title: str = "Feature field of held-out views",
    note: str = "",
    targets_are: str = "Held-out view",
    labels: Sequence[str] | None = None,
) -> Figure:
    """A model's predictions for held-out views of a scene, next to the truth.

    The top shows the context, which is the model's input. Below is a row per held-out view: the picture; for every
    target, the true and the predicted features in shared colors, and their difference; the depth of the probe, of the
    backbone, and the true depth if it is known.

    Args:
        views: Pictures (H, W, 3) uint8 of one scene, context and targets, in the model's input order. At most 10 of the
            context and 4 of the targets are drawn.
        output: The output of :class:`~spa3r.Spa3RForPreTraining` for this single scene.
        grid_hw: (views, 2), the patch grid of every view.
        true_depth: For every view (h, w), any size, meters.
        title: Title of the figure.
        note: A warning below the title, for example that the model is untrained.
        targets_are: Heading of the targets' pictures.
        labels: Label of every view, below the pictures of targets; None: no labels.

    Raises:
        ValueError: The views or labels don't match the output, or none of them is a target.
    """
    mask = [] if output.target_mask is None else output.target_mask.tolist()
    if not any(mask):
        raise ValueError("`output` must have at least one target view, got none. Set `target_mask`.")
    if len(views) != len(mask):
        raise ValueError(
            f"`views` must hold the {len(mask)} views that the output is about, got {len(views)}. Give all views of "
            "one scene, context and targets, in the order of the model's inputs."
        )
    if labels is not None and len(labels) != len(views):
        raise ValueError(f"`labels` must have one entry for each of the {len(views)} views, got {len(labels)}.")
    views = [np.asarray(view) for view in views]
    context = [view for view, target in enumerate(mask) if not target]
    targets = [view for view, target in enumerate(mask) if target]
    shown, rows = context[:MOST_CONTEXT], targets[:MOST_TARGETS]
    pictures = _Panel(
        "not seen", {view: views[view] for view in rows}, {view: labels[view] for view in rows} if labels else {}
    )
    grids = [tuple(grid) for grid in as_list(grid_hw)]
    groups = [(targets_are, [pictures]), *_field_panels(output, grids, true_depth, rows)]

    # Everything is placed in inches, from the top left corner.
    columns = sum(len(panels) for _, panels in groups)
    width = 2 * MARGIN + columns * (PANEL + GAP) - GAP + (len(groups) - 1) * (GROUP_GAP - GAP)
    thumb = min((width - 2 * MARGIN + GAP) / len(shown) - GAP, 1.2 * PANEL)
    thumb_height = thumb * max(_aspect(views[view]) for view in shown)
    height = PANEL * max(_aspect(views[view]) for view in rows)
    strip_top = 0.3 + 0.35 * bool(title) + 0.25 * bool(note)
    body_top = strip_top + thumb_height + 0.75
    page = _Page(width, body_top + len(rows) * (height + CAPTION) + 0.35)
    page.text(width / 2, 0.22, title, fontsize=12, weight="bold")
    page.text(width / 2, 0.22 + 0.27 * bool(title), note, fontsize=9, color=MARK)

    page.text(width / 2, strip_top - 0.12, _count("Context: the model sees", context, shown), fontsize=9.5)
    left = (width - len(shown) * (thumb + GAP) + GAP) / 2
    for view in shown:
        _picture(page.axes(left, strip_top, thumb, thumb_height, f"view {view}"), views[view])
        left += thumb + GAP

    left = MARGIN
    for group, panels in groups:
        group_width = len(panels) * (PANEL + GAP) - GAP
        page.text(left + group_width / 2, body_top - 0.36, group, fontsize=9.5)
        for panel in panels:
            page.text(left + PANEL / 2, body_top - 0.12, panel.heading, fontsize=8.5, color=GRAY)
            for row, view in enumerate(rows):
                top = body_top + row * (height + CAPTION)
                axes = page.axes(left, top, PANEL, height, f"view {view}, {group}, {panel.heading}")
                drawn = panel.draw(axes, view)
                page.text(left + PANEL / 2, top + height + 0.09, panel.captions.get(view, ""), fontsize=7.5, color=GRAY)
            if panel.colors is not None:
                bar = page.axes(left, page.height - 0.32, PANEL, 0.07)
                page.figure.colorbar(drawn, cax=bar, orientation="horizontal", extend=panel.extend)
                bar.tick_params(labelsize=7, color=GRAY, labelcolor=GRAY, length=2, pad=1.5)
                for spine in bar.spines.values():
                    spine.set_visible(False)
            left += PANEL + GAP
        left += GROUP_GAP - GAP
    return page.figure


@dataclass(frozen=True)
class _Panel:
    """One column of a field figure: one image per held-out view, all with the same color scale."""

    heading: str
    images: dict[int, np.ndarray]
    captions: dict[int, str] = field(default_factory=dict)
    colors: str | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    extend: str = "neither"

    def draw(self, axes: Axes, view: int) -> AxesImage:
        low, high = self.limits
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes.imshow(self.images[view], cmap=self.colors, vmin=low, vmax=high, interpolation="nearest")


def _field_panels(
    output: Spa3RForPreTrainingOutput,
    grids: Sequence[tuple[int, int]],
    true_depth: Sequence[np.ndarray] | None,
    rows: Sequence[int],
) -> list[tuple[str, list[_Panel]]]:
    """The columns of a field figure beside the pictures, in groups with headings."""

    def by_view(values: Tensor) -> dict[int, Tensor]:  # (sum of N, ...) -> (h, w, ...) for every drawn view
        parts = values.detach().float().cpu().split([height * width for height, width in grids])
        return {view: parts[view].unflatten(0, grids[view]) for view in rows}

    groups = []
    targets = {
        "Geometry": (output.geometry_features, output.geometry_targets),
        "Semantic": (output.semantic_features, output.semantic_targets),
    }
    for name, (predicted, true) in targets.items():
        if predicted is None or true is None:
            continue
        predicted, true = by_view(predicted), by_view(true)
        colors = FeatureColors.fit(torch.cat([values.flatten(0, 1) for values in true.values()]))
        errors = {view: 1 - cosine_similarity(predicted[view], true[view], dim=-1).clamp(max=1) for view in rows}
        panels = [
            _Panel("true", {view: colors(values) for view, values in true.items()}),
            _Panel("predicted", {view: colors(values) for view, values in predicted.items()}),
            _Panel(
                "1 − cosine",
                {view: error.numpy() for view, error in errors.items()},
                {view: f"mean {error.mean():.2f}" for view, error in errors.items()},
                colors="magma",
                limits=(0.0, 0.5),  # 1 means no similarity; 0.5 is bad already
                extend="max",
            ),
        ]
        groups.append((f"{name} features, shared colors", panels))

    sources = {"probe": output.depth, "backbone": output.depth_targets}
    depths = {name: by_view(values) for name, values in sources.items() if values is not None}
    captions = {}
    if len(depths) == len(sources):
        errors = {view: (depths["probe"][view] / depths["backbone"][view] - 1).abs().mean() for view in rows}
        captions = {view: f"off by {100 * error:.0f} %" for view, error in errors.items()}
    limits = _range(list(depths.values())[-1].values())  # one unit, one range
    panels = [
        _Panel(
            name,
            {view: values.numpy() for view, values in depth.items()},
            captions if name == "probe" else {},
            colors="viridis",
            limits=limits,
        )
        for name, depth in depths.items()
    ]
    if true_depth is not None:
        meters = {view: np.asarray(true_depth[view]) for view in rows}
        panels.append(_Panel("true, meters", meters, colors="viridis", limits=_range(meters.values())))
    return [*groups, ("Depth", panels)]


def _range(images: Iterable[np.ndarray | Tensor]) -> tuple[float, float]:
    images = list(images)
    return min(float(image.min()) for image in images), max(float(image.max()) for image in images)


def _aspect(view: np.ndarray) -> float:
    return view.shape[0] / view.shape[1]


def _count(words: str, views: Sequence[int], shown: Sequence[int]) -> str:
    words += f" {len(views)} view{'s' * (len(views) != 1)}"
    return words + f" ({len(shown)} are drawn)" * (len(shown) < len(views))


class _Page:
    """A figure with elements placed in inches from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI)

    def axes(self, left: float, top: float, width: float, height: float, label: str = "") -> Axes:
        corner = (left / self.width, 1 - (top + height) / self.height)
        return self.figure.add_axes((*corner, width / self.width, height / self.height), label=label)

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        if words:
            self.figure.text(x / self.width, 1 - y / self.height, words, ha="center", va="center", **style)


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    """An empty page with its title; `height` is that of the pictures alone."""
    top = 0.4 * bool(title) + 0.25 * bool(note)
    margin = 0.1 / width
    layout = ConstrainedLayoutEngine(rect=(margin, 0.02, 1 - 2 * margin, height / (height + top) - 0.02))
    figure = Figure(figsize=(width, height + top), dpi=DPI, layout=layout)
    y = 1 - 0.22 / (height + top)
    if title:
        figure.text(0.5, y, title, ha="center", va="center", fontsize=12, weight="bold")
        y -= 0.27 / (height + top)
    if note:
        figure.text(0.5, y, note, ha="center", va="center", fontsize=9, color=MARK)
    return figure


def _picture(axes: Axes, picture: np.ndarray, label: str = "", frame: str | None = None) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(label, fontsize=8.5, pad=3, color=frame or "black")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=2)
