"""How good a model is, in numbers, beside what can be had without it."""

from spa3r.evaluation.field import FieldReport, Measure, evaluate_field

__all__ = ["FieldReport", "Measure", "evaluate_field"]
