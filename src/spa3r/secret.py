"""Tokens, passwords and keys, which must never be written, logged or shown. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_NAME = re.compile(
    r"(^|\.)token$|(^|[._-])(hub|hf|access|auth|api|bearer|refresh|session|security)[_-]?token$"
    r"|(^|[._-])(passwords?|passwd|passphrase|secrets?|(secret|api|access|private)[_-]?key|credentials?|authorization)$",
    re.IGNORECASE,
)
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), f"hf_{MASK}"),
    (re.compile(r"(?<=://)[^/\s@\"'<>]+@"), f"{MASK}@"),
    (
        re.compile(
            r"([?&;](?:[\w-]*(?:token|signature|credential|password|secret)|sig|key|api_?key)=)[^&\s\"'#<>]+",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{MASK}"),
)
_known: set[str] = set()


class Secret(str):
    """A string that its ``repr`` doesn't show."""

    def __repr__(self) -> str:
        return repr(MASK)


def is_secret(name: Any) -> bool:
    """Whether a value of this name is a secret: ``hub_token``, ``password``, ``api_key``; not ``spatial_tokens``."""
    return isinstance(name, str) and _NAME.search(name) is not None


def keep_secret(tree: Any, inside: bool = False) -> Any:
    """A copy of the configuration whose secrets are :class:`Secret` and are masked by :func:`hide` from now on.

    Args:
        tree: Nested dicts and lists.
        inside: Whether it is nested under a secret's name.
    """
    if isinstance(tree, Mapping):
        return {key: keep_secret(value, inside or is_secret(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [keep_secret(value, inside) for value in tree]
    if inside and tree is not None and not isinstance(tree, bool):
        if len(str(tree)) >= 6:  # masking a shorter one would damage ordinary text
            _known.add(str(tree))
        return Secret(tree)
    return tree


def without_secrets(tree: Any) -> Any:
    """A copy of the configuration without secrets: their keys are removed, and texts go through :func:`hide`."""
    if isinstance(tree, Mapping):
        return {key: without_secrets(value) for key, value in tree.items() if not is_secret(key)}
    if isinstance(tree, list | tuple):
        return [without_secrets(value) for value in tree]
    return hide(tree) if isinstance(tree, str) else tree


def hidden(tree: Any) -> Any:
    """A copy of the configuration for output: secret values are masked, and all texts go through :func:`hide`."""
    if isinstance(tree, Mapping):
        return {
            hidden(key): MASK if is_secret(key) and value is not None else hidden(value) for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [hidden(value) for value in tree]
    return hide(tree) if isinstance(tree, str) else tree


def hide(text: str) -> str:
    """A text with secrets masked: those of the configuration and the environment, hub tokens, and passwords and
    signatures in URLs."""
    of_environment = (
        value for name, value in os.environ.items() if len(value) >= 8 and (is_secret(name) or name.endswith("_TOKEN"))
    )
    for value in sorted({*_known, *of_environment}, key=len, reverse=True):
        text = text.replace(value, MASK)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    return text


__all__ = ["Secret", "hidden", "hide", "is_secret", "keep_secret", "without_secrets"]
