"""A run's questions and answers as one HTML page.

page = make_report(EvaluationRun.load("runs/mine"))
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

from typing import Any

import PIL.Image

from spa3r.evaluation import Benchmark, EvaluationRun, open_benchmark
from spa3r.evaluation.benchmarks import scene_of
from spa3r.evaluation.run_folder import Line, missing_note
from spa3r.media.videos import uniform_indices
from spa3r.page import Answer, Question, data_url, render_page
from spa3r.secret import hide
from spa3r.tables import Table

_LONGEST, _SHORTEST = 240, 160  # pixels of a frame's longer side: larger ones are reduced, smaller ones enlarged


def make_report(
    run: EvaluationRun,
    benchmark: Benchmark | None = None,
    scenes: int = 20,
    frames: int = 8,
    note: str = "",
    command: str = "",
) -> str:
    """A page about a run: its scores and conditions, and for some scenes the frames, the questions and the answers.

    Args:
        run: The run.
        benchmark: Source of the frames; None: the benchmark of the run.
        scenes: Maximum number of scenes shown, spread over the run.
        frames: Maximum number of frames shown per scene, spread over those that the model saw.
        note: A warning at the top, such as that the answers come from untrained weights.
        command: The command that creates the same page again.

    Returns:
        An HTML document with its pictures inside.

    Raises:
        ValueError: `scenes` or `frames` is below 1.
    """
    for name, value in (("scenes", scenes), ("frames", frames)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    about = run.about["benchmark"]
    if benchmark is None:
        results = ("questions", "scenes", "rows_sha256")
        benchmark = open_benchmark({key: value for key, value in about.items() if key not in results})
    by_scene: dict[str, list[Line]] = {}
    for line in run.answers:
        by_scene.setdefault(scene_of(line), []).append(line)
    names = [list(by_scene)[i] for i in _spread(len(by_scene), scenes)]
    *tasks, whole = run.table().rows
    missing = run.about["missing"]
    return render_page(
        "run.html",
        _facts(run),
        note,
        hide(command),
        run=run,
        benchmark=" ".join(str(about[key]) for key in ("name", "subset") if key in about),
        table=Table(run.table().head, [whole, *tasks]),
        missing=missing_note(missing) if missing["questions"] else None,
        num_scenes=len(by_scene),
        scenes=[_scene(benchmark, name, by_scene[name], frames) for name in names],
    )


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, uniformly spread."""
    return list(dict.fromkeys(uniform_indices(count, min(most, count)).tolist()))


def _facts(run: EvaluationRun) -> dict[str, str]:
    model, settings, environment = run.about["model"], run.about["settings"], run.about["environments"][-1]
    packages = environment["packages"]
    revision = f", revision {model['revision'][:12]}" if model["revision"] else ""
    return {
        "weights": f"SHA-256 {model['weights_sha256'][:12]}{revision}",
        "type": ", ".join(f"{part} {kind.removeprefix('torch.')}" for part, kind in model["dtype"].items()),
        "attention": ", ".join(f"{part} {kinds['own']}" for part, kinds in model["attention"].items()),
        "asked": f"{settings['num_frames']} frames, {settings['max_new_tokens']} tokens at most, greedy"
        + ("" if settings["use_spa3r"] else ", without Spa3R"),
        "device": environment["device"],
        "started": environment["started"],
        "versions": ", ".join(f"{name} {packages[name]}" for name in ("spa3r", "torch", "transformers")),
    }


def _scene(benchmark: Benchmark, name: str, lines: list[Line], most: int) -> dict[str, Any]:
    """A scene's questions, and the frames that the model saw or the reason if they can't be read any more."""
    scene = {"name": name, "questions": [_question(line) for line in lines], "unseen": None}
    numbers = lines[0]["frames"]
    if not numbers:
        return scene | {"unseen": hide(lines[0]["missing"])}
    try:
        _, pictures = benchmark.frames(name, len(numbers))
    except (ValueError, OSError) as error:
        return scene | {"unseen": hide(str(error))}
    shown = [(numbers[i], _jpeg(pictures[i])) for i in _spread(len(pictures), most)]
    return scene | {"frames": shown, "num_frames": len(pictures)}


def _jpeg(picture: PIL.Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST))
    return data_url(picture, _SHORTEST, "jpeg", quality=85)


def _question(line: Line) -> Question:
    answer = Answer("Answer", line["prediction"] or "", line["score"])
    return Question(line["question_type"], line["question"], line["options"] or [], line["ground_truth"], [answer])
