"""A limit on the bodies of requests, for servers of this package. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class LimitedBodies:
    """Middleware that rejects too large request bodies, if possible before they are read.

    Args:
        app: The wrapped ASGI app.
        limit_of: Takes a path, and returns the maximum number of bytes, with the message of the refusal, in which
            ``{}`` stands for the number of bytes that came.
        content_of: Takes the message, and returns the body of the refusal as JSON.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit_of: Callable[[str], tuple[int, str]],
        content_of: Callable[[str], object] = lambda message: {"detail": message, "error": message},
    ):
        self.app, self.limit_of, self.content_of = app, limit_of, content_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, refusal = self.limit_of(scope["path"])
        promised = dict(scope["headers"]).get(b"content-length", b"")
        if promised.isdigit() and int(promised) > limit:
            content = self.content_of(refusal.format(int(promised)))
            await JSONResponse(content, 413, {"connection": "close"})(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:  # a chunked body has no declared size
                raise HTTPException(413, refusal.format("more"), {"connection": "close"})
            return message

        await self.app(scope, counted, send)
