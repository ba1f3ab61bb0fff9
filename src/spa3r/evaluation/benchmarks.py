"""Benchmarks, their questions and their frames: VSI-Bench as released, and rooms.

benchmark = VsiBench("VSI-Bench", subset="debiased")
numbers, frames = benchmark.frames("scannet/scene0050_00", num_frames=32)
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import tempfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import PIL.Image

from spa3r.checks import check_count, check_types, is_count, is_of_type, shorten
from spa3r.hub import naming_missing
from spa3r.media.files import exists, inside, read_text, shortened
from spa3r.media.videos import FrameChoice, check_frames, sample_numbered_frames
from spa3r.rooms.instructions import FIRST_TEST_SEED, RoomQuestions
from spa3r.rooms.walk import walk_steps
from spa3r.vsi_bench.format import make_prompt
from spa3r.vsi_bench.scoring import score_prediction

LARGEST_PICTURE = 4096
"""Maximum side of a room's pictures in pixels: all pictures of a room are kept."""

Row = dict[str, Any]
Frames = tuple[list[int], list[PIL.Image.Image]]
Subset = Literal["full", "debiased", "pruned"]
"""All questions of VSI-Bench; those that remain where text alone doesn't help (arXiv 2511.04655); the rest."""


class Benchmark(ABC):
    """Questions in VSI-Bench's row format, and the frames they refer to.

    Attributes:
        rows: The questions, in order: ``id``, ``dataset``, ``scene_name``, ``question_type``, ``question``,
            ``options``, ``ground_truth``, and any other fields of the source.
        about: ``name`` and the arguments that recreate the benchmark, ready for JSON: see
            :func:`open_benchmark`.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any], source: str) -> None:
        self.rows: list[Row] = [{"id": number} | dict(row) for number, row in enumerate(rows)]
        self.about = dict(about)
        _check_rows(self.rows, source)

    @property
    def scenes(self) -> dict[str, list[Row]]:
        """The questions of every scene, by :func:`scene_of`."""
        scenes: dict[str, list[Row]] = {}
        for row in self.rows:
            scenes.setdefault(scene_of(row), []).append(row)
        return scenes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    def missing(self) -> dict[str, str]:
        """Scenes whose frames are missing, as far as can be told without reading them, and why."""
        return {}

    @abstractmethod
    def frames(self, scene: str, num_frames: int) -> Frames:
        """Frames of a scene, and their numbers; evenly spaced ones include the first and the last. Thread-safe.

        Raises:
            ValueError: The frames can't be read.
        """


def scene_of(row: Mapping[str, Any]) -> str:
    """The scene of a row: ``<dataset>/<scene_name>``."""
    return f"{row['dataset']}/{row['scene_name']}"


class VsiBench(Benchmark):
    """VSI-Bench (arXiv 2412.14171) in its released layout.

    Args:
        data: A folder, an annotation file (``.parquet`` or ``.jsonl``) in one, or the id of a data set on the hub, such
            as ``nyu-visionx/VSI-Bench``. The videos, ``<dataset>/<scene_name>.mp4``, are next to the annotations, or in
            archives, ``<dataset>.zip``, which need not be unpacked. The annotations of a folder are ``test.parquet``,
            else ``test.jsonl``, else ``test-*.parquet``, else both parts, ``test_debiased.parquet`` and
            ``test_pruned.parquet``.
        subset: ``"full"``; ``"debiased"`` or ``"pruned"``: ``test_<subset>.parquet``, or as given by the rows'
            ``pruned`` or by ``pruned_ids.txt``.
        revision: Revision of a data set on the hub.
        frames: How the frames of a video are chosen: ``"uniform"`` as in the official evaluation, or ``"coverage"``
            (:class:`~spa3r.media.videos.FrameSampling`).

    Raises:
        FileNotFoundError: There are no annotations.
        ValueError: `frames` is unknown, a row can't be asked or scored, ids repeat, or nothing tells which rows are
            pruned.
    """

    def __init__(
        self,
        data: str | Path,
        subset: Subset = "full",
        revision: str | None = None,
        frames: FrameChoice = "uniform",
    ) -> None:
        check_frames(frames)
        if subset not in get_args(Subset):
            raise ValueError(f"`subset` must be one of {', '.join(get_args(Subset))}, got {subset!r}.")
        path, revision = _fetched(data, revision)
        self.root = path if path.is_dir() else path.parent
        rows = _rows_of_folder(path, subset) if path.is_dir() else _of_subset(_read_rows(path), subset, self.root)
        about = {"name": "vsi-bench", "data": str(data if revision else path.absolute()), "subset": subset}
        about |= {} if revision is None else {"revision": revision}
        self.choice: FrameChoice = frames
        super().__init__(rows, about | ({} if frames == "uniform" else {"frames": frames}), str(path))

    def missing(self) -> dict[str, str]:
        """As :meth:`Benchmark.missing`: videos that don't exist."""
        found = {}
        for scene in self.scenes:
            try:
                with self._video(scene, unpack=False):
                    pass
            except ValueError as error:
                found[scene] = str(error)
        return found

    def frames(self, scene: str, num_frames: int) -> Frames:
        """As :meth:`Benchmark.frames`. A video that ends before its declared number of frames is rejected."""
        with self._video(scene) as video:
            return sample_numbered_frames(video, num_frames, whole=True, frames=self.choice)

    @contextmanager
    def _video(self, scene: str, unpack: bool = True) -> Generator[Path]:
        """The file of a video; a file from an archive exists only inside the context."""
        video = inside(self.root, f"{scene}.mp4", "A scene")
        archive = self.root / f"{scene.partition('/')[0]}.zip"
        if exists(video) or not exists(archive):
            if not exists(video):
                raise ValueError(
                    f"The video {shortened(str(video), 1000)} doesn't exist, nor an archive "
                    f"{shortened(str(archive), 1000)}. Fetch it."
                )
            yield video
            return
        try:
            with zipfile.ZipFile(archive) as content, tempfile.TemporaryDirectory(prefix="spa3r-") as folder:
                names = set(content.namelist())
                name = next((name for name in (f"{scene}.mp4", video.name) if name in names), None)
                if name is None:
                    raise ValueError(f"The archive {archive} holds no {scene}.mp4. Fetch it again.")
                place = Path(folder) / video.name
                if unpack:
                    with content.open(name) as packed, open(place, "wb") as file:
                        shutil.copyfileobj(packed, file)
                yield place
        # Python's readers raise these for truncated, modified or encrypted archives and unknown compression methods.
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
            raise ValueError(f"The archive {archive} can't be read ({error}). Fetch it again.") from error


class RoomsBenchmark(Benchmark):
    """Questions of VSI-Bench's types about rooms that are never used for training.

    See :class:`~spa3r.rooms.instructions.RoomQuestions`.

    Args:
        num_rooms: Number of rooms; each has questions of every type that it allows.
        level: Level of the rooms, 0..3.
        frames: Pictures of each room on which the questions are based; the model sees some or all of them.
        seed: Seed of the questions.
        first_seed: Seed of the first room, at least :data:`~spa3r.rooms.instructions.FIRST_TEST_SEED`.
        size: Height and width of the pictures in pixels.

    Raises:
        ValueError: `first_seed` belongs to a training room, or another argument is out of range.
    """

    def __init__(
        self,
        num_rooms: int = 30,
        level: int = 0,
        frames: int = 8,
        seed: int = 0,
        first_seed: int = FIRST_TEST_SEED,
        size: int = 112,
    ) -> None:
        check_count("size", size, 1, LARGEST_PICTURE)
        if check_count("first_seed", first_seed, 0) < FIRST_TEST_SEED:
            raise ValueError(
                f"`first_seed` must be at least {FIRST_TEST_SEED}, got {first_seed}: the rooms before are for training."
            )
        self.questions = RoomQuestions(first_seed, num_rooms, level=level, frames=frames, seed=seed, size=size)
        self._lock = threading.Lock()  # the questions cache rooms, and that cache is not thread-safe
        # A question that its room does not allow is replaced by another one; each question is asked once.
        rows = {row["id"]: row for row in map(self.questions.row, range(len(self.questions)))}
        about = {"name": "rooms", "num_rooms": num_rooms, "level": level, "frames": frames, "seed": seed}
        super().__init__(rows.values(), about | {"first_seed": first_seed, "size": size}, "rooms")

    def frames(self, scene: str, num_frames: int) -> Frames:
        """As :meth:`Benchmark.frames`; the numbers are steps of the walk."""
        with self._lock:
            pictures = self.questions.pictures(int(scene.rpartition("/")[2]))
        if num_frames != len(pictures):
            raise ValueError(
                f"`num_frames` must be {len(pictures)}, the pictures of a room that its questions are about, got "
                f"{num_frames}. Make the benchmark with `frames` = {num_frames}."
            )
        return walk_steps(num_frames).tolist(), pictures


def open_benchmark(about: Mapping[str, Any]) -> Benchmark:
    """Recreate the benchmark of a run.

    Args:
        about: Its :attr:`Benchmark.about`.
    """
    makers: dict[str, Callable[..., Benchmark]] = {"vsi-bench": VsiBench, "rooms": RoomsBenchmark}
    arguments = dict(about)
    return makers[arguments.pop("name")](**arguments)


# Rows of VSI-Bench


def _fetched(data: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of the data, and the revision of a data set on the hub."""
    check_types({"data": data, "revision": revision}, {"data": str | Path, "revision": str | None})
    path = Path(data).expanduser()
    is_hub_id = isinstance(data, str) and data.count("/") == 1 and data[0] not in "./~" and not exists(path)
    if not is_hub_id:
        if not exists(path):
            raise FileNotFoundError(
                f"`data` must be a folder in VSI-Bench's layout, its annotations or a hub id, got {str(data)!r}, which "
                "doesn't exist. Check the path."
            )
        return path, None
    from huggingface_hub import snapshot_download

    with naming_missing(data, kind="dataset"):
        folder = Path(snapshot_download(data, repo_type="dataset", revision=revision))
    # A snapshot's folder is named after its commit.
    return folder, folder.name


def _rows_of_folder(folder: Path, subset: Subset) -> list[Row]:
    own = folder / f"test_{subset}.parquet"
    if own.is_file():
        return _read_rows(own)
    parts = [folder / f"test_{part}.parquet" for part in ("debiased", "pruned")]
    choices = [[folder / "test.parquet"], [folder / "test.jsonl"], sorted(folder.glob("test-*.parquet")), parts]
    files = next((files for files in choices if files and all(file.is_file() for file in files)), None)
    if files is None:
        raise FileNotFoundError(
            f"`data` must hold test.parquet, test.jsonl, test-*.parquet or test_debiased.parquet and "
            f"test_pruned.parquet, got the folder {folder} with none of them. Fetch VSI-Bench again."
        )
    rows = [row for file in files for row in _read_rows(file)]
    if files is parts and all(is_count(row.get("id"), 0) for row in rows):
        rows.sort(key=lambda row: row["id"])
    return _of_subset(rows, subset, folder)


def _read_rows(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return [
            _read_row(line, f"{file}, line {n}")
            for n, line in enumerate(read_text(file).split("\n"), 1)
            if line.strip()
        ]
    if file.suffix != ".parquet":
        raise ValueError(f"`data` must be a .parquet or .jsonl file where it is a file, got {file}.")
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Parquet files need pyarrow, which is not installed. pip install 'spa3r[eval]', or give the test.jsonl."
        ) from error
    try:
        return parquet.read_table(file).to_pylist()
    except (ValueError, OSError) as error:  # includes the errors of pyarrow
        raise ValueError(f"{file} can't be read as Parquet ({error}). Fetch it again.") from error


def _read_row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON ({error}). Repair the file.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}. Repair the file.")
    return row


def _of_subset(rows: list[Row], subset: Subset, folder: Path) -> list[Row]:
    if subset == "full":
        return rows
    if absent := next((row for row in rows if not _is_id(row.get("id"))), None):
        raise ValueError(
            f"`id` must be a number or a text to tell which rows are pruned, got {shorten(absent.get('id'))} in "
            f"{folder}. Fetch VSI-Bench again."
        )
    if all("pruned" in row for row in rows):
        pruned = {row["id"] for row in rows if row["pruned"]}
    elif (folder / "pruned_ids.txt").is_file():
        file = folder / "pruned_ids.txt"
        try:
            pruned = {int(line) for line in read_text(file).split()}
        except ValueError as error:
            raise ValueError(f"{file} must hold the ids of rows, one a line ({error}). Fetch it again.") from error
    else:
        raise ValueError(
            f'`subset` can be "{subset}" where test_{subset}.parquet, pruned_ids.txt or the column `pruned` says which '
            f'rows are pruned; {folder} has none of them. Fetch VSI-Bench again, or take subset="full".'
        )
    return [row for row in rows if (row["id"] in pruned) == (subset == "pruned")]


_TYPES = {"dataset": str | int, "scene_name": str | int, "options": list | None, "ground_truth": str | float}


def _is_id(value: Any) -> bool:
    return is_of_type(value, int | float | str)


def _check_rows(rows: list[Row], source: str) -> None:
    """Check everything that asking and scoring rely on, before hours of answering."""
    if not rows:
        raise ValueError(f"A benchmark must hold at least one question, and {source} holds none.")
    for number, row in enumerate(rows):
        if not _is_id(row["id"]):
            raise ValueError(f"`id` must be a number or a text, got {shorten(row['id'])} in row {number} of {source}.")
        needed = ("dataset", "scene_name", "question_type", "question", "ground_truth")
        if absent := [key for key in needed if row.get(key) is None]:
            raise ValueError(f"Every row must have {', '.join(needed)}; row {row['id']} of {source} lacks {absent}.")
        try:
            check_types(row, _TYPES)
            for key in ("dataset", "scene_name"):
                inside(".", str(row[key]), f"`{key}`")
            make_prompt(row)
            score_prediction(row, "")
        except ValueError as error:
            raise ValueError(f"Row {row['id']} of {source}: {error}") from error
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError(f"`id` must be of one row only, and {source} has {len(rows)} rows with repeated ids.")
