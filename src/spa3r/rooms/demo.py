"""The result of a demo as one self-contained HTML page: no other files, scripts or network access.

page = room_report(views, cameras=walk, room=room, questions=questions, facts={"room": "seed 7"})
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from markupsafe import Markup
from matplotlib.figure import Figure

from spa3r.page import Answer, Question, data_url, environment, render_page
from spa3r.rooms import COLORS, Cameras, Room
from spa3r.tables import Table

# Walls 0..3, at -x, -y, +x and +y: their positions, and the direction in which a fixture's `along` grows.
_WALLS = (((-1, 0), (0, 1)), ((0, -1), (-1, 0)), ((1, 0), (0, -1)), ((0, 1), (1, 0)))

_MARGIN = 0.35  # meters around the room in the plan
_PIXELS = 160  # minimum size of a view's longer side on the page


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

    def for_page(self) -> Question:
        """The question as :func:`room_report` shows it."""
        text, _, options = self.question.partition("\nOptions:\n")
        answers = (
            Answer("With Spa3R", self.answer, self.score),
            Answer("Without", self.answer_without_spa3r, self.score_without_spa3r, "without"),
        )
        return Question(self.question_type, text, options.splitlines(), self.truth, answers)


def room_report(
    views: Sequence[np.ndarray],
    room: Room,
    cameras: Cameras,
    questions: Sequence[AskedQuestion],
    scores: tuple[float, float],
    facts: Mapping[str, str],
    note: str = "",
    figures: Mapping[str, Figure] | None = None,
    table: Table | None = None,
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
        table: A table below the figures.
        command: The command that creates the same page again.

    Returns:
        An HTML document with its pictures inside.
    """
    pictures = [data_url(PIL.Image.fromarray(np.asarray(view)), _PIXELS) for view in views]
    return render_page(
        "room.html",
        facts,
        note,
        command,
        room=room,
        plan=Markup(floor_plan(room, cameras)),
        pictures=list(enumerate(pictures)),
        scores=scores,
        questions=[asked.for_page() for asked in questions],
        figures=[(caption, _figure_url(drawn)) for caption, drawn in (figures or {}).items()],
        table=table,
    )


def _figure_url(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return data_url(PIL.Image.open(file))


def floor_plan(room: Room, cameras: Cameras) -> str:
    """The room from above as SVG, to scale: objects, the path of the camera, and its viewing directions.

    Args:
        room: The room.
        cameras: Cameras of the views, in the room's frame.
    """
    floor = np.array(room.size[:2])
    fixtures = []
    for fixture in room.fixtures:
        stands, along = np.array(_WALLS[fixture.wall])
        middle = stands * floor / 2 + along * fixture.along
        half = along * fixture.size[0] / 2
        fixtures.append(([middle - half, middle + half], fixture.bottom == 0))
    extrinsics = np.asarray(cameras.extrinsics, np.float64)
    rotation = extrinsics[:, :3, :3]
    centers = -np.einsum("vji,vj->vi", rotation, extrinsics[:, :3, 3])[:, :2]
    ahead = rotation[:, 2, :2]
    ahead = 0.34 * ahead / np.linalg.norm(ahead, axis=1, keepdims=True).clip(min=1e-9)
    aside = 0.16 / 0.34 * np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
    templates = environment()
    templates.filters["points"] = lambda places: " ".join(f"{x:.0f},{-y:.0f}" for x, y in 100 * np.asarray(places))
    templates.filters["hex"] = lambda color: "#" + "".join(f"{round(255 * channel):02x}" for channel in COLORS[color])
    return templates.get_template("plan.svg").render(
        room=room,
        corners=np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * floor / 2,
        box=100 * np.array([*(-floor / 2 - _MARGIN), *(floor + 2 * _MARGIN)]),
        font_size=3 * floor.max(),  # scales with the size of the room
        fixtures=fixtures,
        centers=centers,
        wedges=np.stack([centers, centers + ahead + aside, centers + ahead - aside], axis=1),
    )
