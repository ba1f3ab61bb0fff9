"""What a demo has shown, as one HTML page: no other file, no script, nothing from the network.

page = room_report(views, cameras=walk, room=room, questions=questions, facts={"room": "seed 7"})
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from spa3r.data.vsi_format import is_choice
from spa3r.evaluation.vsi_bench import parse_prediction
from spa3r.rooms import COLOURS, Cameras, Room

TYPE_TITLES = {
    "object_counting": "How many",
    "object_abs_distance": "Distance",
    "object_size_estimation": "Object size",
    "room_size_estimation": "Room size",
    "object_rel_distance": "Which is nearest",
    "object_rel_direction_easy": "Direction, easy",
    "object_rel_direction_medium": "Direction, medium",
    "object_rel_direction_hard": "Direction, hard",
    "route_planning": "Route",
    "obj_appearance_order": "Order of appearance",
}
"""Question types of VSI-Bench in few words."""

# Of walls 0..3, at -x, -y, +x and +y: where they stand, and the direction in which a fixture's `along` grows.
_WALLS = (((-1, 0), (0, 1)), ((0, -1), (-1, 0)), ((1, 0), (0, -1)), ((0, 1), (1, 0)))

_DOOR = "#8a5a2b"
_PIXELS = 160  # of a view's longer side, at least: smaller ones are enlarged without blur


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a demo with both answers.

    Attributes:
        question_type: Of VSI-Bench.
        question: Its text; of a choice with a line ``Options:`` and one option a line.
        answer: Of the model with Spa3R.
        truth: A number, or the letter of an option.
        score: Of the answer, between 0 and 1.
        answer_without_spa3r: Of the VLM without Spa3R.
        score_without_spa3r: Of that answer.
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
    """A page about one room: what the model saw of it, what it was asked and what it said, with and without Spa3R.

    Args:
        views: Pictures (H, W, 3) uint8 that the questions were asked about, in their order.
        room: The room; drawn from above.
        cameras: Of the views.
        questions: What was asked, with answers and scores.
        scores: Overall scores with Spa3R and without, per cent.
        facts: What there is to know of room, model and weights, by name.
        note: A warning at the top, such as that the answers come from untrained weights.
        figures: More pictures, by their captions.
        table: A Markdown table below the figures.
        command: What makes the same page again.

    Returns:
        An HTML document with its pictures inside.
    """
    sections = [
        _section("The room", _figure(floor_plan(room, cameras), _plan_caption(room)) + _views(views), "room"),
        _section("Questions", _summary(scores, len(questions)) + "".join(map(_question, questions)), "questions"),
    ]
    if figures or table:
        pictures = "".join(_figure(_image(_png_of(figure), caption), caption) for caption, figure in figures.items())
        sections.append(_section("The feature field of views that it was not shown", pictures + _table(table), "field"))
    return _PAGE.substitute(
        style=_STYLE,
        note=f'<p class="note" role="note">{escape(_sentence(note))}</p>' if note else "",
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()),
        sections="\n".join(sections),
        command=f"<p>The same page again: <code>{escape(command)}</code></p>" if command else "",
    )


# Parts of the page


def floor_plan(room: Room, cameras: Cameras) -> str:
    """The room from above as SVG, to scale: its objects, the way of the camera, and where it looked.

    Args:
        room: The room.
        cameras: Of the views, in the room's frame.
    """
    length, width, _ = room.size
    margin, scale = 0.35, 100  # metres around the room, units a metre

    def points(places: np.ndarray) -> str:  # (N, 2) metres, y up -> units, y down
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
        colour = "#" + "".join(f"{round(255 * channel):02x}" for channel in COLOURS[item.colour])
        title = escape(f"{item.colour} {item.name}, {' × '.join(f'{side:.2f}' for side in item.size)} m")
        shapes.append(
            f'<polygon points="{points(item.footprint())}" fill="{colour}" class="object"><title>{title}</title>'
            "</polygon>"
        )

    rotation = np.asarray(cameras.extrinsics, np.float64)[:, :3, :3]
    centres = -np.einsum("vji,vj->vi", rotation, np.asarray(cameras.extrinsics, np.float64)[:, :3, 3])[:, :2]
    shapes.append(line(centres, 'class="walk"'))
    for view, (centre, looks) in enumerate(zip(centres, rotation[:, 2, :2])):
        looks = looks / max(np.linalg.norm(looks), 1e-9)
        aside = np.array([-looks[1], looks[0]])
        wedge = np.stack([centre, centre + 0.34 * looks + 0.16 * aside, centre + 0.34 * looks - 0.16 * aside])
        shapes.append(
            f'<polygon points="{points(wedge)}" class="camera"/>'
            f'<circle cx="{scale * centre[0]:.0f}" cy="{-scale * centre[1]:.0f}" r="6" class="centre">'
            f"<title>view {view}</title></circle>"
        )
    for item in room.objects:
        x, y = scale * item.center[0], -scale * item.center[1]
        shapes.append(f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(item.name)}</text>')
    left, top = -scale * (length / 2 + margin), -scale * (width / 2 + margin)
    box = f"{left:.0f} {top:.0f} {-2 * left:.0f} {-2 * top:.0f}"
    letters = f"font-size:{3 * max(length, width):.0f}px"  # as large in a large room
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
        f"<li>{_image(_png(np.asarray(view)), f'View {index}')}<span>{index}</span></li>"
        for index, view in enumerate(views)
    )
    caption = f"What the model sees: {len(views)} views, in this order."
    return f'<figure><ol class="views">{cells}</ol><figcaption>{caption}</figcaption></figure>'


def _summary(scores: tuple[float, float], count: int) -> str:
    rows = "".join(
        f'<div class="total {name}"><b>{score:.0f}</b><span>{title}</span>{_bar(score / 100)}</div>'
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
    listed = "".join(
        f'<li class="{"true" if _letter(option) == _letter(asked.truth) else "false"}">{escape(option)}</li>'
        for option in choices
    )
    answers = "".join(
        f'<tr class="{name}"><th scope="row">{title}</th><td>{_said(answer, choices)}</td>'
        f"<td>{_bar(score)}</td><td>{100 * score:.0f}</td></tr>"
        for name, title, answer, score in rows
    )
    truth = f'<tr class="truth"><th scope="row">Truth</th><td colspan="3">{_said(asked.truth, choices)}</td></tr>'
    scored = "right or wrong" if is_choice(asked.question_type) else "the nearer the better"
    return (
        f"<article><header><h3>{escape(TYPE_TITLES[asked.question_type])}</h3><span>{scored}</span></header>"
        f"<p>{escape(text)}</p>"
        + (f'<ul class="options">{listed}</ul>' if choices else "")
        + f'<table class="answers">{answers}{truth}</table></article>'
    )


def _letter(option: str) -> str:
    return parse_prediction(option).upper()


def _said(answer: str, choices: Sequence[str]) -> str:
    """An answer; beside a mere letter what the letter stands for."""
    if not answer.strip():
        return '<i class="hint">nothing</i>'
    meant = next((option[len(answer) :] for option in choices if option.startswith(f"{answer}.")), "")
    return f'<div class="said" title="{escape(answer)}"><b>{escape(answer)}</b>{escape(meant)}</div>'


def _bar(share: float) -> str:
    return f'<span class="bar" aria-hidden="true"><span style="width:{100 * share:.0f}%"></span></span>'


def _table(markdown: str) -> str:
    """A Markdown table as HTML; its first row of numbers stands out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    if not rows:
        return ""
    head, _, *body = rows
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in body
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _section(title: str, content: str, name: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2><div class="content">{content}</div></section>'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(description)}">'


def _png(view: np.ndarray) -> bytes:
    picture, file = PIL.Image.fromarray(view), io.BytesIO()
    factor = -(-_PIXELS // max(picture.size))  # a browser would blur it
    picture.resize([factor * side for side in picture.size], PIL.Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _png_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5c6b7a; --line: #dbe2e8; --page: #f4f6f8; --card: #fff;
  --with: #0b7f8f; --without: #94a1ad; --good: #1f7a3f; --good-soft: #e3f4e8; --warn: #8a4b00; --warn-soft: #fff1db; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa8b5; --line: #2d3843; --page: #12181e;
  --card: #1a222a; --with: #35b5c6; --without: #6c7985; --good: #7dd79b; --good-soft: #17331f; --warn: #ffc978;
  --warn-soft: #3a2a10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 2.75rem 0 0.9rem; font-size: 1.3rem; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 0.95rem; }
p { margin: 0.5rem 0; }
.lead { max-width: 44rem; color: var(--soft); font-size: 1.08rem; }
.hint, figcaption, article header span, dt, footer { color: var(--soft); font-size: 0.85rem; }
.note { margin: 1.25rem 0; padding: 0.7rem 1rem; border-left: 4px solid var(--warn); border-radius: 0.4rem;
  background: var(--warn-soft); color: var(--warn); font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 0.6rem 2rem; margin: 1.25rem 0 0; }
.facts dd { margin: 0; }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 0.8rem; background: var(--card); }
figcaption { margin-top: 0.6rem; }
figure > img { display: block; width: 100%; border-radius: 0.4rem; background: #fff; }
#room .content { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.plan { display: block; width: 100%; max-height: 30rem; }
.plan .floor { fill: var(--page); stroke: var(--soft); stroke-width: 10; stroke-linejoin: round; }
.plan .fixture { stroke: #7db7dd; stroke-width: 8; }
.plan .object { fill-opacity: 0.85; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round; }
.plan .walk { stroke: var(--with); stroke-width: 4; stroke-linejoin: round; }
.plan .camera { fill: var(--with); fill-opacity: 0.3; }
.plan .centre { fill: var(--with); }
.plan text { font-weight: 600; text-anchor: middle; fill: var(--ink); stroke: var(--card);
  stroke-width: 0.3em; stroke-linejoin: round; paint-order: stroke; }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: 0.5rem; margin: 0;
  padding: 0; list-style: none; }
.views li { position: relative; }
.views img { display: block; width: 100%; border-radius: 0.4rem; }
.views span { position: absolute; left: 0.3rem; top: 0.3rem; padding: 0 0.4rem; border-radius: 0.6rem;
  background: #0009; color: #fff; font-size: 0.72rem; }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.total { display: grid; grid-template-columns: auto 1fr; gap: 0 0.7rem; align-items: baseline;
  padding: 0.9rem 1rem 1rem; border: 1px solid var(--line); border-radius: 0.8rem; background: var(--card); }
.total b { font-size: 2.2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.total .bar { grid-column: 1 / -1; }
.total.with b { color: var(--with); }
#questions .content { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
#questions .totals, #questions .content > p { grid-column: 1 / -1; margin: 0; }
article { display: flex; flex-direction: column; padding: 0.9rem 1rem 0.7rem; border: 1px solid var(--line);
  border-radius: 0.8rem; background: var(--card); }
article header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
.options { display: flex; flex-wrap: wrap; gap: 0.4rem; margin: 0.2rem 0 0.6rem; padding: 0; list-style: none; }
.options li { padding: 0.05rem 0.65rem; border: 1px solid var(--line); border-radius: 1rem; font-size: 0.9rem; }
.options .true { border-color: var(--good); background: var(--good-soft); color: var(--good); font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.answers { width: 100%; margin-top: auto; table-layout: fixed; font-size: 0.92rem; }
.answers th { width: 6.2rem; font-weight: 500; text-align: left; }
.answers td, .answers th { padding: 0.25rem 0.3rem 0.25rem 0; border-top: 1px solid var(--line); }
.answers td:nth-child(3) { width: 26%; }
.answers td:nth-child(4) { width: 2.6rem; text-align: right; }
.said { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  overflow-wrap: anywhere; }
.truth th, .truth td { color: var(--good); }
.bar { display: block; height: 0.5rem; border-radius: 0.25rem; background: var(--line); overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 0.25rem; background: var(--without); }
.with .bar span { background: var(--with); }
#field .content { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.wide { overflow-x: auto; padding: 0.4rem 1rem; border: 1px solid var(--line); border-radius: 0.8rem;
  background: var(--card); }
.numbers { width: 100%; font-size: 0.88rem; }
.numbers th, .numbers td { padding: 0.35rem 0.6rem 0.35rem 0; text-align: left; font-weight: 400; white-space: nowrap; }
.numbers thead th { color: var(--soft); }
.numbers tbody tr { border-top: 1px solid var(--line); }
.numbers tbody tr:first-child > * { color: var(--with); font-weight: 600; }
code { padding: 0.1rem 0.4rem; border-radius: 0.3rem; background: var(--line); overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>spa3r: a room that it has never seen</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>A room that it has never seen</h1>
<p class="lead">Spa3R turns views of a place into one spatial representation; a vision-language model that looks at it
answers questions about the place. Here is one room, every question with its true answer, and what the model says with
Spa3R and without.</p>
$note
<dl class="facts">$facts</dl>
</header>
$sections
<footer>$command</footer>
</main>
</body>
</html>
""")
