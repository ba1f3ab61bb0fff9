"""The page of a run: scores, frames, questions and answers, in one file."""

import base64
import dataclasses
import io
import re
from html import unescape

import pytest
from html_outline import Outline
from PIL import Image
from tiny_benchmark import SETTINGS, build_composed, write_vsi_bench

from spa3r.evaluation import VsiBench, run_benchmark
from spa3r.evaluation.report import make_report

HOSTILE = "</td><script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    benchmark = VsiBench(write_vsi_bench(folder / "data"))
    (folder / "data" / "arkitscenes" / "scene1.mp4").unlink()
    settings = dataclasses.replace(SETTINGS, missing="skip", num_frames=4)
    return run_benchmark(*build_composed(), benchmark, folder / "run", settings, name="tiny & random")


@pytest.fixture(scope="module")
def page(run):
    return make_report(run, frames=3, note="the model is untrained", command="spa3r eval report run")


def test_a_page_needs_nothing_else(page):
    for tag, attributes in Outline(page).elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    assert "http" not in page and "url(" not in page


def test_every_question_and_answer_is_told(page, run):
    texts = [unescape(text) for text in Outline(page).texts]
    for line in run.answers:
        assert " ".join(line["question"].split()) in texts
        if line["prediction"]:
            assert any(" ".join(line["prediction"].split()) in text for text in texts)
    assert page.count("<article>") == 11 and texts.count("left out") == 2
    assert "tiny & random on vsi-bench full" in texts and "The model is untrained." in texts
    assert "4 frames, 4 tokens at most, greedy" in texts and "spa3r eval report run" in texts
    assert f"{run.scores['overall']:.1f}" in texts


def test_true_options_stand_out(page, run):
    marked = re.findall(r'<li class="true">([AB])\.', page)
    assert marked == [line["ground_truth"] for line in run.answers if line["options"]]


def test_frames_are_those_that_the_model_saw(page, run):
    pictures = Outline(page).of("img")
    assert [a["alt"] for a in pictures] == ["Frame 0", "Frame 1", "Frame 5"] * 3
    for attributes in pictures:
        content = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
        assert Image.open(io.BytesIO(content)).size == (192, 144)
    assert run.answers[0]["frames"] == [0, 1, 3, 5]


def test_what_was_not_seen_is_told(page, run):
    told = re.sub(r"\s+", " ", unescape(page))
    assert "Questions without frames to look at: 2, left out of the scores." in told
    assert told.count(next(iter(run.about["missing"]["scenes"].values()))) == 2


def test_videos_that_are_gone_leave_the_words(run, tmp_path):
    data = write_vsi_bench(tmp_path)
    for video in data.rglob("*.mp4"):
        video.unlink()
    page = make_report(run, VsiBench(data))
    assert Outline(page).of("img") == [] and page.count("<article>") == 11
    assert unescape(page).count("doesn't exist, nor an archive") >= 4


def test_few_scenes_are_spread_over_the_run(run):
    page = make_report(run, scenes=2)
    assert re.findall(r'<section id="scene-\d" class="cards"><h2>([^<]+)', page) == [
        "scannet/scene0",
        "arkitscenes/scene3",
    ]
    assert "2 scenes are shown, spread over the run" in page
    for arguments in ({"scenes": 0}, {"frames": 0}):
        with pytest.raises(ValueError, match=r"must be at least 1, got 0"):
            make_report(run, **arguments)


def test_words_of_a_model_stay_words(run):
    lines = [dict(line) for line in run.answers]
    lines[0]["prediction"] = lines[0]["question"] = HOSTILE
    page = make_report(dataclasses.replace(run, answers=lines))
    assert "<script" not in page and Outline(page).texts.count(HOSTILE) == 2
