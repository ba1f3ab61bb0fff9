"""``spa3r app``: serve the web demo."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from spa3r.checkpoints import EMBEDDED, QUESTIONS_NOTE
from spa3r.console import (
    AsJson,
    Attention,
    Compiled,
    Device,
    Dtype,
    Int8,
    Limits,
    Model,
    Verbose,
    WeightType,
    compile_spa3r,
    embedded_note,
    load_vlm,
    reporting,
)


def web_demo(
    model: Model = EMBEDDED,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 can be reached from other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on if not given.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve the page through a public link of gradio's servers.")
    ] = False,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for encoded scenes.")] = 4,
    max_question: Annotated[
        int, typer.Option(min=1, help="Maximum number of characters of a question.")
    ] = Limits.question_length,
    max_views: Annotated[
        int, typer.Option(min=1, help="Maximum number of pictures and frames of a place.")
    ] = Limits.views,
    max_mib: Annotated[int, typer.Option(min=1, help="Maximum size of a place's files.")] = Limits.file_bytes // 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum number of pixels of a picture.")] = Limits.pixels,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    compiled: Compiled = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Serve a web page: show a place, by photos, a video or a generated room, and ask about it. Ctrl+C ends it."""
    with reporting(as_json, verbose) as report:
        from spa3r.app import build_app

        with report.status(f"Loading {model}"):
            vlm, processor = load_vlm(model, device, dtype, attention, report.note, int8)
            if compiled:
                compile_spa3r(vlm.spa3r)
        if model == EMBEDDED:
            report.note(f"{embedded_note()}. {QUESTIONS_NOTE}")
        page = build_app(
            vlm,
            processor,
            about=_about_model(model),
            cache_bytes=int(cache_gib * 2**30),
            limits=Limits(max_question, max_views, max_mib * 2**20, max_pixels),
        )
        try:
            _, local, public = page.launch(
                server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True
            )
        except OSError as error:
            where = f"{host}, port {port or 'any of 7860 to 7959'}"
            raise OSError(
                f"The page can't be served on {where} ({error}). Give another `--host` or `--port`."
            ) from error
        report.finish(f"The page is at {public or local}", model=model, url=public or local)
    sys.stdout.flush()  # a pipe or file would get the address at the end
    with redirect_stdout(sys.stderr):
        page.block_thread()


def _about_model(name: str) -> str:
    """The description of a model on the page."""
    return f"Model: `{name}`" + (f"; {embedded_note()}. {QUESTIONS_NOTE}" if name == EMBEDDED else ".")
