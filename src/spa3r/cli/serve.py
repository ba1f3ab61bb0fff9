"""``spa3r serve``: answer questions over HTTP, in the form of OpenAI's API."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa3r.checkpoints import EMBEDDED, QUESTIONS_NOTE
from spa3r.checks import shorten
from spa3r.console import (
    AsJson,
    Attention,
    Device,
    Dtype,
    Evicted,
    Images,
    Int8,
    Limits,
    Model,
    Verbose,
    WeightType,
    embedded_note,
    load_vlm,
    reporting,
)

if TYPE_CHECKING:
    from spa3r.serving.engine import Engine
    from spa3r.serving.metrics import Metrics
    from spa3r.serving.service import ServerSettings


def _engine(
    name: str, key: str | None, model: Any, processor: Any, settings: ServerSettings, metrics: Metrics
) -> Engine:
    if name == "transformers":
        from spa3r.serving.transformers_engine import TransformersEngine

        return TransformersEngine(model, processor, settings.max_running, metrics.step.observe)
    from spa3r.serving.vllm_engine import LocalVllm, RemoteVllm, VllmEngine

    if name == "vllm":
        return VllmEngine(model, processor, LocalVllm(model, processor, settings.limits.views))
    return VllmEngine(model, processor, RemoteVllm(name, key, settings.timeout))


def serve(
    model: Model = EMBEDDED,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 can be reached from other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SPA3R_API_KEY", show_envvar=True, help="Key that clients must send. Other users see options."
        ),
    ] = None,
    images: Annotated[
        Images, typer.Option(help="What the VLM sees: the views as Spa3R sees them, or the pictures as they are.")
    ] = Images.aligned,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME|URL",
            help="What generates: 'transformers'; 'vllm', in this process; or the address of a vLLM server with the "
            "VLM that `spa3r export` writes.",
        ),
    ] = "transformers",
    engine_key: Annotated[
        str | None,
        typer.Option(envvar="SPA3R_ENGINE_KEY", show_envvar=True, help="Key of the vLLM server, with `--engine URL`."),
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Download pictures and videos at public http(s) addresses.")
    ] = False,
    max_running: Annotated[int, typer.Option(min=1, help="Answers that are generated together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers beyond these that wait.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 1024,
    max_text: Annotated[int, typer.Option(min=1, help="Maximum number of characters of a conversation.")] = 32_000,
    max_views: Annotated[
        int, typer.Option(min=1, help="Maximum number of pictures and frames of a scene.")
    ] = Limits.views,
    max_mib: Annotated[int, typer.Option(min=1, help="Maximum size of a request.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum number of pixels of a picture.")] = 2**26,
    timeout: Annotated[float, typer.Option(min=0.1, help="Maximum time of a request in seconds.")] = 300,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that requests have to end after a stop signal.")] = 30,
    cache_gib: Annotated[float, typer.Option(min=0, help="Memory for encoded scenes.")] = 4,
    pictures_gib: Annotated[
        float, typer.Option(min=0, help="Memory for the pictures of uploaded scenes, to encode them again.")
    ] = 1,
    evicted: Annotated[
        Evicted, typer.Option(help="A question about an uploaded scene that left the memory: encode again, or refuse.")
    ] = Evicted.ENCODE,
    device: Device = "auto",
    dtype: WeightType = Dtype.auto,
    attention: Attention = None,
    int8: Int8 = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer questions over HTTP, for any client of OpenAI's API. Ctrl+C or SIGTERM ends it."""
    with reporting(as_json, verbose) as report:
        from spa3r.serving import server
        from spa3r.serving.metrics import Metrics
        from spa3r.serving.service import ServerSettings

        if engine not in ("transformers", "vllm") and not engine.startswith(("http://", "https://")):
            raise ValueError(
                f"`--engine` must be 'transformers', 'vllm' or the address of a vLLM server, got {shorten(engine)}."
            )
        settings = ServerSettings(
            limits=Limits(max_text, max_views, max_mib * 2**20, max_pixels),
            max_tokens=max_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            timeout=timeout,
            grace=grace,
            cache_bytes=int(cache_gib * 2**30),
            picture_bytes=int(pictures_gib * 2**30),
            evicted=evicted,
            allow_remote=allow_remote,
            api_key=api_key or None,
        )
        listening = server.listening_socket(host, port)
        with report.status(f"Loading {model}"):
            vlm, processor = load_vlm(model, device, dtype, attention, report.note, int8)
        if model == EMBEDDED:
            report.note(f"{embedded_note()}. {QUESTIONS_NOTE}")
        processor.image_mode = images.value
        metrics = Metrics()
        running = _engine(engine, engine_key, vlm, processor, settings, metrics)
        keep = processor.view_image_processor.process_view if images == Images.aligned else None
        name = Path(model).resolve().name if Path(model).exists() else model
        app = server.build_server(running, name, settings, keep, metrics)
        found = listening.getsockname()
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{found[1]}/v1"
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            report.note("everyone who reaches this address can use the model: give `--api-key`")
        report.finish(f"Serving {name} at {url}", model=name, url=url)
    sys.stdout.flush()  # a pipe or file would get the address at the end
    with redirect_stdout(sys.stderr):
        server.server_of(app, "info" if verbose else "warning").run(sockets=[listening])
