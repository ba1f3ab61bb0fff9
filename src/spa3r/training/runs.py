"""What the runs of the commands share: folder, log, signals, and the final summary."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from spa3r.data import SkippedReport
from spa3r.disk import alone_in, write_whole
from spa3r.signals import on_signals
from spa3r.training.arguments import RunArguments
from spa3r.training.base import ResumableTrainer
from spa3r.training.checkpoints import (
    DAMAGED,
    LAST_FILE,
    last_checkpoint,
    newest_intact,
    remove_unfinished,
    set_aside,
)
from spa3r.training.config import RunConfig, changes, read_yaml
from spa3r.training.logs import JsonLinesCallback, read_log

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"
WEIGHTS = ("model*.safetensors*", "adapter_model.safetensors", "adapter_config.json")

Trained = TypeVar("Trained", bound=ResumableTrainer)


@dataclass
class RunResult:
    """The result of a training.

    Attributes:
        output_dir: The run's folder. Once finished it holds the model and its processor for ``from_pretrained``; with
            the policies ``"lora"`` and ``"qlora"`` the peft checkpoint.
        step: Steps done, including those before a resumption.
        max_steps: Steps of the whole run.
        resumed_from: The checkpoint that the run resumed from, or None.
        checkpoint: The last checkpoint.
        interrupted_by: Name of the signal that ended the run early, or None.
        evaluation: The results of the last evaluation by name, scores in percent; None for missing numbers.
        nonfinite_steps: Number of dropped steps.
        skipped: What could not be used in all processes: pictures and scenes, or rows.
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
    config: RunConfig,
    args: RunArguments,
    make_trainer: Callable[[Callable[[str], object]], Trained],
    parts: Collection[str | None],
    fresh: bool,
    note: Callable[[str], object],
    progress: Callable[[str], object],
) -> tuple[Trained, dict[str, Any]]:
    """Train from the last checkpoint to the end or until a signal, and save the finished model.

    The run's folder is locked from the first search for checkpoints to the saved model.

    Args:
        config: The configuration.
        args: The trainer's arguments.
        make_trainer: Creates the trainer after the seed is set; its argument is `note`.
        parts: Folders of the model's parts, which can't be the run's folder.
        fresh: Whether to delete an earlier run in the folder.
        note: Called in the main process with messages for the user.
        progress: Called in the main process with one line per log entry.

    Returns:
        The trainer, and the fields of a :class:`RunResult`.

    Raises:
        ValueError: The folder belongs to a different run, is in use, or is that of a part; or the run learned nothing.
    """
    _require_tensorboard(config)
    folder, is_main = args.folder, args.process_index == 0
    if not is_main:
        note = lambda text: None  # noqa: E731
    cure = "Wait for its end, or name another folder in `training.output_dir`."
    with alone_in(folder, cure) if is_main else nullcontext():
        with args.main_process_first(desc="looking for an earlier run"):
            if is_main:
                _prepare_folder(config, folder, fresh, note, parts)
        checkpoint = last_checkpoint(folder)  # the newest, now that damaged ones are gone
        step = 0
        if checkpoint is not None:
            note(f"resuming from {checkpoint}")
            step = TrainerState.load_from_json(str(checkpoint / LAST_FILE)).global_step
        set_seed(args.seed)
        trainer = make_trainer(note)
        _continue_tensorboard(trainer, folder, step)
        if is_main:
            trainer.add_callback(ProgressLines(progress))
        signals: list[str] = []
        if step < args.max_steps:
            with _stopping_on_signals(trainer, signals, note):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            step = trainer.state.global_step
        elif checkpoint is not None and not trainer.is_sharded:  # a kill may have come before the model was saved
            trainer.restore(checkpoint)
            trainer.check_learned()
        if step >= args.max_steps:
            trainer.save_model()
        skipped, last = trainer.skipped_by_all(), last_checkpoint(folder)
        return trainer, {
            "output_dir": str(folder),
            "step": step,
            "max_steps": args.max_steps,
            "resumed_from": None if checkpoint is None else str(checkpoint),
            "checkpoint": None if last is None else str(last),
            "interrupted_by": signals[0] if signals and step < args.max_steps else None,
            "evaluation": _last_evaluation(folder),
            "nonfinite_steps": trainer.nonfinite_steps,
            "skipped": skipped,
        }


def _prepare_folder(
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
    checkpoint, damaged = newest_intact(output_dir)
    if checkpoint is not None:
        if changed := changes(_earlier_configuration(file, config), config.to_dict(), config.FREE_TO_CHANGE):
            raise ValueError(
                f"`training.output_dir` {output_dir} holds a run of another configuration ({'; '.join(changed)}). "
                "Change it back to resume that run, name another folder, or start over with --fresh, which deletes "
                "its checkpoints and logs."
            )
    for folder, fault in damaged.items():
        note(set_aside(folder, fault))
    write_whole(file, config.to_yaml())


def _earlier_configuration(file: Path, config: RunConfig) -> dict[str, Any]:
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


def _require_tensorboard(config: RunConfig) -> None:
    if "tensorboard" in config.training.get("report_to", "tensorboard"):
        try:
            import tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The log for TensorBoard needs tensorboard, which is not installed. pip install 'spa3r[train]', or do "
                "without: training.report_to: none."
            ) from error


def _continue_tensorboard(trainer: ResumableTrainer, output_dir: Path, step: int) -> None:
    """Use one folder for all parts of a run; a resumed part hides the steps that it repeats."""
    if trainer.pop_callback(TensorBoardCallback) is None or not trainer.is_world_process_zero():
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / TENSORBOARD), purge_step=step + 1 if step else None)
    trainer.add_callback(TensorBoardCallback(writer))


def _last_evaluation(output_dir: Path) -> dict[str, float | None]:
    file = output_dir / JsonLinesCallback.FILE
    evaluations = (
        [line for line in read_log(file) if any(key.startswith("eval_") for key in line)] if file.exists() else []
    )
    return {key: value for key, value in (evaluations or [{}])[-1].items() if key.startswith("eval_")}


class ProgressLines(TrainerCallback):
    """Writes a line for every log entry."""

    def __init__(self, write: Callable[[str], object]):
        self.write = write

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line."""
        numbers = {key: value for key, value in (logs or {}).items() if key != "epoch"}
        parts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        self.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(parts)}")


@contextmanager
def _stopping_on_signals(
    trainer: ResumableTrainer, received: list[str], note: Callable[[str], object]
) -> Generator[None]:
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
