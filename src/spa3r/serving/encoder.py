"""The thread in which engines encode scenes and prompts, beside the event loop. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spa3r.serving.engine import EngineClosed

CLOSED = "The server is shutting down before this was answered. Ask again when it is back."


class EncodingThread:
    """Does one piece of work at a time; called from one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "spa3r-encode")
        self._under_way: set[asyncio.Future[Any]] = set()
        self._is_closed = False

    async def run(self, work: Callable[[], Any]) -> Any:
        """The result of work that may take long. After :meth:`close`, nobody waits for its end.

        Raises:
            EngineClosed: The thread was closed before the work was finished.
        """
        if self._is_closed:
            raise EngineClosed(CLOSED)
        encoding = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._under_way.add(encoding)
        try:
            return await encoding
        except asyncio.CancelledError:
            if self._is_closed:
                raise EngineClosed(CLOSED) from None
            raise
        finally:
            self._under_way.discard(encoding)

    def close(self) -> None:
        """Take no more work, and drop what has not begun."""
        self._is_closed = True
        for encoding in list(self._under_way):
            encoding.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
