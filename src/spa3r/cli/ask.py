"""``spa3r ask``: answer a question about photos or videos."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from spa3r.checkpoints import EMBEDDED, QUESTIONS_NOTE
from spa3r.checks import shorten
from spa3r.console import (
    AsJson,
    Attention,
    ChoiceOfFrames,
    Device,
    Dtype,
    Frames,
    Images,
    Int8,
    Model,
    NumFrames,
    Verbose,
    WeightType,
    embedded_note,
    load_vlm,
    plural,
    printable,
    read_views,
    reporting,
)


def ask(
    photos_and_question: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTOS... QUESTION",
            help="Pictures, videos, folders of them, or URLs, all of one scene; and last the question. "
            + QUESTIONS_NOTE,
            show_default=False,
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="One more question about the same scene, which is encoded once for all."),
    ] = None,
    model: Model = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 128,
    num_frames: NumFrames = None,
    frames: ChoiceOfFrames = Frames.uniform,
    images: Annotated[
        Images, typer.Option(help="What the VLM sees: the views as Spa3R sees them, or the pictures as they are.")
    ] = Images.aligned,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Ask a Spa3-VLM questions about photos of a scene."""
    *photos, question = photos_and_question
    if not photos or os.path.exists(question) or not question.strip():
        raise typer.BadParameter(
            f"The last argument must be the question, after at least one photo; got {shorten(question)}.",
            param_hint="PHOTOS... QUESTION",
        )
    questions = [question, *(more or [])]
    with reporting(as_json, verbose) as report:
        from spa3r.answering.engine import AnsweringEngine

        with report.status("Reading the photos"):
            names, views = read_views(photos, num_frames, frames=frames)
        with report.status(f"Loading {model}"):
            vlm, processor = load_vlm(model, device, dtype, attention, report.note, int8)
        if model == EMBEDDED:
            report.note(f"{embedded_note()}. {QUESTIONS_NOTE}")
        processor.image_mode = images.value
        with report.status(f"Looking at {plural(len(views), 'view')}"):
            answers = AnsweringEngine(vlm, processor).answers(views, questions, max_new_tokens=max_new_tokens)
        lines = [f"{asked}\n    {printable(answer)}" for asked, answer in zip(questions, answers)]
        report.finish(
            "\n".join(lines) if more else printable(answers[0]),
            model=model,
            question=question,
            answer=answers[0],
            answers=[{"question": asked, "answer": answer} for asked, answer in zip(questions, answers)],
            views=names,
            num_views=len(names),
        )
