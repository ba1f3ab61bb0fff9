"""The web demo: upload pictures of a place, then ask about it. Each scene is encoded once and cached.

build_app(*embedded_model()).launch()
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any

import PIL.Image

from spa3r.answering.engine import AnsweringEngine
from spa3r.checks import check_count
from spa3r.console import Limits, one_line, plural, printable, read_views
from spa3r.media.files import HEIF, PICTURES, VIDEOS, can_read_heif
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3_vlm.scenes import EncodedScene, SceneCache
from spa3r.rooms import room_questions
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.vsi_bench.format import TYPE_TITLES, make_prompt

try:
    import gradio as gr
    from starlette.middleware import Middleware

    from spa3r.serving.bodies import LimitedBodies
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('The web demo needs gradio, which is not installed. pip install "spa3r[app]".') from error

DAY = 24 * 60 * 60
"""How long uploaded files are kept, and how often they are checked, in seconds; a server stop deletes them."""

LEAD = """# Ask about a place
Give photos or a video of one place, or take a generated room. The model looks at it once; then ask as much as you like.
"""

CSS = """.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
.grid-wrap { max-height: none !important; }
"""


@dataclass(frozen=True)
class GivenFiles:
    """A place with photos and videos uploaded by a visitor.

    Attributes:
        files: The files on the server.
        num_frames: Number of frames of each video; None: by its length.
        read: Function that reads them, like :func:`spa3r.console.read_views`.
    """

    files: tuple[str, ...]
    num_frames: int | None
    read: Callable[[list[str], int | None], tuple[list[str], list[PIL.Image.Image]]] = field(
        default=read_views, compare=False
    )

    questions = {}
    """Empty: there are no questions with known answers."""

    def views(self) -> list[PIL.Image.Image]:
        """The pictures of the place, read on each call.

        Raises:
            ValueError: There are no files, they were deleted, or one can't be read. Messages use the visitor's file
                names.
        """
        if not self.files:
            raise ValueError("There are no pictures: give photos or a video of a place first.")
        if gone := [Path(file).name for file in self.files if not os.path.exists(file)]:
            raise ValueError(
                f"The server no longer keeps the pictures of this place ({', '.join(gone)}). Give them again."
            )
        try:
            names, views = self.read(list(self.files), self.num_frames)
        except (ValueError, OSError) as error:
            text = str(error)
            for file in self.files:
                text = text.replace(file, Path(file).name)
            raise ValueError(text) from error
        for name, view in zip(names, views):
            view.filename = Path(name).name  # ty: ignore[missing-attribute]  # as PIL's pictures of files have it; for errors
        return views


@dataclass(frozen=True)
class UnseenRoom:
    """A generated room that is in no training data.

    Attributes:
        seed: Seed of the room.
        size: Width and height of its pictures.
    """

    seed: int
    size: int

    @property
    def _source(self) -> RoomQuestions:
        return RoomQuestions(self.seed, num_rooms=1, size=self.size)

    def views(self) -> list[PIL.Image.Image]:
        """The pictures of the room, rendered on each call."""
        return self._source.pictures(self.seed)

    @cached_property
    def questions(self) -> dict[str, dict[str, Any]]:
        """VSI-Bench rows about the room, at most one per question type, keyed by the question."""
        return {make_prompt(row): row for row in room_questions(self._source.walk(self.seed))}


Place = GivenFiles | UnseenRoom
ChatMessage = dict[str, Any]


class Demo:
    """Logic of the page: one model for all visitors, one request at a time.

    Args:
        model: The model.
        processor: Its processor.
        cache_bytes: Memory for all scenes together. An evicted scene is encoded again when it is needed.
        limits: Limits on a visitor's requests; None: the defaults.
    """

    def __init__(
        self,
        model: Spa3VLMForConditionalGeneration,
        processor: Spa3VLMProcessor,
        cache_bytes: int,
        limits: Limits | None = None,
    ):
        self.engine, self.processor, self.limits = AnsweringEngine(model, processor), processor, limits or Limits()
        self.scenes = SceneCache(cache_bytes)
        self._lock = threading.Lock()

    def look_at_files(self, files: list[str] | None, num_frames: int) -> tuple[Any, ...]:
        """Show a visitor's files on the page; 0 frames selects the number by each video's length."""
        with _errors_for_visitor():
            frames = check_count("num_frames", num_frames or 0, 0) or None
            is_native = self.processor.image_mode == "native"  # the VLM takes the original pictures
            keep = None if is_native else self.processor.view_image_processor.process_view
            read = partial(read_views, limits=self.limits, keep=keep)
            return self._look(GivenFiles(tuple(files or ()), frames, read))

    def look_at_room(self, seed: int) -> tuple[Any, ...]:
        """Show the room of a seed, counted from the first that is in no training data, on the page."""
        with _errors_for_visitor():
            check_count("seed", seed, 0)
            return self._look(UnseenRoom(FIRST_TEST_SEED + seed, self.processor.view_image_processor.size))

    def ask(self, place: Place | None, question: str, chat: list[ChatMessage]) -> tuple[list[ChatMessage], str]:
        """The chat with the question and its answer added, and an empty box for the next question."""
        with _errors_for_visitor(), self._lock:
            self.limits.check_question(question)
            if place is None:
                raise ValueError("There is no place to ask about: give photos, a video or a generated room first.")
            was_kept = place in self.scenes
            scene, status = self._scene(place)
            start = time.perf_counter()
            answer = printable(self.engine.ask(scene, [question])[0])
            seconds = f"Answered in {time.perf_counter() - start:.2f} s"
        if not was_kept:
            seconds += f"; the place was not in memory: {status}"
        truth = [f"The truth: {_truth(place.questions[question])}"] if question in place.questions else []
        text = "\n".join([answer, "", *truth, seconds])
        return [*chat, {"role": "user", "content": question}, {"role": "assistant", "content": text}], ""

    def _look(self, place: Place) -> tuple[Any, ...]:
        """The place, its views, its description, its suggested questions, and an empty chat."""
        with self._lock:
            scene, status = self._scene(place)
        size = f"{plural(len(scene.views), 'view')}, {len(scene.image_tokens)} image tokens"
        facts = f"What the model sees: {size}, {status}."
        return place, scene.views, facts, _suggested(place), []

    def _scene(self, place: Place) -> tuple[EncodedScene, str]:
        """The scene of a place, and whether it was encoded or cached."""
        start, was_kept = time.perf_counter(), place in self.scenes
        scene = self.scenes.get_or_encode(place, lambda: self.engine.encode(place.views()))
        status = "encoded before" if was_kept else f"read and encoded in {time.perf_counter() - start:.2f} s"
        if place not in self.scenes:
            sizes = (f"{size / 2**20:.1f}" for size in (scene.num_bytes, self.scenes.max_bytes))
            status += (
                f"; too large for the memory for scenes ({' of '.join(sizes)} MiB), so each question encodes it again"
            )
        return scene, status


def build_app(
    model: Spa3VLMForConditionalGeneration,
    processor: Spa3VLMProcessor,
    *,
    about: str = "",
    cache_bytes: int = 4 * 2**30,
    limits: Limits | None = None,
) -> gr.Blocks:
    """The web page on which visitors upload pictures of a place and ask about it.

    Requests of all visitors are processed one at a time. A place's pictures go through the model once. Scenes of all
    visitors are cached up to `cache_bytes`, and an evicted scene is encoded again when it is needed. Uploaded files are
    kept for a day. The page loads nothing from other servers.

    Args:
        model: A Spa3-VLM, on its device.
        processor: The model's processor.
        about: Description of the model on the page, as Markdown.
        cache_bytes: Memory for scenes, 0 or more; see :class:`~spa3r.SceneCache`.
        limits: Limits on a visitor's requests; None: the defaults of :class:`~spa3r.console.Limits`.

    Returns:
        The page; its ``launch()`` starts the server and takes gradio's arguments.

    Raises:
        ValueError: `cache_bytes` is negative.
    """
    demo = Demo(model, processor, cache_bytes, limits)
    with _Page(title="Spa3R", analytics_enabled=False, delete_cache=(DAY, DAY), fill_width=True) as page:
        page.limits = demo.limits
        place = gr.State()
        gr.Markdown(f"{LEAD}\n{about}")
        with gr.Row():
            with gr.Column():
                with gr.Tab("Photos or a video"):
                    types = sorted({*PICTURES, *VIDEOS}.difference(() if can_read_heif() else HEIF))
                    files = gr.File(label="Of one place", file_count="multiple", file_types=types, height=160)
                    info = "0: by its length, 4 to 8."
                    num_frames = gr.Number(0, label="Frames of a video", info=info, precision=0, minimum=0)
                    look_at_files = gr.Button("Look at these", variant="primary")
                with gr.Tab("A generated room"):
                    seed = gr.Number(0, label="Seed", info="Each is another room that no training saw.", precision=0)
                    look_at_room = gr.Button("Look at this room", variant="primary")
                facts = gr.Markdown()
                views = gr.Gallery(show_label=False, columns=3, height="auto", format="png", buttons=[])
            with gr.Column():
                chat = gr.Chatbot(
                    label="Questions and answers",
                    placeholder="Look at a place, then ask about it.",
                    render_markdown=False,
                    buttons=["copy_all"],
                    height=420,
                )
                question = gr.Textbox(label="Your question", placeholder="How many chairs are there?", max_lines=12)
                ask = gr.Button("Ask", variant="primary")
                suggested = gr.Dataset(
                    label="Questions whose answer is known", components=[question], samples=[], visible=False
                )

        in_turn = {"concurrency_id": "model", "concurrency_limit": 1}
        shown = [place, views, facts, suggested, chat]
        asked = {"fn": demo.ask, "inputs": [place, question, chat], "outputs": [chat, question], **in_turn}
        look_at_files.click(demo.look_at_files, [files, num_frames], shown, api_name="look_at_files", **in_turn)
        look_at_room.click(demo.look_at_room, [seed], shown, api_name="look_at_room", **in_turn)
        gr.on([question.submit, ask.click], api_name="ask", **asked)
        chosen = suggested.click(lambda sample: sample[0], suggested, question, api_name=False)
        chosen.then(api_name=False, **asked)
    return page


class _Page(gr.Blocks):
    """Blocks that use system fonts, no external links and no history in the browser."""

    def launch(self, **kwargs: Any) -> Any:
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        looks = {"theme": gr.themes.Default(**fonts), "css": CSS, "footer_links": [], "run_history": False}
        for_server = dict(kwargs.pop("app_kwargs", None) or {})
        limited = Middleware(LimitedBodies, limit_of=self._limit_of)  # gradio reads every body whole
        for_server["middleware"] = [*(for_server.get("middleware") or ()), limited]
        return super().launch(**looks | {"max_file_size": self.limits.file_bytes, "app_kwargs": for_server} | kwargs)

    def _limit_of(self, path: str) -> tuple[int, str]:
        if path.rstrip("/").endswith("/upload"):
            what, cure = "Files that are uploaded together", "Give fewer or smaller files"
            limit = max(self.limits.file_bytes, self.max_file_size or 0) + 2**20  # for names and boundaries
        else:
            what, cure = "A request", "Ask a shorter question, or begin a new chat: look at the place again"
            limit = self.limits.request_bytes
        return limit, f"{what} must have at most {limit} bytes, got {{}}. {cure}."

    def block_thread(self) -> None:
        """Serve until the process ends: SIGTERM and SIGHUP stop it like Ctrl+C does, so that uploads are deleted."""
        if threading.current_thread() is not threading.main_thread():  # signal handlers need the main thread
            super().block_thread()
            return
        ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {end: signal.signal(end, signal.default_int_handler) for end in ends}
        try:
            super().block_thread()
        finally:
            for end, handler in before.items():
                signal.signal(end, handler)
            for file in {file for files in self.temp_file_sets for file in files}:
                Path(file).unlink(missing_ok=True)  # gradio keeps them if a visitor's page is still open


@contextmanager
def _errors_for_visitor() -> Generator[None]:
    """Show errors about a visitor's input on the page, with the library's message."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(escape(one_line(error), quote=False), print_exception=False) from error


def _suggested(place: Place) -> gr.Dataset:
    """The place's questions with known answers, as suggestions."""
    labels = [TYPE_TITLES[row["question_type"]] for row in place.questions.values()]
    return gr.Dataset(
        samples=[[prompt] for prompt in place.questions], sample_labels=labels, visible=bool(place.questions)
    )


def _truth(row: dict[str, Any]) -> str:
    """The true answer: a number, or the right option."""
    truth = row["ground_truth"]
    return next((option for option in row["options"] or () if option.startswith(f"{truth}.")), truth)
