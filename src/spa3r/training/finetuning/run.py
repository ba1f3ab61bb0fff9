"""Fine-tuning from a configuration to the last checkpoint: the implementation of ``spa3r finetune``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import Dataset, Subset
from transformers import AutoModelForImageTextToText, TrainerCallback

from spa3r.checkpoints import EMBEDDED, resolve
from spa3r.data.collator import Spa3VLMCollator
from spa3r.data.instructions import StreamedInstructions
from spa3r.media.videos import uniform_indices
from spa3r.models.base import check_adapter_keys
from spa3r.models.model_card import source_names
from spa3r.models.released import find_adapter
from spa3r.models.spa3_vlm.modeling_spa3_vlm import Spa3VLMForConditionalGeneration
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining
from spa3r.rooms.embedded import embedded_spa3r
from spa3r.training.arguments import FinetuningArguments, make_checked
from spa3r.training.finetuning.batches import InstructionBatches
from spa3r.training.finetuning.config import FinetuningConfig
from spa3r.training.finetuning.policies import group_table, quantization
from spa3r.training.finetuning.trainer import FinetuningTrainer
from spa3r.training.runs import CONFIG_FILE, RunResult, run
from spa3r.training.sources import make_instructions


@dataclass
class FinetuningResult(RunResult):
    """What :func:`finetune` returns.

    Attributes:
        parameters: Part, size, learning rate (None: frozen) and weight decay of every parameter group.
    """

    parameters: list[dict[str, Any]] = field(default_factory=list)


def finetune(
    config: FinetuningConfig,
    *,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    note: Callable[[str], object] = lambda text: None,
    progress: Callable[[str], object] = lambda text: None,
) -> FinetuningResult:
    """Train, or resume training, as :func:`pretrain` does.

    Args:
        config: The configuration.
        fresh: As in :func:`pretrain`.
        callbacks: More callbacks for the trainer.
        note: Called in the main process with messages for the user; before the first step, with all parameter
            groups and their sizes.
        progress: Called in the main process with one line per log entry.

    Raises:
        ValueError: As in :func:`pretrain`.
        ImportError: A package of ``spa3r[train]`` is missing, or bitsandbytes for ``"qlora"``.
    """
    args, section, data, evaluation = make_arguments(config), config.model, config.data, config.evaluation

    def make_trainer(note: Callable[[str], object]) -> FinetuningTrainer:
        model, processor, psfm = make_model(config, args)
        collator = Spa3VLMCollator(processor, max_length=data.max_length)
        batches = InstructionBatches(
            make_instructions(data.train),
            collator,
            args.per_device_train_batch_size,
            group_by_length=data.group_by_length,
            accumulate=args.gradient_accumulation_steps,
            seed=data.seed,
            rank=args.process_index,
            world_size=args.world_size,
            max_bad_share=data.max_bad_share,
        )
        trainer = FinetuningTrainer(
            model,
            args,
            batches,
            make_questions(config),
            processing_class=processor,
            data_collator=collator,
            psfm=psfm,
            evaluation={"batch_size": evaluation.batch_size, "max_new_tokens": evaluation.max_new_tokens},
            callbacks=list(callbacks),
        )
        trainer.training_data = source_names(data.train)
        note(group_table(trainer.parameter_groups()))
        return trainer

    parts = (section.init_from, section.vlm, section.spa3r)
    trainer, result = run(config, args, make_trainer, parts, fresh, note, progress)
    return FinetuningResult(**result, parameters=[group.to_dict() for group in trainer.parameter_groups()])


def merge_lora(run_folder: str | Path) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor]:
    """Merge the low-rank updates of a ``"lora"`` run into the language model; returns an ordinary Spa3-VLM.

    Args:
        run_folder: Folder of the run, or of one of its checkpoints; or any PEFT adapter that names its base as a
            folder or hub id.

    Raises:
        ValueError: The folder has no peft checkpoint, or one with missing or unexpected keys.
    """
    folder = Path(run_folder)
    runs = [place for place in (folder, folder.parent) if (place / CONFIG_FILE).is_file()]
    adapter = find_adapter(run_folder)
    if not runs and adapter is not None and adapter.base is not None:
        base = Spa3VLMForConditionalGeneration.from_pretrained(adapter.base, **adapter.where)
        return _merge(base, run_folder), Spa3VLMProcessor.from_pretrained(run_folder)
    if not runs or adapter is None:
        raise ValueError(
            f"`run_folder` must hold the peft checkpoint of a run of `spa3r finetune`, got {run_folder}. Give the "
            "run's output folder or one of its checkpoints, of the policy 'lora' or 'qlora'; or an adapter of PEFT "
            "that names its base model."
        )
    config = FinetuningConfig.from_yaml(runs[0] / CONFIG_FILE)
    model, processor, _ = make_model(config)
    return _merge(model, folder), processor


def _merge(model: Spa3VLMForConditionalGeneration, adapter: str | Path) -> Spa3VLMForConditionalGeneration:
    low_rank = PeftModel.from_pretrained(model, str(adapter))
    # `from_pretrained` only warns of wrong keys.
    loaded = low_rank.load_adapter(str(adapter), str(low_rank.active_adapter))
    check_adapter_keys(adapter, type(model), loaded.missing_keys, loaded.unexpected_keys)
    return low_rank.merge_and_unload().eval()


# Objects of the configuration


def make_arguments(config: FinetuningConfig) -> FinetuningArguments:
    """The trainer's arguments."""
    given = dict(config.training) | {"dataloader_num_workers": config.data.num_workers, "data_seed": config.data.seed}
    if config.evaluation.questions:
        given |= {"eval_strategy": "steps", "eval_steps": config.evaluation.every}
    return make_checked(FinetuningArguments, given)


def make_model(
    config: FinetuningConfig, args: FinetuningArguments | None = None
) -> tuple[Spa3VLMForConditionalGeneration, Spa3VLMProcessor, Spa3RForPreTraining | None]:
    """The model, its processor, and if ``args.psfm_weight`` is set, the Spa3R with its teacher.

    Without `args` the VLM is loaded unquantized, as needed to merge a ``"qlora"`` model.
    """
    section = config.model
    loading: dict[str, Any] = {"dtype": section.dtype, "attn_implementation": section.attn_implementation}
    needs_teacher = args is not None and args.psfm_weight > 0
    psfm = None
    if section.init_from is not None:
        quantizes = args is not None and args.policy == "qlora"
        if quantizes or (needs_teacher and section.init_from != EMBEDDED):
            what = "`policy` 'qlora' quantizes a VLM" if quantizes else "`psfm_weight` takes Spa3R's teacher"
            raise ValueError(
                f"{what} where a VLM and a Spa3R are combined: give `model.vlm` and `model.spa3r`, not `init_from`."
            )
        model = Spa3VLMForConditionalGeneration.from_pretrained(section.init_from, **loading)
        processor = Spa3VLMProcessor.from_pretrained(section.init_from)
        if needs_teacher and model.spa3r is not None:
            psfm, _ = embedded_spa3r()
            psfm.spa3r = model.spa3r
    else:
        name: Any = section.vlm  # or `init_from`, as the configuration has checked
        vlm = name
        if args is not None and (quantized := quantization(args, name)) is not None:
            vlm = AutoModelForImageTextToText.from_pretrained(name, quantization_config=quantized, **loading)
            for module in vlm.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    # Otherwise the first evaluation repacks the weights on such CPUs, which then blocks gradients.
                    module.support_avx512bf16_for_cpu = False  # ty: ignore[invalid-assignment]  # bitsandbytes' flag
        place = None if section.spa3r is None else resolve(section.spa3r)
        spa3r: Any = place
        if needs_teacher:
            psfm = Spa3RForPreTraining.from_pretrained(place, **loading)
            spa3r = psfm.spa3r
        model = Spa3VLMForConditionalGeneration.from_vlm_and_spa3r(vlm, spa3r, **loading, **section.fields)
        processor = Spa3VLMProcessor.from_vlm_and_spa3r(name, place)
        processor.spatial_tokens = model.config.spatial_tokens
    if section.images is not None:
        processor.image_mode = section.images
    if section.view_size is not None:
        processor.view_image_processor.size = section.view_size
    return model, processor, psfm


def make_questions(config: FinetuningConfig) -> Dataset | None:
    """The held-out questions, or None.

    Raises:
        ValueError: They are streamed.
    """
    if not config.evaluation.questions:
        return None
    questions, wanted = make_instructions(config.evaluation.questions), config.evaluation.examples
    if isinstance(questions, StreamedInstructions):
        raise ValueError("`evaluation.questions` must have random access, got `streaming: true`. Leave it out.")
    if wanted is None or wanted >= len(questions):
        return questions
    return Subset(questions, uniform_indices(len(questions), wanted).tolist())


__all__ = ["FinetuningResult", "finetune", "merge_lora"]
