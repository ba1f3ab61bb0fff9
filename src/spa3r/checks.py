"""Validation of single values at the entry points of the library, and wording of the errors. Imports no torch.

Every error gives the value's name, what was expected, what was given and how to fix it; large values are shortened.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def shorten(value: Any) -> str:
    """``repr`` of a value for an error message, shortened to about a line."""
    text = f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def range_words(lowest: float, highest: float | None, kind: str = "a whole number", above: bool = False) -> str:
    """``a whole number from 1 to 8``; `above` excludes the lowest value itself."""
    if highest is None:
        return f"{kind} {'above' if above else 'of at least'} {lowest}"
    return f"{kind} above {lowest}, at most {highest}" if above else f"{kind} from {lowest} to {highest}"


def is_count(value: Any, lowest: float = 1, highest: int | None = None) -> bool:
    """Whether a value is a whole number in a range: an int or NumPy integer, but no boolean, text or fraction."""
    if isinstance(value, bool):
        return False
    try:
        number = operator.index(value)
    except TypeError:
        return False
    return lowest <= number and (highest is None or number <= highest)


def is_number(value: Any, lowest: float, highest: float = math.inf, above: bool = False) -> bool:
    """Whether a value is a finite number in a range; `above` excludes the lowest value itself."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an array, or an integer beyond every float
        return False
    return math.isfinite(number) and (number > lowest if above else number >= lowest) and number <= highest


def check_count(name: str, value: Any, lowest: int = 1, highest: int | None = None, cure: str = "") -> int:
    """Validate a whole number and return it as an int.

    Args:
        name: Name of the value in the error, without quotes.
        value: The value.
        lowest: Minimum.
        highest: Maximum; None: no limit.
        cure: The last sentence of the error.

    Raises:
        ValueError: It is not a whole number, or is out of range.
    """
    if not is_count(value, lowest, highest):
        raise ValueError(f"`{name}` must be {range_words(lowest, highest)}, got {shorten(value)}. {cure}".rstrip())
    return operator.index(value)


def check_channels(
    name: str, values: Any, lowest: float = -math.inf, above: bool = False, cure: str = ""
) -> list[float]:
    """Validate three finite numbers, one per color channel, and return them as floats.

    Args:
        name: Name of the values in the error, without quotes.
        values: The values.
        lowest: Minimum of each.
        above: Whether the minimum itself is excluded.
        cure: The last sentence of the error.

    Raises:
        ValueError: There are not three, or one is not a finite number or is out of range.
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


def check_types(values: Mapping[str, Any], types: Mapping[str, Any], prefix: str = "") -> None:
    """Raise for values that don't match the annotated types. Names without a type are ignored.

    Raises:
        ValueError: A value has the wrong type; the message gives its name, the expected type, and the value.
    """
    for name, value in values.items():
        if name in types and not is_of_type(value, types[name]):
            raise ValueError(f"`{prefix}{name}` must be {type_words(types[name])}, got {shorten(value)}.")


def signature_types(made: type) -> dict[str, Any]:
    """Annotated types of a class's constructor arguments; types of libraries that are not imported yet become Any."""
    names = vars(sys.modules[made.__module__])
    types = {}
    for name, annotation in made.__init__.__annotations__.items():
        try:
            types[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
        except NameError:
            types[name] = Any
    return types


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, tuple[float, float | None]], prefix: str = "") -> None:
    """Raise for numbers, also inside lists, that are outside the ranges of their names. None is ignored.

    Raises:
        ValueError: A value is out of range; the message gives its name, the range, and the value.
    """
    for name, (lowest, highest) in ranges.items():
        given = values.get(name)
        for number in given if isinstance(given, list | tuple) else [given]:
            if number is not None and not is_number(number, lowest, math.inf if highest is None else highest):
                wanted = range_words(lowest, highest, "a number")
                raise ValueError(f"`{prefix}{name}` must be {wanted}, got {shorten(given)}.")


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value matches an annotation: booleans are not whole numbers, numbers must be finite, lists match
    tuples, and texts match paths and enumeration members."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any or isinstance(annotation, str):
        return True
    if origin in (Union, UnionType):
        return any(is_of_type(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (list, tuple, Sequence, Iterable):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return (
                isinstance(value, list | tuple)
                and len(value) == len(arguments)
                and all(map(is_of_type, value, arguments))
            )
        return isinstance(value, list | tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            is_of_type(key, arguments[0]) and is_of_type(item, arguments[1]) for key, item in value.items()
        )
    if annotation in (None, NoneType):
        return value is None
    if annotation is int:
        return is_count(value, -(2**63), 2**63 - 1)
    if annotation is float:
        return is_number(value, -math.inf)
    if annotation in (Path, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return isinstance(value, annotation) or value in [member.value for member in annotation]
    return isinstance(value, origin or annotation) if isinstance(origin or annotation, type) else True


def type_words(annotation: Any) -> str:
    """Description of an expected type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if str in arguments:  # skip enums: long lists of names, which are texts too
            arguments = [one for one in arguments if not (isinstance(one, type) and issubclass(one, Enum))]
        return " or ".join(dict.fromkeys(type_words(argument) for argument in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list of which each entry is {type_words(arguments[0])}"
    if origin in (dict, Mapping) or annotation is dict:
        return "a dictionary"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(repr(member.value) for member in annotation)}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", NoneType: "None"}
    return names.get(annotation) or f"a {getattr(annotation, '__name__', annotation)}"
