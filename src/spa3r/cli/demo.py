"""``spa3r demo``: ask about a room that is in no training data, and write a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa3r.console import AsJson, Verbose, embedded_note, one_line, plural, printable, reporting
from spa3r.disk import write_whole, writing

if TYPE_CHECKING:
    import numpy as np

    from spa3r.evaluation import FieldReport
    from spa3r.models.spa3r.image_processing_spa3r import Spa3RImageProcessor
    from spa3r.models.spa3r.modeling_spa3r import Spa3RForPreTraining, Spa3RForPreTrainingOutput
    from spa3r.rooms import Room, RoomViews
    from spa3r.rooms.demo import AskedQuestion

    Loaded = tuple[Any, Any]  # a VLM and its processor

FIRST_UNSEEN_ROOM = 1_000_000
"""Seed of the demo's first room: the embedded models were trained on rooms of smaller seeds only."""

ROOMS_PER_SEED = 100
"""Rooms among which the demo looks for one about which every type of question can be asked."""


def _look_around(seed: int, level: int, views: int, size: int) -> RoomViews:
    """The pictures of a room."""
    from spa3r.rooms import generate_room, look_around, render

    room = generate_room(seed, level)
    return render(room, look_around(room, views, (size, size)))


def _room_of_questions(first: int, level: int, views: int, size: int) -> tuple[Room, list[dict[str, Any]]]:
    """The first room from `first` on that allows a question of every type, and these; else the one that allows most."""
    from spa3r.rooms import generate_room, look_around
    from spa3r.rooms.questions import QUESTION_TYPES, RoomWalk, room_questions

    found = []
    for seed in range(first, first + ROOMS_PER_SEED):
        room = generate_room(seed, level)
        found.append((room, room_questions(RoomWalk.from_cameras(room, look_around(room, views, (size, size))))))
        if len(found[-1][1]) == len(QUESTION_TYPES):
            break
    return max(found, key=lambda room_and_rows: len(room_and_rows[1]))


def _embedded_vlms() -> tuple[Loaded, Loaded, str]:
    """The embedded Spa3-VLM and a VLM to compare it with, each with its processor, and a description of the latter."""
    from spa3r.rooms.embedded import embedded_model, embedded_vlm

    return embedded_model(), embedded_vlm(), "the same VLM, trained on the same questions without Spa3R"


def _ask_with_and_without(
    rows: list[dict[str, Any]], frames: Sequence[np.ndarray], with_spa3r: Loaded, without: Loaded
) -> tuple[list[AskedQuestion], dict[str, float]]:
    """Two answers to every question, and the overall scores, percent."""
    import PIL.Image

    from spa3r.evaluation import evaluate_answers
    from spa3r.rooms.demo import AskedQuestion
    from spa3r.vsi_bench.format import make_messages

    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    examples = [{"messages": make_messages(row, pictures), "question_type": row["question_type"]} for row in rows]
    ours, theirs = evaluate_answers(*with_spa3r, examples), evaluate_answers(*without, examples, use_spa3r=False)
    questions = [
        AskedQuestion(
            question_type=row["question_type"],
            question="\n".join((row["question"], *(("Options:", *row["options"]) if row["options"] else ()))),
            answer=our.answer,
            truth=our.truth,
            score=our.score,
            answer_without_spa3r=their.answer,
            score_without_spa3r=their.score,
        )
        for row, our, their in zip(rows, ours.answers, theirs.answers)
    ]
    return questions, {"with_spa3r": ours.scores["overall"], "without_spa3r": theirs.scores["overall"]}


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


def _predict_held_out(
    model: Spa3RForPreTraining, processor: Spa3RImageProcessor, rooms: list[RoomViews]
) -> tuple[dict[str, Any], Spa3RForPreTrainingOutput, FieldReport]:
    """Every second view is held out, cameras are given: inputs and output of the first room, metrics of all rooms."""
    import torch

    from spa3r.evaluation import evaluate_field

    batches = []
    for room in rooms:
        intrinsics = processor.process_intrinsics(room.intrinsics, room.images.shape[1:3])
        cameras = {"extrinsics": room.extrinsics, "intrinsics": intrinsics}
        cameras = {name: torch.from_numpy(values).float() for name, values in cameras.items()}
        held_out = {"target_mask": torch.arange(len(room.images)) % 2 == 1}
        batches.append({**processor(list(room.images)).to(model.device), **cameras, **held_out})
    with torch.inference_mode():
        output = model(**batches[0])
    return batches[0], output, evaluate_field(model, batches)


def demo(
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help=f"Which room: the first from seed {FIRST_UNSEEN_ROOM} + {ROOMS_PER_SEED} x this on about which every "
            "type of question can be asked. It is in no training data.",
        ),
    ] = 0,
    level: Annotated[int, typer.Option(min=0, max=3, help="How varied the room is.")] = 0,
    views: Annotated[
        int, typer.Option(min=2, max=16, help="Views of the room; of the field every second one is held out.")
    ] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for page and pictures.")] = Path("spa3r_demo"),
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Try everything without a download: a room, questions with and without Spa3R, the field of held-out views."""
    with reporting(as_json, verbose) as report:
        import PIL.Image

        from spa3r.rooms import look_around, render
        from spa3r.rooms.demo import room_report
        from spa3r.rooms.embedded import embedded_spa3r
        from spa3r.rooms.questions import QUESTION_TYPES
        from spa3r.visualization import contact_sheet, field_figure

        photos = output / "photos"
        with writing(output):
            photos.mkdir(parents=True, exist_ok=True)
        with report.status("Making the models"):
            model, processor = embedded_spa3r()
            spa3_vlm, alone, alone_note = _embedded_vlms()
        with report.status("Looking for a room, and rendering it and another one"):
            first = FIRST_UNSEEN_ROOM + ROOMS_PER_SEED * seed
            room, rows = _room_of_questions(first, level, views, processor.size)
            cameras = look_around(room, views, (processor.size, processor.size))
            rooms = [render(room, cameras), _look_around(room.seed + 1, level, views, processor.size)]
        images = list(rooms[0].images)
        with report.status("Encoding, decoding and measuring"):
            inputs, predicted, metrics = _predict_held_out(model, processor, rooms)
        held_out, latents_shape = list(range(1, views, 2)), list(predicted["latents"].shape)
        context = [view for view in range(views) if view not in held_out]
        with report.status("Answering, with Spa3R and without"):
            questions, scores = _ask_with_and_without(rows, images, spa3_vlm, alone)

        facts = {
            "room": f"seed {room.seed}, level {level}; {views} views",
            "models": embedded_note(),
            "without": alone_note,
            "latents": f"{' x '.join(map(str, latents_shape))}, of {plural(len(context), 'context view')}",
            "field": f"cameras: given; {plural(len(held_out), 'view')} held out, of this room and of room "
            f"{room.seed + 1}",
        }
        if missing := [name for name in QUESTION_TYPES if name not in [row["question_type"] for row in rows]]:
            facts["not asked"] = f"{', '.join(missing)}: {views} views of no nearby room allow it"
        with report.status("Drawing"), writing(output):
            files, page = [output / "views.png", output / "field.png"], output / "report.html"
            for index, image in enumerate(images):  # to go on with: spa3r ask, spa3r encode
                PIL.Image.fromarray(image).save(photos / f"{index}.png")
            contact_sheet(
                images,
                f"Room of seed {room.seed}, level {level}",
                labels=[f"view {view}" + ", held out" * (view in held_out) for view in range(views)],
                marked=held_out,
            ).savefig(files[0])
            figure = field_figure(
                images,
                predicted,
                inputs["view_grid_hw"],
                list(rooms[0].depth),
                title="Feature field of held-out views of an unseen room (cameras: given)",
            )
            figure.savefig(files[1])
            caption = (
                "The same views again, every second one held out: the features that Spa3R predicts for the cameras of "
                "these, beside the true ones. The table has their errors for this room and another one, and those of "
                "baselines without a model."
            )
            html = room_report(
                images,
                room,
                cameras,
                questions,
                (scores["with_spa3r"], scores["without_spa3r"]),
                facts,
                figures={caption: figure},
                table=metrics.table(),
                command=f"spa3r demo --seed {seed} --level {level} --views {views}",
            )
            write_whole(page, html)
        facts |= {"page": str(page), "pictures": ", ".join(map(str, files)), "photos": str(photos)}
        total = "overall, of 100: with Spa3R {with_spa3r:.1f}, without {without_spa3r:.1f} (one room is no measurement)"
        parts = [
            "\n".join(f"{name:<10} {text}" for name, text in facts.items()),
            "\n".join(map(_as_text, questions)),
            total.format(**scores),
            metrics.table(),
        ]
        report.finish(
            "\n\n".join(parts),
            seed=seed,
            room=room.seed,
            level=level,
            num_views=views,
            held_out=held_out,
            cameras="given",
            questions=[vars(asked) for asked in questions],
            scores=scores,
            latents_shape=latents_shape,
            field=metrics.to_dict(),
            report=str(page),
            pictures=[str(file) for file in files],
            photos=str(photos),
        )
