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
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import PIL.Image
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from spa3r.answering.engine import answer
from spa3r.checks import check_count, check_types, shorten, signature_types
from spa3r.disk import alone_in
from spa3r.evaluation.benchmarks import Benchmark, Frames, Row
from spa3r.evaluation.run_folder import EvaluationRun, LineWriter, RunFolder, about_environment, about_model
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3_vlm.scenes import EncodedScene
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.secret import hide
from spa3r.vsi_bench.format import make_messages, make_prompt
from spa3r.vsi_bench.scoring import parse_prediction, score_prediction

logger = logging.get_logger(__name__)

T, R = TypeVar("T"), TypeVar("R")

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
            if name != "seed" and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
            # Convert NumPy integers to plain ints: settings are saved as JSON.
            highest = LARGEST_SEED if name == "seed" else None
            object.__setattr__(self, name, check_count(name, value, int(name != "seed"), highest))
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
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
    processor: Any,
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
    state, asker = processes(), _Asker(model, _as_set(model, processor, settings), settings)
    for row in benchmark.rows:
        try:
            asker.processor.check_messages([{"role": "user", "content": make_prompt(row)}])
        except ValueError as error:
            raise ValueError(f"Question {row['id']} can't be asked. {error}") from error
    folder = RunFolder(output, benchmark.rows)
    with own_folder(output):
        if state.is_main_process:
            asked = {"questions": len(benchmark.rows), "scenes": len(benchmark.scenes)}
            about = {
                "benchmark": benchmark.about | asked | {"rows_sha256": benchmark.fingerprint},
                "model": about_model(model, asker.processor, name) | {"asking": asker.way, "chat": asker.chat},
                "settings": asdict(settings),
            }
            for told in folder.begin(about, about_environment(model.device, state.num_processes), fresh):
                (logger.warning if note is None else note)(told)
        state.wait_for_everyone()
        done = folder.answered()
        mine = _deal(_waiting(benchmark, done, settings.batch_size), state.num_processes)[state.process_index]
        state.wait_for_everyone()  # all have read what is done before the first one writes
        set_seed(settings.seed)
        writer = LineWriter(folder.part(state.process_index))
        count, total = 0, sum(len(batch) for _, batches in mine for batch in batches)
        hidden = progress is not None or not state.is_local_main_process
        with closing(writer), logging.tqdm(total=total, desc="Answering", unit="question", disable=hidden) as bar:
            for lines in _answers(asker, benchmark, mine, settings):
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


def processes() -> PartialState:
    """The state of all processes. Each waits for the others until their last scene is done, for days if necessary."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


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


def _as_set(model: PreTrainedModel, processor: Any, settings: EvaluationSettings) -> Spa3VLMProcessor:
    """A copy of the processor with these settings; that of a plain VLM becomes a Spa3-VLM's."""
    processor = copy.deepcopy(processor)
    if not isinstance(processor, Spa3VLMProcessor):
        # Views are needed only if the VLM sees them; otherwise they should cost nothing.
        views = Spa3RImageProcessor() if settings.images == "aligned" else Spa3RImageProcessor(size=14, patch_size=14)
        token_id = getattr(model.config, "image_token_id", None)
        processor = Spa3VLMProcessor(processor, views, images="native", image_token_id=token_id)
    if settings.images is not None:
        processor.images = settings.images
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
    asker: _Asker, benchmark: Benchmark, scenes: Sequence[tuple[str, list[list[Row]]]], settings: EvaluationSettings
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
        yield from _answers_about(asker, batches, numbers, frames)


def _answers_about(
    asker: _Asker, batches: list[list[Row]], numbers: list[int], frames: list[PIL.Image.Image]
) -> Iterator[list[dict[str, Any]]]:
    """The lines of every batch about one scene, whose memory is freed afterwards."""
    ask = asker.look(frames)
    for batch in batches:
        yield [_line(row, numbers, text) for row, text in zip(batch, ask(batch))]


def _line(row: Row, numbers: list[int], prediction: str | None, missing: str | None = None) -> dict[str, Any]:
    answered = {"parsed": None, "score": None, "missing": missing}
    if prediction is not None:
        answered = {"parsed": parse_prediction(prediction), "score": score_prediction(row, prediction)}
    return row | {"prompt": make_prompt(row), "frames": numbers, "prediction": prediction} | answered


class _Asker:
    """Asks about a scene that is encoded once, or in whole prompts if a VLM doesn't allow that.

    Attributes:
        way: Which of the two, and why.
        chat: The rendered text of one picture and a prompt.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, settings: EvaluationSettings):
        self.model, self.processor, self.settings = model, processor, settings
        self.spa3_vlm = self.spa3_vlm_processor = None
        asked = [*self._before, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT"}]}]
        self.chat = processor.apply_chat_template(asked, add_generation_prompt=True)
        try:
            self.spa3_vlm, self.spa3_vlm_processor = _as_spa3_vlm(model, processor, settings.use_spa3r)
            self._encode([PIL.Image.new("RGB", (56, 56))])
            self.way = "a scene is encoded once"
        except ValueError as error:
            self.spa3_vlm, self.way = None, f"whole prompts: {error}"

    def look(self, frames: list[PIL.Image.Image]) -> Callable[[list[Row]], list[str]]:
        """A function that answers questions about these frames."""
        if self.spa3_vlm is None:
            return lambda rows: self._ask_alone(frames, rows)
        scene, settings = self._encode(frames), self.settings
        return lambda rows: self.spa3_vlm.ask(
            scene, [make_prompt(row) for row in rows], max_new_tokens=settings.max_new_tokens, batch_size=len(rows)
        )

    @property
    def _before(self) -> list[dict[str, Any]]:
        system = self.settings.system
        return [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]

    def _encode(self, frames: list[PIL.Image.Image]) -> EncodedScene:
        return self.spa3_vlm.encode_scene(self.spa3_vlm_processor, frames, system=self.settings.system)

    def _ask_alone(self, frames: list[PIL.Image.Image], rows: list[Row]) -> list[str]:
        examples = [{"messages": [*self._before, *make_messages(row, frames)[:1]]} for row in rows]
        asked = {"max_new_tokens": self.settings.max_new_tokens, "use_spa3r": self.settings.use_spa3r}
        return answer(self.model, self.processor, examples, len(rows), **asked, show_progress=False)


def _as_spa3_vlm(
    model: PreTrainedModel, processor: Spa3VLMProcessor, use_spa3r: bool
) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """The model as one that encodes scenes: a plain VLM becomes a Spa3-VLM without a Spa3R, which fuses nothing."""
    if hasattr(model, "encode_scene"):
        if use_spa3r:
            return model, processor
        model, processor = model.vlm, copy.copy(processor)
        processor.spatial_tokens = None
    model.eval()
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    spa3_vlm = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(model, spatial_source="none")  # freezes parts
    for parameter, is_trained in trained.items():
        parameter.requires_grad_(is_trained)
    return spa3_vlm, processor
