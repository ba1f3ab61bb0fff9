"""Text of an answer while it grows: what can be sent already. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class GrowingText:
    """Turns tokens into text that is final, for streams.

    Held back are incomplete characters, white space at the end (answers have none around them), and what may be the
    beginning of a text that ends the answer.

    Args:
        decode: Turns tokens into text.
        stop: Texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._sent = ""
        self.is_stopped = False
        """Whether one of the texts that end the answer has come."""

    def next(self, tokens: Sequence[int], is_last: bool) -> str:
        """The characters that can be sent after those before.

        Args:
            tokens: All tokens so far.
            is_last: Whether no tokens follow.
        """
        text = self._decode(tokens).lstrip()
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, text = True, text[: min(ends)]
        elif not is_last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        text = text.rstrip()
        fresh, self._sent = text[len(self._sent) :], max(self._sent, text, key=len)
        return fresh


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of a text with which another one begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
