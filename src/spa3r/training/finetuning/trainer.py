"""transformers' Trainer for instruction tuning: policies, token-weighted gradients, scored answers during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from spa3r.data.collator import Spa3VLMCollator
from spa3r.evaluation.answers import AnswerReport, evaluate_answers
from spa3r.models.spa3_vlm.modeling_spa3_vlm import REPORT_KEYS, Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.training.arguments import FinetuningArguments
from spa3r.training.base import (
    ResumableTrainer,
    can_omit_frozen_parts,
    load_strictly,
)
from spa3r.training.finetuning.batches import InstructionBatches
from spa3r.training.finetuning.policies import ParameterGroup, apply_policy, parameter_groups

NOT_FOR_MODEL = (*REPORT_KEYS, "rows", "num_tokens", "num_patches")
LAYOUT = ("view_grid_hw", "views_per_scene", "image_tokens_per_scene", "spatial_tokens_per_scene")
"""Small inputs that are read by the host: they stay there as Python numbers."""

logger = logging.get_logger(__name__)

PEFT_FILE = "adapter_model.safetensors"


class FinetuningTrainer(ResumableTrainer):
    """Trains a :class:`~spa3r.Spa3VLMForConditionalGeneration` on instructions.

    In addition to transformers' Trainer:

    - ``args.policy`` determines what is trained; the rest is frozen.
    - The loss of a step is the mean over all answer tokens in all processes and accumulated batches: apart from
      rounding, the distribution of rows has no effect.
    - Rows that can't be used are counted and reported, and raise an error above a given share. Steps whose gradient is
      not finite are dropped, and their rows are named.
    - Evaluation generates answers and scores them as VSI-Bench does.
    - Checkpoints hold no pickles and appear atomically. A resumed run continues exactly where the saved one was.
      Checkpoints of ``"lora"`` and ``"qlora"`` are small peft checkpoints.

    Args:
        model: The model. The policy is applied to it; ``trainer.model`` is the trained model.
        args: The arguments.
        train_dataset: Examples with ``messages``, or :class:`InstructionBatches` of this process's rank.
        eval_dataset: Examples whose last message is the true answer; they are split among all processes.
        processing_class: The processor, saved with the model.
        data_collator: None: :class:`~spa3r.data.Spa3VLMCollator` of the processor.
        psfm: With ``args.psfm_weight``: the Spa3R with its semantic teacher; ``psfm.spa3r`` must be ``model.spa3r``.
        evaluation: Arguments of :func:`~spa3r.evaluation.evaluate_answers`, such as ``batch_size``.
        callbacks: More callbacks.
        **kwargs: As in transformers.

    Raises:
        ValueError: The policy doesn't fit the model, the data has no length and ``args.max_steps`` isn't given, or
            `psfm` is missing or belongs to another model.
    """

    UNIT = "rows"
    COUNTED = ("num_tokens", "num_patches")

    def __init__(
        self,
        model: Spa3VLMForConditionalGeneration,
        args: FinetuningArguments,
        train_dataset: InstructionBatches | Dataset | Sequence[Any],
        eval_dataset: Dataset | Sequence[Any] | None = None,
        processing_class: Spa3VLMProcessor | None = None,
        data_collator: Any = None,
        psfm: Spa3RForPreTraining | None = None,
        evaluation: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        if data_collator is None and processing_class is not None:
            data_collator = Spa3VLMCollator(processing_class)
        if not isinstance(train_dataset, InstructionBatches):
            train_dataset = InstructionBatches(
                train_dataset,
                data_collator,
                args.per_device_train_batch_size,
                group_by_length=args.train_sampling_strategy == "group_by_length",
                accumulate=args.gradient_accumulation_steps,
                seed=args.seed if args.data_seed is None else args.data_seed,
                rank=args.process_index,
                world_size=args.world_size,
            )
        if args.max_steps <= 0:
            args.max_steps = steps_of(train_dataset, args)
        if train_dataset.is_streamed:  # datasets splits the shards of a stream among workers: only one may read
            args.dataloader_num_workers = min(args.dataloader_num_workers, 1)
        if args.psfm_weight and (psfm is None or psfm.spa3r is not model.spa3r):
            raise ValueError(
                "`psfm` must be the Spa3RForPreTraining whose `spa3r` is the model's, since `psfm_weight` is "
                f"{args.psfm_weight}; got {'none' if psfm is None else 'that of another model'}. Combine the VLM with "
                "`psfm.spa3r`."
            )
        self.whole_model, self._recipe = model, args
        super().__init__(
            apply_policy(model, args),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            callbacks=callbacks,
            **kwargs,
        )
        self.psfm = psfm if args.psfm_weight else None
        if self.psfm is not None and self.psfm.semantic_teacher is not None:
            self.psfm.semantic_teacher.requires_grad_(False).eval().to(args.device)
        self.evaluation = dict(evaluation or {})

    # Groups

    def parameter_groups(self) -> list[ParameterGroup]:
        """All groups, trained and frozen; :func:`~spa3r.training.group_table` prints them."""
        model = self._unwrapped
        return parameter_groups(model, self._recipe, self.get_decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with a separate learning rate for Spa3R's encoder."""
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.weight_decay}
                for group in self.parameter_groups()
                if group.learning_rate is not None
            ]
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    # A step

    def _count(self, batch: dict[str, Any]) -> None:
        batch["num_tokens"] = int((batch["labels"][:, 1:] != -100).sum())
        batch["num_patches"] = len(batch["view_pixel_values"]) if _has_views(batch) else 0
        skipped, tried = batch["skipped"], batch["num_rows"]
        broken = {(entry["source"], entry["scene"]) for entry in skipped}  # a row counts as a scene, once
        self.skipped.count(skipped, tried, max(0, tried - len(broken)))
        self._window.counts.update(rows=tried, tokens=batch["num_tokens"], skipped=len(skipped))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch: the sum over its tokens divided by the number of tokens of the step."""
        num_tokens = inputs.get("num_tokens") or int((inputs["labels"][:, 1:] != -100).sum())
        items = max(num_tokens, 1) if num_items_in_batch is None else num_items_in_batch
        ready = model_inputs(inputs, self.args.device)
        with self.accelerator.autocast():  # accelerate omits it under FSDP2
            outputs = model(**ready, num_items_in_batch=items)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            guard = None if self.psfm is None else self._guard(self.psfm, ready)
        if model.training:
            mean = loss * (items / num_tokens) if num_tokens else loss
            losses, weights = {"answers": mean}, [num_tokens]
            if guard is not None:
                losses["psfm"], weights = self._recipe.psfm_weight * guard, [num_tokens, inputs["num_patches"]]
            self._window.add(sum(losses.values()), losses, weights)
            self._step_batches.append((inputs.get("rows", []), loss.detach()))
        if guard is not None:
            patches = max(self._step_counts["num_patches"], 1)
            loss = loss + guard * (self._recipe.psfm_weight * inputs["num_patches"] / patches)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # since gradients are averaged over processes
        spa3r = self.whole_model.spa3r
        if spa3r is not None and self._recipe.policy == "end_to_end" and not _has_views(ready):
            # Distributed training needs a gradient for every parameter, even if a batch has only text.
            loss = loss + 0.0 * sum(parameter.sum() for parameter in spa3r.encoder.parameters())
        return (loss, outputs) if return_outputs else loss

    def _guard(self, psfm: Spa3RForPreTraining, inputs: Mapping[str, Any]) -> Tensor:
        """Spa3R's pretraining loss on the views of the batch."""
        if not _has_views(inputs):
            return torch.zeros((), device=self.args.device)
        scenes = [count for count in inputs["views_per_scene"] if count]
        # The depth probe learns only from its own loss, and is frozen here.
        losses = psfm(inputs["view_pixel_values"], inputs["view_grid_hw"], scenes).losses
        return sum(loss for name, loss in losses.items() if name != "depth_probe")

    def _nonfinite_parts(self) -> list[str]:
        return [
            name or "without a name"
            for names, loss in self._step_batches
            if not math.isfinite(loss.item())
            for name in names
        ]

    def _counted(self, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {
            "rows_per_second": counts.get("rows", 0) / seconds,
            "tokens_per_second": counts.get("tokens", 0) / seconds,
            "skipped_rows": int(counts.get("skipped", 0)),
        }

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the held-out questions, each process its share, and score the answers.

        Questions that can't be asked are left out, and a warning names the first.

        Returns:
            Scores in percent, by name with the prefix: the ``scores`` of :class:`~spa3r.evaluation.AnswerReport`.

        Raises:
            ValueError: There are no questions, or none can be asked.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("`eval_dataset` must hold questions with their answers to evaluate on, got None.")
        indices = range(self.args.process_index, len(dataset), self.args.world_size)
        with self._window.pause():
            own = AnswerReport([])
            if indices:
                processor: Any = self.processing_class
                examples = (dataset[index] for index in indices)
                with self.accelerator.autocast():
                    own = evaluate_answers(self._unwrapped, processor, examples, **self.evaluation, skip=True)
            parts = self._gather_from_hosts((own.answers, own.skipped))
            answers, skipped = (list(chain.from_iterable(part)) for part in zip(*parts))
            report = AnswerReport(answers, skipped)
        if skipped:
            first = f"{skipped[0]['row']!r}: {skipped[0]['reason']}"
            words = f"{len(skipped)} of {len(dataset)} held-out questions can't be asked; the first is {first}"
            if not answers:
                raise ValueError(f"{words} Check the questions, and that the processor is the model's.")
            logger.warning(words)
        return self._log_evaluation(report.scores, metric_key_prefix)

    # Checkpoints

    def _save_weights(self, model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Save the low-rank updates and adapter of a peft model. Otherwise save the model: completely at the end of a
        run, and before that without Spa3R's frozen backbone if it can be loaded again."""
        if isinstance(model, PeftModel):
            model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            return
        can_omit = model.spa3r is not None and can_omit_frozen_parts(model.spa3r, folder)
        model.save_pretrained(folder, include_backbone=self._writing_dir is None or not can_omit, state_dict=state_dict)

    def _load_weights(self, model: Any, checkpoint: Path) -> None:
        if not isinstance(model, PeftModel):
            load_strictly(model, checkpoint, may_lack=("spa3r.backbone",))
            return
        weights = load_file(checkpoint / PEFT_FILE)
        result = set_peft_model_state_dict(model, weights)
        if result.unexpected_keys:
            raise ValueError(
                f"The checkpoint {checkpoint} doesn't fit the model: it has the unexpected keys "
                f"{result.unexpected_keys}. Resume with the configuration that it was saved with."
            )


def steps_of(batches: InstructionBatches, args: FinetuningArguments) -> int:
    """Number of steps of ``args.num_train_epochs`` epochs.

    Raises:
        ValueError: The data is streamed, and has no length.
    """
    try:
        num_batches = len(batches)
    except TypeError as error:
        raise ValueError(
            "`max_steps` must be given where the rows are streamed, since nobody knows how many an epoch has; got "
            f"{args.max_steps}. For example 10000."
        ) from error
    return max(1, math.ceil(args.num_train_epochs * num_batches / args.gradient_accumulation_steps))


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The model's inputs of a batch: tensors on the device, the layout of the views as Python numbers."""
    ready = {}
    for name, value in batch.items():
        if name in NOT_FOR_MODEL:
            continue
        if name in LAYOUT and isinstance(value, Tensor):
            ready[name] = value.tolist()
        else:
            ready[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return ready


def _has_views(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("view_pixel_values") is not None and len(inputs["view_pixel_values"]) > 0


__all__ = ["FinetuningTrainer"]
