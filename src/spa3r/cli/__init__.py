"""The command line, ``spa3r``."""

from __future__ import annotations

import signal
import sys

from spa3r.signals import ending_on_signals


def run() -> None:
    """Run the command line. Ctrl-C ends it with one line at any time, also while modules are imported."""
    received: list[signal.Signals] = []
    try:
        with ending_on_signals() as received:
            from spa3r.cli.main import app

            app()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise  # the command ended as it should: Ctrl-C is how a server ends
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        name = received[-1].name if received else "SIGINT"  # an import may turn a signal into any error
        print(f"note: stopped by {name}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end of the interpreter would print a traceback
