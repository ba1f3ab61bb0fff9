"""The small trained checkpoint that comes with the package, and the name by which ``from_pretrained`` finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
"""What commands and ``from_pretrained`` call the checkpoint in the package, in place of a folder or hub id."""

FOLDERS = {EMBEDDED: Path(__file__).parent / "rooms"}


def resolve(name_or_path: Any) -> Any:
    """The folder of a checkpoint that comes with the package; any other name as it is."""
    return FOLDERS.get(name_or_path, name_or_path) if isinstance(name_or_path, str) else name_or_path
