"""Signals that stop a command: from a scheduler, Ctrl-C or a closed terminal. Imports no torch."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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
def ending_on_signals() -> Generator[list[signal.Signals]]:
    """Context manager in which stop signals act like Ctrl-C: partial files are removed, finished ones are kept.

    Yields:
        The signals that were received so far.

    Raises:
        KeyboardInterrupt: A signal was received; it names the signal.
    """
    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt(f"{received[-1].name}: what is finished stays")

    def raise_again(dropped: Any) -> None:
        """Python prints and drops what a handler raises inside a callback, such as those of imports."""
        if isinstance(dropped.exc_value, KeyboardInterrupt) and received:
            threading.Timer(0.01, _thread.interrupt_main, [received[-1]]).start()
        else:
            hook(dropped)

    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        with on_signals(stop):
            yield received
    finally:
        sys.unraisablehook = hook


__all__ = ["STOP_SIGNALS", "ending_on_signals", "on_signals"]
