"""Errors for names on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError


@contextmanager
def naming_missing(*names: str | Path | None, kind: str = "model") -> Generator[None]:
    """Context manager for loading; its error names what is neither cached nor reachable, which the libraries omit.

    Args:
        *names: Folders or hub ids that are loaded; other values are ignored.
        kind: What the names are: ``"model"`` or ``"dataset"``.

    Raises:
        FileNotFoundError: One of the names is not in the cache, and the hub can't be reached.
    """
    try:
        yield
    except OSError as error:
        missing = [str(name) for name in names if name is not None and not _is_here(str(name), kind)]
        if not missing or not _is_out_of_reach(error):
            raise
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise FileNotFoundError(
            f"{' and '.join(missing)} can't be loaded: there is no such folder, no such {kind} in the cache, and "
            f"{reason}. Check the name, or download the {kind} first."
        ) from error


def _is_out_of_reach(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, LocalEntryNotFoundError | ConnectionError):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_here(name: str, kind: str) -> bool:
    """Whether a name is a file or folder, or something of it is in the cache."""
    if Path(name).exists() or name.count("/") != 1:
        return True
    try:
        snapshot_download(name, repo_type=kind, local_files_only=True)
    except (OSError, ValueError):  # not cached, or no valid name
        return False
    return True
