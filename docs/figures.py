"""Draws the pictures of the documentation while it is built, so that they can't be older than the code."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from sphinx.application import Sphinx

from spa3r.rooms import LEVELS, camera_walk, generate_room, look_around, render
from spa3r.rooms.embedded import embedded_spa3r
from spa3r.visualization import field_figure

FOLDER = Path(__file__).parent / "_build" / "figures"
SIZE = (168, 224)  # height and width of one view


def draw_rooms() -> PIL.Image.Image:
    """A row of views for every level: one room, every eighth frame of a walk."""
    rows = []
    for level in range(len(LEVELS)):
        room = generate_room(seed=3, level=level)
        rows.append(np.concatenate(list(render(room, camera_walk(room, 32, SIZE)).images[::8]), axis=1))
    return PIL.Image.fromarray(np.concatenate(rows))


def draw_kinds() -> PIL.Image.Image:
    """What `render` returns of one view: picture, depth, instance ids."""
    room = generate_room(seed=3, level=2)
    views = render(room, camera_walk(room, 1, SIZE))
    depth = 255 - 255 * views.depth[0] / views.depth[0].max()
    palette = np.random.default_rng(1).integers(60, 256, (len(room.objects) + 1, 3))
    palette[0] = 235
    panels = [views.images[0], np.repeat(depth[..., None], 3, axis=-1), palette[views.instance_ids[0]]]
    return PIL.Image.fromarray(np.concatenate([panel.astype(np.uint8) for panel in panels], axis=1))


def draw_field() -> Figure:
    """What the embedded Spa3R predicts of every second view of a room."""
    model, processor = embedded_spa3r()
    room = generate_room(seed=1_000_002, level=0)
    views = render(room, look_around(room))
    inputs = processor(list(views.images))
    cameras = {"extrinsics": views.extrinsics, "intrinsics": views.intrinsics}
    with torch.no_grad():
        output = model(**inputs, **cameras, target_mask=[False, True] * 4)
    return field_figure(views.images, output, inputs["view_grid_hw"], views.depth)


def draw(app: Sphinx) -> None:
    """Write all figures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw_rooms().save(FOLDER / "rooms.png")
    draw_kinds().save(FOLDER / "kinds.png")
    draw_field().savefig(FOLDER / "field.png")


def setup(app: Sphinx) -> dict:
    """Sphinx's entry."""
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
