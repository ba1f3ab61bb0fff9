"""What the runs of the commands share: folder, log, signals, and the final summary."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerState

from spa3r.data import SkippedReport
from spa3r.disk import alone_in, write_whole
from spa3r.signals import on_signals
from spa3r.training.base import ResumableTrainer
from spa3r.training.checkpoints import (
    DAMAGED,
    LAST_FILE,
    checkpoints_in,
    newest_whole,
    put_aside,
    remove_unfinished,
)
from spa3r.training.config import RunConfig, changes, read_yaml
from spa3r.training.logs import JsonLinesCallback, read_log

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"
WEIGHTS = ("model*.safetensors*", "adapter_model.safetensors", "adapter_config.json")


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        output_dir: The run's folder. Once finished it holds the model for ``from_pretrained``.
        step: Steps done, including those before a resumption.
        max_steps: Steps of the whole run.
        resumed_from: The checkpoint that the run resumed from, or None.
        checkpoint: The last checkpoint.
        interrupted_by: Name of the signal that ended the run early, or None.
        evaluation: The results of the last evaluation by name; None for missing numbers.
        nonfinite_steps: Number of dropped steps.
        skipped: What could not be read in all processes.
    """

    output_dir: str
    step: int
    max_steps: int
    resumed_from: str | None = None
    checkpoint: str | None = None
    interrupted_by: str | None = None
    evaluation: dict[str, float | None] = field(default_factory=dict)
    nonfinite_steps: int = 0
    skipped: SkippedReport = field(default_factory=SkippedReport)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.max_steps


def run(
    trainer: ResumableTrainer,
    checkpoint: Path | None,
    max_steps: int,
    note: Callable[[str], object],
    progress: Callable[[str], object],
) -> dict[str, Any]:
    """Train to the end or until a signal, save the finished model, and return the fields of a result."""
    args, step = trainer.args, step_of(checkpoint)
    output_dir = Path(args.output_dir)
    continue_tensorboard(trainer, output_dir, step)
    if args.process_index == 0:
        trainer.add_callback(ProgressLines(progress))
    signals: list[str] = []
    if step < max_steps:
        with stopping_on_signals(trainer, signals, note):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step = trainer.state.global_step
    elif not trainer.is_sharded:  # all steps are done, but a kill may have come before the model was saved
        trainer.restore(checkpoint)
        trainer.check_learnt()
    if step >= max_steps:
        trainer.save_model()
    skipped = trainer.skipped_by_all()
    last = next(iter(reversed(checkpoints_in(output_dir))), None)
    return {
        "output_dir": str(output_dir),
        "step": step,
        "max_steps": max_steps,
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "checkpoint": None if last is None else str(last),
        "interrupted_by": signals[0] if signals and step < max_steps else None,
        "evaluation": last_evaluation(output_dir),
        "nonfinite_steps": trainer.nonfinite_steps,
        "skipped": skipped,
    }


@contextmanager
def own_folder(args: Any) -> Iterator[None]:
    """Lock the run's folder, from the first search for checkpoints to the saved model.

    Raises:
        ValueError: Another run is using the folder.
    """
    if args.process_index != 0:
        yield
        return
    with alone_in(args.output_dir, "Wait for its end, or name another folder in `training.output_dir`."):
        yield


def find_checkpoint(
    config: RunConfig,
    args: Any,
    fresh: bool,
    note: Callable[[str], object],
    parts: Collection[str | None],
) -> Path | None:
    """Prepare the run's folder and return the checkpoint to resume from, or None.

    Raises:
        ValueError: The folder belongs to a different run or to one of the model's parts.
    """
    output_dir = Path(args.output_dir)
    with args.main_process_first(desc="looking for an earlier run"):
        if args.process_index == 0:
            prepare_folder(config, output_dir, fresh, note, parts)
    checkpoint = next(iter(reversed(checkpoints_in(output_dir))), None)  # the newest, now that damaged ones are gone
    if checkpoint is not None:
        note(f"going on from {checkpoint}")
    return checkpoint


def prepare_folder(
    config: RunConfig, output_dir: Path, fresh: bool, note: Callable[[str], object], parts: Collection[str | None]
) -> None:
    """Reject another run's folder, clean up after a kill, and save the resolved configuration."""
    if output_dir.resolve() in {Path(name).resolve() for name in parts if name is not None}:
        raise ValueError(
            f"`training.output_dir` must be another folder than those of the model's parts, got {output_dir}: the "
            "trained model would overwrite them."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / CONFIG_FILE
    if fresh:
        checkpoints = (output_dir.glob(f"{prefix}checkpoint-*") for prefix in ("", DAMAGED))
        for folder in [*itertools.chain(*checkpoints), output_dir / TENSORBOARD]:
            shutil.rmtree(folder, ignore_errors=True)
        for name in (CONFIG_FILE, JsonLinesCallback.FILE, *WEIGHTS):
            for stale in output_dir.glob(name):
                stale.unlink()
    if remove_unfinished(output_dir):
        note("an unfinished checkpoint of a killed run was removed")
    if (output_dir / JsonLinesCallback.FILE).exists():
        read_log(output_dir / JsonLinesCallback.FILE)  # fail now, not after the model is loaded
    checkpoint, damaged = newest_whole(output_dir)
    if checkpoint is not None:
        if changed := changes(earlier_configuration(file, config), config.to_dict(), config.FREE_TO_CHANGE):
            raise ValueError(
                f"`training.output_dir` {output_dir} holds a run of another configuration ({'; '.join(changed)}). "
                "Change it back to go on with that run, name another folder, or start over with --fresh, which deletes "
                "its checkpoints and logs."
            )
    for folder, fault in damaged.items():
        note(put_aside(folder, fault))
    write_whole(file, config.to_yaml())


def earlier_configuration(file: Path, config: RunConfig) -> dict[str, Any]:
    """The configuration with which a resumed run was started.

    Raises:
        ValueError: The file is missing or damaged.
    """
    cure = (
        "Put an undamaged copy back (each start of a run prints it), name another folder, or start over with --fresh, "
        "which deletes the checkpoints and logs."
    )
    if not file.is_file():
        raise ValueError(f"{file} is missing, though {file.parent} holds checkpoints of a run. {cure}")
    try:
        before = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error} {cure}") from error
    if lacks := config.lacking_in(before):
        raise ValueError(
            f"{file} is damaged, or was written by another version: it lacks {', '.join(lacks[:5])}"
            f"{f' and {len(lacks) - 5} more' if len(lacks) > 5 else ''}. {cure}"
        )
    return before


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else TrainerState.load_from_json(str(checkpoint / LAST_FILE)).global_step


def require_tensorboard(config: RunConfig) -> None:
    reports = config.training.get("report_to", "tensorboard")
    if "tensorboard" in reports:
        try:
            import tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The log for TensorBoard needs tensorboard, which is not installed. pip install 'spa3r[train]', or do "
                "without: training.report_to: none."
            ) from error


def continue_tensorboard(trainer: ResumableTrainer, output_dir: Path, step: int) -> None:
    """Use one folder for all parts of a run; a resumed part hides the steps that it repeats."""
    if trainer.pop_callback(TensorBoardCallback) is None or not trainer.is_world_process_zero():
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / TENSORBOARD), purge_step=step + 1 if step else None)
    trainer.add_callback(TensorBoardCallback(writer))


def last_evaluation(output_dir: Path) -> dict[str, float | None]:
    file = output_dir / JsonLinesCallback.FILE
    evaluations = (
        [line for line in read_log(file) if any(key.startswith("eval_") for key in line)] if file.exists() else []
    )
    return {key: value for key, value in (evaluations or [{}])[-1].items() if key.startswith("eval_")}


class ProgressLines(TrainerCallback):
    def __init__(self, write: Callable[[str], object]):
        self.write = write

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {key: value for key, value in (logs or {}).items() if key != "epoch"}
        parts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        self.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(parts)}")


@contextmanager
def stopping_on_signals(
    trainer: ResumableTrainer, received: list[str], note: Callable[[str], object]
) -> Iterator[None]:
    """SIGTERM, SIGHUP and the first Ctrl-C stop the run at the end of the step."""

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(name)
        trainer.stop_requested = True
        note(f"{name}: saving a checkpoint at the end of this step")

    with on_signals(stop):
        yield
