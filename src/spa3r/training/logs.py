"""The log of a run as JSON lines, complete even after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spa3r.disk import read_json_lines, write_whole, writing
from spa3r.secret import hide


class JsonLinesCallback(TrainerCallback):
    """Appends all logged values to ``log.jsonl`` in the output folder, one JSON object per line.

    A resumed run first drops the lines of steps that it will repeat, so that each step is listed once.
    """

    FILE = "log.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training resumes from."""
        file = Path(str(args.output_dir)) / self.FILE
        if not state.is_world_process_zero or not file.exists():
            return
        kept = [line for line in read_log(file) if line["step"] <= state.global_step]
        write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (logs or {}).items()
        }
        place = Path(str(args.output_dir)) / self.FILE
        with writing(place, "Free space; the same command resumes from the last checkpoint."):
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "a", encoding="utf-8") as file:
                file.write(hide(json.dumps(line)) + "\n")


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a ``log.jsonl``. A last line that a kill cut short is left out.

    Raises:
        ValueError: Another line is damaged.
    """
    lines, faults = read_json_lines(file, _check_entry, may_be_cut=True)
    if faults:
        raise ValueError(
            f"{file} is damaged: {faults[0]} can't be read. Delete that line, or move the file away: the run continues "
            "without it."
        )
    return lines


def _check_entry(line: dict[str, Any]) -> None:
    if not isinstance(line.get("step"), int):
        raise ValueError("it is no entry of a log")


__all__ = ["JsonLinesCallback", "read_log"]
