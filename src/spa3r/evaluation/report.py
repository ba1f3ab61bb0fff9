"""A run's questions and answers as one HTML page.

page = run_report(EvaluationRun.load("runs/mine"))
Path("report.html").write_text(page, encoding="utf-8")
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

import PIL.Image

from spa3r.evaluation import Benchmark, EvaluationRun, open_benchmark
from spa3r.evaluation.benchmarks import scene_of
from spa3r.evaluation.run_folder import Line, told_missing
from spa3r.media.videos import uniform_indices
from spa3r.page import TYPE_TITLES, bar, figure, html_options, html_table, image, make_page, said, section
from spa3r.secret import hide
from spa3r.vsi_bench.format import is_choice

_LONGEST, _SHORTEST = 240, 160  # pixels of a frame's longer side: larger ones are reduced, smaller ones enlarged


def run_report(
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
    if benchmark is None:
        about = run.about["benchmark"]
        told = ("questions", "scenes", "rows_sha256")
        benchmark = open_benchmark({key: value for key, value in about.items() if key not in told})
    by_scene: dict[str, list[Line]] = {}
    for line in run.answers:
        by_scene.setdefault(scene_of(line), []).append(line)
    names = [list(by_scene)[i] for i in dict.fromkeys(uniform_indices(len(by_scene), min(scenes, len(by_scene))))]
    parts = [section("Scores", _scores(run), "scores", "cards")]
    if run.about["missing"]["questions"]:
        parts.append(section("Not seen", _missing(run), "missing", "cards"))
    for number, name in enumerate(names):
        lines = by_scene[name]
        content = _frames(benchmark, name, lines[0], frames) + "".join(map(_question, lines))
        parts.append(section(name, content, f"scene-{number}", "cards"))
    lead = f"{len(run.answers)} questions about {len(by_scene)} scenes, scored by the rules of VSI-Bench."
    if len(names) < len(by_scene):
        lead += f" {len(names)} scenes are shown, spread over the run; the folder has all answers."
    title = f"{run.about['model']['name']} on {_benchmark(run)}"
    return make_page(title, lead, _facts(run), parts, note, hide(command))


def _benchmark(run: EvaluationRun) -> str:
    about = run.about["benchmark"]
    return " ".join(str(about[key]) for key in ("name", "subset") if key in about)


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


def _scores(run: EvaluationRun) -> str:
    overall = run.scores["overall"]
    total = f'<div class="total with"><b>{overall:.1f}</b><span>overall, of 100</span>{bar(overall / 100)}</div>'
    hint = "Intervals hold 95 % of the scores of as many scenes drawn anew, with replacement."
    head, line, *tasks, whole = run.table().splitlines()
    table = html_table("\n".join((head, line, whole, *tasks)))
    return f'<div class="totals">{total}</div>{table}<p class="hint">{hint}</p>'


def _missing(run: EvaluationRun) -> str:
    missing = run.about["missing"]
    items = "".join(f"<li>{escape(scene)}: {escape(why)}</li>" for scene, why in missing["scenes"].items())
    return f'<p>{escape(told_missing(missing))}</p><ul class="hint">{items}</ul>'


def _frames(benchmark: Benchmark, scene: str, line: Line, most: int) -> str:
    """The frames that the model saw, or the reason if they can't be read any more."""
    if not line["frames"]:
        return f"<p>{escape(hide(line['missing']))}</p>"
    try:
        _, pictures = benchmark.frames(scene, len(line["frames"]))
    except (ValueError, OSError) as error:
        return f"<p>{escape(hide(str(error)))}</p>"
    shown = list(dict.fromkeys(uniform_indices(len(pictures), min(most, len(pictures))).tolist()))
    cells = "".join(
        f"<li>{image(_jpeg(picture), f'Frame {number}', 'jpeg')}<span>{number}</span></li>"
        for number, picture in ((line["frames"][i], pictures[i]) for i in shown)
    )
    return figure(f'<ol class="views">{cells}</ol>', f"{len(shown)} of the {len(pictures)} frames that the model saw.")


def _jpeg(picture: PIL.Image.Image) -> bytes:
    picture, file = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((_LONGEST, _LONGEST))
    factor = -(-_SHORTEST // max(picture.size))
    picture = picture.resize([factor * side for side in picture.size], PIL.Image.Resampling.NEAREST)
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _question(line: Line) -> str:
    options: Sequence[str] = line["options"] or []
    scored = "right or wrong" if is_choice(line["question_type"]) else "the nearer the better"
    if line["score"] is None:
        score = "<td></td><td>left out</td>"
    else:
        score = f"<td>{bar(line['score'])}</td><td>{100 * line['score']:.0f}</td>"
    rows = (
        f'<tr class="with"><th scope="row">Answer</th><td>{said(line["prediction"] or "", options)}</td>{score}</tr>'
        f'<tr class="truth"><th scope="row">Truth</th><td colspan="3">{said(line["ground_truth"], options)}</td></tr>'
    )
    return (
        f"<article><header><h3>{escape(TYPE_TITLES[line['question_type']])}</h3><span>{scored}</span></header>"
        f"<p>{escape(line['question'])}</p>{html_options(options, line['ground_truth'])}"
        f'<table class="answers">{rows}</table></article>'
    )
