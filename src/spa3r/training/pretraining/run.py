"""Pretraining from a configuration to the last checkpoint: the implementation of ``spa3r pretrain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from spa3r.data import SceneBatches, SkippedReport
from spa3r.models.model_card import source_names
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.training.arguments import PretrainingArguments, make_checked
from spa3r.training.config import PretrainingConfig
from spa3r.training.pretraining.trainer import PretrainingTrainer
from spa3r.training.runs import RunResult, run
from spa3r.training.sources import make_source


@dataclass
class PretrainingResult(RunResult):
    """What :func:`pretrain` returns.

    Attributes:
        held_out_skipped: As ``skipped``, for the held-out scenes in the last evaluation of this process.
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
    args, section = make_arguments(config), config.model

    def make_trainer(note: Callable[[str], object]) -> PretrainingTrainer:
        model, processor = make_model(config)
        batches = make_batches(config, processor, model, args)
        held_out = make_evaluation_batches(config, processor, model, args) if config.evaluation.sources else None
        trainer = PretrainingTrainer(
            model, args, batches, held_out, processing_class=processor, callbacks=list(callbacks)
        )
        trainer.training_data = source_names(config.data.sources)
        return trainer

    parts = (section.init_from, section.backbone, section.semantic_teacher)
    trainer, result = run(config, args, make_trainer, parts, fresh, note, progress)
    return PretrainingResult(**result, held_out_skipped=trainer.held_out_skipped)


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
    fields: dict[str, Any] = {"dtype": section.dtype} | section.fields
    own: dict[str, Any] = {"mode": "pretraining"}
    if section.init_from is None:
        backbone = section.backbone or ""  # there is one, as the configuration has checked
        model = Spa3RForPreTraining.from_backbone_and_dinov3(backbone, section.semantic_teacher, **fields)
    else:
        places = {"backbone": section.backbone, "semantic_teacher": section.semantic_teacher}
        fields |= {f"{part}_name_or_path": place for part, place in places.items() if place is not None}
        model = Spa3RForPreTraining.from_pretrained(section.init_from, **fields)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        with suppress(OSError):  # the folder may have none
            saved = Spa3RImageProcessor.from_pretrained(section.init_from)
            own = {"size": saved.size, "mode": saved.mode}
    if section.attn_implementation is not None:
        model.set_attn_implementation(section.attn_implementation)
    given = {"size": data.image_size, "mode": data.image_mode}
    own |= {name: value for name, value in given.items() if value is not None}
    return model, Spa3RImageProcessor(patch_size=model.config.patch_size, **own)


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
        weights=data.weights,
        scenes_per_epoch=data.scenes_per_epoch,
        seed=data.seed,
        **_shared_options(config, model, args),
    )


def make_evaluation_batches(
    config: PretrainingConfig, processor: Spa3RImageProcessor, model: Spa3RForPreTraining, args: PretrainingArguments
) -> SceneBatches:
    """The held-out batches of this process."""
    evaluation = config.evaluation
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
        pictures_per_batch=max(config.data.pictures_per_device, views[1]),
        scenes_per_epoch=scenes,
        seed=evaluation.seed,
        **_shared_options(config, model, args),
    )


def _shared_options(
    config: PretrainingConfig, model: Spa3RForPreTraining, args: PretrainingArguments
) -> dict[str, Any]:
    return {
        "mask_ratio": model.config.mask_ratio,
        "cameras": config.data.cameras,
        "rank": args.process_index,
        "world_size": args.world_size,
        "max_bad_share": config.data.max_bad_share,
    }


def _range_of(views: int | Sequence[int]) -> Sequence[int]:
    return (views, views) if isinstance(views, int) else views


__all__ = ["PretrainingResult", "pretrain"]
