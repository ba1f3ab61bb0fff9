"""The result of a demo as one self-contained HTML page: no other files, scripts or network access.

page = room_report(views, cameras=walk, room=room, questions=questions, facts={"room": "seed 7"})
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from spa3r.page import TYPE_TITLES, bar, figure, html_options, html_table, image, make_page, png_of, said, section
from spa3r.rooms import COLORS, Cameras, Room
from spa3r.vsi_bench.format import is_choice

# Walls 0..3, at -x, -y, +x and +y: their positions, and the direction in which a fixture's `along` grows.
_WALLS = (((-1, 0), (0, 1)), ((0, -1), (-1, 0)), ((1, 0), (0, -1)), ((0, 1), (1, 0)))

LEAD = (
    "Spa3R turns views of a place into one spatial representation; a vision-language model that looks at it answers "
    "questions about the place. Here is one room, every question with its true answer, and what the model says with "
    "Spa3R and without."
)

_DOOR = "#8a5a2b"
_PIXELS = 160  # minimum size of a view's longer side: smaller ones are enlarged without blur


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a demo with both answers.

    Attributes:
        question_type: Type of VSI-Bench.
        question: Its text; choices have a line ``Options:`` and one option per line.
        answer: Answer of the model with Spa3R.
        truth: A number, or the letter of an option.
        score: Score of the answer, between 0 and 1.
        answer_without_spa3r: Answer of the VLM without Spa3R.
        score_without_spa3r: Score of that answer.
    """

    question_type: str
    question: str
    answer: str
    truth: str
    score: float
    answer_without_spa3r: str
    score_without_spa3r: float


def room_report(
    views: Sequence[np.ndarray],
    room: Room,
    cameras: Cameras,
    questions: Sequence[AskedQuestion],
    scores: tuple[float, float],
    facts: Mapping[str, str],
    note: str = "",
    figures: Mapping[str, Figure] | None = None,
    table: str = "",
    command: str = "",
) -> str:
    """A page about one room: its views, the questions and the answers with and without Spa3R.

    Args:
        views: The pictures (H, W, 3) uint8 that the questions refer to, in order.
        room: The room; drawn from above.
        cameras: Cameras of the views.
        questions: The questions, with answers and scores.
        scores: Overall scores with Spa3R and without, in percent.
        facts: Facts about room, model and weights, by name.
        note: A warning at the top, such as that the answers come from untrained weights.
        figures: More pictures, by their captions.
        table: A Markdown table below the figures.
        command: The command that creates the same page again.

    Returns:
        An HTML document with its pictures inside.
    """
    sections = [
        section("The room", figure(floor_plan(room, cameras), _plan_caption(room)) + _views(views), "room"),
        section(
            "Questions", _summary(scores, len(questions)) + "".join(map(_question, questions)), "questions", "cards"
        ),
    ]
    if figures or table:
        pictures = "".join(figure(image(png_of(drawn), caption), caption) for caption, drawn in figures.items())
        title = "The feature field of views that it was not shown"
        sections.append(section(title, pictures + html_table(table), "field"))
    return make_page("A room that it has never seen", LEAD, facts, sections, note, command)


# Parts of the page


def floor_plan(room: Room, cameras: Cameras) -> str:
    """The room from above as SVG, to scale: objects, the path of the camera, and its viewing directions.

    Args:
        room: The room.
        cameras: Cameras of the views, in the room's frame.
    """
    length, width, _ = room.size
    margin, scale = 0.35, 100  # meters around the room, units per meter

    def points(places: np.ndarray) -> str:  # (N, 2) meters, y up -> units, y down
        return " ".join(f"{scale * x:.0f},{-scale * y:.0f}" for x, y in np.asarray(places))

    def line(places: np.ndarray, style: str) -> str:
        return f'<polyline points="{points(places)}" fill="none" {style}/>'

    corners = np.array([[-length, -width], [length, -width], [length, width], [-length, width]]) / 2
    shapes = [f'<polygon points="{points(corners)}" class="floor"/>']
    for fixture in room.fixtures:
        stands, along = np.array(_WALLS[fixture.wall])
        middle = stands * np.array([length, width]) / 2 + along * fixture.along
        ends = np.stack([middle - along * fixture.size[0] / 2, middle + along * fixture.size[0] / 2])
        is_door = fixture.bottom == 0
        shapes.append(line(ends, f'stroke="{_DOOR}" stroke-width="14"' if is_door else 'class="fixture"'))
    for item in room.objects:
        color = "#" + "".join(f"{round(255 * channel):02x}" for channel in COLORS[item.color])
        title = escape(f"{item.color} {item.name}, {' × '.join(f'{side:.2f}' for side in item.size)} m")
        shapes.append(
            f'<polygon points="{points(item.footprint())}" fill="{color}" class="object"><title>{title}</title>'
            "</polygon>"
        )

    rotation = np.asarray(cameras.extrinsics, np.float64)[:, :3, :3]
    centers = -np.einsum("vji,vj->vi", rotation, np.asarray(cameras.extrinsics, np.float64)[:, :3, 3])[:, :2]
    shapes.append(line(centers, 'class="walk"'))
    for view, (center, looks) in enumerate(zip(centers, rotation[:, 2, :2])):
        looks = looks / max(np.linalg.norm(looks), 1e-9)
        aside = np.array([-looks[1], looks[0]])
        wedge = np.stack([center, center + 0.34 * looks + 0.16 * aside, center + 0.34 * looks - 0.16 * aside])
        shapes.append(
            f'<polygon points="{points(wedge)}" class="camera"/>'
            f'<circle cx="{scale * center[0]:.0f}" cy="{-scale * center[1]:.0f}" r="6" class="center">'
            f"<title>view {view}</title></circle>"
        )
    for item in room.objects:
        x, y = scale * item.center[0], -scale * item.center[1]
        shapes.append(f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(item.name)}</text>')
    left, top = -scale * (length / 2 + margin), -scale * (width / 2 + margin)
    box = f"{left:.0f} {top:.0f} {-2 * left:.0f} {-2 * top:.0f}"
    letters = f"font-size:{3 * max(length, width):.0f}px"  # scales with the size of the room
    return (
        f'<svg viewBox="{box}" role="img" aria-label="The room from above" class="plan" style="{letters}">'
        f"{''.join(shapes)}</svg>"
    )


def _plan_caption(room: Room) -> str:
    length, width, height = room.size
    return (
        f"From above, to scale: {length:.1f} × {width:.1f} m, {height:.1f} m high, {len(room.objects)} objects. "
        "The line is the way of the camera, every wedge a view. The model sees the views only."
    )


def _views(views: Sequence[np.ndarray]) -> str:
    cells = "".join(
        f"<li>{image(_png(np.asarray(view)), f'View {index}')}<span>{index}</span></li>"
        for index, view in enumerate(views)
    )
    caption = f"What the model sees: {len(views)} views, in this order."
    return f'<figure><ol class="views">{cells}</ol><figcaption>{caption}</figcaption></figure>'


def _summary(scores: tuple[float, float], count: int) -> str:
    rows = "".join(
        f'<div class="total {name}"><b>{score:.0f}</b><span>{title}</span>{bar(score / 100)}</div>'
        for name, title, score in zip(("with", "without"), ("with Spa3R", "without Spa3R"), scores)
    )
    return (
        f'<div class="totals">{rows}</div><p class="hint">Overall score by the rules of VSI-Bench, of 100: the mean of '
        f"its tasks. {count} questions about one room are a glimpse and no measurement.</p>"
    )


def _question(asked: AskedQuestion) -> str:
    text, _, options = asked.question.partition("\nOptions:\n")
    choices = [option for option in options.split("\n") if option]
    rows = (
        ("with", "With Spa3R", asked.answer, asked.score),
        ("without", "Without", asked.answer_without_spa3r, asked.score_without_spa3r),
    )
    answers = "".join(
        f'<tr class="{name}"><th scope="row">{title}</th><td>{said(answer, choices)}</td>'
        f"<td>{bar(score)}</td><td>{100 * score:.0f}</td></tr>"
        for name, title, answer, score in rows
    )
    truth = f'<tr class="truth"><th scope="row">Truth</th><td colspan="3">{said(asked.truth, choices)}</td></tr>'
    scored = "right or wrong" if is_choice(asked.question_type) else "the nearer the better"
    return (
        f"<article><header><h3>{escape(TYPE_TITLES[asked.question_type])}</h3><span>{scored}</span></header>"
        f"<p>{escape(text)}</p>"
        + html_options(choices, asked.truth)
        + f'<table class="answers">{answers}{truth}</table></article>'
    )


def _png(view: np.ndarray) -> bytes:
    picture, file = PIL.Image.fromarray(view), io.BytesIO()
    factor = -(-_PIXELS // max(picture.size))  # a browser would blur it
    picture.resize([factor * side for side in picture.size], PIL.Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()
