"""Atomic writing of files, and exclusive locks on the folders of runs. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK_FILE = ".lock"
"""Lock file in a run's folder. Only a lock held by a process counts; that of a killed process is free."""


def write_whole(file: str | os.PathLike, content: str | bytes) -> None:
    """Write a file atomically.

    Args:
        file: Target file; its folder is created if needed.
        content: Text is encoded as UTF-8.

    Raises:
        WriteError: The file can't be written. An existing file stays unchanged, and no partial file remains.
    """
    file = Path(file)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{uuid4().hex}.tmp")  # other threads and machines may write the same file
        try:
            with open(unfinished, "wb") as opened:
                opened.write(content.encode("utf-8") if isinstance(content, str) else content)
                opened.flush()
                os.fsync(opened.fileno())  # otherwise a power failure may leave an empty file
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


class WriteError(OSError):
    """A write error. Its message says what failed, why, and how to fix it."""

    def __init__(self, what: str | os.PathLike, reason: str, cure: str):
        super().__init__(f"{what} can't be written: {reason.rstrip('.')}. {cure}")
        self.reason = reason


@contextmanager
def writing(what: str | os.PathLike, cure: str = "Free space, or choose another place.") -> Generator[None]:
    """Context manager that converts errors during writing to a :class:`WriteError` that names the target.

    Args:
        what: What is written, for the error.
        cure: Advice for the user.

    Raises:
        WriteError: The system reports an error, directly or through safetensors.
    """
    try:
        yield
    except WriteError as error:  # from a nested call
        raise WriteError(what, error.reason, cure) from error
    except (OSError, SafetensorError) as error:
        raise WriteError(what, getattr(error, "strerror", None) or str(error), cure) from error


@contextmanager
def writing_folder(folder: str | os.PathLike) -> Generator[Path]:
    """Context manager with an empty temporary folder, whose files move to the target folder at the end, or not at all.

    A new or empty target folder is replaced atomically. If it contains files, they are replaced one by one.

    Args:
        folder: Target folder.

    Raises:
        WriteError: The folder can't be written.
    """
    folder = Path(folder)
    with writing(folder):
        unfinished = folder.absolute().with_name(f".{uuid4().hex}.tmp")
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            with suppress(OSError):  # it doesn't exist, or contains files
                folder.rmdir()
            if not folder.exists():
                os.rename(unfinished, folder)
                return
            for file in [file for file in unfinished.rglob("*") if file.is_file()]:
                place = folder / file.relative_to(unfinished)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def alone_in(folder: str | os.PathLike, cure: str = "Wait for its end, or name another folder.") -> Generator[None]:
    """Context manager that locks a folder against other runs; the lock of a killed run is free.

    Args:
        folder: The folder to lock; created if needed.
        cure: Advice for the user.

    Raises:
        ValueError: Another run, in any process or thread, has locked the folder.
    """
    folder = Path(folder).resolve()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, is_singleton=True)  # a thread may lock a folder again that it has locked
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"Another run is going on in {folder} (it holds {LOCK_FILE}). {cure}") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # the last holder removes the file; waiting processes reopen it
            with suppress(OSError):  # Windows can't delete open files
                (folder / LOCK_FILE).unlink()
        lock.release()


def read_json_object(file: str | os.PathLike, what: str, cure: str) -> dict[str, Any]:
    """Read a JSON file that must contain an object.

    Args:
        file: The file.
        what: What it should be, for the error.
        cure: Advice for the user.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {what} must be JSON ({error}). {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: {what} must be a JSON object, got {type(content).__name__}. {cure}")
    return content


def sha256_of(file: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_json_lines(
    file: str | os.PathLike, check: Callable[[dict[str, Any]], object], may_be_cut: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """The readable lines of a file of JSON objects, and the others, such as ``line 3 of 11 (no JSON)``.

    Args:
        file: A file with one JSON object per line; empty lines are ignored.
        check: Raises ValueError for an object that is not one of this file.
        may_be_cut: Whether an unreadable last line is left out silently: a kill cuts what is being appended.
    """
    lines, faults = [], []
    texts = [text for text in Path(file).read_bytes().split(b"\n") if text.strip()]
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode("utf-8"))
            if not isinstance(line, dict):
                raise ValueError(f"it must be a JSON object, got {type(line).__name__}")
            check(line)
            lines.append(line)
        except (ValueError, RecursionError) as error:
            if not (may_be_cut and number == len(texts)):
                faults.append(f"line {number} of {len(texts)} ({error})")
    return lines, faults


__all__ = [
    "WriteError",
    "alone_in",
    "read_json_lines",
    "read_json_object",
    "sha256_of",
    "write_whole",
    "writing",
    "writing_folder",
]
