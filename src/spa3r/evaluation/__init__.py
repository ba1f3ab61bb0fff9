"""How good a model is, in numbers, beside what can be had without it."""

from spa3r.evaluation.blind import blind_answers, blind_scores
from spa3r.evaluation.field import FieldReport, Measure, evaluate_field
from spa3r.evaluation.room_answers import (
    AnswerReport,
    ScoredAnswer,
    answer,
    evaluate_answers,
    score_answer,
    score_table,
)
from spa3r.evaluation.vsi_bench import aggregate, make_prompt, parse_prediction, score_prediction

__all__ = [
    "AnswerReport",
    "FieldReport",
    "Measure",
    "ScoredAnswer",
    "aggregate",
    "answer",
    "blind_answers",
    "blind_scores",
    "evaluate_answers",
    "evaluate_field",
    "make_prompt",
    "parse_prediction",
    "score_answer",
    "score_prediction",
    "score_table",
]
