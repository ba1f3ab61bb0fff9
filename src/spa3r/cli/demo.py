"""``spa3r demo``: ask about rooms that are in no training data, and write a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa3r.console import AsJson, Report, Verbose, embedded_note, one_line, plural, printable, reporting
from spa3r.disk import write_whole, writing

if TYPE_CHECKING:
    from spa3r.evaluation import EvaluationRun, FieldReport, RoomsBenchmark
    from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RForPreTrainingOutput
    from spa3r.rooms import RoomViews
    from spa3r.rooms.demo import AskedQuestion, DemoScores

    Loaded = tuple[Any, Any]  # a VLM and its processor

ROOMS_PER_SEED = 100
"""Rooms between the first ones of two seeds; a demo takes no more."""

MEASURED_ROOMS = 4
"""Rooms of the demo in which the fields of held-out views are measured."""

TABLE = "docs/guides/rooms_recipe.md"
"""The page with the scores on many rooms by task."""


def _embedded_vlms() -> tuple[Loaded, Loaded, str]:
    """The embedded Spa3-VLM and a VLM to compare it with, each with its processor, and a description of the latter."""
    from spa3r.rooms.embedded import embedded_model, embedded_vlm

    return embedded_model(), embedded_vlm(), "the same VLM, trained on the same questions without Spa3R"


def _ask(report: Report, loaded: Loaded, name: str, benchmark: RoomsBenchmark, output: Path) -> EvaluationRun:
    """All questions, as `spa3r eval rooms` asks them, in a run's folder."""
    from dataclasses import replace

    from spa3r.evaluation import PRESETS, run_benchmark

    settings = replace(PRESETS["official"], num_frames=benchmark.about["frames"])
    with report.progress() as progress:
        task = progress.add_task(f"Answering {name.replace('_', ' ')}", total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return run_benchmark(
            *loaded, benchmark, output / name, settings, f"embedded, {name}", True, update, report.note
        )


def _measured(with_spa3r: EvaluationRun, without_spa3r: EvaluationRun) -> tuple[DemoScores | None, str]:
    """The scores of the models on many rooms, and where the table of all tasks is; None if others were measured."""
    from spa3r.checkpoints import SCORES
    from spa3r.rooms.demo import DemoScores

    kept = json.loads(SCORES.read_text(encoding="utf-8"))
    asked = {"with_spa3r": with_spa3r, "without_spa3r": without_spa3r}
    if kept["weights_sha256"] != {name: run.about["model"]["weights_sha256"] for name, run in asked.items()}:
        return None, "these weights were not measured; spa3r eval rooms --rooms 500 does it"
    scores = DemoScores.from_dict(kept["scores"])
    return scores, f"{TABLE}; again: spa3r eval rooms --rooms {scores.rooms}"


def _asked(with_spa3r: EvaluationRun, without_spa3r: EvaluationRun, room: str) -> list[AskedQuestion]:
    """The first question of each type about a room, with both answers."""
    from spa3r.evaluation.benchmarks import scene_of
    from spa3r.rooms.demo import AskedQuestion

    pairs = zip(with_spa3r.answers, without_spa3r.answers, strict=True)
    pairs = sorted((pair for pair in pairs if scene_of(pair[0]) == room), key=lambda pair: pair[0]["id"], reverse=True)
    first = {our["question_type"]: (our, their) for our, their in pairs}
    return [
        AskedQuestion(
            question_type=name,
            question="\n".join((our["question"], *(("Options:", *our["options"]) if our["options"] else ()))),
            answer=our["prediction"],
            truth=our["ground_truth"],
            score=our["score"],
            answer_without_spa3r=their["prediction"],
            score_without_spa3r=their["score"],
        )
        for name, (our, their) in reversed(first.items())
    ]


def _as_text(asked: AskedQuestion) -> str:
    """A question with its answers, for a terminal."""
    question, _, options = asked.question.partition("\nOptions:\n")
    lines = [f"{asked.question_type}: {question}"]
    if options:
        lines.append(f"    {'   '.join(options.splitlines())}")
    answers = (
        ("with Spa3R", asked.answer, asked.score),
        ("without", asked.answer_without_spa3r, asked.score_without_spa3r),
    )
    answered = (f"{name} {one_line(printable(answer))!r} (score {score:.2f})" for name, answer, score in answers)
    return "\n".join([*lines, f"    truth {asked.truth!r}, {', '.join(answered)}"])


def _most_types(scenes: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The first of the rooms about which the most types of questions are asked."""
    return max(scenes, key=lambda scene: len({row["question_type"] for row in scenes[scene]}))


def _inputs(processor: Spa3RImageProcessor, views: RoomViews, targets: Sequence[bool]) -> dict[str, Any]:
    """The model's inputs for views of a room with given cameras."""
    import torch

    intrinsics = processor.process_intrinsics(views.intrinsics, views.images.shape[1:3])
    cameras = {"extrinsics": views.extrinsics, "intrinsics": intrinsics}
    cameras = {name: torch.from_numpy(values).float() for name, values in cameras.items()}
    return {**processor(list(views.images)), **cameras, "target_mask": torch.tensor(targets)}


def _predict_held_out(
    model: Spa3RForPreTraining, processor: Spa3RImageProcessor, rooms: Sequence[RoomViews]
) -> tuple[dict[str, Any], Spa3RForPreTrainingOutput, FieldReport]:
    """Every second view is held out, cameras are given: inputs and output of the first room, metrics of all rooms."""
    from spa3r.evaluation import evaluate_field

    batches = [_inputs(processor, room, [view % 2 == 1 for view in range(len(room.images))]) for room in rooms]
    return batches[0], _predict(model, batches[0]), evaluate_field(model, batches)


def _predict(model: Spa3RForPreTraining, inputs: dict[str, Any]) -> Spa3RForPreTrainingOutput:
    import torch

    with torch.inference_mode():
        return model(**inputs)


def demo(
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help=f"Which rooms: those from number {ROOMS_PER_SEED} x this on among the rooms that are in no training "
            "data.",
        ),
    ] = 0,
    num_rooms: Annotated[
        int, typer.Option("--rooms", min=2, max=ROOMS_PER_SEED, help="Number of rooms that questions are about.")
    ] = 10,
    level: Annotated[int, typer.Option(min=0, max=3, help="How varied the rooms are.")] = 0,
    views: Annotated[
        int, typer.Option(min=2, max=16, help="Views of each room; of the field every second one is held out.")
    ] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for page, pictures and answers.")] = Path(
        "spa3r_demo"
    ),
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Try everything without a download: rooms, questions with and without Spa3R, fields of new cameras."""
    with reporting(as_json, verbose) as report:
        import numpy as np
        import PIL.Image

        from spa3r.evaluation import RoomsBenchmark
        from spa3r.rooms import RoomViews, generate_room, look_around, new_cameras, render
        from spa3r.rooms.demo import DemoScores, room_report
        from spa3r.rooms.embedded import embedded_spa3r
        from spa3r.rooms.instructions import FIRST_TEST_SEED
        from spa3r.rooms.questions import QUESTION_TYPES
        from spa3r.visualization import contact_sheet, field_figure

        photos = output / "photos"
        with writing(output):
            photos.mkdir(parents=True, exist_ok=True)
        with report.status("Making the models"):
            model, processor = embedded_spa3r()
            spa3_vlm, alone, alone_note = _embedded_vlms()
        size = (processor.size, processor.size)
        with report.status("Making rooms and questions"):
            first = FIRST_TEST_SEED + ROOMS_PER_SEED * seed
            benchmark = RoomsBenchmark(num_rooms, level, views, first_seed=first, size=processor.size)
            shown = _most_types(benchmark.scenes)
        with_spa3r = _ask(report, spa3_vlm, "with_spa3r", benchmark, output)
        without_spa3r = _ask(report, alone, "without_spa3r", benchmark, output)
        with report.status("Encoding, decoding and measuring"):
            scores = DemoScores.from_answers(with_spa3r.answers, without_spa3r.answers)
            measured, table_note = _measured(with_spa3r, without_spa3r)
            questions = _asked(with_spa3r, without_spa3r, shown)
            seeds = [int(scene.removeprefix("rooms/")) for scene in benchmark.scenes]
            room = generate_room(int(shown.removeprefix("rooms/")), level)
            cameras, beside = look_around(room, views, size), new_cameras(room, views, size)
            taken = render(room, cameras)
            in_field = [room.seed, *(other for other in seeds if other != room.seed)][:MEASURED_ROOMS]
            others = (generate_room(other, level) for other in in_field[1:])
            held_out_rooms = [taken, *(render(other, look_around(other, views, size)) for other in others)]
            inputs, predicted, metrics = _predict_held_out(model, processor, held_out_rooms)
            unseen = render(room, beside)
            both = RoomViews(*(np.concatenate(pair) for pair in zip(vars(taken).values(), vars(unseen).values())))
            new = len(unseen.images)
            new_inputs = _inputs(processor, both, [False] * views + [True] * new)
            at_new = _predict(model, new_inputs)
        images = list(taken.images)
        held_out, latents_shape = list(range(1, views, 2)), list(at_new["latents"].shape)
        facts = {
            "rooms": f"{plural(len(seeds), 'room')} from seed {first} on, level {level}; {views} views of each",
            "in detail": f"the room of seed {room.seed}",
            "models": embedded_note(),
            "without": alone_note,
            "latents": f"{' x '.join(map(str, latents_shape))}, of {plural(views, 'context view')}",
            "field": f"cameras: given; {plural(len(held_out), 'view')} held out in each of "
            f"{plural(len(in_field), 'room')}; {plural(new, 'new camera')}",
            "table": table_note,
        }
        if missing := [name for name in QUESTION_TYPES if name not in [asked.question_type for asked in questions]]:
            facts["not asked"] = f"{', '.join(missing)}: {views} views of none of the rooms allow every type"
        with report.status("Drawing"), writing(output):
            files = [output / name for name in ("views.png", "new_cameras.png", "field.png")]
            page = output / "report.html"
            for index, image in enumerate(images):  # to go on with: spa3r ask, spa3r encode
                PIL.Image.fromarray(image).save(photos / f"{index}.png")
            contact_sheet(
                images,
                f"Room of seed {room.seed}, level {level}",
                labels=[f"view {view}" + ", held out" * (view in held_out) for view in range(views)],
                marked=held_out,
            ).savefig(files[0])
            kinds = ["between", "beside"]
            field_figure(
                list(both.images),
                at_new,
                new_inputs["view_grid_hw"],
                list(both.depth),
                title="Feature field of new cameras (cameras: given)",
                targets_are="New camera",
                labels=[""] * views + [f"{kinds[2 * i // new]} views" for i in range(new)],
            ).savefig(files[1])
            field_figure(
                images,
                predicted,
                inputs["view_grid_hw"],
                list(taken.depth),
                title="Feature field of held-out views of an unseen room (cameras: given)",
            ).savefig(files[2])
            what = f"This demo: {plural(scores.questions, 'question')} about {plural(scores.rooms, 'room')}."
            of_all = {what: scores}
            if measured is not None:
                of_all[
                    f"Measured before: {measured.questions} questions about {measured.rooms} rooms of level 0, 8 views "
                    f"of each. Scores of every task: {table_note}."
                ] = measured
            html = room_report(
                images,
                room,
                cameras,
                questions,
                of_all,
                facts,
                figures={
                    "New cameras": {
                        "All views are given. The features and the depth that Spa3R predicts for cameras between and "
                        "beside these views, without their pictures. The pictures were rendered to compare: beside "
                        "each prediction are the features that the backbone and the teacher compute from them.": (
                            PIL.Image.open(files[1])
                        )
                    },
                    "Held-out views": {
                        "The same views, every second one held out: the features that Spa3R predicts for the cameras "
                        "of these, beside the true ones. The table has their errors and those of baselines, for "
                        f"{plural(len(in_field), 'room')}.": PIL.Image.open(files[2])
                    },
                },
                table=metrics.table(),
                command=f"spa3r demo --seed {seed} --rooms {num_rooms} --level {level} --views {views}",
                new_cameras=beside,
            )
            write_whole(page, html)
        facts |= {"page": str(page), "pictures": ", ".join(map(str, files)), "photos": str(photos)}
        facts["answers"] = f"{with_spa3r.folder}, {without_spa3r.folder}"
        lines = [f"overall score, of 100 (95 % interval): {what[:1].lower()}{what[1:-1]}", f"    {scores}"]
        if measured is not None:
            lines += [f"measured on {measured.rooms} unseen rooms of level 0", f"    {measured}"]
        parts = [
            "\n".join(f"{name:<10} {text}" for name, text in facts.items()),
            "\n".join(lines),
            f"questions about the room of seed {room.seed} (one room is no measurement)",
            "\n".join(map(_as_text, questions)),
            metrics.table(),
        ]
        report.finish(
            "\n\n".join(parts),
            seed=seed,
            rooms=seeds,
            room=room.seed,
            level=level,
            num_views=views,
            held_out=held_out,
            cameras="given",
            scores=scores.to_dict(),
            measured=None if measured is None else measured.to_dict(),
            table=table_note,
            questions=[vars(asked) for asked in questions],
            latents_shape=latents_shape,
            field=metrics.to_dict(),
            new_cameras=beside.extrinsics.tolist(),
            report=str(page),
            pictures=[str(file) for file in files],
            photos=str(photos),
            answers=[str(with_spa3r.folder), str(without_spa3r.folder)],
        )
