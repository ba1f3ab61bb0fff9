"""What ends a run that can be gone on with: a scheduler, Ctrl-C, a terminal that closes. Imports no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)


@contextmanager
def on_signals(stop: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Hand :data:`STOP_SIGNALS` to a handler for as long as this lasts.

    One that is ignored stays so: nohup ignores SIGHUP. Outside the main thread nothing changes.

    Args:
        stop: Called with the signal's number.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End as Ctrl-C does, whatever asks for it: what is half-written is removed, and what is finished stays.

    Raises:
        KeyboardInterrupt: A signal came; it says which.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"{signal.Signals(number).name}: what is finished stays; the same command goes on")

    with on_signals(stop):
        yield


__all__ = ["STOP_SIGNALS", "ending_on_signals", "on_signals"]
