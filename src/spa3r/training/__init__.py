"""Pretraining: a configuration file, transformers' Trainer for batches of scenes, and whole checkpoints."""

from spa3r.training.arguments import PretrainingArguments
from spa3r.training.config import DataSection, EvaluationSection, ModelSection, PretrainingConfig
from spa3r.training.logs import JsonLinesCallback, read_log
from spa3r.training.pretrain import PretrainingResult, pretrain
from spa3r.training.trainer import PretrainingTrainer, whole_batch

__all__ = [
    "DataSection",
    "EvaluationSection",
    "JsonLinesCallback",
    "ModelSection",
    "PretrainingArguments",
    "PretrainingConfig",
    "PretrainingResult",
    "PretrainingTrainer",
    "pretrain",
    "read_log",
    "whole_batch",
]
