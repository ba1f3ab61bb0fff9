"""The arguments of a pretraining: transformers' own, with the method's recipe as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

COSINE = "cosine_with_min_lr"


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' ``TrainingArguments``, with the recipe of the released Spa3R as defaults.

    AdamW with a learning rate of 2e-3 that falls along a cosine to a tenth of it, weight decay 1e-4 (not of biases and
    norms), gradients clipped to 1.0, two batches accumulated, 80 000 steps. A training is counted in steps, not in
    epochs.

    Args:
        max_nonfinite_steps: How many steps of a run may be dropped because their gradient is not finite. One more is
            an error.

    Raises:
        ValueError: An argument doesn't suit a training that is counted in steps and reads whole batches.
    """

    max_steps: int = field(default=80_000)
    learning_rate: float = field(default=2e-3)
    lr_scheduler_type: str = field(default=COSINE)
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default=None)
    weight_decay: float = field(default=1e-4)
    max_grad_norm: float = field(default=1.0)
    gradient_accumulation_steps: int = field(default=2)
    per_device_train_batch_size: int = field(default=1)
    logging_steps: float = field(default=10)
    logging_nan_inf_filter: bool = field(default=False)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=2)
    report_to: str | list[str] | None = field(default="tensorboard")
    disable_tqdm: bool | None = field(default=True)
    remove_unused_columns: bool = field(default=False)
    ignore_data_skip: bool = field(default=True)
    dataloader_num_workers: int = field(default=4)
    ddp_find_unused_parameters: bool | None = field(default=False)
    ddp_broadcast_buffers: bool | None = field(default=False)
    seed: int = field(default=0)
    max_nonfinite_steps: int = field(default=100)

    def __post_init__(self):
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == COSINE:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(
                f"`max_steps` must be at least 1, got {self.max_steps}: a pretraining is counted in steps, not epochs."
            )
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(f"`{name}` must be 'steps' or 'no', got 'epoch': a pretraining is counted in steps.")
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                "`per_device_train_batch_size` must be 1, the one batch of scenes that the data set makes, got "
                f"{self.per_device_train_batch_size}. Say how many pictures a batch holds with `pictures_per_batch` of "
                "SceneBatches (`data.pictures_per_device` in a configuration file)."
            )


__all__ = ["PretrainingArguments"]
