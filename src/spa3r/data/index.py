"""The index of a source on disk: its scenes and their pictures.

The index is a memory-mapped Arrow file, so a million pictures need hardly any memory, and worker processes share it.
It is cached and written atomically. When it is opened, whatever changed on disk is listed again.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

_VERSION = 1
_CHUNK = 256  # scenes that are listed and written at a time
_RACY = 2_000_000_000  # nanoseconds: a folder that changed just now may change again within the resolution of the clock
_DIGITS = re.compile(r"\d+")

Entry = tuple[str, str]
"""The name of a scene, and the folder or file that it is listed from."""

Scan = Callable[[str], tuple[list[str], int]]
"""Maps the path of an entry to the names of its pictures and its number of frames."""


def natural_key(name: str) -> str:
    """Sort key that orders numbers in names by value: 2.jpg before 10.jpg."""
    return f"{_DIGITS.sub(lambda digits: digits[0].zfill(20), name)}\0{name}"


def arrow() -> Any:
    """Import PyArrow, which the extra ``train`` installs."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Scenes on disk are indexed with pyarrow, which is not installed. pip install 'spa3r[train]'."
        ) from error
    return pyarrow


def default_cache() -> Path:
    """The user's cache folder for indices."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spa3r" / "indices"


class SceneIndex:
    """Scenes by number: name, path, number of frames, and names of the pictures. Created by :meth:`build`."""

    def __init__(self, file: str):
        pa = arrow()
        self.file = file
        self.table = pa.ipc.open_file(pa.memory_map(file)).read_all()
        metadata = self.table.schema.metadata or {}
        if metadata.get(b"version") != str(_VERSION).encode():
            raise ValueError(f"The index {file} is of another version of spa3r. Delete it.")
        self.digest = metadata[b"digest"].decode()
        self.counts = self.table["count"].to_numpy()

    def __len__(self) -> int:
        return len(self.counts)

    def name(self, row: int) -> str:
        """A scene's name."""
        return self.table["name"][row].as_py()

    def path(self, row: int) -> str:
        """The folder or file that a scene was listed from."""
        return self.table["path"][row].as_py()

    def picture(self, row: int, frame: int) -> str:
        """The name of a picture."""
        return self.table["pictures"][row].values[frame].as_py()

    def pictures(self, row: int) -> list[str]:
        """The names of all pictures of a scene."""
        return self.table["pictures"][row].as_py()

    def __reduce__(self) -> tuple[Callable[..., SceneIndex], tuple[str, str]]:
        return _reopen, (self.file, self.digest)

    @classmethod
    def build(
        cls,
        key: Sequence[str | Path],
        entries: Sequence[Entry],
        scan: Scan,
        cache_dir: str | Path | None = None,
        threads: int | None = None,
    ) -> SceneIndex:
        """Return the index of the scenes: the cached one if nothing changed, otherwise a new one, for which only
        changed entries are listed again.

        Args:
            key: What the index depends on besides the entries; it identifies the cached file.
            entries: The scenes in order.
            scan: Lists an entry.
            cache_dir: Folder of the indices; None: the user's cache.
            threads: How many entries are listed at a time; None: based on the number of cores.
        """
        threads = threads or min(32, 4 * (os.cpu_count() or 1))
        file = _cache_folder(cache_dir) / f"{_digest(key)[:24]}.arrow"
        old = _open_cached(str(file))
        started = time.time_ns()
        with ThreadPoolExecutor(threads) as pool:
            stamps = [
                stamp
                for chunk in _in_chunks(entries)
                for stamp in pool.map(_time_of_change, [path for _, path in chunk])
            ]
            rows = _known_rows(old, entries, stamps)
            if old is not None and len(old) == len(entries) and rows == list(range(len(entries))):
                return old
            chunks = _chunks(entries, stamps, rows, old, scan, pool, started)
            _write(chunks, _digest(part for entry in zip(entries, stamps) for part in entry), file)
        return cls(str(file))


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def _in_chunks(items: Sequence) -> Iterator[Sequence]:
    """Chunks small enough that the results of threads don't pile up."""
    return (items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK))


def _time_of_change(path: str) -> int:
    """Modification time of a folder or file in nanoseconds; 0 if it is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _cache_folder(cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = Path(tempfile.gettempdir()) / f"spa3r-{os.getuid() if hasattr(os, 'getuid') else 'user'}" / "indices"
        warnings.warn(
            f"The index can't be kept in {folder} ({error.strerror}); it goes to {other}. Give a `cache_dir` that can "
            "be written to.",
            stacklevel=4,
        )
        other.mkdir(parents=True, exist_ok=True, mode=0o700)
        return other


def _open_cached(file: str) -> SceneIndex | None:
    if not os.path.exists(file):
        return None
    try:
        return SceneIndex(file)
    except (OSError, ValueError, KeyError):  # damaged, or from another version: it is only a cache
        return None


def _reopen(file: str, digest: str) -> SceneIndex:
    """Open the same index in another process."""
    index = SceneIndex(file)
    if index.digest != digest:
        raise RuntimeError(
            f"The index {file} was rebuilt while it was in use: the pictures changed on disk. Start the run again."
        )
    return index


def _known_rows(old: SceneIndex | None, entries: Sequence[Entry], stamps: Sequence[int]) -> list[int | None]:
    """For every entry, its row in the old index if it didn't change."""
    if old is None:
        return [None] * len(entries)
    paths, known = old.table["path"].to_pylist(), old.table["stamp"].to_numpy()
    row_of = {path: row for row, path in enumerate(paths)}
    rows = (row_of.get(path) for _, path in entries)
    return [
        row if row is not None and known[row] == stamp and old.name(row) == name else None
        for row, stamp, (name, _) in zip(rows, stamps, entries)
    ]


def _chunks(
    entries: Sequence[Entry],
    stamps: Sequence[int],
    rows: Sequence[int | None],
    old: SceneIndex | None,
    scan: Scan,
    pool: ThreadPoolExecutor,
    started: int,
) -> Iterator[dict[str, list]]:
    """Columns of the index, chunk by chunk."""

    def listed(place: int) -> tuple[list[str], int]:
        row = rows[place]
        if row is None or old is None:
            return scan(entries[place][1])
        return old.pictures(row), int(old.counts[row])

    with tqdm(total=len(entries), desc="Indexing", unit=" scenes", delay=2) as progress:
        for places in _in_chunks(range(len(entries))):
            found = list(pool.map(listed, places))
            yield {
                "name": [entries[place][0] for place in places],
                "path": [entries[place][1] for place in places],
                # Entries that changed just now, and empty ones, are listed again next time.
                "stamp": [
                    stamps[place] if found_count and stamps[place] < started - _RACY else -1
                    for place, (_, found_count) in zip(places, found)
                ],
                "count": [count for _, count in found],
                "pictures": [pictures for pictures, _ in found],
            }
            progress.update(len(places))


def _write(chunks: Iterator[dict[str, list]], digest: str, file: Path) -> None:
    """Write to a temporary name first, so that the file appears atomically."""
    pa = arrow()
    columns = [("name", pa.string()), ("path", pa.string()), ("stamp", pa.int64()), ("count", pa.int64())]
    schema = pa.schema(
        [*columns, ("pictures", pa.list_(pa.string()))], metadata={"version": str(_VERSION), "digest": digest}
    )
    handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}.")
    os.close(handle)
    try:
        with pa.ipc.new_file(unfinished, schema) as writer:
            for chunk in chunks:
                writer.write_batch(pa.RecordBatch.from_pydict(chunk, schema))
        os.replace(unfinished, file)
    except BaseException:
        os.unlink(unfinished)
        raise
