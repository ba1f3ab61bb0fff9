"""The result of a demo as one self-contained HTML page: no other files, scripts or network access.

page = room_report(views, cameras=walk, room=room, questions=questions, facts={"room": "seed 7"})
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import PIL.Image
from markupsafe import Markup

from spa3r.page import Answer, Question, data_url, environment, render_page
from spa3r.rooms import COLORS, Cameras, Room
from spa3r.tables import Table
from spa3r.vsi_bench.intervals import Line, difference_intervals, score_intervals
from spa3r.vsi_bench.scoring import aggregate

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


class Estimate(NamedTuple):
    """A score or a difference of scores in percent.

    Attributes:
        value: The score.
        low: Lower end of its 95 % interval over rooms.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DemoScores:
    """Overall scores of VSI-Bench of a model with Spa3R and of one without, on the same questions about rooms.

    Attributes:
        rooms: Number of rooms.
        questions: Number of questions.
        with_spa3r: Score with Spa3R.
        without_spa3r: Score without.
        difference: The first minus the second.
    """

    rooms: int
    questions: int
    with_spa3r: Estimate
    without_spa3r: Estimate
    difference: Estimate

    @classmethod
    def from_answers(cls, with_spa3r: Sequence[Line], without_spa3r: Sequence[Line]) -> Self:
        """The scores of two runs' answers to the same questions, in the same order.

        Raises:
            ValueError: The questions differ, or are about fewer than two rooms, which have no interval.
        """
        rooms = {line["scene_name"] for line in with_spa3r}
        if [line["id"] for line in with_spa3r] != [line["id"] for line in without_spa3r] or len(rooms) < 2:
            raise ValueError(
                "Both runs must be of the same questions about at least 2 rooms, got "
                f"{len(with_spa3r)} about {len(rooms)} rooms and {len(without_spa3r)}. Compare runs of one benchmark."
            )
        ours, theirs = (aggregate(lines)["overall"] for lines in (with_spa3r, without_spa3r))
        gained = difference_intervals(without_spa3r, [line["score"] for line in with_spa3r])["overall"]
        return cls(
            len(rooms),
            len(with_spa3r),
            Estimate(ours, *score_intervals(with_spa3r)["overall"]),
            Estimate(theirs, *score_intervals(without_spa3r)["overall"]),
            Estimate(ours - theirs, *gained),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The scores that :meth:`to_dict` returned."""
        estimates = {name: Estimate(**fields[name]) for name in ("with_spa3r", "without_spa3r", "difference")}
        return cls(fields["rooms"], fields["questions"], **estimates)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {name: v._asdict() if isinstance(v, Estimate) else v for name, v in vars(self).items()}

    def __str__(self) -> str:
        ours, theirs, gained = self.with_spa3r, self.without_spa3r, self.difference
        return (
            f"with Spa3R {ours.value:.1f} ({ours.low:.1f} to {ours.high:.1f}), "
            f"without {theirs.value:.1f} ({theirs.low:.1f} to {theirs.high:.1f}), "
            f"difference {gained.value:+.1f} ({gained.low:+.1f} to {gained.high:+.1f})"
        )


def room_report(
    views: Sequence[np.ndarray],
    room: Room,
    cameras: Cameras,
    questions: Sequence[AskedQuestion],
    scores: Mapping[str, DemoScores],
    facts: Mapping[str, str],
    note: str = "",
    figures: Mapping[str, Mapping[str, PIL.Image.Image]] | None = None,
    table: Table | None = None,
    command: str = "",
    new_cameras: Cameras | None = None,
) -> str:
    """A page about scores on several rooms and about one of these: its views, the questions and both answers to each.

    Args:
        views: The pictures (H, W, 3) uint8 that the questions refer to, in order.
        room: The room; drawn from above.
        cameras: Cameras of the views.
        questions: The questions, with answers and scores.
        scores: Overall scores by a sentence that says what they are of.
        facts: Facts about room, model and weights, by name.
        note: A warning at the top, such as that the answers come from untrained weights.
        figures: More pictures: for every heading, pictures by their captions.
        table: A table of the errors of the fields.
        command: The command that creates the same page again.
        new_cameras: More cameras in the plan, of which there are no views.

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
        plan=Markup(floor_plan(room, cameras, new_cameras)),
        has_new_cameras=new_cameras is not None,
        pictures=list(enumerate(pictures)),
        scores=scores,
        questions=[asked.for_page() for asked in questions],
        figures={
            heading: [(caption, data_url(picture)) for caption, picture in part.items()]
            for heading, part in (figures or {}).items()
        },
        table=table,
    )


def floor_plan(room: Room, cameras: Cameras, new_cameras: Cameras | None = None) -> str:
    """The room from above as SVG, to scale: objects, the path of the camera, and its viewing directions.

    Args:
        room: The room.
        cameras: Cameras of the views, in the room's frame.
        new_cameras: More cameras that are not on the path.
    """
    floor = np.array(room.size[:2])
    fixtures = []
    for fixture in room.fixtures:
        stands, along = np.array(_WALLS[fixture.wall])
        middle = stands * floor / 2 + along * fixture.along
        half = along * fixture.size[0] / 2
        fixtures.append(([middle - half, middle + half], fixture.bottom == 0))
    centers, wedges = _wedges(cameras)
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
        wedges=wedges,
        new_wedges=[] if new_cameras is None else _wedges(new_cameras)[1],
    )


def _wedges(cameras: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Places (V, 2) of cameras from above, and triangles (V, 3, 2) that open in their directions."""
    extrinsics = np.asarray(cameras.extrinsics, np.float64)
    rotation = extrinsics[:, :3, :3]
    centers = -np.einsum("vji,vj->vi", rotation, extrinsics[:, :3, 3])[:, :2]
    ahead = rotation[:, 2, :2]
    ahead = 0.34 * ahead / np.linalg.norm(ahead, axis=1, keepdims=True).clip(min=1e-9)
    aside = 0.16 / 0.34 * np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
    return centers, np.stack([centers, centers + ahead + aside, centers + ahead - aside], axis=1)
