"""Pretraining and fine-tuning: configuration files, transformers' Trainer for whole batches, and whole checkpoints."""

from spa3r.training.arguments import FinetuningArguments, PretrainingArguments
from spa3r.training.config import DataSection, EvaluationSection, ModelSection, PretrainingConfig
from spa3r.training.finetune import FinetuningResult, finetune, merge_lora
from spa3r.training.finetune_batches import InstructionBatches
from spa3r.training.finetune_config import (
    AnswerSection,
    FinetuningConfig,
    FinetuningModelSection,
    InstructionSection,
)
from spa3r.training.finetune_trainer import FinetuningTrainer
from spa3r.training.logs import JsonLinesCallback, read_log
from spa3r.training.policies import ParameterGroup, apply_policy, group_table
from spa3r.training.pretrain import PretrainingResult, pretrain
from spa3r.training.trainer import PretrainingTrainer, whole_batch

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
    "apply_policy",
    "finetune",
    "group_table",
    "merge_lora",
    "pretrain",
    "read_log",
    "whole_batch",
]
