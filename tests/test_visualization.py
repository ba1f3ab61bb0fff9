"""Pictures of views and fields: shared colours, whole figures, nothing global."""

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from media import noise, smooth
from PIL import Image

from spa3r import visualization
from spa3r.visualization import FeatureColours, contact_sheet, field_figure


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


def test_colours_are_shared_by_all_fields():
    one, other = features(0), features(1)
    colours = FeatureColours.fit(one)
    both = colours(torch.cat([other, one]))
    np.testing.assert_array_equal(both, np.concatenate([colours(other), colours(one)]))
    assert not np.allclose(colours(other), FeatureColours.fit(other)(other))


def test_colours_span_their_range_and_stay_in_it():
    colours = FeatureColours.fit(features(0))
    own, wild = colours(features(0)), colours(100 * features(1))
    assert own.shape == (64, 3) and own.min() == 0 and own.max() == 1
    assert own.std(axis=0).min() > 0.1
    assert wild.min() == 0 and wild.max() == 1
    assert colours(features(0).reshape(8, 8, 16)).shape == (8, 8, 3)


def test_colours_follow_the_main_directions_with_a_fixed_sign():
    values = features(0)
    colours = FeatureColours.fit(values)
    centred = (values - values.mean(0)).double()
    main = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    torch.testing.assert_close((colours.directions * main).sum(0).abs(), torch.ones(3, dtype=torch.float64))
    largest = colours.directions.gather(0, colours.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    np.testing.assert_array_equal(FeatureColours.fit(values)(values), colours(values))
    np.testing.assert_allclose(FeatureColours.fit(values.flip(0))(values), colours(values), atol=1e-9)


def test_constant_features_have_a_colour_too():
    constant = torch.ones(10, 8)
    assert np.isfinite(FeatureColours.fit(constant)(constant)).all()


def test_half_precision_with_gradients():
    values = features(0).bfloat16().requires_grad_()
    assert FeatureColours.fit(values)(values).dtype == np.float64


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


def make_field_figure(decoded: torch.Tensor, **kwargs):
    picture = np.asarray(smooth(56, 42))
    return field_figure(
        [picture] * 3, picture, (6, 8), features(0, 48), decoded, torch.linspace(1, 3, 48), np.eye(42, 56), **kwargs
    )


def test_field_figure_says_what_is_seen():
    figure = make_field_figure(features(1, 48), title="A field", note="untrained")
    said = " | ".join(texts(figure))
    for words in ("A field", "untrained", "sees 3 views", "Held-out", "True features", "Decoded features", "Depth"):
        assert words in said
    assert drawn(figure).std() > 10


def test_field_figure_of_a_perfect_model():
    figure = make_field_figure(features(0, 48))
    panels = {axes.get_title(): axes.images[0].get_array() for axes in figure.findobj(match=_is_panel)}
    np.testing.assert_array_equal(panels["True features (backbone)"], panels["Decoded features (same colours)"])
    assert np.abs(panels["Cosine error, mean 0.00"]).max() < 1e-5
    assert panels["Depth of the probe (model's unit)"].shape == (6, 8)


def _is_panel(artist) -> bool:
    return bool(getattr(artist, "images", None)) and bool(artist.get_title())


def test_no_figure_is_registered_anywhere():
    drawn(contact_sheet([np.asarray(smooth(40, 30))]))
    assert not Gcf.figs
    assert "pyplot" not in vars(visualization)
