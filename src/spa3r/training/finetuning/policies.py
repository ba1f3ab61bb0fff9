"""What fine-tuning trains: named policies, and the resulting parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.training.arguments import FinetuningArguments

ADAPTER, LANGUAGE, VISION = "adapter", "language model", "vision tower and merger"
ENCODER, REST = "Spa3R's encoder", "rest of Spa3R"
"""The parts of a Spa3-VLM."""

LOW_RANK = "low-rank updates"


def apply_policy(
    model: Spa3VLMForConditionalGeneration, args: FinetuningArguments
) -> Spa3VLMForConditionalGeneration | PeftModel:
    """Make exactly the parameters of the policy trainable; they become float32, the others stay unchanged.

    Args:
        model: The model, changed in place.
        args: The arguments with the ``policy``.

    Returns:
        The model; for ``"lora"`` and ``"qlora"`` a peft model, whose checkpoints hold the low-rank updates and the
        whole adapter.

    Raises:
        ValueError: The policy would train nothing, or needs what the model doesn't have.
    """
    model.requires_grad_(False)
    parts = parts_of(model)
    if args.policy == "adapter_only" and not parts[ADAPTER]:
        raise ValueError(
            "`policy` 'adapter_only' trains the adapter, and this model has none (`spatial_source` is 'none'). Use "
            "'paper', 'lora' or 'qlora'."
        )
    if args.policy == "end_to_end" and not parts[ENCODER]:
        raise ValueError(
            "`policy` 'end_to_end' trains Spa3R's encoder, which this model doesn't use: its `spatial_source` is "
            f"{getattr(model.config, 'spatial_source', None)!r}. Use 'paper', or spatial_source='spa3r'."
        )
    trained = [*parts[ADAPTER]]
    if args.policy in ("paper", "end_to_end"):
        trained += parts[LANGUAGE]
    if args.policy == "end_to_end":
        trained += parts[ENCODER]
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    if args.policy in ("lora", "qlora"):
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=linear_layers(model),
            modules_to_save=["adapter"] if parts[ADAPTER] else None,
        )
        low_rank = get_peft_model(model, lora)
        low_rank.train(model.training)  # frozen parts stay in eval mode
        return low_rank
    return model


def parts_of(model: Spa3VLMForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """All parameters, grouped by the part of the model to which they belong."""
    vision = {id(parameter) for parameter in model.vision_parameters()}
    spa3r, adapter = getattr(model, "spa3r", None), getattr(model, "adapter", None)
    uses_encoder = getattr(model.config, "spatial_source", "spa3r") == "spa3r"
    encoder = list(spa3r.encoder.parameters()) if spa3r is not None and uses_encoder else []
    learns = {id(parameter) for parameter in encoder}
    return {
        LANGUAGE: [parameter for parameter in model.vlm.parameters() if id(parameter) not in vision],
        VISION: model.vision_parameters(),
        ADAPTER: [] if adapter is None else list(adapter.parameters()),
        ENCODER: encoder,
        REST: [] if spa3r is None else [p for p in spa3r.parameters() if id(p) not in learns],
    }


def linear_layers(model: Spa3VLMForConditionalGeneration) -> list[str]:
    """Names of the linear layers of the language model, without its head."""
    language = set(model.vlm.get_decoder().modules())
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in language]


def quantization(args: FinetuningArguments, vlm: str) -> BitsAndBytesConfig | None:
    """How to load the VLM: with a 4-bit language model (arXiv 2305.14314) for ``"qlora"``, otherwise unchanged.

    Args:
        args: Arguments of the training.
        vlm: Folder or hub id of the VLM.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if args.policy != "qlora":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`policy` 'qlora' needs bitsandbytes, which is not installed or doesn't run here. pip install "
            "'spa3r[qlora]', or use 'lora'."
        ) from error
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(vlm))
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if on_cuda and not torch.cuda.is_bf16_supported() else torch.bfloat16,
        llm_int8_skip_modules=beside(model, model.get_decoder()),
    )


def beside(model: nn.Module, part: nn.Module) -> list[str]:
    """Names of the fewest modules that together contain everything in a model except one part."""
    (path,) = (name.split(".") for name, module in model.named_modules() if module is part)
    names = []
    for depth, step in enumerate(path):
        above = path[:depth]
        children = model.get_submodule(".".join(above)).named_children()
        names += [".".join((*above, name)) for name, _ in children if name != step]
    return names


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained with the same options.

    Attributes:
        part: Part of the model.
        parameters: The parameters.
        learning_rate: Peak learning rate; None: they are frozen.
        weight_decay: Weight decay.
    """

    part: str
    parameters: list[nn.Parameter]
    learning_rate: float | None = None
    weight_decay: float = 0.0

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(parameter.numel() for parameter in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """The group without the parameters themselves, ready for JSON."""
        group = {"part": self.part, "size": self.size}
        return group | {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}


def parameter_groups(
    model: Spa3VLMForConditionalGeneration | PeftModel, args: FinetuningArguments, decayed: Iterable[str]
) -> list[ParameterGroup]:
    """All parameters of a model with an applied policy, in groups: for each part those with weight decay, those
    without, and the frozen ones.

    Args:
        model: The model.
        args: The arguments.
        decayed: Names of parameters with weight decay.
    """
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    part_of = {id(parameter): part for part, members in parts_of(whole).items() for parameter in members}
    decayed, groups = set(decayed), {}
    for name, parameter in model.named_parameters():
        part = LOW_RANK if ".lora_" in name else part_of[id(parameter)]
        rate = decay = None
        if parameter.requires_grad:
            rate = args.spa3r_learning_rate if part == ENCODER else args.learning_rate
            decay = args.weight_decay if name in decayed else 0.0
        elif "original_module." in name:
            continue  # peft keeps the original adapter next to the trained one
        groups.setdefault((part, rate, decay or 0.0), []).append(parameter)
    order = (ADAPTER, LOW_RANK, LANGUAGE, VISION, ENCODER, REST)
    keys = sorted(groups, key=lambda key: (key[1] is None, order.index(key[0]), -key[2]))
    return [ParameterGroup(part, groups[part, rate, decay], rate, decay) for part, rate, decay in keys]


def group_table(groups: Iterable[ParameterGroup]) -> str:
    """The groups and their sizes, one per line."""
    rows = [("parameters of the", "how many", "learning rate", "weight decay")]
    for group in groups:
        is_frozen = group.learning_rate is None
        options = ("frozen", "") if is_frozen else (f"{group.learning_rate:g}", f"{group.weight_decay:g}")
        rows.append((group.part, f"{group.size:,}", *options))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
