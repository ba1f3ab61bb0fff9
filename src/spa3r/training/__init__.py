"""Pretraining and fine-tuning: configuration files, a Trainer for whole batches, and atomic checkpoints."""

from spa3r.training.arguments import FinetuningArguments, PretrainingArguments, RunArguments
from spa3r.training.config import DataSection, EvaluationSection, ModelSection, PretrainingConfig
from spa3r.training.finetuning.batches import InstructionBatches
from spa3r.training.finetuning.config import (
    AnswerSection,
    FinetuningConfig,
    FinetuningModelSection,
    InstructionSection,
)
from spa3r.training.finetuning.policies import ParameterGroup, apply_policy, group_table
from spa3r.training.finetuning.run import FinetuningResult, finetune, merge_lora
from spa3r.training.finetuning.trainer import FinetuningTrainer
from spa3r.training.logs import JsonLinesCallback, read_log
from spa3r.training.pretraining.run import PretrainingResult, pretrain
from spa3r.training.pretraining.trainer import PretrainingTrainer, whole_batch
from spa3r.training.runs import RunResult
from spa3r.training.sources import make_instructions, make_source

__all__ = [
    "AnswerSection",
    "DataSection",
    "EvaluationSection",
    "FinetuningArguments",
    "FinetuningConfig",
    "FinetuningModelSection",
    "FinetuningResult",
    "FinetuningTrainer",
    "InstructionBatches",
    "InstructionSection",
    "JsonLinesCallback",
    "ModelSection",
    "ParameterGroup",
    "PretrainingArguments",
    "PretrainingConfig",
    "PretrainingResult",
    "PretrainingTrainer",
    "RunArguments",
    "RunResult",
    "apply_policy",
    "finetune",
    "group_table",
    "make_instructions",
    "make_source",
    "merge_lora",
    "pretrain",
    "read_log",
    "whole_batch",
]
