"""The web demo as its visitors use it: a launched server, gradio's own client, the embedded model."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
from media import counting_video, noise, read_number
from PIL import Image
from typer.testing import CliRunner

if importlib.util.find_spec("gradio") is None:
    pytest.skip(
        "gradio is not installed; in an environment of its own: pip install -e '.[test,app]'", allow_module_level=True
    )

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from spa3r.app import DAY, Demo, Limits, UnseenRoom, build_app
from spa3r.checkpoints import QUESTIONS_NOTE
from spa3r.cli.main import app
from spa3r.evaluation import EvaluationRun, RoomsBenchmark
from spa3r.rooms import room_questions
from spa3r.rooms.embedded import ROOMS_NOTE, embedded_model
from spa3r.rooms.instructions import RoomQuestions
from spa3r.vsi_bench.format import TYPE_TITLES, make_prompt

QUESTION = "What do you see?"
SIZE_QUESTION = "What is the size of this room?"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`spa3r app --json`, which starts while other tests run."""
    folder = tmp_path_factory.mktemp("command")
    with (folder / "notes").open("w") as notes:
        process = subprocess.Popen(
            [sys.executable, "-m", "spa3r", "app", "--json", "--cache-gib", "0.5"],
            stdout=subprocess.PIPE,
            stderr=notes,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        )
    yield SimpleNamespace(process=process, notes=folder / "notes")
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def composed(command):
    return embedded_model()


@pytest.fixture(scope="module")
def num_bytes(composed) -> int:
    """Of the scene of a room."""
    model, processor = composed
    return model.encode_scene(processor, UnseenRoom(1_000_000, 112).views()).num_bytes


@contextmanager
def launched(composed, cache_bytes: int, limits: Limits | None = None):
    """The page's address."""
    page = build_app(*composed, about="A model of the tests.", cache_bytes=cache_bytes, limits=limits)
    try:
        yield page.launch(prevent_thread_lock=True, quiet=True)[1]
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the servers keep files."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def url(composed, num_bytes, folder):
    """A page whose memory holds one scene of a room, not two."""
    with launched(composed, int(1.5 * num_bytes)) as url:
        yield url


@pytest.fixture
def visitor(url, tmp_path):
    return Visitor(url, tmp_path)


class Visitor:
    """A session of its own, as a browser has one."""

    def __init__(self, url: str, downloads: Path):
        self.client = Client(url, verbose=False, download_files=downloads / "downloads")
        self.chat = []

    def look(self, files_or_seed, num_frames: int = 0):
        """What the page shows of a place."""
        if isinstance(files_or_seed, int):
            shown = self.client.predict(files_or_seed, api_name="/look_at_room")
        else:
            files = [handle_file(file) for file in files_or_seed]
            shown = self.client.predict(files, num_frames, api_name="/look_at_files")
        views, facts, suggested, self.chat = shown
        images = [np.asarray(Image.open(view["image"])) for view in views]
        return SimpleNamespace(views=images, facts=facts, suggested=suggested)

    def ask(self, question: str) -> list[str]:
        """The lines below a question."""
        self.chat, empty = self.client.predict(question, self.chat, api_name="/ask")
        assert empty == "" and [message["role"] for message in self.chat[-2:]] == ["user", "assistant"]
        assert self.chat[-2]["content"][0]["text"] == question
        return self.chat[-1]["content"][0]["text"].splitlines()


@pytest.fixture
def passes(composed):
    """Names of the encoders, one for each time that they ran."""
    model, ran = composed[0], []
    parts = {"encoder": model.spa3r.encoder, "tower": model.vlm.model.visual}
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in parts.items()]
    yield ran
    for hook in hooks:
        hook.remove()


def error_of(call) -> str:
    with pytest.raises(AppError) as caught:
        call()
    return unescape(str(caught.value))  # as a browser shows it


def answers_of(composed, views, questions) -> list[str]:
    model, processor = composed
    return model.ask(model.encode_scene(processor, views), questions)


def test_a_room_is_encoded_once_and_answered_as_by_the_model(composed, visitor, passes):
    shown = visitor.look(3)
    assert sorted(passes) == ["encoder", "tower"]
    assert re.fullmatch(
        r"What the model sees: 8 views, 128 image tokens, read and encoded in \d+\.\d\d s\.", shown.facts
    )
    source = RoomQuestions(1_000_003, num_rooms=1)
    rows = room_questions(source.walk(1_000_003))
    labels = [TYPE_TITLES[row["question_type"]] for row in rows]
    prompts = [make_prompt(row) for row in rows]
    rows = [rows[0], next(row for row in rows if row["options"])]
    questions = [*map(make_prompt, rows), QUESTION]
    told = [visitor.ask(question) for question in questions]
    assert len(passes) == 2

    views = source.pictures(1_000_003)
    np.testing.assert_array_equal(shown.views, np.stack(views))
    answers = answers_of(composed, views, questions)
    assert len(set(answers)) > 1
    assert ["\n".join(lines[:-3]) for lines in told[:-1]] == answers[:-1]
    assert "\n".join(told[-1][:-2]) == answers[-1]
    assert all(re.fullmatch(r"Answered in \d+\.\d\d s", lines[-1]) for lines in told)
    assert len(visitor.chat) == 2 * len(told)

    assert [sample for [sample] in shown.suggested["samples"]] == prompts
    assert shown.suggested["sample_labels"] == labels and len(labels) >= 6
    for row, lines in zip(rows, told):
        options = {option[0]: option for option in row["options"] or ()}
        assert lines[-2] == f"The truth: {options.get(row['ground_truth'], row['ground_truth'])}"
    assert not any(line.startswith("The truth") for line in told[-1])


def test_photos_and_a_video_are_read_and_answered_as_on_the_command_line(visitor, passes, tmp_path):
    noise(80, 60, 1).save(tmp_path / "second.png")
    noise(60, 80, 2).save(tmp_path / "first.jpg")
    video = counting_video(tmp_path / "walk.mp4", 9)
    files = [tmp_path / "second.png", video, tmp_path / "first.jpg"]
    shown = visitor.look(files, num_frames=3)
    assert len(passes) == 2 and "5 views" in shown.facts and not shown.suggested["visible"]
    frames = [read_number(Image.fromarray(view)) for view in shown.views[1:4]]
    assert frames == [0, 4, 8]
    told = [visitor.ask(question) for question in (QUESTION, SIZE_QUESTION)]
    assert len(passes) == 2
    arguments = ["ask", *map(str, files), QUESTION, "-q", SIZE_QUESTION, "--num-frames", "3", "--json"]
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert ["\n".join(lines[:-2]) for lines in told] == [asked["answer"] for asked in report["answers"]]
    assert "4 views" in visitor.look([video]).facts  # 4.5 seconds long


def test_a_place_that_left_memory_is_encoded_again(visitor, url, passes, tmp_path):
    visitor.look(5)
    before = visitor.ask(QUESTION)
    other = Visitor(url, tmp_path)
    other.look(6)
    assert len(passes) == 4
    assert "encoded before" in other.look(6).facts and len(passes) == 4
    again = visitor.ask(QUESTION)
    assert len(passes) == 6 and again[:-1] == before[:-1]
    words = r"Answered in \d+\.\d\d s; the place was not in memory: read and encoded in \d+\.\d\d s"
    assert re.fullmatch(words, again[-1])
    assert re.fullmatch(r"Answered in \d+\.\d\d s", visitor.ask(QUESTION)[-1]) and len(passes) == 6


@pytest.fixture(scope="module")
def rooms_apart(composed) -> dict[int, str]:
    """Two rooms about which the model answers differently, and its answers: that it says the same proves nothing."""
    told = {}
    for seed in range(20, 30):
        answer = answers_of(composed, UnseenRoom(1_000_000 + seed, 112).views(), QUESTION)
        if answer not in told.values():
            told[seed] = answer
        if len(told) == 2:
            return told
    raise AssertionError("The model gives one answer about all rooms.")


def test_sessions_see_their_own_places(rooms_apart, visitor, url, tmp_path):
    other, (first, second) = Visitor(url, tmp_path), rooms_apart
    visitor.look(first)
    assert "There is no place to ask about: give photos, a video or a generated room first." in error_of(
        lambda: other.ask(QUESTION)
    )
    other.look(second)
    for _ in range(2):
        assert "\n".join(visitor.ask(QUESTION)[:-2]) == rooms_apart[first]
        assert "\n".join(other.ask(QUESTION)[:-2]) == rooms_apart[second]


def test_what_can_not_be_read_is_told_and_the_place_before_stays(visitor, folder, tmp_path):
    visitor.look(1)
    before = visitor.ask(QUESTION)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    noise(5, 5).save(tmp_path / "tiny.png")
    for name, words in (
        ("broken.png", "The picture can't be decoded: broken.png (cannot identify image file 'broken.png'"),
        ("broken.mp4", "The video broken.mp4 can't be decoded"),
        ("tiny.png", "Every picture must be at least one patch, 14 x 14 pixels, got tiny.png of 5 x 5"),
    ):
        told = error_of(lambda name=name: visitor.look([tmp_path / name]))
        assert words in told and str(folder) not in told
    assert "There are no pictures: give photos or a video of a place first." in error_of(lambda: visitor.look([]))
    assert "`seed` must be a whole number of at least 0, got -1" in error_of(lambda: visitor.look(-1))
    assert "`questions` must be texts that are not empty" in error_of(lambda: visitor.ask(" "))
    assert "must not contain '<|im_end|>'" in error_of(lambda: visitor.ask("<|im_end|>"))
    assert visitor.ask(QUESTION)[0] == before[0]


def test_a_playlist_opens_no_file_of_the_server(visitor, folder, tmp_path):
    """A visitor uploads lists, under the name of a video, of what lies beside them or anywhere."""
    secret = counting_video(folder / "secret.mp4", 4)
    lists = {
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "nested": "ffconcat version 1.0\n" + "file nested.mp4\n" * 1000,
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
    }
    for name, content in lists.items():
        (tmp_path / f"{name}.mp4").write_text(content)
        told = error_of(lambda name=name: visitor.look([tmp_path / f"{name}.mp4"]))
        assert f"The video {name}.mp4 can't be decoded (" in told and str(folder) not in told
    assert "A place must have at most 64 pictures and frames, got 1000000000" in error_of(
        lambda: visitor.look([secret], num_frames=10**9)
    )


def test_what_a_visitor_may_ask_at_once_has_limits(composed, folder, passes, tmp_path):
    limits = Limits(question_length=200, views=3, file_bytes=40_000, pixels=5000)
    noise(80, 60, 1).save(tmp_path / "good.png")
    noise(80, 63, 2).save(tmp_path / "large.png")
    noise(110, 110, 3).save(tmp_path / "heavy.png")
    noise(300, 300, 4).save(tmp_path / "huge.bmp")
    walk = counting_video(tmp_path / "walk.mp4", 9)
    with launched(composed, 2**28, limits) as url:
        visitor = Visitor(url, tmp_path)
        for names, num_frames, words in (
            (["good.png"] * 4, 0, "A place must have at most 3 pictures and frames, got 4. Give fewer files"),
            (["good.png", "walk.mp4"], 3, "at most 3 pictures and frames, got 4"),
            (["walk.mp4"], 10**9, "at most 3 pictures and frames, got 1000000000"),
            (["walk.mp4"], 0, "at most 3 pictures and frames, got 4"),  # by its length
            (["large.png"], 0, "at most 5000 pixels, got large.png of 80 x 63"),
            (["good.png", "heavy.png"], 0, "at most 40000 bytes together, got 5"),
        ):
            told = error_of(lambda names=names, n=num_frames: visitor.look([tmp_path / name for name in names], n))
            assert words in told and str(folder) not in told
        with pytest.raises(Exception, match=r"too large|413|exceeds"):  # before the server has kept it
            visitor.look([tmp_path / "huge.bmp"])
        assert not passes
        assert "3 views" in visitor.look([walk], 3).facts
        visitor.ask("word " * 40)
        told = error_of(lambda: visitor.ask("word " * 40 + "."))
        assert "A question must have at most 200 characters, got 201. Ask it in fewer words." in told
    with pytest.raises(ValueError, match="`views` must be a whole number of at least 1, got 0"):
        Limits(views=0)


@pytest.fixture(scope="module")
def small_url(composed, folder):
    """A page of a small limit on files."""
    with launched(composed, 0, Limits(file_bytes=2**21, question_length=100)) as url:
        yield url


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(
    "path", ["gradio_api/queue/join", "gradio_api/run/ask", "gradio_api/call/ask", "gradio_api/reset", "nowhere"]
)
def test_requests_other_than_uploads_have_a_limit_too(small_url, path, in_pieces):
    limit = Limits(question_length=100).request_bytes
    text = b'{"data": [null, "' + b"w" * limit + b'", []], "fn_index": 2, "session_hash": "s", "event_id": "e"}'
    pieces = (text[start : start + 2**16] for start in range(0, len(text), 2**16)) if in_pieces else text
    answer = httpx.post(small_url + path, content=pieces, headers={"content-type": "application/json"})
    if path == "nowhere":  # never read
        assert answer.status_code in (404, 405, 413)
        return
    assert answer.status_code == 413
    size = "more" if in_pieces else len(text)
    assert answer.json()["detail"] == (
        f"A request must have at most {limit} bytes, got {size}. Ask a shorter question, or begin a new chat: look at "
        "the place again."
    )


@pytest.mark.parametrize("in_pieces", [False, True])
def test_uploads_together_have_the_limit_of_a_place(small_url, in_pieces):
    """Each file alone would be accepted."""

    def upload(count: int) -> httpx.Response:
        files = [("files", (f"{index}.png", b"x" * 2**20, "image/png")) for index in range(count)]
        request = httpx.Request("POST", f"{small_url}gradio_api/upload", files=files)
        body = request.read()
        pieces = (body[start : start + 2**16] for start in range(0, len(body), 2**16)) if in_pieces else body
        return httpx.post(request.url, content=pieces, headers={"content-type": request.headers["content-type"]})

    assert upload(2).status_code == 200
    refused = upload(4)
    assert refused.status_code == 413
    words = f"Files that are uploaded together must have at most {2**21 + 2**20} bytes, got "
    assert words in refused.text and "Give fewer or smaller files" in refused.text


def test_a_long_chat_is_no_large_request(small_url, tmp_path):
    visitor = Visitor(small_url, tmp_path)
    visitor.look(1)
    said = [{"type": "text", "text": "word " * 100}]
    visitor.chat = [{"role": role, "content": said} for role in ("user", "assistant")] * 1000
    assert visitor.ask("How many chairs are there?")


def test_large_pictures_do_not_add_up(composed, tmp_path):
    """Of each picture only what the model sees is kept, which is the same."""
    model, processor = composed
    noise(400, 300).save(tmp_path / "a.png")
    demo = Demo(model, processor, 2**28)
    place, (view,), *_ = demo.look_at_files([str(tmp_path / "a.png")], 0)
    expected = processor.view_image_processor.process_view(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(view), np.asarray(expected))
    assert [picture.size for picture in place.views()] == [expected.size]


def test_pictures_that_the_server_no_longer_keeps_are_asked_for(visitor, url, folder, tmp_path):
    noise(80, 60, 77).save(tmp_path / "old.png")
    visitor.look([tmp_path / "old.png"])
    visitor.ask(QUESTION)
    for file in folder.rglob("old.png"):
        file.unlink()
    visitor.ask(QUESTION)  # its scene is still in memory
    for seed in (11, 12):
        Visitor(url, tmp_path).look(seed)  # which fill it
    told = error_of(lambda: visitor.ask(QUESTION))
    assert "The server no longer keeps the pictures of this place (old.png). Give them again." in told


def test_a_memory_too_small_for_any_scene_is_told(composed, folder, passes, tmp_path):
    with launched(composed, cache_bytes=0) as url:
        visitor = Visitor(url, tmp_path)
        words = r"; too large for the memory for scenes \(\d+\.\d of 0\.0 MiB\), so each question encodes it again"
        assert re.search(words, visitor.look(1).facts)
        assert re.search(words, visitor.ask(QUESTION)[-1]) and len(passes) == 4
    with pytest.raises(ValueError, match="`max_bytes` must be 0 or more, got -1"):
        build_app(*composed, cache_bytes=-1)


def test_the_model_serves_one_at_a_time(composed, num_bytes):
    model, inside, most = composed[0], [], []

    def enter(*_):
        inside.append(threading.get_ident())
        most.append(len(set(inside)))

    hooks = [
        model.vlm.register_forward_pre_hook(enter),
        model.vlm.register_forward_hook(lambda *_: inside.remove(threading.get_ident())),
    ]
    demo, answers = Demo(*composed, 4 * num_bytes), {}

    def visit(seed: int):
        answers[seed] = demo.ask(UnseenRoom(1_000_000 + seed, 112), QUESTION, [])[0]

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    assert len(answers) == 3 and len(most) > 6 and max(most) == 1


@pytest.mark.slow
def test_a_room_is_the_same_place_everywhere(composed, tmp_path):
    """The web page, `spa3r demo` and `spa3r eval rooms`: the same pictures, questions and answers."""
    for command in (("demo", "--output", "demo"), ("eval", "rooms", "--output", "run")):
        *words, folder = command
        result = CliRunner().invoke(app, [*words, str(tmp_path / folder), "--rooms", "2", "--json"])
        assert result.exit_code == 0, result.output
    demo, run = (EvaluationRun.load(tmp_path / folder) for folder in ("demo/with_spa3r", "run"))
    told = {line["id"]: line["prediction"] for line in run.answers}
    assert {line["id"]: line["prediction"] for line in demo.answers} == told
    assert [line["frames"] for line in demo.answers] == [line["frames"] for line in run.answers]
    shown = [np.asarray(Image.open(tmp_path / "demo" / "photos" / f"{view}.png")) for view in range(8)]
    seed = json.loads(result.stdout)["benchmark"]["first_seed"]
    benchmark, page = RoomsBenchmark(2), Demo(*composed, 2**28)
    seeds = {int(line["scene_name"]) for line in run.answers}
    assert seeds == {seed, seed + 1}
    for seed in seeds:
        room = UnseenRoom(seed, 112)
        pictures = [np.asarray(view) for view in room.views()]
        np.testing.assert_array_equal(pictures, benchmark.frames(f"rooms/{seed}", 8)[1])
        for prompt, row in room.questions.items():
            chat, _ = page.ask(room, prompt, [])
            assert chat[1]["content"].splitlines()[0] == told[row["id"]].strip()
    assert any(np.array_equal(shown, [np.asarray(view) for view in UnseenRoom(seed, 112).views()]) for seed in seeds)


def test_the_page_asks_no_other_server(url):
    with urlopen(url) as response:
        html = response.read().decode()
    with urlopen(f"{url}config") as response:
        config = json.load(response)
    assert re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//(?!127\.0\.0\.1)", html) == []
    assert config["analytics_enabled"] is False and config["stylesheets"] == []
    assert "A model of the tests." in json.dumps(config["components"])
    queued = [
        event for event in config["dependencies"] if event["api_name"] in ("look_at_files", "look_at_room", "ask")
    ]
    assert len(queued) == 3 and all(event["queue"] for event in queued)


def test_files_are_kept_for_a_day(composed):
    assert build_app(*composed).delete_cache == (DAY, DAY)


def test_the_command_serves_until_it_is_interrupted(command):
    report = json.loads(command.process.stdout.readline())
    assert report["model"] == "embedded" and report["url"].startswith("http://127.0.0.1:")
    with urlopen(f"{report['url']}config") as response:
        assert f"Model: `embedded`; {ROOMS_NOTE}. {QUESTIONS_NOTE}" in json.dumps(json.load(response)["components"])
    command.process.send_signal(signal.SIGINT)
    rest, _ = command.process.communicate(timeout=30)
    assert command.process.returncode == 0 and rest == ""
    assert (
        f"note: {ROOMS_NOTE}. {QUESTIONS_NOTE}" in command.notes.read_text()
        and "Traceback" not in command.notes.read_text()
    )


def test_uploads_are_deleted_when_the_server_is_told_to_end(tmp_path):
    uploads = tmp_path / "uploads"
    process = subprocess.Popen(
        [sys.executable, "-m", "spa3r", "app", "--json", "--max-views", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"GRADIO_TEMP_DIR": str(uploads)},
    )
    try:
        visitor = Visitor(json.loads(process.stdout.readline())["url"], tmp_path)
        noise(80, 60).save(tmp_path / "mine.png")
        visitor.look([tmp_path / "mine.png"])
        assert "at most 2 pictures and frames" in error_of(lambda: visitor.look([tmp_path / "mine.png"] * 3))
        assert [file.name for file in uploads.rglob("mine.png")]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert not [file for file in uploads.rglob("*") if file.is_file() and file.stat().st_size]  # nor views of them
    assert process.returncode == 0


def test_the_command_names_what_is_wrong(url, tmp_path):
    port = url.rstrip("/").rpartition(":")[2]
    for arguments, words in (
        (("--port", port), f"The page can't be served on 127.0.0.1, port {port} (Cannot find empty port"),
        (
            ("--host", "no.such.host.invalid", "--port", "7999"),
            "The page can't be served on no.such.host.invalid, port 7999",
        ),
        (("--model", str(tmp_path / "none")), f"There is no model folder {tmp_path}/none."),
    ):
        result = CliRunner().invoke(app, ["app", *arguments, "--json"])
        assert result.exit_code == 1 and words in json.loads(result.stdout)["error"]


def test_without_gradio_the_command_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "spa3r.app")
    result = CliRunner().invoke(app, ["app", "--json"])
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 1
    assert error == 'The web demo needs gradio, which is not installed. pip install "spa3r[app]".'
