"""Views and feature fields as pictures: what a model was shown, and what it says of a camera that it was not shown.

Every function returns an array or a matplotlib ``Figure`` of its own. Nothing is shown, saved or kept: there is no
global state and no display is needed.

    contact_sheet(views).savefig("views.png")
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

CELL = 1.75
"""Inches of a picture's longer side in a contact sheet."""

DPI = 150
MARK = "#d9480f"  # of the views that stand out, and of warnings
GREY = "#777777"


@dataclass(frozen=True)
class FeatureColours:
    """RGB colours of features: their three main directions, fitted once and shared by every field it is applied to.

    Attributes:
        mean: (C,) of the features that it was fitted on.
        directions: (C, 3), orthonormal, by falling variance; in each the entry of largest size is positive.
        low: (3,), what becomes 0 in each direction.
        high: (3,), what becomes 1.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> FeatureColours:
        """Principal components of (N, C) features. The darkest and brightest percent are cut off."""
        features = features.detach().cpu().double()
        mean = features.mean(0)
        covariance = (features - mean).T @ (features - mean)
        directions = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(-1)
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        share = torch.tensor([0.01, 0.99], dtype=torch.float64)
        low, high = ((features - mean) @ directions).quantile(share, dim=0)
        return cls(mean, directions, low, high)

    def __call__(self, features: Tensor) -> np.ndarray:  # (..., C) -> (..., 3)
        """Colours in [0, 1]; what lies outside the fitted range is cut to it."""
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
        title: Stands above all.
        labels: Of every view; None: numbers from 0.
        marked: Indices of views that stand out by a coloured frame and label.
        note: A warning below the title, such as that a model is untrained.
    """
    if not len(views):
        raise ValueError("`views` must hold at least one picture, got none.")
    if labels is not None and len(labels) != len(views):
        raise ValueError(f"`labels` must have one entry for each of the {len(views)} views, got {len(labels)}.")
    views = [np.asarray(view) for view in views]  # PIL images too
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
    context_views: Sequence[np.ndarray],
    target_view: np.ndarray,
    grid_hw: tuple[int, int],
    true_features: Tensor,
    decoded_features: Tensor,
    probe_depth: Tensor,
    true_depth: np.ndarray | Tensor,
    title: str = "Feature field at a held-out camera",
    note: str = "",
) -> Figure:
    """What a model knows of a view that it has not seen, beside the truth.

    Above the context views; then the held-out view, its true and decoded features in shared colours; then where they
    differ, and depth, the model's and the true one, each in its own unit and range.

    Args:
        context_views: Pictures (H, W, 3) uint8 that the model was shown; at most 10 are drawn.
        target_view: The picture (H, W, 3) uint8 that it was not shown.
        grid_hw: Patch grid of the target view, N patches.
        true_features: (N, C), the backbone's.
        decoded_features: (N, C), decoded from the latents.
        probe_depth: (N,), the model's, in the backbone's unit.
        true_depth: (h, w), any size, metres.
        title: Stands above all.
        note: A warning below the title, such as that the model is untrained.
    """
    colours = FeatureColours.fit(true_features)
    true, decoded = (colours(features).reshape(*grid_hw, 3) for features in (true_features, decoded_features))
    error = 1 - torch.nn.functional.cosine_similarity(true_features.float(), decoded_features.float(), dim=-1)
    error = error.detach().cpu().clamp(min=0).reshape(grid_hw).numpy()
    aspect = target_view.shape[0] / target_view.shape[1]
    shown = context_views[:10]
    figure = _figure(8.4, 1.45 + 2 * (2.5 * aspect + 0.35), title, note)
    strip, body = figure.subfigures(2, 1, height_ratios=[1.45, 2 * (2.5 * aspect + 0.35)])
    caption = f"Context: the model sees {len(context_views)} view{'s' * (len(context_views) != 1)}"
    strip.suptitle(caption + f" ({len(shown)} are drawn)" * (len(shown) < len(context_views)), fontsize=9.5)
    for axes, view in zip(strip.subplots(1, len(shown), squeeze=False)[0], shown):
        _picture(axes, view)

    axes = body.subplots(2, 3).flatten()
    _picture(axes[0], target_view, "Held-out view (not seen)", MARK)
    _picture(axes[1], true, "True features (backbone)")
    _picture(axes[2], decoded, "Decoded features (same colours)")
    _map(axes[3], error, f"Cosine error, mean {error.mean():.2f}", "magma", 0, 1)
    _map(
        axes[4],
        probe_depth.detach().float().cpu().reshape(grid_hw).numpy(),
        "Depth of the probe (model's unit)",
        "viridis",
    )
    _map(axes[5], np.asarray(true_depth), "True depth (metres)", "viridis")
    return figure


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    """An empty page with its title; `height` is that of the pictures alone."""
    top = 0.4 * bool(title) + 0.25 * bool(note)
    figure = Figure(figsize=(width, height + top), dpi=DPI, layout="constrained")
    margin = 0.1 / width
    figure.get_layout_engine().set(rect=(margin, 0.02, 1 - 2 * margin, height / (height + top) - 0.02))
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


def _map(
    axes: Axes,
    values: np.ndarray | Tensor,
    label: str,
    colours: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Numbers as colours, with the scale beside them."""
    drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(label, fontsize=8.5, pad=3)
    axes.set_axis_off()
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, extend="neither" if high is None else "max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, color=GREY, labelcolor=GREY, length=2)
