"""Files that appear whole or not at all, and folders that one run has to itself. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK_FILE = ".lock"
"""In the folder of a run while it goes on. What counts is whether a process holds it: a killed one holds nothing."""


def write_whole(file: str | os.PathLike, content: str | bytes) -> None:
    """Write a file that appears at once, with everything in it.

    Args:
        file: Its folder is made if need be.
        content: Text is written as UTF-8.

    Raises:
        WriteError: It can't be written. What was there before is still there, and nothing half-written is left.
    """
    file = Path(file)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{uuid4().hex}.tmp")  # other threads and machines may write the same file
        try:
            with open(unfinished, "wb") as opened:
                opened.write(content.encode("utf-8") if isinstance(content, str) else content)
                opened.flush()
                os.fsync(opened.fileno())  # else a loss of power may leave an empty file of this name
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


class WriteError(OSError):
    """Something can't be written. Its message says what, why, and what to do."""

    def __init__(self, what: str | os.PathLike, reason: str, cure: str):
        super().__init__(f"{what} can't be written: {reason.rstrip('.')}. {cure}")
        self.reason = reason


@contextmanager
def writing(what: str | os.PathLike, cure: str = "Free space, or choose another place.") -> Iterator[None]:
    """Whatever goes wrong while something is written is an error that names it.

    Args:
        what: What is written, for the error.
        cure: What the user can do.

    Raises:
        WriteError: The system refused, or safetensors passes on that it did.
    """
    try:
        yield
    except WriteError as error:  # of a part of it
        raise WriteError(what, error.reason, cure) from error
    except (OSError, SafetensorError) as error:
        raise WriteError(what, getattr(error, "strerror", None) or str(error), cure) from error


@contextmanager
def writing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder beside another one; what is written there gets into the other one at the end, or nothing does.

    A new or empty folder appears at once. Files of one that holds files are replaced one by one.

    Args:
        folder: Where the files go.

    Raises:
        WriteError: The system refused.
    """
    folder = Path(folder)
    with writing(folder):
        unfinished = folder.absolute().with_name(f".{uuid4().hex}.tmp")
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            with suppress(OSError):  # it doesn't exist, or holds files
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
def alone_in(folder: str | os.PathLike, cure: str = "Wait for its end, or name another folder.") -> Iterator[None]:
    """Keep a second run out of a folder for as long as this lasts; the lock of a killed run is free.

    Args:
        folder: It is made if need be.
        cure: What the user can do.

    Raises:
        ValueError: Another run, of any process or thread, is going on there.
    """
    folder = Path(folder).resolve()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, is_singleton=True)  # a thread may ask again for what it holds
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"Another run is going on in {folder} (it holds {LOCK_FILE}). {cure}") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # its last holder leaves no file; who opened that one meanwhile, opens another
            with suppress(OSError):  # Windows deletes no open file
                (folder / LOCK_FILE).unlink()
        lock.release()


def read_json_object(file: str | os.PathLike, what: str, cure: str) -> dict[str, Any]:
    """The content of a JSON file that must be an object.

    Args:
        file: The file.
        what: What it should be, for the error.
        cure: What the user can do.

    Raises:
        ValueError: It is damaged.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {what} must be JSON ({error}). {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: {what} must be a JSON object, got {type(content).__name__}. {cure}")
    return content


__all__ = ["WriteError", "alone_in", "read_json_object", "write_whole", "writing", "writing_folder"]
