"""The folder of a run: everything needed to repeat, compare and inspect it.

run.json         benchmark, model, settings, environments; scores
answers.jsonl    one question per line: the row, prompt, frames, the model's output, the parsed answer, score
table.md         the scores as a table

While questions are answered, their lines are in ``answers-00000.jsonl`` and so on, one file per process. A killed
run resumes from these files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from spa3r.checks import check_types, is_number, is_of_type, shorten, type_words
from spa3r.disk import read_json_lines, read_json_object, sha256_of, write_whole, writing
from spa3r.evaluation.answers import AnswerReport, ScoredAnswer
from spa3r.models.quantization import plain_tensors
from spa3r.models.spa3_vlm.processing_spa3_vlm import Spa3VLMProcessor
from spa3r.secret import hidden
from spa3r.tables import Table
from spa3r.vsi_bench.format import is_choice, task_title
from spa3r.vsi_bench.intervals import SAMPLES, SEED, score_intervals
from spa3r.vsi_bench.scoring import aggregate, score_prediction

logger = logging.get_logger(__name__)

Line = dict[str, Any]
RUN_FILE, ANSWERS_FILE, TABLE_FILE = "run.json", "answers.jsonl", "table.md"
FREE_TO_CHANGE = ("settings.missing", "settings.workers", "model.name", "model.revision", "benchmark.data")
"""What may change when a run is resumed: weights and questions are identified by their hashes."""

ASK_AGAIN = "The command that started it asks again what can't be read."
START_OVER = (
    "Put an undamaged copy back, name another folder, or start over with --fresh (`fresh=True`), which deletes the "
    "answers."
)
ABOUT = {
    "benchmark": {"name": str, "questions": int, "scenes": int, "rows_sha256": str},
    "model": {
        "name": str,
        "revision": str | None,
        "weights_sha256": str,
        "dtype": dict,
        "attention": dict,
        "image_processor": dict,
    },
    "settings": {"num_frames": int, "max_new_tokens": int, "use_spa3r": bool},
}
"""The keys of ``run.json`` that are read, and their types."""
ABOUT_FINISHED = ABOUT | {
    "scores": dict[str, float],
    "intervals": dict[str, list[float]],
    "missing": {"choice": Literal["fail", "skip", "zero"], "questions": int, "scenes": dict[str, str]},
}
ANSWER = {
    "id": int | float | str,
    "dataset": Any,
    "scene_name": Any,
    "question_type": str,
    "question": str,
    "ground_truth": Any,
    "frames": list[int],
    "prediction": str | None,
    "score": float | None,
}
"""The keys of an answer line that are read, and their types."""
ENVIRONMENT = {"started": str, "device": str, "python": str, "packages": dict[str, str | None]}


@dataclass(frozen=True)
class EvaluationRun:
    """A finished run.

    Attributes:
        folder: Its folder.
        about: Content of ``run.json``: ``benchmark``, ``model``, ``settings``, ``environments`` (one for each start of
            the run), ``scores`` (percent), ``intervals`` (95 %, by scenes), ``missing``.
        answers: For every question, in the benchmark's order, its row with ``prompt``, ``frames`` (numbers in the
            video), ``prediction`` (the model's output), ``parsed`` (the parsed answer), ``score``; if the frames
            could not be read, ``missing`` with the reason, and no prediction.
    """

    folder: Path
    about: dict[str, Any]
    answers: list[Line]

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationRun:
        """Read a run.

        Args:
            folder: The folder of a finished run.

        Raises:
            ValueError: The folder is not a run, the run is not finished, or one of its files is damaged: there are
                scores of all questions or none.
        """
        check_types({"folder": folder}, {"folder": str | Path})
        folder = Path(folder)
        if not (folder / RUN_FILE).is_file():
            raise ValueError(f"{folder} must be the folder of an evaluation, and holds no {RUN_FILE}. Check the path.")
        if not (folder / ANSWERS_FILE).is_file():
            raise ValueError(
                f"The run in {folder} is not finished: it has no {ANSWERS_FILE}. The command that started it goes on."
            )
        about = read_about(folder, START_OVER)
        if "scores" not in about:
            raise ValueError(
                f"The run in {folder} is not finished: its {RUN_FILE} holds no scores. The command that started it "
                "goes on."
            )
        _check_about(about, ABOUT_FINISHED, folder / RUN_FILE)
        return cls(folder, hidden(about), _finished_answers(folder, about))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def scores(self) -> dict[str, float]:
        """In percent: ``"overall"`` and the tasks that occur, as :func:`~spa3r.evaluation.aggregate` returns them."""
        return aggregate(scored(self.answers))

    def table(self) -> Table:
        """The scores by task as a Markdown table, with the number of questions and 95 % intervals over scenes."""
        return make_table(self.answers)


def scored(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that have a score: all except skipped ones."""
    return [line for line in lines if line["score"] is not None]


def make_table(lines: list[Line]) -> Table:
    """As :meth:`EvaluationRun.table`."""
    intervals = score_intervals(scored(lines))
    report = AnswerReport(
        [
            ScoredAnswer("", line["question_type"], "", line["prediction"] or "", line["ground_truth"], line["score"])
            for line in scored(lines)
        ]
    )
    rows = []
    for name in [*list(report.scores)[1:], "overall"]:
        low, high = intervals[name]
        rows.append(
            [task_title(name), str(report.counts[name]), f"{report.scores[name]:.1f}", f"{low:.1f} to {high:.1f}"]
        )
    return Table(["percent", "questions", "score", "95 % interval"], rows)


def missing_note(missing: Mapping[str, Any]) -> str:
    """What happened to questions without frames, from ``about["missing"]``."""
    became = {"skip": "left out of the scores", "zero": "scored 0"}[missing["choice"]]
    return f"Questions without frames to look at: {missing['questions']}, {became}."


# Lines of answers


def _check_answer(line: Line) -> None:
    """Check that a line has the keys that are read, with the right types."""
    if absent := [key for key in ANSWER if key not in line]:
        raise ValueError(f"it lacks {', '.join(absent)}")
    is_choice(line["question_type"])
    for key, kind in ANSWER.items():
        if not is_of_type(line[key], kind):
            raise ValueError(f"its `{key}` must be {type_words(kind)}, got {shorten(line[key])}")
    is_missing = isinstance(line.get("missing"), str)
    if not (is_number(line["score"], 0, 1) or (line["score"] is None and is_missing)):
        raise ValueError(f"its `score` must be a number from 0 to 1, got {shorten(line['score'])}")
    if line["prediction"] is None and not is_missing:
        raise ValueError("its `prediction` must be a text, got None")


def _few(faults: list[str]) -> str:
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")


def _finished_answers(folder: Path, about: Mapping[str, Any]) -> list[Line]:
    """The answers of a finished run: all of them, or an error."""
    file = folder / ANSWERS_FILE
    answers, faults = read_json_lines(file, _check_answer)
    if faults:
        raise ValueError(f"{file} is damaged: {_few(faults)}. {ASK_AGAIN}")
    ids, wanted = [line["id"] for line in answers], about["benchmark"]["questions"]
    if len(set(ids)) < len(ids):
        repeated = next(question for question in ids if ids.count(question) > 1)
        raise ValueError(f"{file} is damaged: it holds question {repeated!r} more than once. {ASK_AGAIN}")
    if len(answers) != wanted:
        raise ValueError(
            f"{file} is damaged: it must hold the answers to all {wanted} questions, got {len(answers)}. {ASK_AGAIN}"
        )
    if note := _changed_since(folder, about):
        logger.warning(note)
    return answers


def _changed_since(folder: Path, about: Mapping[str, Any]) -> str | None:
    """A message if the answers are not those of the finished run."""
    file, wanted = folder / ANSWERS_FILE, about.get("answers_sha256")
    if wanted is None or not file.exists() or sha256_of(file) == wanted:
        return None
    return f"{file} was changed after the run: the scores are those of the answers that it holds now"


class LineWriter:
    """Appends lines to a file, each readable as soon as it is written."""

    def __init__(self, file: Path) -> None:
        self.place = file
        with self._writing():
            self._file = open(file, "ab", buffering=0)  # unbuffered: closing does not retry a failed write
            if self._file.tell():
                self._write(b"\n")  # after a line that a kill cut short; empty lines are ignored

    def write(self, lines: Iterable[Line]) -> None:
        """Write lines and hand them to the operating system, so that a kill can't lose them.

        Raises:
            WriteError: The system refused the write.
        """
        with self._writing():
            self._write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    def _write(self, content: bytes) -> None:
        while content:
            content = content[self._file.write(content) :]

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.place, "Free space; the same command goes on from what is answered.")

    def close(self) -> None:
        self._file.close()


class RunFolder:
    """The folder of a run in progress. A process that begins and finishes it must lock it first
    (:func:`~spa3r.disk.alone_in`).

    Args:
        folder: The folder; :meth:`begin` creates it.
        rows: The questions, in order.
    """

    def __init__(self, folder: str | Path, rows: Sequence[Line]) -> None:
        self.folder = Path(folder)
        self._rows = {row["id"]: json.loads(json.dumps(row)) for row in rows}

    def begin(self, about: dict[str, Any], environment: dict[str, Any], fresh: bool) -> list[str]:
        """Save what is run; for a resumed run, check that it is the same.

        Returns:
            Messages about what is damaged and asked again.

        Raises:
            ValueError: The folder belongs to another run, or its ``run.json`` is missing or damaged.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                for file in (self.folder / RUN_FILE, self.folder / TABLE_FILE, *self._files()):
                    file.unlink(missing_ok=True)
        about, environments, notes = hidden(json.loads(json.dumps(about))), [], []
        if (self.folder / RUN_FILE).exists():
            before = hidden(read_about(self.folder, START_OVER))
            if changed := changes({key: before.get(key) for key in about}, about):
                raise ValueError(
                    f"`output` {self.folder} holds another run ({'; '.join(changed)}). Change it back to go on with "
                    "that run, name another folder, or start over with --fresh (`fresh=True`), which deletes its "
                    "answers."
                )
            environments = before["environments"]
            if note := _changed_since(self.folder, before):
                notes.append(note)
        elif files := self._files():
            raise ValueError(f"{self.folder / RUN_FILE} is missing, though {files[0]} holds answers. {START_OVER}")
        self._write_about(about | {"environments": [*environments, hidden(environment)]})
        for file, (_, faults) in self._read().items():
            if faults:
                notes.append(f"{file}: {_few(faults)} can't be read; what it answered is asked again")
        return notes

    def answered(self) -> dict[Any, Line]:
        """Lines by id, from all starts. Lines with unreadable frames are left out: they are tried again."""
        return {key: line for key, line in self._lines().items() if not line.get("missing")}

    def part(self, process: int) -> Path:
        """The file in which a process writes its lines."""
        return self.folder / f"answers-{process:05d}.jsonl"

    def finish(self, missing: Literal["fail", "skip", "zero"], seconds: float) -> EvaluationRun:
        """Merge the lines of all processes into one file, in the benchmark's order, and score them.

        Raises:
            ValueError: There is nothing to score, or a written line can't be read any more.
        """
        lines = self._lines()
        if lost := [question for question in self._rows if question not in lines]:
            raise ValueError(
                f"{self.folder} must hold the answers to all {len(self._rows)} questions, and {len(lost)} can't be "
                f"read again, such as that to question {lost[0]!r}. Check the disk; the same command asks them again."
            )
        answers = [lines[question] for question in self._rows]
        unread = [line for line in answers if line.get("missing")]
        for line in unread:
            line["score"] = 0.0 if missing == "zero" else None
        if not scored(answers):
            raise ValueError(
                f"At least one question must have frames to be scored, and none of {len(answers)} has: "
                f"{unread[0]['missing']}"
            )
        table = make_table(answers)
        write_whole(
            self.folder / ANSWERS_FILE, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        )
        write_whole(self.folder / TABLE_FILE, table + "\n")
        about = read_about(self.folder, START_OVER)
        about["environments"][-1]["seconds"] = round(seconds, 3)
        about["scores"] = aggregate(scored(answers))
        about["intervals"] = score_intervals(scored(answers))
        about["bootstrap"] = {"samples": SAMPLES, "seed": SEED}
        about["missing"] = {
            "choice": missing,
            "questions": len(unread),
            "scenes": {f"{line['dataset']}/{line['scene_name']}": line["missing"] for line in unread},
        }
        about["answers_sha256"] = sha256_of(self.folder / ANSWERS_FILE)
        self._write_about(about)
        for part in self._parts():
            part.unlink()
        return EvaluationRun(self.folder, about, answers)

    def _lines(self) -> dict[Any, Line]:
        """Lines by id; an answer takes precedence over a note that frames could not be read."""
        lines: dict[Any, Line] = {}
        for line in (line for read, _ in self._read().values() for line in read):
            before = lines.get(line["id"])
            if before is None or before.get("missing") or not line.get("missing"):
                lines[line["id"]] = line
        return lines

    def _read(self) -> dict[Path, tuple[list[Line], list[str]]]:
        return {file: read_json_lines(file, self._check) for file in self._files()}

    def _check(self, line: Line) -> None:
        """Check that a line matches the question as it is asked."""
        _check_answer(line)
        row = self._rows.get(line["id"])
        if row is None:
            raise ValueError(f"there is no question {line['id']!r}")
        ours = ("prompt", "frames", "prediction", "parsed", "score", "missing")
        if changed := [key for key in row if key not in ours and line.get(key) != row[key]]:
            raise ValueError(f"its `{changed[0]}` is not that of question {line['id']!r}")
        if line["prediction"] is not None and line["score"] != score_prediction(row, line["prediction"]):
            raise ValueError("its `score` is not that of its `prediction`")

    def _files(self) -> list[Path]:
        whole = self.folder / ANSWERS_FILE
        return [*([whole] if whole.exists() else []), *self._parts()]

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("answers-[0-9]*.jsonl"))

    def _write_about(self, about: dict[str, Any]) -> None:
        write_whole(self.folder / RUN_FILE, json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def read_about(folder: Path, cure: str) -> dict[str, Any]:
    """Read a ``run.json``, finished or not.

    Raises:
        ValueError: The file is damaged.
    """
    about = read_json_object(folder / RUN_FILE, "what a run is", cure)
    _check_about(about, ABOUT, folder / RUN_FILE)
    environments = about.get("environments")
    if not isinstance(environments, list) or not environments:
        environments = [None]
    for environment in environments:
        _check_about({"environments": environment}, {"environments": ENVIRONMENT}, folder / RUN_FILE)
    return about


def _check_about(about: Any, wanted: Mapping[str, Any], file: Path, path: str = "") -> None:
    """Reject a ``run.json`` in which a required key is missing or has the wrong type."""
    for key, kind in wanted.items():
        value, name = about.get(key), f"{path}{key}"
        is_section = isinstance(kind, dict)
        if not is_of_type(value, dict if is_section else kind):
            words = type_words(dict if is_section else kind)
            raise ValueError(
                f"{file} is damaged, or was written by another version: `{name}` must be {words}, got "
                f"{shorten(value)}. {START_OVER}"
            )
        if is_section:
            _check_about(value, kind, file, f"{name}.")


def changes(before: Any, now: Any, path: str = "") -> list[str]:
    """Differences, such as ``settings.num_frames was 32 and is 16``."""
    if path in FREE_TO_CHANGE or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        parts = ((before.get(key), now.get(key), f"{path}.{key}" if path else key) for key in keys)
        return [change for part in parts for change in changes(*part)]
    return [f"{path} was {json.dumps(before)} and is {json.dumps(now)}"]


# What a run depends on


def about_model(model: PreTrainedModel, processor: ProcessorMixin, name: str | None = None) -> dict[str, Any]:
    """Describe the weights that answer and their format, ready for JSON.

    Args:
        model: A Spa3-VLM or a VLM of transformers.
        processor: The processor of its inputs.
        name: Name of the model; None: as it was loaded.
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
        "images": processor.image_mode if isinstance(processor, Spa3VLMProcessor) else "native",
        "views": processor.view_image_processor.to_dict()
        if isinstance(processor, Spa3VLMProcessor) and ("spa3r" in parts or processor.image_mode == "aligned")
        else None,
    }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, types and values of all weights as loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dict(plain_tensors(model.state_dict().items())).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attention(module: PreTrainedModel) -> dict[str, str | None]:
    configs = {"": module.config} | {key: getattr(module.config, key, None) for key in module.config.sub_configs}
    found = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items() if config}
    return {key.removesuffix("_config") or "own": value for key, value in found.items()}


def about_environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Describe the environment of a start, ready for JSON; it differs every time."""
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
