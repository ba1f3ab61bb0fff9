"""Checks of single values where they enter the library, and the words of the errors. Imports no torch.

Every error says the value's name, what was wanted, what was got and how to cure it; a large value is shortened.
"""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def shorten(value: Any) -> str:
    """``repr`` of a value for an error message, at most a line or so of it."""
    text = f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def range_words(lowest: float, highest: float | None, kind: str = "a whole number", above: bool = False) -> str:
    """``a whole number from 1 to 8``; the lowest itself is excluded with `above`."""
    if highest is None:
        return f"{kind} {'above' if above else 'of at least'} {lowest}"
    return f"{kind} above {lowest}, at most {highest}" if above else f"{kind} from {lowest} to {highest}"


def is_count(value: Any, lowest: float = 1, highest: int | None = None) -> bool:
    """Whether a value is a whole number in a range: an int or NumPy's, never a truth value, a text or a fraction."""
    if isinstance(value, bool):
        return False
    try:
        number = operator.index(value)
    except TypeError:
        return False
    return lowest <= number and (highest is None or number <= highest)


def is_number(value: Any, lowest: float, highest: float = math.inf, above: bool = False) -> bool:
    """Whether a value is a finite number in a range; the lowest itself is excluded with `above`."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    number = float(value)
    return math.isfinite(number) and (number > lowest if above else number >= lowest) and number <= highest


def check_count(name: str, value: Any, lowest: int = 1, highest: int | None = None, cure: str = "") -> int:
    """The value as an int.

    Args:
        name: What the error calls it, without quotes.
        value: What was given.
        lowest: The least that is accepted.
        highest: The most; None: no limit.
        cure: A sentence that ends the error.

    Raises:
        ValueError: It is no whole number, or out of range.
    """
    if not is_count(value, lowest, highest):
        raise ValueError(f"`{name}` must be {range_words(lowest, highest)}, got {shorten(value)}. {cure}".rstrip())
    return operator.index(value)


def check_channels(
    name: str, values: Any, lowest: float = -math.inf, above: bool = False, cure: str = ""
) -> list[float]:
    """Three finite numbers, one for each color channel, as floats.

    Args:
        name: What the error calls them, without quotes.
        values: What was given.
        lowest: The least that each may be.
        above: Whether the lowest itself is excluded.
        cure: A sentence that ends the error.

    Raises:
        ValueError: They are not three, or one is no finite number or out of range.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    is_right = isinstance(values, list | tuple) and len(values) == 3
    if not is_right or not all(is_number(value, lowest, above=above) for value in values):
        limit = "" if lowest == -math.inf else f" {'above' if above else 'of at least'} {lowest:g}"
        raise ValueError(
            f"`{name}` must hold three finite numbers{limit}, one for each channel, got {shorten(values)}."
            f"{cure and f' {cure}'}"
        )
    return [float(value) for value in values]
