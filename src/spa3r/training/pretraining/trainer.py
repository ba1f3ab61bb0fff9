"""transformers' Trainer for batches of scenes: patch-weighted gradients, small checkpoints, exact resumption."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from spa3r.data import SkippedReport
from spa3r.evaluation import FieldReport, evaluate_field
from spa3r.models.packing import ViewLayout
from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.training.arguments import PretrainingArguments
from spa3r.training.base import (
    ResumableTrainer,
    Window,
    can_omit_frozen_parts,
    end_workers,
    load_strictly,
)

MODEL_INPUTS = ("view_pixel_values", "view_grid_hw", "views_per_scene", "target_mask", "extrinsics", "intrinsics")
ON_DEVICE = ("view_pixel_values", "extrinsics", "intrinsics")


def whole_batch(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collator for a plain ``transformers.Trainer`` over :class:`~spa3r.data.SceneBatches`: returns the single batch.

    It keeps the model's inputs and drops names and counts. The trainer's batch size must be 1, and
    ``accelerator_config={"dispatch_batches": False}`` prevents accelerate from slicing packed tensors.

    Args:
        features: A list of one batch.

    Raises:
        ValueError: There are several batches: packed batches can't be stacked.
    """
    if len(features) != 1:
        raise ValueError(
            f"`features` must hold one whole batch of scenes, got {len(features)}. Set per_device_train_batch_size=1 "
            "and per_device_eval_batch_size=1; SceneBatches says how many pictures a batch holds."
        )
    return {name: features[0][name] for name in MODEL_INPUTS if name in features[0]}


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The model's inputs of a batch: pixels and cameras on the device, the layout as Python numbers.

    Wrappers such as DDP move every tensor to the device, and reading the layout back would require a synchronization.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if batch.get(name) is not None}
    return {
        name: value.to(device, non_blocking=True) if name in ON_DEVICE else value.tolist()
        for name, value in inputs.items()
    }


class PretrainingTrainer(ResumableTrainer):
    """Trains a :class:`~spa3r.Spa3RForPreTraining` on batches of scenes.

    In addition to transformers' Trainer:

    - The loss of a step is the mean over all patches of all processes and accumulated batches, whatever their sizes:
      apart from rounding, the distribution of a batch has no effect.
    - Every loss term, the views per second and the skipped pictures are logged, also as JSON lines.
    - A step whose gradient is not finite is dropped in all processes, and the scenes whose loss caused it are
      named. More than ``args.max_nonfinite_steps`` raise an error.
    - Checkpoints omit the frozen parts if they can be loaded again, hold no pickles, and appear atomically. A resumed
      run continues exactly where the saved one was, in the data too.

    Args:
        model: The model.
        args: The arguments.
        train_dataset: :class:`~spa3r.data.SceneBatches` of this process's rank. Processes must not share batches:
            accelerate is prevented from slicing them.
        eval_dataset: Held-out scenes of this process's rank.
        processing_class: The image processor, saved with the model.
        callbacks: More callbacks.
        **kwargs: As in transformers.
    """

    COUNTED = ("num_patches",)

    def __init__(
        self,
        model: Spa3RForPreTraining,
        args: PretrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Spa3RImageProcessor | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self.held_out_skipped = SkippedReport()  # from the last evaluation

    # Data

    def _count(self, batch: dict[str, Any]) -> None:
        batch["num_patches"] = sum(self._counted_patches_per_view(batch))
        if "skipped" in batch:
            self.skipped.add(batch)
            self._window.counts["skipped"] += len(batch["skipped"])
        self._window.counts["views"] += len(batch["view_grid_hw"])

    def _counted_patches_per_view(self, batch: Mapping[str, Any]) -> list[int]:
        patches = torch.as_tensor(batch["view_grid_hw"]).prod(-1)
        if self._unwrapped.config.loss_views == "target":
            patches = patches * torch.as_tensor(batch["target_mask"])
        return patches.tolist()

    # A step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, weighted by its share of the patches of the step."""
        with self.accelerator.autocast():  # accelerate omits it under FSDP2
            outputs = model(**model_inputs(inputs, self.args.device))
        num_patches = inputs.get("num_patches") or sum(self._counted_patches_per_view(inputs))
        loss = outputs["loss"]
        if model.training:
            self._window.add(loss, outputs["losses"], num_patches)
            self._step_batches.append((_small_part(inputs), outputs["losses_per_scene"]))
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, so the loss is multiplied by their number.
            loss = loss * (num_patches * self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _nonfinite_parts(self) -> list[str]:
        names_of_all: list[str] = []
        for batch, losses in self._step_batches:
            layout = ViewLayout.from_inputs(batch["view_grid_hw"], batch["views_per_scene"])
            names = batch.get("scenes") or [f"number {scene}" for scene in range(len(layout.views_per_scene))]
            counted = layout.per_scene(self._counted_patches_per_view(batch))
            per_scene = torch.stack(list(losses.values())).sum(0).tolist()
            names_of_all += [
                name for name, loss, patches in zip(names, per_scene, counted) if patches and not math.isfinite(loss)
            ]
        return names_of_all

    def _counted(self, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {
            "views_per_second": counts.get("views", 0) / seconds,
            "skipped_pictures": int(counts.get("skipped", 0)),
        }

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the loss terms and the quality of the predicted fields of held-out views, on the held-out scenes.

        Returns:
            Results by name, with the prefix: ``loss`` and its terms; for every metric of
            :func:`~spa3r.evaluation.evaluate_field` that of the model, as ``field_geometry_cosine``, and the share of
            the gap between the best baseline and perfect prediction that it closes, as
            ``field_geometry_cosine_gap_closed``.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` must hold held-out scenes to evaluate on, got None.")
        with self._window.pause():
            dataset.set_epoch(0)  # the same scenes, frames and targets every time
            # The loader has its own generator, for the reason given in BatchLoader.
            loader = DataLoader(dataset, batch_size=None, generator=torch.Generator(), **self._loader_options())
            batches = iter(loader)
            try:
                self.held_out_skipped = SkippedReport()
                means, report = self._evaluate_scenes(_counting(batches, self.held_out_skipped))
            finally:
                end_workers(batches)
            metrics = {"loss": sum(means.values())} | means | _numbers(_merged(self._gather_from_hosts(report)))
        return self._log_evaluation(metrics, metric_key_prefix)

    def _evaluate_scenes(self, batches: Iterable[dict[str, Any]]) -> tuple[dict[str, float], FieldReport]:
        """The loss terms over all processes, and the report of this process, from one forward pass of each batch."""
        model, window = self._unwrapped, Window()

        def collect(module: nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> None:
            window.add(output["loss"], output["losses"], sum(self._counted_patches_per_view(inputs)))

        hook = model.register_forward_hook(collect, with_kwargs=True)
        try:
            with self.accelerator.autocast():
                report = evaluate_field(model, batches)
        finally:
            hook.remove()
        return Window.means(self._sum_over_hosts(window.totals()), window.names), report

    # Checkpoints

    def _save_weights(self, model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Save without the frozen parts if they can be loaded again."""
        model.save_pretrained(
            folder,
            include_backbone=not can_omit_frozen_parts(model, folder),
            state_dict=state_dict,
            save_original_format=False,  # the model's own names, which resuming expects
        )

    def _load_weights(self, model: Any, checkpoint: Path) -> None:
        load_strictly(model, checkpoint, may_lack=tuple(model.frozen_modules()))


def _counting(batches: Iterable[dict[str, Any]], report: SkippedReport) -> Iterator[dict[str, Any]]:
    """The same batches; what could not be read is added to the report."""
    for batch in batches:
        if "skipped" in batch:
            report.add(batch)
        yield batch


def _small_part(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ON_DEVICE}


def _merged(reports: Sequence[FieldReport]) -> FieldReport:
    """The combined report of all processes."""
    merged, *others = reports
    for report in others:
        merged.num_views += report.num_views
        merged.skipped += report.skipped
        for predictor, measures in report.rows.items():
            for metric, measure in measures.items():
                total = merged.rows[predictor][metric]
                if not measure.scenes:
                    continue
                if not total.scenes:
                    merged.rows[predictor][metric] = measure
                    continue
                scenes, distance = total.scenes + measure.scenes, measure.mean - total.mean
                total.squares += measure.squares + distance**2 * total.scenes * measure.scenes / scenes
                total.mean += distance * measure.scenes / scenes
                total.scenes = scenes
    return merged


def _numbers(report: FieldReport) -> dict[str, float]:
    numbers = {f"field_{name}": measure.mean for name, measure in report.rows["model"].items()}
    return numbers | {f"field_{name}_gap_closed": gap for name, gap in report.gap_closed.items()}


__all__ = ["PretrainingTrainer", "whole_batch"]
