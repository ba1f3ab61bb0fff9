"""Pictures of views and fields: shared colors, whole figures, nothing global."""

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from media import noise, smooth
from PIL import Image
from tiny import alive, pretraining_config, view_inputs

from spa3r import Spa3RForPreTraining, visualization
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTrainingOutput
from spa3r.visualization import FeatureColors, contact_sheet, field_figure


def drawn(figure) -> np.ndarray:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def texts(figure) -> list[str]:
    """Everything that a figure says."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def features(seed: int, count: int = 64, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.1, channels)  # variances that differ, as real features' do
    return torch.randn(count, channels, generator=generator) * spread


def test_colors_are_shared_by_all_fields():
    one, other = features(0), features(1)
    colors = FeatureColors.fit(one)
    both = colors(torch.cat([other, one]))
    np.testing.assert_array_equal(both, np.concatenate([colors(other), colors(one)]))
    assert not np.allclose(colors(other), FeatureColors.fit(other)(other))


def test_colors_span_their_range_and_stay_in_it():
    colors = FeatureColors.fit(features(0))
    own, wild = colors(features(0)), colors(100 * features(1))
    assert own.shape == (64, 3) and own.min() == 0 and own.max() == 1
    assert own.std(axis=0).min() > 0.1
    assert wild.min() == 0 and wild.max() == 1
    assert colors(features(0).reshape(8, 8, 16)).shape == (8, 8, 3)


def test_colors_follow_the_main_directions_with_a_fixed_sign():
    values = features(0)
    colors = FeatureColors.fit(values)
    centred = (values - values.mean(0)).double()
    main = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    torch.testing.assert_close((colors.directions * main).sum(0).abs(), torch.ones(3, dtype=torch.float64))
    largest = colors.directions.gather(0, colors.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    np.testing.assert_array_equal(FeatureColors.fit(values)(values), colors(values))
    np.testing.assert_allclose(FeatureColors.fit(values.flip(0))(values), colors(values), atol=1e-9)


def test_constant_features_have_a_color_too():
    constant = torch.ones(10, 8)
    assert np.isfinite(FeatureColors.fit(constant)(constant)).all()


def test_half_precision_with_gradients():
    values = features(0).bfloat16().requires_grad_()
    assert FeatureColors.fit(values)(values).dtype == np.float64


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_contact_sheet_shows_every_view(count):
    views = [np.asarray(smooth(40, 30))] * count
    figure = contact_sheet(views, "A room", marked=[count - 1], note="careful")
    assert sum(bool(axes.images) for axes in figure.axes) == count
    assert {"A room", "careful", *map(str, range(count))} <= set(texts(figure))
    assert drawn(figure).std() > 10


def test_contact_sheet_takes_views_of_any_sizes():
    sheet = contact_sheet([np.asarray(noise(40, 30)), np.asarray(noise(30, 60))], labels=["wide", "high"])
    assert {"wide", "high"} <= set(texts(sheet))


def test_contact_sheet_of_nothing():
    with pytest.raises(ValueError, match="must hold at least one picture, got none"):
        contact_sheet([])


def an_output(targets: int = 2, **changes) -> Spa3RForPreTrainingOutput:
    """Of a scene whose views are 6 x 8 patches, every second one a target."""
    mask = torch.arange(2 * targets) % 2 == 1
    count = 48 * len(mask)
    fields = {
        "last_hidden_state": torch.zeros(1, 4, 8),
        "target_mask": mask,
        "geometry_targets": features(0, count),
        "geometry_features": features(1, count),
        "semantic_targets": features(2, count, 12),
        "semantic_features": features(3, count, 12),
        "depth_targets": torch.linspace(1, 3, count),
        "depth": torch.linspace(1, 3, count) * 1.5,
    }
    return Spa3RForPreTrainingOutput(**(fields | changes))


def make_field_figure(output, meters: bool = True, **kwargs):
    count = len(output.target_mask)
    views = [np.asarray(noise(56, 42, seed)) for seed in range(count)]
    true_depth = [np.eye(42, 56) + view for view in range(count)] if meters else None
    return field_figure(views, output, torch.tensor([[6, 8]] * count), true_depth, **kwargs)


def panels(figure) -> dict[str, np.ndarray]:
    """What is drawn, by label."""
    drawn = [axes for axes in figure.axes if axes.images]
    assert len({axes.get_label() for axes in drawn}) == len(drawn)
    return {axes.get_label(): np.asarray(axes.images[0].get_array()) for axes in drawn}


def test_field_figure_says_what_is_seen():
    figure = make_field_figure(an_output(), title="A field", note="untrained")
    said = " | ".join(texts(figure))
    words = ("A field", "untrained", "the model sees 2 views", "Held-out", "Geometry features", "Semantic features")
    for word in (*words, "true", "predicted", "1 − cosine", "probe", "backbone", "true, meters", "off by 50 %"):
        assert word in said
    assert drawn(figure).std() > 10


def test_field_figure_shows_each_view_in_its_place():
    output = an_output(3)
    shown = panels(make_field_figure(output))
    kinds = ("true", "predicted", "1 − cosine")
    columns = ["Held-out view, not seen", *(f"Depth, {name}" for name in ("probe", "backbone", "true, meters"))]
    columns += [f"{name} features, shared colors, {kind}" for name in ("Geometry", "Semantic") for kind in kinds]
    wanted = {f"view {view}, {column}" for view in (1, 3, 5) for column in columns}
    assert shown.keys() == wanted | {f"view {view}" for view in (0, 2, 4)}
    for view in range(6):
        label = f"view {view}" + ", Held-out view, not seen" * (view % 2)
        np.testing.assert_array_equal(shown[label], np.asarray(noise(56, 42, view)))
    rows = torch.cat([output.geometry_targets.split(48)[view] for view in (1, 3, 5)])
    colors = FeatureColors.fit(rows)  # of all true features that are drawn, and of nothing else
    error = 1 - torch.nn.functional.cosine_similarity(output.geometry_features, output.geometry_targets)
    for view in (1, 3, 5):
        group = f"view {view}, Geometry features, shared colors"
        for kind, name in (("true", "geometry_targets"), ("predicted", "geometry_features")):
            part = output[name].split(48)[view].view(6, 8, -1)
            np.testing.assert_allclose(shown[f"{group}, {kind}"], colors(part))
        np.testing.assert_allclose(shown[f"{group}, 1 − cosine"], error.split(48)[view].view(6, 8).numpy(), atol=1e-6)
        np.testing.assert_allclose(shown[f"view {view}, Depth, probe"], output.depth.split(48)[view].view(6, 8).numpy())
        np.testing.assert_array_equal(shown[f"view {view}, Depth, true, meters"], np.eye(42, 56) + view)


def test_field_figure_says_what_its_targets_are():
    figure = make_field_figure(an_output(), targets_are="New camera", labels=["", "above", "", "beside"])
    said = texts(figure)
    assert "New camera" in said and "Held-out view" not in said and said.count("above") == said.count("beside") == 1
    assert "view 1, New camera, not seen" in panels(figure)
    with pytest.raises(ValueError, match=r"`labels` must have one entry for each of the 4 views, got 1"):
        make_field_figure(an_output(), labels=["above"])


def test_field_figure_of_a_perfect_model():
    output = an_output()
    output.geometry_features, output.depth = output.geometry_targets.clone(), output.depth_targets.clone()
    shown = panels(make_field_figure(output))
    for view in (1, 3):
        group = f"view {view}, Geometry features, shared colors"
        np.testing.assert_array_equal(shown[f"{group}, true"], shown[f"{group}, predicted"])
        assert np.abs(shown[f"{group}, 1 − cosine"]).max() < 1e-5
    assert {"mean 0.00", "off by 0 %"} <= set(texts(make_field_figure(output)))


def test_depths_of_one_unit_share_their_range():
    figure = make_field_figure(an_output())
    limits = {axes.get_label(): axes.images[0].get_clim() for axes in figure.axes if "Depth" in axes.get_label()}
    assert len({limits[f"view {view}, Depth, {name}"] for view in (1, 3) for name in ("probe", "backbone")}) == 1
    assert limits["view 1, Depth, true, meters"] == (1, 4)  # of its own, over all rows


def test_field_figure_leaves_out_what_there_is_not():
    output = an_output(semantic_features=None, semantic_targets=None, depth_targets=None)
    labels = " ".join(panels(make_field_figure(output, meters=False)))
    assert "Geometry" in labels and "probe" in labels
    assert not [word for word in ("Semantic", "backbone", "meters") if word in labels]


def test_field_figure_of_many_views_and_of_several_grids():
    figure = make_field_figure(an_output(12))
    assert "the model sees 12 views (10 are drawn)" in " ".join(texts(figure))
    assert sum("not seen" in label for label in panels(figure)) == 4
    assert drawn(figure).shape[0] < 2500
    output = an_output(1, geometry_targets=features(0, 30), geometry_features=features(1, 30))
    output.semantic_targets = output.semantic_features = None
    output.depth_targets = output.depth = torch.ones(30)
    views = [np.asarray(noise(30, 40)), np.asarray(noise(60, 20))]
    shown = panels(field_figure(views, output, [[6, 3], [2, 6]]))
    assert shown["view 1, Depth, probe"].shape == (2, 6)


def test_field_figure_refuses_other_views():
    picture = np.asarray(noise(56, 42))
    with pytest.raises(ValueError, match=r"`views` must hold the 4 views that the output is about, got 1. Give all"):
        field_figure([picture], an_output(), [[6, 8]] * 4)
    with pytest.raises(ValueError, match=r"must have at least one target view, got none. Set `target_mask`"):
        field_figure([picture] * 4, an_output(target_mask=torch.zeros(4, dtype=torch.bool)), [[6, 8]] * 4)


@torch.no_grad()
def test_field_figure_takes_what_the_model_returns():
    model = alive(Spa3RForPreTraining(pretraining_config()))
    inputs = view_inputs([[(3, 5), (4, 3), (3, 5)]], [[0, 1, 1]])
    views = [np.asarray(noise(20, 12)), np.asarray(noise(12, 16)), np.asarray(noise(20, 12))]
    figure = field_figure(views, model(**inputs), inputs["view_grid_hw"])
    assert drawn(figure).std() > 10


def test_no_figure_is_registered_anywhere():
    drawn(contact_sheet([np.asarray(smooth(40, 30))]))
    assert not Gcf.figs
    assert "pyplot" not in vars(visualization)
