"""The folder of a run: everything that is needed to repeat it, to compare it and to look at it.

run.json         what was asked of which model with which settings, on what; scores
answers.jsonl    one question a line: the row, prompt, frames, the model's words, what was read of them, score
table.md         the scores as a table

While questions are answered their lines lie in ``answers-00000.jsonl`` and so on, one file for each process. A killed
run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spa3r.evaluation.bootstrap import SAMPLES, SEED, score_intervals
from spa3r.evaluation.room_answers import AnswerReport, ScoredAnswer
from spa3r.evaluation.vsi_bench import aggregate
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor

Line = dict[str, Any]
RUN_FILE, ANSWERS_FILE, TABLE_FILE = "run.json", "answers.jsonl", "table.md"
FREE_TO_CHANGE = ("settings.missing", "settings.workers", "model.name", "model.revision", "benchmark.data")
"""What may be another when a run is gone on with: weights and questions are told by their hashes."""


@dataclass(frozen=True)
class EvaluationRun:
    """A finished run.

    Attributes:
        folder: Where it lies.
        about: What ``run.json`` says: ``benchmark``, ``model``, ``settings``, ``environments`` (one for each time that
            the run was started), ``scores`` (per cent), ``intervals`` (95 %, by scenes), ``missing``.
        answers: Of every question, in the benchmark's order, its row with ``prompt``, ``frames`` (numbers in the
            video), ``prediction`` (the model's words), ``parsed`` (what was read of them), ``score``; where the frames
            could not be read ``missing``, the reason, and no prediction.
    """

    folder: Path
    about: dict[str, Any]
    answers: list[Line]

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationRun:
        """Read a run.

        Args:
            folder: Of a run that is finished.

        Raises:
            ValueError: It is no folder of a run, or the run is not finished.
        """
        folder = Path(folder)
        if not (folder / RUN_FILE).is_file():
            raise ValueError(f"{folder} must be the folder of an evaluation, and holds no {RUN_FILE}. Check the path.")
        if not (folder / ANSWERS_FILE).is_file():
            raise ValueError(
                f"The run in {folder} is not finished: it has no {ANSWERS_FILE}. The command that started it goes on."
            )
        about = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return cls(folder, about, list(read_lines(folder / ANSWERS_FILE)))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def scores(self) -> dict[str, float]:
        """Per cent: ``"overall"`` and the tasks that occur, as :func:`~spa3r.evaluation.aggregate` gives them."""
        return aggregate(scored(self.answers))

    def table(self) -> str:
        """The scores by task as a Markdown table, with the number of questions and 95 % intervals over scenes."""
        return (self.folder / TABLE_FILE).read_text(encoding="utf-8").strip()


def scored(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that have a score: all but those that are skipped."""
    return [line for line in lines if line["score"] is not None]


def make_table(lines: list[Line]) -> str:
    """As :meth:`EvaluationRun.table`."""
    intervals = score_intervals(scored(lines))
    report = AnswerReport(
        [
            ScoredAnswer("", line["question_type"], "", line["prediction"] or "", line["ground_truth"], line["score"])
            for line in scored(lines)
        ]
    )
    cells = [["per cent", "questions", "score", "95 % interval"]]
    for name in [*list(report.scores)[1:], "overall"]:
        low, high = intervals[name]
        cells.append(
            [task_title(name), str(report.counts[name]), f"{report.scores[name]:.1f}", f"{low:.1f} to {high:.1f}"]
        )
    return markdown(cells)


def task_title(name: str) -> str:
    """``object counting`` of ``object_counting_MRA:.5:.95:.05``."""
    return name.partition("_MRA")[0].removesuffix("_accuracy").replace("_", " ")


def told_missing(missing: Mapping[str, Any]) -> str:
    """What became of questions without frames, from ``about["missing"]``."""
    became = {"skip": "left out of the scores", "zero": "scored 0"}[missing["choice"]]
    return f"Questions without frames to look at: {missing['questions']}, {became}."


def markdown(cells: list[list[str]]) -> str:
    """A Markdown table, its first row the headings, that is readable as plain text."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# Lines of answers


def read_lines(file: Path) -> Iterator[Line]:
    """The whole lines of a file; one that a kill cut short is left out."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


class LineWriter:
    """Appends lines to a file, each readable as soon as it is written."""

    def __init__(self, file: Path):
        self._file = open(file, "a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # after a line that a kill cut short; one that is empty is no line

    def write(self, lines: Iterable[Line]) -> None:
        """Write lines and hand them to the system, from where no kill takes them back."""
        self._file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RunFolder:
    """The folder of a run that is going on.

    Args:
        folder: It is made by :meth:`begin`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def begin(self, about: dict[str, Any], environment: dict[str, Any], fresh: bool) -> None:
        """Write down what is run; of a run that goes on, check that it is the same.

        Raises:
            ValueError: Another run is in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (RUN_FILE, TABLE_FILE, ANSWERS_FILE):
                (self.folder / name).unlink(missing_ok=True)
            for part in self._parts():
                part.unlink()
        about, environments = json.loads(json.dumps(about)), []
        if (self.folder / RUN_FILE).exists():
            before = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
            if changed := changes({key: before.get(key) for key in about}, about):
                raise ValueError(
                    f"`output` {self.folder} holds another run ({'; '.join(changed)}). Change it back to go on with "
                    "that run, name another folder, or start over with --fresh (`fresh=True`), which deletes its "
                    "answers."
                )
            environments = before["environments"]
        self._write_about(about | {"environments": [*environments, environment]})

    def answered(self) -> dict[Any, Line]:
        """Lines by id, of all starts. Those of frames that could not be read are left out: they are tried again."""
        return {key: line for key, line in self._lines().items() if not line.get("missing")}

    def part(self, process: int) -> Path:
        """Where a process writes its lines."""
        return self.folder / f"answers-{process:05d}.jsonl"

    def finish(self, ids: list[Any], missing: Literal["fail", "skip", "zero"], seconds: float) -> EvaluationRun:
        """Put the lines of all processes into one file, in the benchmark's order, and score them."""
        lines = self._lines()
        answers = [lines[question] for question in ids]
        unread = [line for line in answers if line.get("missing")]
        for line in unread:
            line["score"] = 0.0 if missing == "zero" else None
        if not scored(answers):
            raise ValueError(
                f"At least one question must have frames to be scored, and none of {len(answers)} has: "
                f"{unread[0]['missing']}"
            )
        table = make_table(answers)
        _publish(self.folder / ANSWERS_FILE, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
        _publish(self.folder / TABLE_FILE, table + "\n")
        about = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
        about["environments"][-1]["seconds"] = round(seconds, 3)
        about["scores"] = aggregate(scored(answers))
        about["intervals"] = score_intervals(scored(answers))
        about["bootstrap"] = {"samples": SAMPLES, "seed": SEED}
        about["missing"] = {
            "choice": missing,
            "questions": len(unread),
            "scenes": {f"{line['dataset']}/{line['scene_name']}": line["missing"] for line in unread},
        }
        self._write_about(about)
        for part in self._parts():
            part.unlink()
        return EvaluationRun(self.folder, about, answers)

    def _lines(self) -> dict[Any, Line]:
        """Lines by id; an answer counts more than a word that frames could not be read."""
        lines: dict[Any, Line] = {}
        for file in (self.folder / ANSWERS_FILE, *self._parts()):
            for line in read_lines(file) if file.exists() else ():
                before = lines.get(line["id"])
                if before is None or before.get("missing") or not line.get("missing"):
                    lines[line["id"]] = line
        return lines

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("answers-[0-9]*.jsonl"))

    def _write_about(self, about: dict[str, Any]) -> None:
        _publish(self.folder / RUN_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _publish(file: Path, text: str) -> None:
    """A file that is whole or not there."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def changes(before: Any, now: Any, path: str = "") -> list[str]:
    """What differs, as ``settings.num_frames was 32 and is 16``."""
    if path in FREE_TO_CHANGE or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        parts = ((before.get(key), now.get(key), f"{path}.{key}" if path else key) for key in keys)
        return [change for part in parts for change in changes(*part)]
    return [f"{path} was {json.dumps(before)} and is {json.dumps(now)}"]


# What a run depends on


def about_model(model: nn.Module, processor: Spa3VLMProcessor, name: str | None = None) -> dict[str, Any]:
    """Which weights answer, in which form: ready for JSON.

    Args:
        model: A Spa3-VLM or a VLM of transformers.
        processor: What makes its inputs.
        name: What it is called; None: as it was loaded.
    """
    parts = {part: getattr(model, part, None) for part in ("vlm", "spa3r", "adapter")}
    parts = {part: module for part, module in parts.items() if module is not None} or {"vlm": model}
    generation = getattr(model, "generation_config", None)
    settings = {} if generation is None else json.loads(generation.to_json_string())
    of_the_moment = ("transformers_version", "_from_model_config")
    return {
        "name": name or model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_sha256": weights_hash(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": {part: str(next(module.parameters()).dtype) for part, module in parts.items()},
        "attention": {part: _attention(module) for part, module in parts.items() if hasattr(module, "config")},
        "generation_config": {key: value for key, value in settings.items() if key not in of_the_moment},
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "images": processor.images,
        "views": processor.view_image_processor.to_dict()
        if "spa3r" in parts or processor.images == "aligned"
        else None,
    }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types and values of all weights as they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attention(module: nn.Module) -> dict[str, str | None]:
    configs = {"": module.config} | {key: getattr(module.config, key, None) for key in module.config.sub_configs}
    found = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items() if config}
    return {key.removesuffix("_config") or "own": value for key, value in found.items()}


def about_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a run was started: ready for JSON, and different every time."""
    is_cuda = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": dict(sorted({dist.name: dist.version for dist in metadata.distributions()}.items())),
    }
