"""Pretraining from a configuration to the last checkpoint: the implementation of ``spa3r pretrain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, set_seed

from spa3r.data import SceneBatches, SkippedReport
from spa3r.models.model_card import source_names
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.training.arguments import PretrainingArguments, make_checked
from spa3r.training.config import ModelSection, PretrainingConfig
from spa3r.training.pretraining.trainer import PretrainingTrainer
from spa3r.training.runs import RunResult, find_checkpoint, own_folder, require_tensorboard, run
from spa3r.training.sources import make_source


@dataclass
class PretrainingResult(RunResult):
    """What :func:`pretrain` returns.

    Attributes:
        output_dir: The run's folder. Once finished it holds the model for ``from_pretrained``.
        step: Steps done, including those before a resumption.
        max_steps: Steps of the whole run.
        resumed_from: The checkpoint that the run resumed from, or None.
        checkpoint: The last checkpoint.
        interrupted_by: Name of the signal that ended the run early, or None.
        evaluation: The results of the last evaluation by name; None for missing numbers.
        nonfinite_steps: Number of dropped steps.
        skipped: Pictures and scenes that could not be read in all processes.
        held_out_skipped: The same for the held-out scenes, in the last evaluation of this process.
    """

    held_out_skipped: SkippedReport = field(default_factory=SkippedReport)


def pretrain(
    config: PretrainingConfig,
    *,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    note: Callable[[str], object] = lambda text: None,
    progress: Callable[[str], object] = lambda text: None,
) -> PretrainingResult:
    """Train, or resume training: a run with the same configuration in ``training.output_dir`` is resumed from its
    last intact checkpoint.

    SIGTERM, SIGHUP (the terminal is closed) and Ctrl-C finish the step, save a checkpoint and return; a second Ctrl-C
    interrupts immediately.

    Args:
        config: The configuration.
        fresh: Start over: delete the checkpoints, model and logs in ``training.output_dir``.
        callbacks: More callbacks for the trainer.
        note: Called in the main process with messages for the user.
        progress: Called in the main process with one line per log entry.

    Raises:
        ValueError: The configuration is wrong, the folder belongs to a different run or is in use, none of
            its checkpoints is intact, or the run learned nothing because no step was finite.
        ImportError: A package of ``spa3r[train]`` is missing.
    """
    require_tensorboard(config)
    args = make_arguments(config)
    if args.process_index != 0:
        note = lambda text: None  # noqa: E731
    with own_folder(args):
        section = config.model
        parts = (section.init_from, section.backbone, section.semantic_teacher)
        checkpoint = find_checkpoint(config, args, fresh, note, parts)
        set_seed(args.seed)
        model, processor = make_model(config)
        train_batches = make_batches(config, processor, model, args)
        eval_batches = make_evaluation_batches(config, processor, model, args) if config.evaluation.sources else None
        trainer = PretrainingTrainer(
            model, args, train_batches, eval_batches, processing_class=processor, callbacks=list(callbacks)
        )
        trainer.training_data = source_names(config.data.sources)
        told = run(trainer, checkpoint, args.max_steps, note, progress)
        return PretrainingResult(**told, held_out_skipped=trainer.held_out_skipped)


# Objects of the configuration


def make_arguments(config: PretrainingConfig) -> PretrainingArguments:
    """The trainer's arguments."""
    given = dict(config.training) | {"dataloader_num_workers": config.data.num_workers}
    if config.evaluation.sources:
        given |= {"eval_strategy": "steps", "eval_steps": config.evaluation.every}
    return make_checked(PretrainingArguments, given)


def make_model(config: PretrainingConfig) -> tuple[Spa3RForPreTraining, Spa3RImageProcessor]:
    """The model and its image processor."""
    section, data = config.model, config.data
    model = _go_on_with(section) if section.init_from is not None else _fresh(section)
    if section.attn_implementation is not None:
        model.set_attn_implementation(section.attn_implementation)
    own: dict[str, Any] = {"mode": "pretraining"}
    if section.init_from is not None:
        with suppress(OSError):  # the folder may have none
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
        scenes = num_scenes if scenes is None else min(scenes, num_scenes)  # each at most once
    except TypeError as error:  # streamed, or endless
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


__all__ = ["PretrainingResult", "pretrain"]
