"""Training arguments: those of transformers, with the recipes of the method as defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from spa3r.checks import check_ranges, check_types

COSINE = "cosine_with_min_lr"

POLICIES = ("paper", "adapter_only", "lora", "qlora", "end_to_end")
"""What fine-tuning trains, see :class:`FinetuningArguments`."""


MAX_SEED = 2**32 - 1
"""The largest seed that NumPy accepts."""

NUMBERS = (int, float, bool, int | None, float | None, bool | None)

RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit"), (1, None)),
    **dict.fromkeys(("gradient_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout"), (1, None)),
    **dict.fromkeys(("torch_empty_cache_steps", "eval_accumulation_steps", "ddp_bucket_cap_mb"), (1, None)),
    **dict.fromkeys(("lora_rank", "lora_alpha"), (1, None)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"), (0, None)),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "eval_delay"), (0, None)),
    **dict.fromkeys(("spa3r_learning_rate", "psfm_weight", "max_nonfinite_steps", "neftune_noise_alpha"), (0, None)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, MAX_SEED)),
    **dict.fromkeys(("max_steps", "local_rank"), (-1, None)),
    "dataloader_num_workers": (0, 1024),
}
"""Lowest and highest values of numeric arguments."""


@cache
def types_of(arguments: type[RunArguments]) -> dict[str, Any]:
    """The annotated types of the trainer's arguments; ``report_to`` may be None."""
    hints = get_type_hints(arguments)
    return {one.name: hints[one.name] for one in dataclasses.fields(arguments) if one.init}


def check_arguments(arguments: type[RunArguments], values: Mapping[str, Any], prefix: str = "") -> None:
    """Reject values of wrong types, and numbers out of range.

    Args:
        arguments: The class that defines the arguments.
        values: Some of the arguments by name.
        prefix: Prefix of the names in error messages.

    Raises:
        ValueError: A value is wrong. The message has the name, the accepted values, and the given value.
    """
    check_types(values, types_of(arguments), prefix)
    check_ranges(values, RANGES, prefix)


def make_checked(arguments: type[RunArguments], values: Mapping[str, Any]) -> Any:
    """Create the trainer's arguments from a configuration; conflicts raise an error before any work starts.

    Raises:
        ValueError: An argument is wrong.
    """
    try:
        made = arguments(**values)
        if made.lr_scheduler_type != "reduce_lr_on_plateau":
            probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=made.learning_rate)
            options: dict[str, Any] = {"scheduler_specific_kwargs": made.lr_scheduler_kwargs}
            get_scheduler(made.lr_scheduler_type, probe, num_warmup_steps=1, num_training_steps=2, **options)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, ValueError) and str(error).startswith("`"):  # our own message
            raise
        raise ValueError(f"`training`: {error}. Correct the value.") from error
    return made


@dataclass
class RunArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with the defaults that both trainings share.

    Args:
        max_nonfinite_steps: How many steps of a run may be dropped because their gradient is not finite. One more
            raises an error.
        muon_learning_rate: Learning rate of the matrices inside transformer layers and adapters, which are then trained
            by Muon instead of AdamW; it follows the same schedule. None: AdamW trains all parameters.

    Raises:
        ValueError: An argument doesn't fit a training that is counted in steps.
    """

    max_grad_norm: float = field(default=1.0)
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
    muon_learning_rate: float | None = field(default=None)

    @property
    def folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(str(self.output_dir))

    def __post_init__(self):
        # transformers checks strings and dictionaries: here they come in more forms than in a file.
        types = {name: kind for name, kind in types_of(type(self)).items() if kind in NUMBERS}
        check_types(vars(self), types)
        check_ranges(vars(self), RANGES)
        super().__post_init__()
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(f"`{name}` must be 'steps' or 'no', got 'epoch': a training is counted in steps.")
        if self.muon_learning_rate is None:
            return
        if self.muon_learning_rate <= 0:
            raise ValueError(
                f"`muon_learning_rate` must be above 0, such as 0.02, got {self.muon_learning_rate}. Leave it out to "
                "have AdamW train all."
            )
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"`muon_learning_rate` goes with `optim` adamw_torch or adamw_torch_fused, which train the rest, got "
                f"{OptimizerNames(self.optim).value!r}. Leave one of the two out."
            )


@dataclass
class PretrainingArguments(RunArguments):
    """:class:`RunArguments` with the recipe of the released Spa3R as defaults.

    AdamW with a learning rate of 2e-3 and cosine decay to a tenth of it, weight decay 1e-4 (not for biases and norms),
    gradients clipped to 1.0, two accumulated batches, 80 000 steps. The length of training is given in steps, not in
    epochs.

    Raises:
        ValueError: An argument doesn't fit a training that is counted in steps and reads whole batches.
    """

    max_steps: int = field(default=80_000)
    learning_rate: float = field(default=2e-3)
    lr_scheduler_type: str = field(default=COSINE)
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default=None)
    weight_decay: float = field(default=1e-4)
    gradient_accumulation_steps: int = field(default=2)

    def __post_init__(self):
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == COSINE:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(
                f"`max_steps` must be at least 1, got {self.max_steps}: a pretraining is counted in steps, not epochs."
            )
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                "`per_device_train_batch_size` must be 1, the one batch of scenes that the data set makes, got "
                f"{self.per_device_train_batch_size}. Say how many pictures a batch holds with `pictures_per_batch` of "
                "SceneBatches (`data.pictures_per_device` in a configuration file)."
            )


@dataclass
class FinetuningArguments(RunArguments):
    """:class:`RunArguments` with the instruction tuning of the paper as defaults.

    One epoch of AdamW: warmup to a learning rate of 1e-5 over 3 % of the steps, then cosine decay to 0, weight decay
    0.01 (not for biases and norms), gradients clipped to 1.0, one row per device accumulated over 8 batches, bfloat16
    where the device supports it.

    Args:
        policy: What is trained. Every policy freezes the VLM's vision tower and merger and Spa3R's backbone.
            ``"paper"``: adapter and language model. ``"adapter_only"``: the adapter. ``"lora"``: the adapter, and
            low-rank updates of the language model's linear layers by peft. ``"qlora"``: the same on a language model
            in 4 bits by bitsandbytes. ``"end_to_end"``: as ``"paper"``, plus Spa3R's encoder.
        spa3r_learning_rate: Learning rate of Spa3R's encoder in ``"end_to_end"``.
        psfm_weight: Weight of Spa3R's own pretraining loss on the same views, which protects the encoder from
            forgetting in ``"end_to_end"``; decoder and heads are frozen. 0: without.
        lora_rank: Rank of the low-rank updates.
        lora_alpha: The updates are scaled by alpha / rank.
        lora_dropout: Dropout rate of the inputs of LoRA layers.
        bf16: Whether to compute in bfloat16; None: on CUDA devices that support it.

    Raises:
        ValueError: The policy is unknown, or an argument doesn't fit it.
    """

    policy: str = field(default="paper")
    spa3r_learning_rate: float = field(default=1e-6)
    psfm_weight: float = field(default=0.0)
    lora_rank: int = field(default=64)
    lora_alpha: int = field(default=128)
    lora_dropout: float = field(default=0.0)
    num_train_epochs: float = field(default=1.0)
    learning_rate: float = field(default=1e-5)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.03)  # below 1 it is a share of all steps
    weight_decay: float = field(default=0.01)
    gradient_accumulation_steps: int = field(default=8)
    bf16: bool | None = field(default=None)  # ty: ignore[incompatible-attribute-override]  # None ends in __post_init__

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, got {self.policy!r}.")
        if self.psfm_weight and self.policy != "end_to_end":
            raise ValueError(
                f"`psfm_weight` must be 0 where Spa3R's encoder isn't trained, got {self.psfm_weight} with the policy "
                f"{self.policy!r}. Leave it out, or use the policy 'end_to_end'."
            )
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}  # inputs of frozen layers need no gradient
        super().__post_init__()


__all__ = ["FinetuningArguments", "POLICIES", "PretrainingArguments", "RunArguments"]
