"""The commands of ``spa3r eval``: score a model, compare two runs, and write a run as a page."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa3r.checkpoints import EMBEDDED
from spa3r.console import (
    AsJson,
    Attention,
    ChoiceOfFrames,
    Compiled,
    Device,
    Dtype,
    Frames,
    Images,
    Int8,
    Model,
    Report,
    Verbose,
    WeightType,
    check_model,
    compile_spa3r,
    embedded_note,
    in_int8,
    is_adapter,
    load_vlm,
    loading_arguments,
    one_line,
    plural,
    printable,
    reporting,
    torch_device,
    with_default_dtype,
)
from spa3r.disk import write_whole
from spa3r.processes import end_processes, is_alone, processes
from spa3r.vsi_bench.format import task_title

if TYPE_CHECKING:
    from spa3r.evaluation import Benchmark, EvaluationRun, EvaluationSettings, Flip

eval_app = typer.Typer(help="Evaluate a VLM, compare two runs, or write a run as a page.", no_args_is_help=True)

SHOWN = 20
"""Flipped questions that the text of a comparison names."""


class Subset(StrEnum):
    full = "full"
    debiased = "debiased"
    pruned = "pruned"


class Preset(StrEnum):
    official = "official"
    released = "released"


class Missing(StrEnum):
    fail = "fail"
    skip = "skip"
    zero = "zero"


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/<benchmark>-<model> if not given.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete the folder's answers.")]
Length = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Length of an answer at most.")]
System = Annotated[str | None, typer.Option(help="System message; that of the chat template if not given.")]
Seen = Annotated[
    Images | None, typer.Option(help="What the VLM sees: the views as Spa3R sees them, or the frames as they are.")
]
MinPixels = Annotated[int | None, typer.Option(min=1, help="Smaller pictures are enlarged by the VLM's processor.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Larger pictures are reduced by the VLM's processor.")]
WithoutSpa3R = Annotated[
    bool, typer.Option("--without-spa3r", help="Run only the VLM of a Spa3-VLM, without fusing its image tokens.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Questions about a scene answered at once.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Scenes whose frames are read ahead.")]
IfMissing = Annotated[
    Missing, typer.Option("--missing", help="Questions whose frames can't be read: stop, leave out, or score 0.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random numbers; greedy decoding uses none.")]


@eval_app.command("vsi-bench", no_args_is_help=True)
def vsi_bench(
    data: Annotated[str, typer.Option(help="Folder in the released layout, its annotations, or a hub id.")],
    model: Model,
    output: Output = None,
    subset: Annotated[Subset, typer.Option(help="Which questions.")] = Subset.full,
    revision: Annotated[str | None, typer.Option(help="Revision of the data on the hub.")] = None,
    preset: Annotated[
        Preset, typer.Option(help="Settings: VSI-Bench's, or those of the released Spa3-VLM. Options override them.")
    ] = Preset.official,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of each video.")] = None,
    frames: ChoiceOfFrames = Frames.uniform,
    max_new_tokens: Length = None,
    system: System = None,
    images: Seen = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    without_spa3r: WithoutSpa3R = False,
    missing: IfMissing = Missing.fail,
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    compiled: Compiled = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score a VLM on VSI-Bench by its official rules, or resume a run that was stopped.

    With `accelerate launch` or `torchrun`, the scenes are divided among the processes.
    """
    with reporting(as_json, verbose, resumable=True) as report:
        from spa3r.evaluation import PRESETS, VsiBench

        chosen = {"num_frames": num_frames, "max_new_tokens": max_new_tokens, "system": system, "images": images}
        chosen |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "batch_size": batch_size, "workers": workers}
        settings = _settings(PRESETS[preset.value], chosen, missing, without_spa3r, seed)
        with report.status("Reading the questions"):
            benchmark = VsiBench(data, subset.value, revision, frames.value)
        _evaluate(report, benchmark, settings, model, output, fresh, (device, dtype, attention, int8, compiled))


@eval_app.command("rooms")
def rooms(
    model: Model = EMBEDDED,
    output: Output = None,
    num_rooms: Annotated[
        int, typer.Option("--rooms", min=1, help="Number of rooms; none is in the training data.")
    ] = 30,
    level: Annotated[int, typer.Option(min=0, max=3, help="How varied the rooms are.")] = 0,
    num_frames: Annotated[int, typer.Option(min=1, max=16, help="Pictures of each room.")] = 8,
    max_new_tokens: Length = None,
    system: System = None,
    images: Seen = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    without_spa3r: WithoutSpa3R = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    fresh: Fresh = False,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    compiled: Compiled = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score a VLM on questions about rooms, without a download, by VSI-Bench's rules."""
    with reporting(as_json, verbose, resumable=True) as report:
        from spa3r.evaluation import PRESETS, RoomsBenchmark

        chosen = {"num_frames": num_frames, "max_new_tokens": max_new_tokens, "system": system, "images": images}
        chosen |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "batch_size": batch_size, "workers": workers}
        settings = _settings(PRESETS["official"], chosen, Missing.fail, without_spa3r, seed)
        with report.status("Making the questions"):
            benchmark = RoomsBenchmark(num_rooms, level, num_frames, seed)
        _evaluate(report, benchmark, settings, model, output, fresh, (device, dtype, attention, int8, compiled))


def _settings(
    preset: EvaluationSettings, chosen: dict[str, Any], missing: Missing, without_spa3r: bool, seed: int
) -> EvaluationSettings:
    chosen = {name: getattr(value, "value", value) for name, value in chosen.items() if value is not None}
    return replace(preset, **chosen, missing=missing.value, use_spa3r=not without_spa3r, seed=seed)


def _evaluate(
    report: Report,
    benchmark: Benchmark,
    settings: EvaluationSettings,
    model: str,
    output: Path | None,
    fresh: bool,
    loading: tuple[str, Dtype, str | None, bool, bool],
) -> None:
    """Run the benchmark; only the first process reports the result."""
    from spa3r.evaluation.runner import check_missing, own_folder, run_benchmark

    check_missing(benchmark, settings)  # before gigabytes are loaded
    device, dtype, attention, int8, compiled = loading
    if device == "auto" and not is_alone():
        device = str(processes().device)
    about = benchmark.about
    if output is None:
        label = re.sub(r"\W+", "-", Path(model).name)
        output = Path("runs") / f"{'-'.join(str(about[key]) for key in ('name', 'subset') if key in about)}-{label}"
    if model != EMBEDDED:
        check_model(model)
    with own_folder(output):  # refused before gigabytes are loaded
        with report.status(f"Loading {model}"):
            vlm, processor = _load_any_vlm(model, device, dtype, attention, report.note, int8)
            if compiled:
                compile_spa3r(getattr(vlm, "spa3r", None))
        if model == EMBEDDED:
            report.note(embedded_note())
        with report.progress() as progress:
            task = progress.add_task("Answering" if is_alone() else "Answering (the first process's share)", total=None)

            def update(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            run = run_benchmark(vlm, processor, benchmark, output, settings, model, fresh, update, report.note)
    end_processes()
    if os.environ.get("RANK", "0") != "0":
        raise typer.Exit
    report.finish(
        _summary(run),
        output=str(output),
        scores=_by_title(run.scores),
        intervals=_by_title(run.about["intervals"]),
        official_scores=run.scores,
        missing=run.about["missing"],
        settings=asdict(settings),
        benchmark=run.about["benchmark"],
    )


def _load_any_vlm(
    name: str,
    device: str,
    dtype: Dtype,
    attention: str | None,
    note: Callable[[str], None] | None = None,
    int8: bool = False,
) -> tuple[Any, Any]:
    """A Spa3-VLM, or a VLM of transformers as it is."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from spa3r.hub import naming_missing
    from spa3r.models.released import find_released

    if name != EMBEDDED:
        if is_adapter(name):
            return load_vlm(name, device, dtype, attention, note, int8)
        with naming_missing(name):
            released = find_released(name, ("spa3-vlm",), "`--model`")
            if released is None and AutoConfig.from_pretrained(name).model_type != "spa3_vlm":
                if int8:
                    in_int8(None)
                place, arguments = torch_device(device), loading_arguments(dtype, attention)
                model = AutoModelForImageTextToText.from_pretrained(name, **arguments)
                return with_default_dtype(model, dtype, place, note), AutoProcessor.from_pretrained(name)
    return load_vlm(name, device, dtype, attention, note, int8)


@eval_app.command("compare", no_args_is_help=True)
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another run.", show_default=False)],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare two runs: scores by task, with 95 % intervals over scenes, and questions that flipped."""
    with reporting(as_json, verbose) as report:
        from spa3r.evaluation import EvaluationRun, compare_runs

        compared = compare_runs(EvaluationRun.load(first), EvaluationRun.load(second))
        won = sum(flip.is_won for flip in compared.flips)
        parts = [
            f"A: {first}\nB: {second}",
            *(
                ["Other differences:\n" + "\n".join(f"  {change}" for change in compared.changed)]
                * bool(compared.changed)
            ),
            compared.table(),
            f"{plural(len(compared.flips), 'question')} flipped: {won} to right, {len(compared.flips) - won} to wrong",
        ]
        if compared.left_out:
            parts[-1] += f"; {plural(compared.left_out, 'question')} left out, without a score in one of the runs"
        if compared.flips:
            parts.append("\n".join(map(_flip, compared.flips[:SHOWN])))
        if len(compared.flips) > SHOWN:
            parts.append(f"and {len(compared.flips) - SHOWN} more; --json lists all")
        result = compared.to_dict()
        result["scores"] = _by_title(result["scores"])
        report.finish("\n\n".join(parts), a=str(first), b=str(second), **result)


def _by_title(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with readable names, those of the table, in place of VSI-Bench's."""
    return {task_title(name): score for name, score in scores.items()}


def _flip(flip: Flip) -> str:
    from spa3r.evaluation.benchmarks import scene_of

    line, sign = flip.first, "+" if flip.is_won else "-"
    first, second = (
        f"{one_line(printable(x['prediction'] or ''))!r} (score {x['score']:.2f})" for x in (flip.first, flip.second)
    )
    return (
        f"{sign} {line['id']} {scene_of(line)} {line['question_type']}: {one_line(printable(line['question']))}\n"
        f"    truth {line['ground_truth']!r}, A {first}, B {second}"
    )


@eval_app.command("report", no_args_is_help=True)
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the run's folder if not given.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes shown at most, spread over the run.")] = 20,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each scene shown at most.")] = 8,
    data: Annotated[str | None, typer.Option(help="New location of VSI-Bench, if it was moved after the run.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as one HTML page: scores, frames, questions, answers."""
    with reporting(as_json, verbose) as report:
        from spa3r.evaluation import EvaluationRun, VsiBench
        from spa3r.evaluation.report import make_report

        loaded = EvaluationRun.load(run)
        about = loaded.about["benchmark"]
        benchmark = None if data is None else VsiBench(data, about.get("subset", "full"))
        with report.status("Drawing"):
            page = make_report(
                loaded,
                benchmark,
                scenes,
                frames,
                note=embedded_note() if loaded.about["model"]["name"] == EMBEDDED else "",
                command=f"spa3r eval report {run} --scenes {scenes} --frames {frames}",
            )
        file = output or run / "report.html"
        write_whole(file, page)
        report.finish(str(file), report=str(file))


def _summary(run: EvaluationRun) -> str:
    from spa3r.evaluation.run_folder import missing_note

    benchmark, missing = run.about["benchmark"], run.about["missing"]
    lines = [
        f"{run.folder}: {plural(benchmark['questions'], 'question')} about {plural(benchmark['scenes'], 'scene')}",
        "",
        run.table(),
    ]
    if missing["questions"]:
        lines += ["", missing_note(missing), *(f"  {scene}: {why}" for scene, why in missing["scenes"].items())]
    return "\n".join(lines)
