"""The configuration file of fine-tuning."""

from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from spa3r.models.spa3_vlm.configuration_spa3_vlm import Spa3VLMConfig
from spa3r.training.arguments import FinetuningArguments
from spa3r.training.config import DATA_RANGES, ELSEWHERE, FREE_TO_CHANGE, RunConfig


@strict
@dataclass
class FinetuningModelSection:
    """The model to train.

    Args:
        vlm: Folder or hub id of the VLM, with `spa3r`.
        spa3r: Folder or hub id of the Spa3R to combine it with; ``embedded``: the one in the package.
        init_from: Folder or hub id of a Spa3-VLM to start from, instead of `vlm` and `spa3r`; ``embedded``: the small
            one in the package.
        dtype: Data type of the frozen weights; the trained ones are float32.
        attn_implementation: Attention back end; None: the best one that is installed.
        images: What the VLM sees, see :class:`~spa3r.Spa3VLMProcessor`; None: the processor's own choice.
        view_size: Width of a processed view in pixels; None: that of the Spa3R.
        fields: Any other fields of :class:`~spa3r.Spa3VLMConfig`, such as ``integration``; in the file they are keys of
            the same section. Only with `vlm` and `spa3r`.
    """

    vlm: str | None = None
    spa3r: str | None = None
    init_from: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    images: Literal["aligned", "native"] | None = None
    view_size: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@strict
@dataclass
class InstructionSection:
    """The instructions to train on.

    Args:
        train: A description of the data, see :func:`~spa3r.training.make_instructions`.
        max_length: Maximum number of tokens of a row; None: no limit.
        max_bad_share: Share of rows that may be broken or too long.
        group_by_length: Whether rows of similar length are grouped.
        num_workers: Processes that read pictures, per device; 0: only the training process.
        seed: Seed of the order.
    """

    train: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    max_bad_share: float | int = 0.05
    group_by_length: bool = False
    num_workers: int = 4
    seed: int = 0


@strict
@dataclass
class AnswerSection:
    """Held-out questions for evaluation during training; without them there is none.

    Args:
        questions: As ``data.train``.
        examples: Number of questions, evenly spaced; None: all.
        every: Steps between two evaluations. There is also one at the end.
        batch_size: Number of questions answered at once.
        max_new_tokens: Maximum length of an answer.
    """

    questions: dict[str, Any] = field(default_factory=dict)
    examples: int | None = 200
    every: int = 1000
    batch_size: int = 8
    max_new_tokens: int = 16


@dataclass
class FinetuningConfig(RunConfig):
    """The configuration of ``spa3r finetune``: a YAML file of four sections.

    Attributes:
        model: The model.
        data: The instructions to train on.
        evaluation: The held-out questions.
        training: Fields of :class:`~spa3r.training.FinetuningArguments`.
    """

    model: FinetuningModelSection = field(default_factory=FinetuningModelSection)
    data: InstructionSection = field(default_factory=InstructionSection)
    evaluation: AnswerSection = field(default_factory=AnswerSection)
    training: dict[str, Any] = field(default_factory=dict)

    ARGUMENTS = FinetuningArguments
    RECIPE = (
        *("policy", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "bf16"),
        *("gradient_checkpointing", "save_steps", "save_total_limit", "logging_steps", "max_nonfinite_steps"),
    )
    FREE_TO_CHANGE = (*FREE_TO_CHANGE, "training.num_train_epochs")
    MODEL = Spa3VLMConfig
    DERIVED = ("vlm_config", "spa3r_config", "spatial_token_id")
    RANGES = {
        "model": {"view_size": (1, None)},
        "data": DATA_RANGES | {"max_length": (1, None)},
        "evaluation": dict.fromkeys(("examples", "every", "batch_size", "max_new_tokens"), (1, None)),
    }
    ELSEWHERE = ELSEWHERE | {
        "per_device_eval_batch_size": "evaluation.batch_size",
        "train_sampling_strategy": "data.group_by_length",
        "data_seed": "data.seed",
    }

    def _check(self) -> None:
        model = self.model
        if not self.data.train:
            raise ValueError("`data.train` must say which instructions are trained on, got nothing.")
        if (model.init_from is None) == (model.vlm is None):
            raise ValueError(
                "`model.vlm` (and `model.spa3r`) must name what is to be combined, or `model.init_from` the Spa3-VLM "
                f"to start from; got {'neither' if model.vlm is None else 'both'}."
            )
        if model.vlm is not None and model.spa3r is None and model.fields.get("spatial_source") != "none":
            raise ValueError(
                "`model.spa3r` must name the Spa3R that the VLM is combined with, got none. A folder, a hub id, or "
                "`embedded`; only spatial_source: none goes without."
            )
        if model.init_from is not None and model.fields:
            raise ValueError(
                f"`model.{next(iter(model.fields))}` can be chosen where a VLM is combined with a Spa3R (`model.vlm`), "
                "and `model.init_from` names a Spa3-VLM, whose choices are made. Leave it out."
            )


__all__ = ["AnswerSection", "FinetuningConfig", "FinetuningModelSection", "InstructionSection"]
