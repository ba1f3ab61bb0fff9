"""The HTTP server: OpenAI's chat completions about scenes, and the upload of scenes.

app = build_server(TransformersEngine(model, processor), "my-model", keep=processor.view_image_processor.process_view)
server_of(app).run(sockets=[listening_socket("127.0.0.1", 8000)])
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import PIL.Image
from transformers.utils import logging

from spa3r.console import one_line
from spa3r.secret import hide
from spa3r.serving.engine import Engine, EngineClosed
from spa3r.serving.errors import ApiError
from spa3r.signals import on_signals

try:
    import python_multipart  # noqa: F401  # Starlette fails at the first form without it
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send

    from spa3r.serving.answers import Answer, as_event
    from spa3r.serving.bodies import LimitedBodies
    from spa3r.serving.metrics import Metrics
    from spa3r.serving.pictures import Upload, is_video
    from spa3r.serving.requests import ChatRequest, RequestForm, SceneRequest, parsed
    from spa3r.serving.service import ServerSettings, Service
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'The server needs {error.name}, which is not installed. pip install "spa3r[serve]".'
    ) from error

logger = logging.get_logger(__name__)

T = TypeVar("T")

CLIENT_GONE = 499
"""Status in the metrics of requests whose client went away; nobody gets it."""


class _ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


class _Stream(StreamingResponse):
    """Server-sent events. An error after the first event is an event itself; the stack is left in any case."""

    def __init__(self, answer: Answer, end: float, stack: AsyncExitStack):
        self._answer, self._end, self._stack = answer, end, stack
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self) -> AsyncGenerator[bytes]:
        async with aclosing(self._answer.events()) as events:
            try:
                while True:
                    async with asyncio.timeout_at(self._end):
                        event = await anext(events, None)
                    if event is None:
                        return
                    yield event
            except Exception as error:
                yield as_event(as_api_error(error).content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):  # a client that doesn't read
                async with asyncio.timeout_at(self._end + 1):
                    await super().__call__(scope, receive, send)
        finally:
            for generation in self._answer.generations:
                generation.cancel()
            await self._stack.aclose()


def as_api_error(error: Exception) -> ApiError:
    """Any error in the form for clients. Errors of this package that are no ValueError are logged, and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), "shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "The request took longer than the server allows. Ask for less.", "timeout")
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code, "invalid")
        return ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    if isinstance(error, ValueError):
        return ApiError(400, hide(one_line(error)), "invalid_request")
    logger.error(f"A request failed: {type(error).__name__}: {error}", exc_info=error)
    return ApiError(500, "The server failed at this request; its log tells why.", "internal_error")


def build_server(
    engine: Engine,
    model_name: str,
    settings: ServerSettings | None = None,
    keep: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The server as an ASGI app; :func:`run_server` runs it.

    Args:
        engine: Encodes scenes and generates answers. It is closed when the app shuts down.
        model_name: The name of the model for clients.
        settings: What is allowed; None: the defaults.
        keep: Function that reduces each picture when it is read, such as ``process_view`` of the view image processor;
            None: keep pictures whole.
        metrics: What is counted; None: a new one.
    """
    settings, metrics = settings or ServerSettings(), metrics or Metrics()
    service = Service(engine, model_name, settings, keep, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        service.is_stopping = True
        await engine.close()

    app = FastAPI(title="spa3r", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    limit = settings.limits.file_bytes
    refusal = f"A request must have at most {limit} bytes, got {{}}. Give fewer or smaller pictures."
    app.add_middleware(
        LimitedBodies,
        limit_of=lambda path: (limit, refusal),
        content_of=lambda message: ApiError(413, message, "request_too_large").content,
    )

    async def failed(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        _count(metrics, request, known.status)
        return JSONResponse(known.content, known.status, known.headers)

    for kind in (ApiError, HTTPException):
        app.add_exception_handler(kind, failed)

    @app.get("/health")
    async def health() -> Response:
        running, waiting = engine.load()
        status = "stopping" if service.is_stopping else "ok"
        content = {"status": status, "engine": engine.name, "running": running, "waiting": waiting}
        return JSONResponse(content, 503 if service.is_stopping else 200)

    @app.get("/metrics")
    async def show_metrics(request: Request) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        return PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "spa3r"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        service.check_model(name)
        return JSONResponse(model)

    @app.get("/v1/scenes")
    async def scenes(request: Request) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        found = [service.described(scene) for scene in service.scenes.uploaded.values()]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/scenes/{scene_id}")
    async def one_scene(request: Request, scene_id: str) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        return JSONResponse(service.described(service.scenes.get(scene_id)))

    @app.delete("/v1/scenes/{scene_id}")
    async def delete_scene(request: Request, scene_id: str) -> Response:
        service.check_key(request.headers.get("authorization", ""))
        service.scenes.delete(scene_id)
        return JSONResponse({"id": scene_id, "object": "scene.deleted", "deleted": True})

    async def worked(request: Request, work: Callable[[_Work], Awaitable[Response]]) -> Response:
        """The response of work that needs the engine."""
        try:
            service.check_key(request.headers.get("authorization", ""))
            async with AsyncExitStack() as stack:
                stack.enter_context(service.admitted())
                end = asyncio.get_running_loop().time() + settings.timeout
                async with asyncio.timeout_at(end):
                    response = await work(_Work(service, request, stack, end))
        except (_ClientGone, ClientDisconnect):
            response = Response(status_code=CLIENT_GONE)
        except Exception as error:
            return await failed(request, error)
        _count(metrics, request, response.status_code)
        return response

    @app.post("/v1/scenes")
    async def add_scene(request: Request) -> Response:
        return await worked(request, lambda work: work.add_scene(None))

    @app.post("/v1/scenes/{scene_id}/pictures")
    async def add_pictures(request: Request, scene_id: str) -> Response:
        return await worked(request, lambda work: work.add_scene(scene_id))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await worked(request, lambda work: work.chat())

    return app


def _count(metrics: Metrics, request: Request, status: int) -> None:
    route = getattr(request.scope.get("route"), "path", "other")
    metrics.requests.labels(route, str(status)).inc()


class _Work:
    """One request that needs the engine.

    Args:
        service: The service.
        request: The request.
        stack: What is left when the response is sent.
        end: Time of the event loop by which the response must be sent.
    """

    def __init__(self, service: Service, request: Request, stack: AsyncExitStack, end: float):
        self.service, self.request, self.stack, self.end = service, request, stack, end
        self.start = time.perf_counter()

    async def chat(self) -> Response:
        asked = await self._json(ChatRequest)
        sampling = self.service.check_chat(asked)
        count = asked.n or 1
        self.stack.enter_context(self.service.admitted(count - 1))
        prompt, cached = await self._while_connected(self.service.prompt(asked.messages))
        generations = await self._while_connected(self.service.begin(prompt, sampling, count))
        answer = Answer(self.service.metrics, asked, generations, cached, self.start)
        if asked.stream:
            return _Stream(answer, self.end, self.stack.pop_all())
        return JSONResponse(await self._while_connected(answer.whole()))

    async def add_scene(self, scene_id: str | None) -> Response:
        service, reader = self.service, self.service.reader
        to = None if scene_id is None else service.scenes.get(scene_id)
        if self.request.headers.get("content-type", "").startswith("multipart/form-data"):
            uploads, system = await self._files()
            read = lambda: reader.files(uploads, "files")  # noqa: E731
        else:
            asked = await self._json(SceneRequest)
            system = asked.system
            read = lambda: reader.parts(asked.content, "content")  # noqa: E731
        if to is not None and system not in (None, to.system):
            raise ApiError(
                400, f"The scene has the system prompt {to.system!r}, got {system!r}. Leave it out.", "invalid_value",
                "system",
            )  # fmt: skip
        system = to.system if to is not None else system
        scene = await self._while_connected(service.add_scene(read, system, to))
        return JSONResponse(service.described(scene), 200 if to is not None else 201)

    async def _json(self, form: type[RequestForm]) -> RequestForm:
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"The header Content-Type must be 'application/json', got {kind[:80]!r}. Set it.", "invalid_type"
            )
        return parsed(form, await self.request.body())

    async def _files(self) -> tuple[list[Upload], str | None]:
        """The files of a form, in order, and the system prompt."""
        async with self.request.form(max_files=10_000, max_fields=100) as form:
            texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            if unknown := sorted(texts.keys() - {"num_frames", "system"}):
                raise ApiError(
                    400,
                    f"A form must have files, and may have the fields 'num_frames' and 'system', got {unknown[0]!r}. "
                    "Send each picture as a file.",
                    "unknown_parameter",
                    unknown[0],
                )
            frames = texts.get("num_frames")
            if frames is not None and not (frames.isascii() and frames.isdigit() and int(frames[:9])):
                raise ApiError(
                    400, f"`num_frames` must be at least 1, got {frames[:40]!r}.", "invalid_value", "num_frames"
                )
            number = None if frames is None else int(frames[:9])
            uploads = []
            for _, file in form.multi_items():
                if isinstance(file, UploadFile):
                    name = file.filename or f"file {len(uploads) + 1}"
                    video = is_video(name, file.content_type)
                    uploads.append(Upload(name, await file.read(), number if video else None, video))
        if not uploads:
            raise ApiError(400, "A form must have at least one file, got none.", "missing_parameter", "files")
        return uploads, texts.get("system")

    async def _while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work; if the client goes away, the work is cancelled."""

        async def gone() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass

        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _ClientGone
            return working.result()
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)


# Running


class _Uvicorn(uvicorn.Server):
    """A server that lets requests end when a signal stops it, and then returns."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            await self.service.engine.close()  # also if the app was not shut down

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        with on_signals(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)  # a second SIGINT ends it at once
        self.stop()

    def stop(self) -> None:
        """Stop as after a signal; from any thread."""
        self.should_exit = True
        if self._loop is not None:
            with suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self.service.stop)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; requests wait in it until the server runs.

    Args:
        host: Address.
        port: Port; 0: any free one.

    Raises:
        OSError: The address is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise OSError(f"{host}, port {port}, can't be used ({error}). Give another `--host` or `--port`.") from error
    return listening


def server_of(app: FastAPI, log_level: str = "warning") -> _Uvicorn:
    """A server for an app of :func:`build_server`: ``run(sockets=[listening_socket(...)])`` serves until a signal comes
    or ``stop()`` is called. Then it accepts no more requests, and those that run have the time of grace."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(service.settings.grace) + 10,
    )
    return _Uvicorn(config, service)
