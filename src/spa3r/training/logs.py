"""The log of a run as JSON lines, true also after a kill."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spa3r.training.checkpoints import publish, unfinished_folder


class JsonLinesCallback(TrainerCallback):
    """Appends everything that is logged to ``log.jsonl`` in the output folder, one JSON object a line.

    A resumed run first drops the lines of steps that it will repeat, so that each step stands there once.
    """

    FILE = "log.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training goes on from."""
        file = Path(args.output_dir) / self.FILE
        if not state.is_world_process_zero or not file.exists():
            return
        kept = [line for line in read_log(file) if line["step"] <= state.global_step]
        folder = unfinished_folder(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.FILE).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        publish(folder / self.FILE, file)

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
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with open(os.path.join(args.output_dir, self.FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``. A last line that a kill cut short is left out."""
    lines = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


__all__ = ["JsonLinesCallback", "read_log"]
