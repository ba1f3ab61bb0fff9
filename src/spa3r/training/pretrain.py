"""A pretraining from its configuration to its last checkpoint: what ``spa3r pretrain`` does."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerState

from spa3r.data import SceneBatches, SkippedReport, make_source
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.training.arguments import PretrainingArguments
from spa3r.training.checkpoints import LAST_FILE, checkpoints_in, publish, remove_unfinished, writing_into
from spa3r.training.config import ModelSection, PretrainingConfig, _yaml, changes
from spa3r.training.logs import JsonLinesCallback, read_log
from spa3r.training.trainer import PretrainingTrainer

CONFIG_FILE = "config.yaml"
TENSORBOARD = "tensorboard"


@dataclass
class PretrainingResult:
    """What :func:`pretrain` returns.

    Attributes:
        output_dir: The run's folder. Once finished it holds the model for ``from_pretrained``.
        step: Steps done, those before a resumption included.
        max_steps: Steps of the whole run.
        resumed_from: The checkpoint that the run went on from, or None.
        checkpoint: The last checkpoint.
        interrupted_by: Name of the signal that ended the run early, or None.
        evaluation: The last evaluation's numbers by name; None where there is no number.
        nonfinite_steps: Steps that were dropped.
        skipped: Pictures and scenes that could not be read, by all processes.
        held_out_skipped: The same of the held-out scenes, in the last evaluation of this process.
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
    held_out_skipped: SkippedReport = field(default_factory=SkippedReport)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.max_steps


def pretrain(
    config: PretrainingConfig,
    *,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    note: Callable[[str], object] = lambda text: None,
    progress: Callable[[str], object] = lambda text: None,
) -> PretrainingResult:
    """Train, or go on with a training: a run of the same configuration in ``training.output_dir`` is resumed from its
    last whole checkpoint.

    SIGTERM and Ctrl-C end the step, save a checkpoint and return; a second Ctrl-C interrupts at once.

    Args:
        config: The configuration.
        fresh: Start over: delete the checkpoints, model and logs in ``training.output_dir``.
        callbacks: More callbacks for the trainer.
        note: Called in the main process with what the user should know.
        progress: Called in the main process with a line for every entry of the log.

    Raises:
        ValueError: The configuration doesn't fit, or another run than this one is in the folder.
        ImportError: A package of ``spa3r[train]`` is missing.
    """
    _require_tensorboard(config)
    args = make_arguments(config)
    if args.process_index != 0:
        note = lambda text: None  # noqa: E731
    output_dir = Path(args.output_dir)
    with args.main_process_first(desc="looking for an earlier run"):
        if args.process_index == 0:
            _prepare_folder(config, output_dir, fresh, note)
    checkpoint = next(iter(reversed(checkpoints_in(output_dir))), None)
    if checkpoint is not None:
        note(f"going on from {checkpoint}")

    set_seed(args.seed)
    model, processor = make_model(config)
    train_batches = make_batches(config, processor, model, args)
    eval_batches = make_evaluation_batches(config, processor, model, args) if config.evaluation.sources else None
    trainer = PretrainingTrainer(
        model, args, train_batches, eval_batches, processing_class=processor, callbacks=list(callbacks)
    )
    step = _step_of(checkpoint)
    _continue_tensorboard(trainer, output_dir, step)
    if args.process_index == 0:
        trainer.add_callback(_ProgressLines(progress))

    signals: list[str] = []
    if step < args.max_steps:
        with _stopping_on_signals(trainer, signals, note):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step = trainer.state.global_step
    elif not trainer.is_sharded:  # all steps are done, but perhaps a kill came before the model was saved
        trainer.restore(_best_of(checkpoint) if args.load_best_model_at_end else checkpoint)
    if step >= args.max_steps:
        trainer.save_model()
    skipped = trainer.skipped_by_all()
    last = next(iter(reversed(checkpoints_in(output_dir))), None)
    return PretrainingResult(
        output_dir=str(output_dir),
        step=step,
        max_steps=args.max_steps,
        resumed_from=None if checkpoint is None else str(checkpoint),
        checkpoint=None if last is None else str(last),
        interrupted_by=signals[0] if signals and step < args.max_steps else None,
        evaluation=_last_evaluation(output_dir),
        nonfinite_steps=trainer.nonfinite_steps,
        skipped=skipped,
        held_out_skipped=trainer.held_out_skipped,
    )


# What the configuration names


def make_arguments(config: PretrainingConfig) -> PretrainingArguments:
    """The trainer's arguments."""
    given = dict(config.training) | {"dataloader_num_workers": config.data.num_workers}
    if config.evaluation.sources:
        given |= {"eval_strategy": "steps", "eval_steps": config.evaluation.every}
    return PretrainingArguments(**given)


def make_model(config: PretrainingConfig) -> tuple[Spa3RForPreTraining, Spa3RImageProcessor]:
    """The model and its image processor."""
    section, data = config.model, config.data
    model = _go_on_with(section) if section.init_from is not None else _fresh(section)
    if section.attn_implementation is not None:
        model.set_attn_implementation(section.attn_implementation)
    own: dict[str, Any] = {"mode": "pretraining"}
    if section.init_from is not None:
        with suppress(OSError):  # there may be none beside the weights
            saved = Spa3RImageProcessor.from_pretrained(section.init_from)
            own = {"size": saved.size, "mode": saved.mode}
    wanted = {"size": data.image_size, "mode": data.image_mode}
    fields = own | {name: value for name, value in wanted.items() if value is not None}
    return model, Spa3RImageProcessor(patch_size=model.config.patch_size, **fields)


def _fresh(section: ModelSection) -> Spa3RForPreTraining:
    fields = {"dtype": section.dtype} | section.fields
    return Spa3RForPreTraining.from_vggt_and_dinov3(section.backbone, section.semantic_teacher, **fields)


def _go_on_with(section: ModelSection) -> Spa3RForPreTraining:
    homes = {"backbone": section.backbone, "semantic_teacher": section.semantic_teacher}
    homes = {f"{part}_name_or_path": home for part, home in homes.items() if home is not None}
    model = Spa3RForPreTraining.from_pretrained(section.init_from, dtype=section.dtype, **homes, **section.fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_batches(
    config: PretrainingConfig, processor: Spa3RImageProcessor, model: Spa3RForPreTraining, args: PretrainingArguments
) -> SceneBatches:
    """The training batches of this process."""
    data = config.data
    return SceneBatches(
        [make_source(source) for source in data.sources],
        processor,
        views=_range_of(data.views),
        pictures_per_batch=data.pictures_per_device,
        mask_ratio=model.config.mask_ratio,
        cameras=data.cameras,
        weights=data.weights,
        scenes_per_epoch=data.scenes_per_epoch,
        seed=data.seed,
        rank=args.process_index,
        world_size=args.world_size,
        max_bad_share=data.max_bad_share,
    )


def make_evaluation_batches(
    config: PretrainingConfig, processor: Spa3RImageProcessor, model: Spa3RForPreTraining, args: PretrainingArguments
) -> SceneBatches:
    """The held-out batches of this process."""
    data, evaluation = config.data, config.evaluation
    views, scenes = _range_of(evaluation.views), evaluation.scenes
    sources = [make_source(source) for source in evaluation.sources]
    try:
        num_scenes = sum(map(len, sources))
        scenes = num_scenes if scenes is None else min(scenes, num_scenes)  # none twice
    except TypeError as error:  # streamed, or without an end
        if scenes is None:
            raise ValueError(
                "`evaluation.scenes` must say how many scenes are measured where a source doesn't know how many it "
                "has, got None. For example 64."
            ) from error
    return SceneBatches(
        sources,
        processor,
        views=views,
        pictures_per_batch=max(data.pictures_per_device, views[1]),
        mask_ratio=model.config.mask_ratio,
        cameras=data.cameras,
        scenes_per_epoch=scenes,
        seed=evaluation.seed,
        rank=args.process_index,
        world_size=args.world_size,
        max_bad_share=data.max_bad_share,
    )


def _range_of(views: int | Sequence[int]) -> tuple[int, ...]:
    return (views, views) if isinstance(views, int) else tuple(views)


# The run's folder


def _prepare_folder(config: PretrainingConfig, output_dir: Path, fresh: bool, note: Callable[[str], object]) -> None:
    """Refuse another run's folder, clear up after a kill, and write down what is trained."""
    named = {config.model.init_from, config.model.backbone, config.model.semantic_teacher} - {None}
    if output_dir.resolve() in {Path(name).resolve() for name in named}:
        raise ValueError(
            f"`training.output_dir` must be another folder than those of the model's parts, got {output_dir}: the "
            "trained model would overwrite them."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / CONFIG_FILE
    if fresh:
        for folder in [*output_dir.glob("checkpoint-*"), output_dir / TENSORBOARD]:
            shutil.rmtree(folder, ignore_errors=True)
        for name in (CONFIG_FILE, JsonLinesCallback.FILE, "model.safetensors"):
            (output_dir / name).unlink(missing_ok=True)
    if remove_unfinished(output_dir):
        note("an unfinished checkpoint of a killed run was removed")
    if checkpoints_in(output_dir):
        before = _yaml().safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        if changed := changes(before, config.to_dict()):
            raise ValueError(
                f"`training.output_dir` {output_dir} holds a run of another configuration ({'; '.join(changed)}). "
                "Change it back to go on with that run, name another folder, or start over with --fresh, which deletes "
                "its checkpoints and logs."
            )
    with writing_into(output_dir) as folder:
        (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        publish(folder / CONFIG_FILE, file)


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else TrainerState.load_from_json(str(checkpoint / LAST_FILE)).global_step


def _best_of(checkpoint: Path) -> Path:
    return Path(TrainerState.load_from_json(str(checkpoint / LAST_FILE)).best_model_checkpoint or checkpoint)


def _require_tensorboard(config: PretrainingConfig) -> None:
    reports = config.training.get("report_to", "tensorboard")
    if "tensorboard" in reports:
        try:
            import tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The log for TensorBoard needs tensorboard, which is not installed. pip install 'spa3r[train]', or do "
                "without: training.report_to: none."
            ) from error


def _continue_tensorboard(trainer: PretrainingTrainer, output_dir: Path, step: int) -> None:
    """One folder for all parts of a run, in which a resumed one hides the steps that it repeats."""
    if trainer.pop_callback(TensorBoardCallback) is None or not trainer.is_world_process_zero():
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / TENSORBOARD), purge_step=step + 1 if step else None)
    trainer.add_callback(TensorBoardCallback(writer))


def _last_evaluation(output_dir: Path) -> dict[str, float | None]:
    file = output_dir / JsonLinesCallback.FILE
    evaluations = [line for line in read_log(file) if "eval_loss" in line] if file.exists() else []
    return {key: value for key, value in (evaluations or [{}])[-1].items() if key.startswith("eval_")}


class _ProgressLines(TrainerCallback):
    def __init__(self, write: Callable[[str], object]):
        self.write = write

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {key: value for key, value in (logs or {}).items() if key != "epoch"}
        parts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        self.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(parts)}")


@contextmanager
def _stopping_on_signals(
    trainer: PretrainingTrainer, received: list[str], note: Callable[[str], object]
) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C let the step end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(name)
        trainer.stop_requested = True
        note(f"{name}: saving a checkpoint at the end of this step")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["PretrainingResult", "pretrain"]
