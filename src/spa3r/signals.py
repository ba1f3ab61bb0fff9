"""Signals that stop a resumable run: from a scheduler, Ctrl-C or a closed terminal. Imports no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)


@contextmanager
def on_signals(stop: Callable[[int, FrameType | None], object]) -> Generator[None]:
    """Context manager that passes :data:`STOP_SIGNALS` to a handler.

    Ignored signals stay ignored: nohup ignores SIGHUP. Has no effect outside the main thread.

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
def ending_on_signals() -> Generator[None]:
    """Context manager in which stop signals act like Ctrl-C: partial files are removed, finished ones are kept.

    Raises:
        KeyboardInterrupt: A signal was received; it names the signal.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"{signal.Signals(number).name}: what is finished stays; the same command goes on")

    with on_signals(stop):
        yield


__all__ = ["STOP_SIGNALS", "ending_on_signals", "on_signals"]
