"""Shared code of all commands: results and notes, common options, devices, loading of models and photos."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from safetensors import SafetensorError

from spa3r.checkpoints import EMBEDDED
from spa3r.checks import check_count
from spa3r.media.files import PICTURES, VIDEOS, describe, exists, is_url, local_path
from spa3r.secret import hidden, hide
from spa3r.signals import ending_on_signals

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from transformers import PreTrainedModel

    from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
    from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RModel


LoadedModel = TypeVar("LoadedModel", bound="PreTrainedModel")

WEIGHTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
"""Suffixes of released checkpoints that are a single file."""


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Images(StrEnum):
    aligned = "aligned"
    native = "native"


NumFrames = Annotated[int | None, typer.Option(min=1, help="Frames of each video; by its length if not given (4-8).")]


class Frames(StrEnum):
    uniform = "uniform"
    coverage = "coverage"


class Evicted(StrEnum):
    """What a server does with a question about a scene that was evicted from memory."""

    ENCODE = "encode"  # a member `encode` would hide the method of texts
    REFUSE = "refuse"


ChoiceOfFrames = Annotated[
    Frames, typer.Option("--frames", help="Frames of a video: evenly spaced, or those that differ most.")
]
Model = Annotated[str, typer.Option("--model", metavar="ID", help="A folder, a hub id, or 'embedded'.")]
Device = Annotated[str, typer.Option(help="auto (the first of cuda, mps, cpu), or a device such as cuda:1.")]
WeightType = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Type of the weights; auto: as saved, but on CPUs bfloat16 for large models if the CPU has instructions "
        "for it, and float32 if it has none.",
    ),
]
Attention = Annotated[
    str | None, typer.Option("--attn", metavar="NAME", help="Attention back end; `spa3r info` lists those that work.")
]
Int8 = Annotated[
    bool,
    typer.Option("--int8", help="Run the frozen backbone in int8 on the CPU: faster than float32, and less exact."),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the layers of the Spa3R: the first scene takes longer. Needs a C++ compiler."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Do nothing, where rich would exit: if progress can't be written, the result may still be wanted."""


class Report:
    """The result of a command, printed once at its end."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.result: dict[str, Any] = {}
        self.text = ""
        self.exit_code = 0
        self.console = _Console(stderr=True, highlight=False)

    def finish(self, text: str, exit_code: int = 0, **result: Any) -> None:
        """Store the result: its fields, the same as text, and the exit code."""
        self.result = result | {"seconds": round(time.perf_counter() - self.start, 3)}
        self.text, self.exit_code = text, exit_code

    def note(self, text: str) -> None:
        """Print a line for the user that is not part of the result."""
        self._write(f"note: {text}", "yellow")

    def line(self, text: str) -> None:
        """Print a line about progress."""
        self._write(text)

    def error(self, text: str) -> None:
        """Print a line about an error."""
        self._write(f"error: {text}", "red")

    def _write(self, text: str, style: str | None = None) -> None:
        with suppress(OSError):  # a closed terminal must not stop the command
            self.console.print(hide(text), style=style, markup=False, soft_wrap=True)

    def status(self, text: str) -> Status:
        """A spinner during a long step; nothing without an interactive terminal."""
        return self.console.status(hide(text))

    def progress(self) -> Progress:
        """A progress bar that counts; nothing without an interactive terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal, transient=True
        )


def one_line(text: object) -> str:
    """A text or an error without line breaks."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    """A model's output without control characters, which could affect the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plural(count: int, noun: str) -> str:
    """``1 view``, ``2 views``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def resuming_command() -> str:
    """The command that goes on with what this process does: its own, without ``--fresh``."""
    program = "python -m spa3r" if Path(sys.argv[0]).name == "__main__.py" else "spa3r"
    words = shlex.join(word for word in sys.argv[1:] if word != "--fresh")
    return f"{program} {words}" + ", launched as before" * ("RANK" in os.environ)


@contextmanager
def reporting(as_json: bool, verbose: bool, resumable: bool = False) -> Generator[Report]:
    """Run a command: only its result goes to standard output; expected errors become one line and exit code 1.

    Args:
        as_json: Whether the result is one JSON object.
        verbose: Whether to show logs and warnings of libraries.
        resumable: Whether the same command goes on after a signal; then the line about the signal gives it.
    """
    report = Report()
    received: list[signal.Signals] = []
    try:
        with ending_on_signals() as received, redirect_stdout(sys.stderr), quiet(not verbose):
            yield report
    except BaseException as error:
        if received or isinstance(error, KeyboardInterrupt):  # a signal may reach the user as any error of a library
            name = received[-1].name if received else "SIGINT"
            more = f"; what is finished stays, and this goes on: {resuming_command()}" if resumable else ""
            if os.environ.get("RANK", "0") == "0":
                report.note(f"stopped by {name}{more}")
            raise typer.Exit(130) from None
        if not isinstance(error, ValueError | OSError | ImportError | SafetensorError):
            raise
        if as_json:
            _print(json.dumps(hidden({"error": one_line(error)})))
        else:
            report.error(one_line(error))
        raise typer.Exit(1) from error
    _print(json.dumps(hidden(report.result)) if as_json else hide(report.text))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print(text: str) -> None:
    """Write to standard output; characters missing in its encoding are escaped, so that no answer is lost."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)


@contextmanager
def quiet(wanted: bool) -> Generator[None]:
    """Hide logs, warnings and progress bars of libraries (except downloads), and restore the settings afterwards."""
    if not wanted:
        yield
        return
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    loggers = [
        logging.getLogger(name)
        for name in ("transformers", "huggingface_hub", "bitsandbytes", "xformers", "spa3r.models.attention")
    ]
    levels, bars = [logger.level for logger in loggers], is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if bars:
        disable_progress_bar()
        enable_progress_bars()  # the line above also disabled the hub's bars; downloads should show theirs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bars:
            enable_progress_bar()


def torch_device(name: str) -> torch.device:
    """The device of the option ``--device``, such as ``auto`` or ``cuda:1``; an error if it is not here."""
    import torch

    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    usable = [*(kind for kind, backend in backends.items() if backend.is_available()), "cpu"]
    if name == "auto":
        return torch.device(usable[0])
    kind, colon, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in usable or (colon and not (index.isdigit() and int(index) < count)):
        raise ValueError(f"`--device` must be auto or a device that is here ({', '.join(usable)}), got {name!r}.")
    return torch.device(name)


def check_model(name: str) -> None:
    """Raise for a path that doesn't exist; looking it up on the hub would give a confusing error."""
    path = Path(name)
    is_path = name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or path.exists()
    if is_path and not path.is_dir() and not (path.is_file() and path.suffix in WEIGHTS):
        raise FileNotFoundError(
            f"There is no model folder {name}. Give a folder, a hub id, or 'embedded'; a released research checkpoint "
            "may be a file."
        )


def loading_arguments(dtype: Dtype, attention: str | None) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for the options of all commands."""
    from spa3r.models.attention import check_attention_implementation

    if attention is not None:
        check_attention_implementation(attention)
    return {"dtype": dtype.value, "attn_implementation": attention}


def with_default_dtype(
    model: LoadedModel, dtype: Dtype, place: torch.device, note: Callable[[str], None] | None
) -> LoadedModel:
    """The model on its device; with ``auto`` on a CPU, in the dtype that this CPU is fast in.

    Args:
        model: The model, as it was saved.
        dtype: The option.
        place: The device.
        note: Called with the dtype and the reason, where the CPU decides.
    """
    from spa3r.models.precision import set_cpu_dtype

    reason = set_cpu_dtype(model) if place.type == "cpu" and dtype == Dtype.auto else None
    if reason is not None and note is not None:
        note(reason)
    return model.to(place).eval()


def in_int8(spa3r: Spa3RModel | None) -> None:
    """Apply the option ``--int8`` to a loaded Spa3R, in place."""
    from spa3r.models.precision import use_int8_layers

    if spa3r is None or spa3r.backbone is None:
        raise ValueError("`--int8` must be left out with a model that has no backbone of a Spa3R.")
    if spa3r.device.type != "cpu":
        raise ValueError(f"`--int8` needs `--device cpu`, got {spa3r.device}. Use `--dtype bfloat16` there.")
    use_int8_layers(spa3r.backbone)


def compile_spa3r(spa3r: Spa3RModel | None) -> None:
    """Apply the option ``--compile`` to a loaded Spa3R, in place."""
    from spa3r.models.precision import compile_layers

    if spa3r is None:
        raise ValueError("`--compile` must be left out with a model that has no Spa3R.")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"`--compile` needs a C++ compiler, and {compiler} is not installed. Install it, name another in the "
            "environment variable CXX, or leave the option out."
        )
    compile_layers(spa3r)


def is_adapter(name: str) -> bool:
    """Whether a folder or repository is a PEFT checkpoint of a Spa3-VLM, as `spa3r finetune` writes for ``lora``."""
    from transformers import PreTrainedConfig

    from spa3r.models.released import find_adapter, find_released

    adapter, folder = find_adapter(name), Path(name)
    if adapter is None:
        return False
    if any((home / "config.yaml").is_file() for home in (folder, folder.parent)):  # a run, or one of its checkpoints
        return True
    if adapter.base is None:
        return (folder / "processor_config.json").is_file()
    if find_released(adapter.base, ("spa3-vlm",), "`--model`", **adapter.where) is not None:
        return True
    fields, _ = PreTrainedConfig.get_config_dict(adapter.base, **adapter.where)
    return fields.get("model_type") == "spa3_vlm"


def load_vlm(
    name: str,
    device: str,
    dtype: Dtype,
    attention: str | None,
    note: Callable[[str], None] | None = None,
    int8: bool = False,
) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """The Spa3-VLM of the options of a command, on its device and in the dtype to run in."""
    place = torch_device(device)
    model, processor = load_saved_vlm(name, dtype, attention)
    model = with_default_dtype(model, dtype, place, note)
    if int8:
        in_int8(model.spa3r)
    return model, processor


def load_saved_vlm(
    name: str, dtype: Dtype = Dtype.auto, attention: str | None = None
) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """A Spa3-VLM as it was saved, or in a given dtype. Low-rank updates are merged."""
    from spa3r import Spa3VLMForConditionalGeneration, Spa3VLMProcessor
    from spa3r.hub import naming_missing

    arguments = loading_arguments(dtype, attention)
    if name != EMBEDDED:
        check_model(name)
    with naming_missing(name):
        if not is_adapter(name):
            processor = Spa3VLMProcessor.from_pretrained(name)
            return Spa3VLMForConditionalGeneration.from_pretrained(name, **arguments), processor
        import torch

        from spa3r.models.precision import cast
        from spa3r.training.finetuning.run import merge_lora

        model, processor = merge_lora(name)
        if dtype != Dtype.auto:
            cast(model, getattr(torch, dtype.value))
        if attention is not None:
            model.set_attn_implementation(attention)
        return model, processor


def embedded_note() -> str:
    """A note about the embedded models."""
    from spa3r.rooms.embedded import ROOMS_NOTE

    return ROOMS_NOTE


def _suffix(source: str) -> str:
    return Path(source.partition("?")[0] if "://" in source else source).suffix.lower()


def _files(source: str) -> list[str]:
    """A file or URL unchanged; for a folder, its pictures and videos in natural order (``2.jpg`` before ``10.jpg``)."""
    if is_url(source) or source[:5].lower() == "data:":
        return [source]
    path = local_path(source)
    if not exists(path):
        raise FileNotFoundError(f"The picture {describe(source)} doesn't exist. Check the path.")
    if not path.is_dir():
        return [source]
    files = [file for file in path.iterdir() if file.suffix.lower() in {*PICTURES, *VIDEOS} and file.name[0] != "."]
    if not files:
        raise ValueError(
            f"The folder {source} holds no pictures and no videos (its subfolders are not searched). Give another."
        )
    numbers_as_such = (
        [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", file.name)] for file in files
    )
    return [str(file) for _, file in sorted(zip(numbers_as_such, files))]


@dataclass(frozen=True)
class Limits:
    """Limits on the requests of a server's visitor.

    Attributes:
        question_length: Maximum number of characters of a question.
        views: Maximum number of pictures and frames of a place together.
        file_bytes: Maximum size of a place's files together.
        pixels: Maximum number of pixels of a picture.

    Raises:
        ValueError: A limit is less than 1.
    """

    question_length: int = 4000
    views: int = 64
    file_bytes: int = 512 * 2**20
    pixels: int = 2**28

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(field.name, getattr(self, field.name))

    @property
    def request_bytes(self) -> int:
        """Maximum size of a request other than an upload: the longest question and a long chat, as JSON."""
        return 4 * 2**20 + 12 * self.question_length

    def check_question(self, question: str) -> None:
        """Raise for a question that is too long.

        Raises:
            ValueError: The question is too long; the message gives both lengths.
        """
        if len(question) > self.question_length:
            raise ValueError(
                f"A question must have at most {self.question_length} characters, got {len(question)}. Ask it in fewer "
                "words."
            )

    def check_views(self, views: int) -> None:
        """Raise for too many pictures and frames of a place.

        Raises:
            ValueError: There are too many; the message gives both numbers.
        """
        if views > self.views:
            raise ValueError(
                f"A place must have at most {self.views} pictures and frames, got {views}. Give fewer files, or take "
                "fewer frames of each video."
            )

    def check_files(self, files: Sequence[str], num_frames: int | None) -> None:
        """Raise for files with too many views or bytes, before any is read.

        Raises:
            ValueError: A limit is exceeded; the message gives the actual and the allowed value.
        """
        videos = sum(_suffix(file) in VIDEOS for file in files)
        self.check_views(len(files) - videos + videos * (num_frames or 1))
        size = sum(local_path(file).stat().st_size for file in files if exists(local_path(file)))
        if size > self.file_bytes:
            raise ValueError(
                f"The files of a place must have at most {self.file_bytes} bytes together, got {size}. Give fewer or "
                "smaller files."
            )


def read_views(
    sources: list[str],
    num_frames: int | None,
    limits: Limits | None = None,
    keep: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
    frames: Frames = Frames.uniform,
) -> tuple[list[str], list[PIL.Image.Image]]:
    """Read all views of the sources in order, with names: a path, a URL, or ``video#i`` for the i-th sampled frame.

    Args:
        sources: Pictures, videos, folders of them, or URLs.
        num_frames: Number of frames of each video; None: by its length.
        limits: Limits to apply; None: unlimited.
        keep: Function that reduces each picture, so that large ones don't add up; None: keep pictures whole.
        frames: How the frames of a video are chosen.

    Raises:
        ValueError: A file can't be read, a folder has nothing to read, or a limit is exceeded. The message names it.
        FileNotFoundError: A source doesn't exist.
    """
    from spa3r.media.images import to_rgb
    from spa3r.media.videos import sample_frames

    files = [file for source in sources for file in _files(source)]
    if limits is not None:
        limits.check_files(files, num_frames)
    names, views = [], []
    for file in files:
        if _suffix(file) in VIDEOS:
            pictures = sample_frames(file, num_frames, frames=frames.value)
            names += [f"{file}#{index}" for index in range(len(pictures))]
        else:
            pictures = [to_rgb(file, None if limits is None else limits.pixels)]
            names.append(describe(file))
        views += pictures if keep is None else map(keep, pictures)
        if limits is not None:
            limits.check_views(len(views))  # a video's length may have decided the number
    return names, views
