"""Evaluation: scores of models and of baselines that do without them."""

from spa3r.answering.engine import answer
from spa3r.evaluation.answers import AnswerReport, ScoredAnswer, evaluate_answers, score_answer, score_table
from spa3r.evaluation.benchmarks import Benchmark, RoomsBenchmark, VsiBench, open_benchmark
from spa3r.evaluation.blind import blind_answers, blind_scores
from spa3r.evaluation.compare import Flip, RunComparison, compare_runs
from spa3r.evaluation.field import FieldReport, Measure, evaluate_field
from spa3r.evaluation.run_folder import EvaluationRun
from spa3r.evaluation.runner import PRESETS, EvaluationSettings, run_benchmark
from spa3r.vsi_bench.scoring import aggregate, make_prompt, parse_prediction, score_prediction

__all__ = [
    "PRESETS",
    "AnswerReport",
    "Benchmark",
    "EvaluationRun",
    "EvaluationSettings",
    "FieldReport",
    "Flip",
    "Measure",
    "RoomsBenchmark",
    "RunComparison",
    "ScoredAnswer",
    "VsiBench",
    "aggregate",
    "answer",
    "blind_answers",
    "blind_scores",
    "compare_runs",
    "evaluate_answers",
    "evaluate_field",
    "make_prompt",
    "open_benchmark",
    "parse_prediction",
    "run_benchmark",
    "score_answer",
    "score_prediction",
    "score_table",
]
