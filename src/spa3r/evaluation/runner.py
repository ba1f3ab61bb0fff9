"""Ask a model all questions of a benchmark: scene by scene, on any number of processes, each question once.

run = run_benchmark(model, processor, VsiBench("VSI-Bench"), "runs/mine")
print(run.table())
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import PIL.Image
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging

from spa3r.answering.engine import AnsweringEngine
from spa3r.checks import check_count, check_types, shorten, signature_types
from spa3r.disk import alone_in
from spa3r.evaluation.benchmarks import Benchmark, Frames, Row
from spa3r.evaluation.run_folder import EvaluationRun, LineWriter, RunFolder, about_environment, about_model
from spa3r.media.videos import MAX_FRAMES
from spa3r.models.spa3_vlm.asking import conversation
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor, check_messages
from spa3r.processes import processes
from spa3r.secret import hide
from spa3r.vsi_bench.format import make_prompt
from spa3r.vsi_bench.scoring import parse_prediction, score_prediction

logger = logging.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

LARGEST_SEED = 2**32 - 1
"""The largest seed that NumPy's generator accepts."""

LOOKING = 8
"""The cost of a scene besides its questions, in questions: decoding and encoding its frames."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is asked. Fields that are None keep the choice of the model's processor.

    Attributes:
        num_frames: Frames of a scene, ``linspace(0, n - 1, num_frames)``; a shorter video repeats frames.
        max_new_tokens: Maximum length of an answer. Decoding is greedy.
        system: The system message; None: that of the chat template, if it has one.
        images: What the VLM sees: ``"aligned"``, the views as Spa3R sees them, or ``"native"``, the original frames.
            None for a plain VLM: the original frames.
        min_pixels: Smaller pictures are enlarged by the VLM's processor.
        max_pixels: Larger pictures are reduced by the VLM's processor.
        use_spa3r: False: use only the VLM of a Spa3-VLM, without fusing its image tokens.
        batch_size: Number of questions about a scene that are answered at once.
        missing: How to handle questions whose frames can't be read: ``"fail"`` stops, ``"skip"`` leaves them out,
            ``"zero"`` scores them 0. They are named and counted, and tried again when the run is resumed.
        workers: Number of scenes whose frames are read ahead, one thread each.
        seed: Seed of random numbers, which greedy decoding doesn't use; below 2**32.

    Raises:
        ValueError: A field has the wrong type, is out of range, or `min_pixels` is above `max_pixels`.
    """

    num_frames: int = 32
    max_new_tokens: int = 16
    system: str | None = None
    images: Literal["aligned", "native"] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    use_spa3r: bool = True
    batch_size: int = 8
    missing: Literal["fail", "skip", "zero"] = "fail"
    workers: int = 2
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("images", ("aligned", "native", None)), ("missing", ("fail", "skip", "zero"))):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {shorten(value)}.")
        check_types({field.name: getattr(self, field.name) for field in fields(self)}, signature_types(type(self)))
        for name in ("num_frames", "max_new_tokens", "batch_size", "workers", "min_pixels", "max_pixels", "seed"):
            value = getattr(self, name)
            if value is None:
                continue
            highest = {"seed": LARGEST_SEED, "num_frames": MAX_FRAMES}.get(name)
            # Convert NumPy integers to plain ints: settings are saved as JSON.
            object.__setattr__(self, name, check_count(name, value, int(name != "seed"), highest))
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"`min_pixels` must be at most `max_pixels`, got {self.min_pixels} and {self.max_pixels}. Change one."
            )


PRESETS = {
    "official": EvaluationSettings(),
    "released": EvaluationSettings(
        system="You are a helpful assistant.", images="aligned", min_pixels=256 * 28 * 28, max_pixels=2048 * 28 * 28
    ),
}
"""Settings by name: the official ones of VSI-Bench, and those with which the released Spa3-VLM was measured. In these
the VLM sees the processed views, enlarged to at least 256 x 28 x 28 pixels."""


ARGUMENTS = {"output": str | Path, "settings": EvaluationSettings, "name": str | None, "fresh": bool}


def run_benchmark(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmark: Benchmark,
    output: str | Path,
    settings: EvaluationSettings = PRESETS["official"],
    name: str | None = None,
    fresh: bool = False,
    progress: Callable[[int, int], object] | None = None,
    note: Callable[[str], object] | None = None,
) -> EvaluationRun:
    """Ask a model every question of a benchmark, or resume a stopped run.

    Every answer is saved immediately. With several processes (``accelerate launch``, ``torchrun``) each calls this
    function with its own copy of the model on its own device and the same folder on a shared file system; the result is
    that of one process.

    Args:
        model: A Spa3-VLM, or a VLM of transformers. It is put into eval mode.
        processor: The model's processor; it is not changed.
        benchmark: The questions.
        output: The run's folder: see :class:`EvaluationRun`.
        settings: How the model is asked.
        name: Name of the model; None: as it was loaded.
        fresh: Start over instead of resuming.
        progress: Called with the number of answered questions and the total, of this process; None: a progress bar.
        note: Called with a message about damaged parts of the folder that are asked again; None: log a warning.

    Raises:
        ValueError: The folder belongs to another run or is in use; the earlier run is damaged; frames can't be
            read and ``settings.missing`` is ``"fail"``; the processor has no minimum or maximum of pixels; a question
            contains a special token of the VLM.
        WriteError: The disk is full, or the folder is not writable.
    """
    start = time.perf_counter()
    check_types({"output": output, "settings": settings, "name": name, "fresh": fresh}, ARGUMENTS)
    check_missing(benchmark, settings)
    processor = _with_settings(model, processor, settings)
    state, engine = processes(), AnsweringEngine(model, processor, settings.use_spa3r)
    for row in benchmark.rows:
        try:
            check_messages(processor, [{"role": "user", "content": make_prompt(row)}])
        except ValueError as error:
            raise ValueError(f"Question {row['id']} can't be asked. {error}") from error
    folder = RunFolder(output, benchmark.rows)
    with own_folder(output):
        if state.is_main_process:
            sizes = {"questions": len(benchmark.rows), "scenes": len(benchmark.scenes)}
            reason = engine.needs_whole_prompts
            asking = f"whole prompts: {reason}" if reason else "a scene is encoded once"
            *before, question = conversation([], "PROMPT", settings.system)
            question["content"].insert(0, {"type": "image"})
            chat = processor.apply_chat_template([*before, question], add_generation_prompt=True)
            about = {
                "benchmark": benchmark.about | sizes | {"rows_sha256": benchmark.fingerprint},
                "model": about_model(model, processor, name) | {"asking": asking, "chat": chat},
                "settings": asdict(settings),
            }
            for message in folder.begin(about, about_environment(model.device, state.num_processes), fresh):
                (logger.warning if note is None else note)(message)
        state.wait_for_everyone()
        done = folder.answered()
        mine = _deal(_waiting(benchmark, done, settings.batch_size), state.num_processes)[state.process_index]
        state.wait_for_everyone()  # all have read what is done before the first one writes
        set_seed(settings.seed)
        writer = LineWriter(folder.part(state.process_index))
        count, total = 0, sum(len(batch) for _, batches in mine for batch in batches)
        hidden = progress is not None or not state.is_local_main_process
        with closing(writer), logging.tqdm(total=total, desc="Answering", unit="question", disable=hidden) as bar:
            for lines in _answers(engine, benchmark, mine, settings):
                writer.write(lines)
                bar.update(len(lines))
                count += len(lines)
                if progress is not None:
                    progress(count, total)
        state.wait_for_everyone()
        if state.is_main_process:
            folder.finish(settings.missing, time.perf_counter() - start)
        state.wait_for_everyone()
        return EvaluationRun.load(output)


def own_folder(output: str | Path) -> AbstractContextManager[None]:
    """Lock the run's folder for this run; the first process holds the lock for all. The lock is reentrant.

    Raises:
        ValueError: Another run is using the folder.
    """
    if not processes().is_main_process:
        return nullcontext()
    return alone_in(output, "Wait for its end, or name another folder with `--output` (`output`).")


def check_missing(benchmark: Benchmark, settings: EvaluationSettings) -> None:
    """Report missing frames before the first answer, if they would stop the run.

    Args:
        benchmark: The questions.
        settings: How they are asked.

    Raises:
        ValueError: There are scenes without frames, and ``settings.missing`` is ``"fail"``.
    """
    if settings.missing != "fail" or not (missing := benchmark.missing()):
        return
    few = "; ".join(f"{scene}: {reason}" for scene, reason in list(missing.items())[:5])
    more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise ValueError(
        f"Frames are missing of {len(missing)} of {len(benchmark.scenes)} scenes: {few}{more} Or go without them: "
        "`missing` = skip leaves their questions out, zero scores them 0."
    )


def _with_settings(model: PreTrainedModel, processor: ProcessorMixin, settings: EvaluationSettings) -> ProcessorMixin:
    """A copy of the processor with these settings."""
    processor = copy.deepcopy(processor)
    if settings.images == "aligned" and not isinstance(processor, Spa3VLMProcessor):
        processor = Spa3VLMProcessor(processor, image_token_id=getattr(model.config, "image_token_id", None))
    if settings.images is not None and isinstance(processor, Spa3VLMProcessor):
        processor.image_mode = settings.images
    pixels = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    if pixels := {key: value for key, value in pixels.items() if value is not None}:
        images = processor.image_processor
        size = dict(getattr(images, "size", None) or {})
        # Families with free resolution use these names for numbers of pixels, although the names say edges.
        if not hasattr(images, "merge_size") or any(size.get(key) is None for key in ("shortest_edge", "longest_edge")):
            raise ValueError(
                "`min_pixels` and `max_pixels` are for VLMs of free resolution, such as Qwen's, got them for a "
                f"{type(images).__name__}. Leave both out, and take the official preset."
            )
        images.size = type(images.size)(**(size | pixels))
    return processor


# Assignment of questions to processes, and reading ahead


def _waiting(benchmark: Benchmark, done: dict[Any, Any], batch_size: int) -> list[tuple[str, list[list[Row]]]]:
    """Scenes with their batches of questions that are not all answered.

    Batches are formed before answered questions are left out: a resumed run asks the same questions together as an
    uninterrupted one, since in half precision an answer may depend on the rest of its batch.
    """
    waiting = []
    for scene, rows in benchmark.scenes.items():
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        if batches := [batch for batch in batches if any(row["id"] not in done for row in batch)]:
            waiting.append((scene, batches))
    return waiting


def _deal(scenes: list[tuple[str, list[list[Row]]]], processes: int) -> list[list[tuple[str, list[list[Row]]]]]:
    """Scenes for every process: the largest first, each to the least loaded process, so that all end together."""
    shares: list[list[tuple[str, list[list[Row]]]]] = [[] for _ in range(processes)]
    loads = [0] * processes
    costs = {scene: LOOKING + sum(map(len, batches)) for scene, batches in scenes}
    for scene, batches in sorted(scenes, key=lambda item: -costs[item[0]]):
        process = loads.index(min(loads))
        shares[process].append((scene, batches))
        loads[process] += costs[scene]
    return shares


def _ahead(function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, Future[R]]]:
    """Items with the results of the function, which threads compute a given number of items ahead."""
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="frames")
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def _answers(
    engine: AnsweringEngine,
    benchmark: Benchmark,
    scenes: Sequence[tuple[str, list[list[Row]]]],
    settings: EvaluationSettings,
) -> Iterator[list[dict[str, Any]]]:
    """The lines of every batch of questions."""

    def read(item: tuple[str, list[list[Row]]]) -> Frames:
        return benchmark.frames(item[0], settings.num_frames)

    for (scene, batches), reading in _ahead(read, scenes, settings.workers):
        try:
            numbers, frames = reading.result()
        except (ValueError, OSError) as error:
            if settings.missing == "fail":
                raise ValueError(
                    f"Frames of the scene {scene} can't be read: {error} Or go on without it: `missing` = skip leaves "
                    "its questions out, zero scores them 0; what is answered stays."
                ) from error
            for batch in batches:
                yield [_line(row, [], None, hide(str(error))) for row in batch]
            continue
        yield from _answers_about(engine, batches, numbers, frames, settings)


def _answers_about(
    engine: AnsweringEngine,
    batches: list[list[Row]],
    numbers: list[int],
    frames: list[PIL.Image.Image],
    settings: EvaluationSettings,
) -> Iterator[list[dict[str, Any]]]:
    """The lines of every batch about one scene, whose memory is freed afterwards."""
    about = engine.whole_prompts if engine.needs_whole_prompts else engine.about
    ask = about(frames, settings.system)
    for batch in batches:
        prompts = [make_prompt(row) for row in batch]
        answers = ask(prompts, max_new_tokens=settings.max_new_tokens, batch_size=len(batch))
        yield [_line(row, numbers, answer) for row, answer in zip(batch, answers)]


def _line(row: Row, numbers: list[int], prediction: str | None, missing: str | None = None) -> dict[str, Any]:
    answered = {"parsed": None, "score": None, "missing": missing}
    if prediction is not None:
        answered = {"parsed": parse_prediction(prediction), "score": score_prediction(row, prediction)}
    return row | {"prompt": make_prompt(row), "frames": numbers, "prediction": prediction} | answered
