"""The thread that encodes for the engines."""

import asyncio
import threading

import pytest

from spa3r.serving.encoder import EncodingThread
from spa3r.serving.engine import EngineClosed


def test_closing_ends_all_work_with_an_error_that_says_so():
    """Work that runs, that waits, and that comes later: clients get a 503 instead of a closed connection."""
    begun, may_end, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        may_end.wait(10)

    async def close() -> list:
        thread = EncodingThread()
        tasks = [asyncio.ensure_future(thread.run(one)) for one in (work, lambda: done.append("waiting"))]
        await asyncio.to_thread(begun.wait)
        thread.close()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(EngineClosed, match="shutting down before this was answered"):
            await thread.run(lambda: done.append("later"))
        may_end.set()
        return ended

    assert [type(error) for error in asyncio.run(close())] == [EngineClosed, EngineClosed]
    assert done == []


def test_results_and_cancelled_requests():
    async def ask() -> None:
        thread = EncodingThread()
        assert await thread.run(lambda: 7) == 7
        task = asyncio.ensure_future(thread.run(lambda: 8))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):  # by the client, not by the server
            await task
        thread.close()

    asyncio.run(ask())
