"""Shared code of ``spa3r pretrain`` and ``spa3r finetune``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spa3r.console import Report, plural, resuming_command
from spa3r.processes import end_processes
from spa3r.vsi_bench.format import task_title

PARTS = ("vlm", "spa3r", "backbone", "semantic_teacher", "init_from")
"""Keys of the section `model` that name a folder or something on the hub."""

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Sections model, data, evaluation, training.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete the checkpoints, model and logs of the run.")]


def train(report: Report, settings: Any, run: Callable[..., Any], fresh: bool) -> Any:
    """Run a training; only the first process returns its result."""
    from spa3r.hub import naming_missing

    is_main_process = os.environ.get("RANK", "0") == "0"
    if is_main_process:
        report.line(settings.to_yaml())
    with naming_missing(*(getattr(settings.model, key, None) for key in PARTS)):
        result = run(settings, fresh=fresh, note=report.note, progress=report.line)
    end_processes()
    if not is_main_process:
        raise typer.Exit
    return result


def finish(report: Report, result: Any, text: str = "", **more: Any) -> None:
    """Report what a training did."""
    lines = [f"{result.output_dir}: {result.step} of {result.max_steps} steps"]
    lines += [f"  {task_title(name)} {value:.4g}" for name, value in result.evaluation.items() if value is not None]
    lines.append(str(result.skipped))
    if text:
        lines.append(text)
    if result.nonfinite_steps:
        lines.append(f"{plural(result.nonfinite_steps, 'step')} dropped, their gradient was not finite")
    if not result.is_finished:
        lines.append(f"stopped by {result.interrupted_by}; {resuming_command()} goes on from {result.checkpoint}")
    report.finish(
        "\n".join(lines),
        exit_code=0 if result.is_finished else 130,
        output_dir=result.output_dir,
        step=result.step,
        max_steps=result.max_steps,
        finished=result.is_finished,
        interrupted_by=result.interrupted_by,
        resumed_from=result.resumed_from,
        checkpoint=result.checkpoint,
        evaluation=result.evaluation,
        nonfinite_steps=result.nonfinite_steps,
        skipped=result.skipped.entries(),
        **more,
    )
