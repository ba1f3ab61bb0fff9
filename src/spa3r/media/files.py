"""Shared helpers for reading files: supported suffixes, text encodings, and names of sources in messages."""

from __future__ import annotations

import json
import re
import stat
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import PIL.Image

from spa3r.secret import hide

HEIF = (".heic", ".heif")
"""Suffixes of pictures that need the extra ``heic``."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", *HEIF)
"""Suffixes of pictures, in lower case; matching ignores case."""

LONGEST_NAME = 200
"""Maximum number of characters of a source in a message; a source may be a whole picture as text."""

VIDEOS = frozenset(
    f".{suffix}" for suffix in "mp4 m4v mov 3gp 3g2 mkv webm avi mpg mpeg ts mts m2ts flv wmv ogv".split()
)
"""Suffixes of videos, in lower case."""

_FILE_URL = re.compile(r"file:(?://(?:localhost(?=/))?)?(?=.)", re.IGNORECASE)


def can_read_heif() -> bool:
    """Whether HEIC pictures can be read in this environment."""
    return find_spec("pillow_heif") is not None


def shortened(text: str, length: int = LONGEST_NAME) -> str:
    """A user's text for a message, truncated if it is long."""
    return text if len(text) <= length else f"{text[:40]}..."


def describe(source: Any) -> str:
    """Name of a picture or video for messages, at most one line: never its content, and URLs without passwords and
    signatures."""
    if isinstance(source, str | Path):
        return shortened(hide(source) if is_url(source) else str(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{memoryview(source).nbytes} bytes"
    if hasattr(source, "shape"):
        return f"an array of shape {tuple(source.shape)}"
    name = getattr(source, "filename", "") or getattr(source, "name", "")
    if isinstance(name, str) and name:
        return shortened(name)
    return "a PIL image" if isinstance(source, PIL.Image.Image) else f"a {type(source).__name__}"


def is_url(source: Any) -> bool:
    """Whether a source is an HTTP(S) URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def local_path(source: str | Path) -> Path:
    """The local path of a source: a path, or a ``file:`` URL, percent-encoded or not."""
    if not isinstance(source, str) or (match := _FILE_URL.match(source)) is None:
        return Path(source)
    raw = source[match.end() :]
    decoded = Path(unquote(raw))
    return decoded if exists(decoded) else Path(raw)  # Qwen's tools don't encode the path


def exists(path: str | Path) -> bool:
    """Whether the file or folder exists; False for a text that can't be a path."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def regular_file(source: str | Path, kind: str = "picture") -> Path:
    """The path of a regular file. Anything else is rejected, since reading pipes and devices can block forever.

    Args:
        source: A path or a ``file:`` URL.
        kind: Kind of the file for messages.

    Raises:
        ValueError: The file doesn't exist, isn't accessible, or is a folder, pipe, socket or device.
    """
    path, name = local_path(source), describe(source)
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise ValueError(f"The {kind} {name} can't be opened: {error.strerror}. Give a file.") from error
    except (OSError, ValueError) as error:  # too long, or contains a null character
        raise ValueError(f"The {kind} {name} doesn't exist. Check the path.") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"The {kind} {name} can't be opened: Is a directory. Give a file.")
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"The {kind} {name} can't be opened: it is a pipe, socket or device. Give a regular file; of a pipe, read "
            "the bytes first and pass these."
        )
    return path


def text_encoding(file: str | Path) -> str:
    """The encoding of a text file: UTF-8, or UTF-16 or UTF-32 by its first bytes; a byte-order mark is removed."""
    with open(file, "rb") as content:
        return json.detect_encoding(content.read(4))


def read_text(file: str | Path) -> str:
    """Read a text file in any Unicode encoding.

    Raises:
        ValueError: The file has another encoding.
        OSError: The file can't be read.
    """
    try:
        return Path(file).read_text(encoding=text_encoding(file))
    except UnicodeDecodeError as error:
        raise other_encoding(file, error) from error


def other_encoding(file: str | Path, error: UnicodeDecodeError) -> ValueError:
    """The error for a text file that is not valid Unicode."""
    return ValueError(f"{file} must be text in UTF-8, UTF-16 or UTF-32, got other bytes ({error}). Save it as UTF-8.")


def inside(root: str | Path, name: Any, what: str) -> Path:
    """The path of a name inside a folder.

    Args:
        root: The folder.
        name: A relative path.
        what: What the name is, for messages.

    Raises:
        ValueError: The name is not a path, or leads out of the folder.
    """
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    if not name or not parts or not parts[0] or ".." in parts or "\0" in name or PureWindowsPath(name).drive:
        raise ValueError(
            f"{what} must be a name below {root}, without '..' and not an absolute path, got {shortened(str(name))!r}. "
            "Correct the name."
        )
    return Path(root) / name
