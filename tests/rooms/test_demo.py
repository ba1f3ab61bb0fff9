"""The page of a demo: one file that needs no other, shows everything once, and takes any words of a model."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from html_outline import Outline
from PIL import Image

from spa3r.evaluation import aggregate
from spa3r.rooms import camera_walk, generate_room, look_around, new_cameras, render
from spa3r.rooms.demo import AskedQuestion, DemoScores, Estimate, floor_plan, room_report
from spa3r.tables import Table
from spa3r.vsi_bench.format import CHOICE_TYPES, NUMBER_TYPES, TYPE_TITLES

HOSTILE = '</td><script>alert("&")</script>'
QUESTIONS = [
    AskedQuestion("object_counting", "How many chairs are in this room?", "3", "4", 0.5, HOSTILE, 0.0),
    AskedQuestion(
        "object_rel_direction_easy", "Where is it?\nOptions:\nA. left\nB. right", "b. right", "B", 1.0, "", 0.0
    ),
]
SCORES = DemoScores(3, 20, Estimate(75.4, 70.1, 80.2), Estimate(0.0, 0.0, 1.5), Estimate(75.4, 68.0, 80.2))
TABLE = Table(["", "cosine ↑"], [["model", "0.75"], ["nearest", "0.25"]])


@pytest.fixture(scope="module")
def room():
    return generate_room(seed=11, level=1)


@pytest.fixture(scope="module")
def walk(room):
    return camera_walk(room, 24, size=(48, 64))[::6]


@pytest.fixture(scope="module")
def views(room, walk):
    return list(render(room, walk, antialias=1).images)


@pytest.fixture(scope="module")
def page(room, walk, views):
    figure = Image.new("RGB", (200, 100), "white")
    return room_report(
        *(views, room, walk, QUESTIONS, {"Of 3 rooms": SCORES}, {"Room": "seed 11", "Model": "<tiny>"}),
        note="the model is untrained: its answers mean nothing",
        figures={"Field": {"Features": figure}},
        table=TABLE,
        command="spa3r demo --seed 11",
        new_cameras=new_cameras(room, 4),
    )


def test_a_page_needs_nothing_else(page):
    outline = Outline(page)
    for tag, attributes in outline.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    assert "http" not in page and "url(" not in page and "@import" not in page and "$" not in page


def test_pictures_are_in_the_page(page, views):
    pictures = []
    for attributes in Outline(page).of("img"):
        assert attributes["alt"]
        data = attributes["src"].removeprefix("data:image/png;base64,")
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")))
    *small, figure = pictures
    assert figure.shape == (100, 200, 3)
    assert len(small) == len(views) == 4
    for picture, view in zip(small, views):
        assert picture.shape == (144, 192, 3)  # three times as large, without blur
        np.testing.assert_array_equal(picture[1::3, 1::3], view)


def test_everything_is_told_once(page):
    texts = Outline(page).texts
    once = ("How many chairs are in this room?", "Where is it?", "A. left", "B. right", "b. right", HOSTILE, "nothing")
    assert [
        words for words in (*once, "How many", "Direction, easy", "seed 11", "<tiny>") if texts.count(words) != 1
    ] == []
    assert "The model is untrained: its answers mean nothing." in texts
    assert "spa3r demo --seed 11" in texts and "Features" in texts
    assert texts.count("With Spa3R") == texts.count("Without") == texts.count("Truth") == 2
    assert texts[texts.index("75.4") + 1] == "with Spa3R" and texts[texts.index("0.0") + 1] == "without Spa3R"
    for words in ("Of 3 rooms", "95 % interval over rooms: 70.1 to 80.2", "Field"):
        assert texts.count(words) == 1
    assert " ".join(next(text for text in texts if "Difference" in text).split()) == (
        "Difference: +75.4 points (+68.0 to +80.2)."
    )


def test_the_true_option_stands_out(page):
    marked = re.findall(r'<li class="(true|false)">([^<]*)</li>', page)
    assert marked == [("false", "A. left"), ("true", "B. right")]


def test_bars_are_as_long_as_the_scores(page):
    widths = [a["style"] for a in Outline(page).of("span") if "style" in a]
    assert widths == [f"width:{width}%" for width in (75, 0, 50, 0, 100, 0)]


def test_a_table_is_the_same_in_the_terminal_and_on_the_page(page):
    assert TABLE == "|         | cosine ↑ |\n|---------|----------|\n| model   | 0.75     |\n| nearest | 0.25     |"
    cells = re.search(r'<table class="numbers">(.*?)</table>', page, re.DOTALL)[1]
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", cells) == ["", "cosine ↑", "model", "0.75", "nearest", "0.25"]


def test_what_is_not_given_is_not_on_the_page(room, walk, views):
    page = room_report(views, room, walk, QUESTIONS, {"Of 3 rooms": SCORES}, {})
    outline = Outline(page)
    assert outline.of("p", "note") == [] and outline.of("code") == []
    assert [attributes["id"] for attributes in outline.of("section")] == ["scores", "room", "questions"]
    assert outline.of("polygon", "new") == [] and "outlined wedge" not in page


def test_the_plan_is_to_scale(room, walk):
    plan = ElementTree.fromstring(floor_plan(room, walk))

    def places(element) -> np.ndarray:  # back to meters, y up
        pairs = [pair.split(",") for pair in element.get("points").split()]
        return np.array(pairs, float) / 100 * [1, -1]

    floor = next(e for e in plan if e.get("class") == "floor")
    np.testing.assert_allclose(np.abs(places(floor)), np.broadcast_to(np.array(room.size[:2]) / 2, (4, 2)), atol=0.01)
    drawn = [e for e in plan if e.get("class") == "object"]
    for item, element in zip(room.objects, drawn, strict=True):
        np.testing.assert_allclose(places(element), item.footprint(), atol=0.01)
        assert element[0].text.startswith(f"{item.color} {item.name}, ")
    assert [e.text for e in plan if e.tag == "text"] == [item.name for item in room.objects]

    way = places(next(e for e in plan if e.get("class") == "walk"))
    assert len(way) == 4 and (room.clearance(way) > 0.2).all()
    pose = np.linalg.inv(walk.extrinsics[2].astype(float))
    np.testing.assert_allclose(way[2], pose[:2, 3], atol=0.01)
    wedge = places([e for e in plan if e.get("class") == "camera"][2])
    looks = wedge[1:].mean(0) - wedge[0]
    assert looks @ pose[:2, 2] / np.linalg.norm(looks) / np.linalg.norm(pose[:2, 2]) > 0.99

    more = ElementTree.fromstring(floor_plan(room, walk, walk[2:3]))
    (outlined,) = (e for e in more if e.get("class") == "new")
    np.testing.assert_array_equal(places(outlined), wedge)


@pytest.mark.parametrize("seed", range(4))
def test_doors_and_windows_are_in_their_walls(seed):
    """Where the mesh of the room has them."""
    room = generate_room(seed, 2)
    plan = ElementTree.fromstring(floor_plan(room, camera_walk(room, 1)))
    drawn = [e for e in plan if e.tag == "polyline" and e.get("class") != "walk"]
    frames = room.background()[6::2]
    assert len(drawn) == len(frames) == len(room.fixtures) > 0
    for element, frame in zip(drawn, frames):
        ends = np.array([pair.split(",") for pair in element.get("points").split()], float) / 100 * [1, -1]
        seen = frame.triangles[..., :2].reshape(-1, 2)
        np.testing.assert_allclose(np.sort(ends, 0), [seen.min(0), seen.max(0)], atol=0.04)


def test_every_type_has_a_title():
    assert set(TYPE_TITLES) == {*CHOICE_TYPES, *NUMBER_TYPES}


@pytest.mark.parametrize("views", (2, 8, 16))
@pytest.mark.parametrize("level", (0, 3))
def test_new_cameras_are_those_of_no_view_and_in_free_space(views, level):
    for seed in range(3):
        room = generate_room(seed, level)
        taken, new = look_around(room, views, (28, 40)), new_cameras(room, views, (28, 40))
        poses = np.linalg.inv(new.extrinsics.astype(float))
        assert len(poses) == (2 if views == 2 else 4) and new.size == (28, 40)
        assert (room.clearance(poses[:, :2, 3]) > 0.04).all()
        distances = np.abs(new.extrinsics[:, None] - taken.extrinsics[None]).max(axis=(2, 3))
        assert distances.min() > 0.01
        between, beside = np.split(poses, 2)
        walk = camera_walk(room, 48, (28, 40)).extrinsics
        assert all((np.abs(walk - np.linalg.inv(pose)).max(axis=(1, 2)) < 1e-5).any() for pose in between)
        np.testing.assert_allclose(np.linalg.norm(between[:, :3, 3] - beside[:, :3, 3], axis=1), 0.2, atol=1e-4)
        ahead, right, turned = between[:, :3, 2], between[:, :3, 0], beside[:, :3, 2]
        np.testing.assert_allclose(np.einsum("vi,vi->v", ahead, turned), np.cos(np.radians(35)), atol=1e-4)
        assert (np.einsum("vi,vi->v", right, turned) > 0.5).all(), "to the right"
    with pytest.raises(ValueError, match=r"`num_views` must be .*2.*16, got 1"):
        new_cameras(room, 1)


def a_line(room: int, number: int, score: float, name: str = "route_planning") -> dict:
    row = {"id": 10 * room + number, "dataset": "rooms", "scene_name": str(room), "question_type": name}
    return row | {"score": score}


def test_scores_have_intervals_over_rooms():
    ours = [a_line(room, number, float(room % 2 or number == 0)) for room in range(8) for number in range(3)]
    theirs = [line | {"score": line["score"] / 2} for line in ours]
    scores = DemoScores.from_answers(ours, theirs)
    assert (scores.rooms, scores.questions) == (8, 24)
    assert scores.with_spa3r.value == pytest.approx(aggregate(ours)["overall"]) == pytest.approx(200 / 3)
    assert scores.with_spa3r.low < 50 < 80 < scores.with_spa3r.high  # rooms differ, questions in a room do not
    assert scores.difference == pytest.approx([value / 2 for value in scores.with_spa3r])
    assert DemoScores.from_dict(scores.to_dict()) == scores
    assert str(scores).startswith("with Spa3R 66.7 (") and "difference +33.3 (" in str(scores)
    with pytest.raises(ValueError, match=r"same questions about at least 2 rooms, got 3 about 1 rooms and 3"):
        DemoScores.from_answers(ours[:3], theirs[:3])
    with pytest.raises(ValueError, match=r"same questions about at least 2 rooms"):
        DemoScores.from_answers(ours, theirs[::-1])
