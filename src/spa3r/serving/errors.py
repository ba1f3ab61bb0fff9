"""Errors in the form of OpenAI's API. Imports no torch."""

from __future__ import annotations

from typing import Any

TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
"""Names of the kinds of errors by status, where they are neither of the request nor of the server."""


class ApiError(Exception):
    """An error that a client gets as ``{"error": {"message", "type", "param", "code"}}``.

    Args:
        status: The HTTP status.
        message: What was wanted, what was given, and what to do.
        code: A short name that doesn't change, for programs.
        param: The part of the request that is wrong, such as ``"messages"``.
        headers: More headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
