"""Instruction data: rows of questions, answers and media in the released formats, read as conversations.

All formats are converted to one: ``messages`` in Hugging Face's chat format, in which a video is a list of
frames. Annotations stay on disk, memory-mapped; media are read when a row is requested, and then closed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from torch.utils.data import Dataset, IterableDataset

from spa3r.checks import is_number
from spa3r.data.dataset_scenes import decode_picture, open_dataset, require_datasets
from spa3r.data.index import natural_key
from spa3r.media.files import PICTURES, describe, exists, local_path, other_encoding, shortened, text_encoding
from spa3r.media.images import is_path, to_rgb
from spa3r.media.videos import default_num_frames, sample_frames, uniform_indices
from spa3r.models.spa3_vlm.videos import VIDEO_OPTIONS

if TYPE_CHECKING:
    import datasets

Example = dict[str, Any]
"""``messages``, and the keys for reports: ``source``, ``row``, ``question_type``, ``skipped``."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
"""Columns that hold media, and their kinds; in this order if a row has several."""

PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
RAW = "json"
"""The only column of annotations read from JSON: the text of a row, whatever its keys."""

_OF_DATASETS = ("state.json", "dataset_dict.json", "dataset_infos.json", "dataset_info.json", "metadata.jsonl")
_CHUNK = 1 << 20  # characters
_TRIES = 1000  # consecutive broken rows
_WORDS_TO_TOKENS, _TOKENS_PER_PICTURE = 1.5, 256  # for lengths, which need only be roughly comparable


class RowError(ValueError):
    """A row that can't be used."""

    def __init__(self, reason: str, media: str = ""):
        super().__init__(reason)
        self.media = media


class RowReader:
    """Converts rows of any known format to examples.

    Args:
        media_root: Root of the rows' relative paths, which must stay inside it; None: `folder`.
        name: Name of the source in reports.
        folder: The annotations' folder, the root of relative paths without `media_root`.
        frames: Lowest and highest number of frames of a video, if its length decides.
        seconds_per_frame: Seconds of a video between two frames, if its length decides.
        num_frames: Frames of every video; None: ``clamp(round(seconds / seconds_per_frame), *frames)``. For a folder
            of frames, None means all of them, at most ``frames[1]``.
    """

    def __init__(
        self,
        media_root: str | Path | None,
        name: str,
        folder: Path | None = None,
        frames: Sequence[int] = (4, 8),
        seconds_per_frame: float = 2.0,
        num_frames: int | None = None,
    ):
        lowest, highest = frames
        if not 1 <= lowest <= highest:
            raise ValueError(f"`frames` must be the fewest and the most frames, at least 1, got {list(frames)}.")
        if not seconds_per_frame > 0:
            raise ValueError(f"`seconds_per_frame` must be above 0, got {seconds_per_frame}.")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}. Leave it out for a drawn number.")
        self.media_root = None if media_root is None else Path(media_root)
        self.folder = folder
        self.name, self.frames, self.num_frames = name, (lowest, highest), num_frames
        self.seconds_per_frame = seconds_per_frame

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """Convert a row to an example.

        Raises:
            RowError: The format is unknown, or a medium is missing or broken.
        """
        try:
            return self._read(row, index)
        except (RowError, MemoryError):
            raise
        except Exception as error:  # real rows come in every form
            raise RowError(f"it is of no known format ({type(error).__name__}: {error})") from error

    def _read(self, row: Mapping[str, Any], index: int) -> Example:
        row = _as_written(row)
        turns = _turns_of(row)
        media = [
            (kind, item)
            for key, kind in MEDIA_KEYS.items()
            for item in _as_items(row.get(key), kind)
            if item is not None
        ]
        return {
            "messages": self._messages(turns, media),
            "source": self.name,
            "row": str(row["id"]) if row.get("id") is not None else str(index),
            "question_type": row.get("question_type"),
            "skipped": [],
        }

    def _messages(self, turns: list[tuple[str, list[Any]]], media: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        places = sum(piece is None for _, pieces in turns for piece in pieces)
        groups = _groups(places, media)
        if not places and groups:  # pictures without a placeholder come first
            first = next((pieces for role, pieces in turns if role == "user"), None)
            if first is None:
                raise RowError("no message of a user, and media that belong to one")
            first.insert(0, None)
        remaining = iter(groups)
        messages = []
        for role, pieces in turns:
            content: list[dict[str, Any]] = []
            for piece in pieces:
                if isinstance(piece, str):
                    content.append({"type": "text", "text": piece})
                    continue
                group = next(remaining, ()) if piece is None else [piece]
                for kind, item in group:
                    content += [{"type": "image", "image": picture} for picture in self._pictures(kind, item)]
            messages.append({"role": role, "content": content})
        return messages

    def _pictures(self, kind: str, item: Any) -> list[Any]:
        """The pictures of one medium."""
        name = _media_name(item)
        try:
            if kind == "image":
                return [self._picture(item)]
            if isinstance(item, list | tuple):  # single frames
                frames = [self._picture(frame) for frame in self._some(list(item))]
            elif isinstance(item, Mapping) and item.get("bytes") is not None:  # a video inside Parquet
                frames = sample_frames(item["bytes"], self.num_frames or self._frames_for)
            else:
                path = self._path(item["path"] if isinstance(item, Mapping) else item)
                if path.is_dir():
                    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURES]
                    files.sort(key=lambda file: natural_key(file.name))
                    frames = [to_rgb(file) for file in self._some(files)]
                else:
                    frames = sample_frames(path, self.num_frames or self._frames_for)
        except (ValueError, OSError) as error:
            raise RowError(str(error), name) from error
        if not frames:
            raise RowError("the folder holds no pictures", name)
        return frames

    def _frames_for(self, seconds: float) -> int:
        return default_num_frames(seconds, *self.frames, self.seconds_per_frame)

    def _some(self, frames: list[Any]) -> list[Any]:
        """Uniformly sampled frames, including the first and the last."""
        wanted = self.num_frames or min(len(frames), self.frames[1])
        return [frames[index] for index in uniform_indices(len(frames), wanted)] if frames else []

    def _picture(self, item: Any) -> PIL.Image.Image:
        """A picture as stored by Hugging Face or in the row itself."""
        if isinstance(item, Mapping) and item.get("bytes") is None:
            if item.get("path") is None:
                raise ValueError("A picture of the row has neither bytes nor a path.")
            item = item["path"]
        holds_itself = isinstance(item, str) and not is_path(item) and not item[:4].lower() == "http"
        return decode_picture(self._path(item) if isinstance(item, str | Path) and not holds_itself else item)

    def _path(self, item: Any) -> Path:
        if not isinstance(item, str | Path):
            raise ValueError(f"A picture or video of a row must be a path, got {type(item).__name__}.")
        path, root = local_path(item), self.folder if self.media_root is None else self.media_root
        path = path if root is None else root / path
        if self.media_root is not None and not _is_below(path, self.media_root):
            raise ValueError(
                f"The path {shortened(str(item))!r} of a row leads out of `media_root` {self.media_root}. "
                "Correct the row, or give the folder that holds all media."
            )
        if not exists(path):
            raise FileNotFoundError(f"{describe(path)} doesn't exist. Check `media_root`.")
        return path


class InstructionDataset(Dataset):
    """Instruction rows with random access.

    A broken row (a medium is missing or can't be read, or the format is unknown) is replaced by the next
    valid row, and named in the example's ``skipped``; so lengths and orders never depend on it.

    Args:
        annotations: A file (``.json``, ``.jsonl``, ``.parquet``); a folder with one JSON file next to its media; a
            folder in the hub's layout or a hub id, as for ``datasets.load_dataset``; or a ``datasets.Dataset``.
        media_root: Root of the rows' relative paths, which must stay inside it; None: the folder of the
            annotations, or wherever the paths lead.
        name: Name of the source in reports; None: the name of the file or data set.
        split: Split of a hub data set.
        frames: Lowest and highest number of frames of a video, if its length decides.
        seconds_per_frame: Seconds of a video per frame, if its length decides.
        num_frames: Frames of every video; None: by its length, ``clamp(round(seconds / seconds_per_frame), *frames)``.

    Attributes:
        lengths: An array of approximate token counts of the rows, for grouping by length; computed once, at the first
            use.

    Raises:
        FileNotFoundError: The file doesn't exist.
        ValueError: There are no rows, or an argument is out of range.
    """

    def __init__(
        self,
        annotations: str | Path | datasets.Dataset,
        media_root: str | Path | None = None,
        *,
        name: str | None = None,
        split: str = "train",
        frames: Sequence[int] = (4, 8),
        seconds_per_frame: float = 2.0,
        num_frames: int | None = None,
    ):
        self.rows, folder, own_name = _load(annotations, split)
        self.reader = RowReader(media_root, name or own_name, folder, frames, seconds_per_frame, num_frames)
        self._lengths: np.ndarray | None = None
        if not len(self.rows):
            raise _no_rows(own_name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, the number of rows, got {index}.")
        skipped = []
        for step in range(min(len(self), _TRIES)):
            place = (index + step) % len(self)
            try:
                return self.reader.read(self.rows[place], place) | {"skipped": skipped}
            except RowError as error:
                skipped.append(_entry(self.reader.name, place, error))
        raise ValueError(
            f"None of the {len(skipped)} rows from row {index % len(self)} of {self.reader.name!r} can be used; the "
            f"first: {skipped[0]['reason']}. Check the annotations and `media_root`."
        )

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) integers."""
        if self._lengths is None:
            frames = self.reader.num_frames or self.reader.frames[1]  # the length of a video is not looked up for this
            self._lengths = np.fromiter((_length(row, frames) for row in self.rows), np.int32, len(self.rows))
        return self._lengths


class InstructionMixture(Dataset):
    """A weighted mixture of several data sets.

    The row of an index is a pure function of the seed and the index. Each data set is repeated in its own
    shuffled order, and its weight determines how often it is drawn.

    Args:
        parts: Data sets by name.
        weights: Relative frequency of each part by name; None: the sizes of the parts.
        num_rows: Rows of the mixture; None: the total number of rows of all parts.
        seed: Seed of the draw.

    Raises:
        ValueError: There are no parts, or the weights don't match the parts.
    """

    def __init__(
        self,
        parts: Mapping[str, Dataset],
        weights: Mapping[str, float] | None = None,
        num_rows: int | None = None,
        seed: int = 0,
    ):
        if not parts:
            raise ValueError("`parts` must hold at least one data set, got none.")
        self.parts: dict[str, Any] = dict(parts)
        self.names = list(parts)
        sizes = np.array([len(part) for part in self.parts.values()])
        weights = dict(zip(self.names, sizes.tolist())) if weights is None else dict(weights)
        if set(weights) != set(parts) or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise ValueError(
                f"`weights` must give each of {', '.join(self.names)} a number of at least 0, and one more than that, "
                f"got {weights}."
            )
        self.num_rows = int(sizes.sum()) if num_rows is None else num_rows
        shares = np.array([weights[name] for name in self.names], float)
        rng = np.random.default_rng([seed, 0])
        self._part = rng.choice(len(shares), self.num_rows, p=shares / shares.sum()).astype(np.uint16)
        self._row = np.empty(self.num_rows, np.int64)
        for part, size in enumerate(sizes):
            places = np.flatnonzero(self._part == part)
            rounds = -(-len(places) // size)
            orders = [np.random.default_rng([seed, 1, part, n]).permutation(size) for n in range(rounds)]
            self._row[places] = np.concatenate(orders)[: len(places)] if orders else []

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below {len(self)}, the number of rows, got {index}.")
        return self.parts[self.names[self._part[index]]][int(self._row[index])]

    @property
    def lengths(self) -> np.ndarray | None:
        """(rows,) integers; None if a part has no lengths."""
        lengths = [getattr(part, "lengths", None) for part in self.parts.values()]
        if any(one is None for one in lengths):
            return None
        return np.array([lengths[part][row] for part, row in zip(self._part, self._row)], np.int32)


class StreamedInstructions(IterableDataset):
    """Instruction rows from a stream: a file too large to index, or a data set that stays on the hub.

    Broken rows are left out and named in ``skipped`` of the next example, or of the last one.

    Args:
        annotations: As for :class:`InstructionDataset`, or a ``datasets.IterableDataset``.
        media_root: Root of the rows' relative paths, which must stay inside it; None: the folder of the
            annotations, or wherever the paths lead.
        name: Name of the source in reports; None: the name of the file or data set.
        split: Split of a hub data set.
        shuffle_buffer: Size of the buffer from which the next row is drawn, differently in every epoch; 0: the order
            of the rows.
        seed: Seed of that draw.
        frames: As for :class:`InstructionDataset`.
        seconds_per_frame: As for :class:`InstructionDataset`.
        num_frames: As for :class:`InstructionDataset`.
    """

    def __init__(
        self,
        annotations: str | Path | datasets.IterableDataset,
        media_root: str | Path | None = None,
        *,
        name: str | None = None,
        split: str = "train",
        shuffle_buffer: int = 0,
        seed: int = 0,
        frames: Sequence[int] = (4, 8),
        seconds_per_frame: float = 2.0,
        num_frames: int | None = None,
    ):
        super().__init__()
        self.rows, folder, own_name = _load(annotations, split, streaming=True)
        if shuffle_buffer:
            self.rows = self.rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.reader = RowReader(media_root, name or own_name, folder, frames, seconds_per_frame, num_frames)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order if rows are shuffled."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Example]:
        waiting: Example | None = None  # the last example reports broken rows at the end of the stream
        skipped: list[dict[str, str]] = []
        for index, row in enumerate(self.rows):
            try:
                example = self.reader.read(row, index)
            except RowError as error:
                skipped.append(_entry(self.reader.name, index, error))
                if len(skipped) == _TRIES:
                    raise self._none_usable(skipped) from error
                continue
            if waiting is not None:
                yield waiting
            waiting, skipped = example | {"skipped": skipped}, []
        if waiting is not None:
            waiting["skipped"] = waiting["skipped"] + skipped
            yield waiting
        elif skipped:
            raise self._none_usable(skipped)

    def _none_usable(self, skipped: list[dict[str, str]]) -> ValueError:
        return ValueError(
            f"{len(skipped)} rows of {self.reader.name!r} one after the other can't be used; the first: "
            f"{skipped[0]['reason']}. Check the annotations and `media_root`."
        )


# Rows


def _as_written(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the row if it was kept as text."""
    if RAW not in row or len(row) > 1:
        return row
    try:
        written = json.loads(row[RAW])
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"it is no JSON: {error}") from error
    if not isinstance(written, dict):
        raise RowError(f"a row must be a JSON object, got {type(written).__name__}")
    return written


def _turns_of(row: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    """The turns of a row: texts, None for the placeholder of a medium, (kind, medium) for an inline medium."""
    key = next((key for key in ("messages", "conversations") if row.get(key)), None)
    if key is None:
        raise RowError(f"a row must have `messages` or `conversations`, got the keys {sorted(row)}")
    turns = []
    if not isinstance(row[key], list | tuple) or not all(isinstance(message, Mapping) for message in row[key]):
        raise RowError(f"`{key}` must be a list of messages, got {str(row[key])[:50]!r}")
    for message in row[key]:
        said_by, said = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if said_by not in ROLES or said is None:
            raise RowError(
                f"a message must have a role (from) among {', '.join(ROLES)} and a content (value), got {said_by!r} "
                f"and the keys {sorted(message)}"
            )
        turns.append((ROLES[said_by], _pieces(said)))
    if not any(role == "assistant" for role, _ in turns):
        raise RowError("no message is the assistant's: there is nothing to learn")
    return turns


def _pieces(said: Any) -> list[Any]:
    if is_number(said, -math.inf):
        said = str(said)
    if isinstance(said, str):
        texts = PLACEHOLDER.split(said)
        pieces = list(chain.from_iterable((None, text) for text in texts))[1:]
        return [piece for piece in pieces if piece != ""]
    pieces = []
    for item in said if isinstance(said, list | tuple) else [said]:
        if isinstance(item, str) or is_number(item, -math.inf):
            pieces.append(str(item))
            continue
        kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        if kind == "text":
            if not (isinstance(item.get("text"), str) or is_number(item.get("text"), -math.inf)):
                raise RowError(f"a text of a content must be a text or a number, got {str(item.get('text'))[:50]!r}")
            pieces.append(str(item["text"]))
        elif kind in ("image", "video"):
            medium = next((item[key] for key in (kind, "url", "path") if item.get(key) is not None), None)
            if options := [key for key in VIDEO_OPTIONS if kind == "video" and item.get(key) is not None]:
                raise RowError(
                    f"a video's {', '.join(options)} can't be used: `num_frames`, or `frames` and `seconds_per_frame`, "
                    "of the data set say which frames are taken"
                )
            pieces.append(None if medium is None else (kind, medium))
        else:
            raise RowError(f"an item of a content must have type text, image or video, got {kind!r}")
    return pieces


def _groups(places: int, media: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Assign media to placeholders."""
    if places == len(media):
        return [[medium] for medium in media]
    if media and places <= 1:
        return [media]
    if len(media) == 1 and media[0][0] == "video":  # one placeholder per frame
        return [media]
    raise RowError(f"{places} places for media (<image> or <video>) in the text, and {len(media)} media")


def _as_items(value: Any, kind: str) -> list[Any]:
    """The media of a column: one, a list of them, or a video as a list of frames."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if not isinstance(value, list | tuple):
        return [value]
    if kind == "video" and value and not isinstance(value[0], list | tuple) and _is_picture(value[0]):
        return [value]  # single frames
    return list(value)


def _is_picture(item: Any) -> bool:
    return not isinstance(item, str) or item.lower().endswith(tuple(set(PICTURES) - {".gif"}))  # which may be animated


def _media_name(item: Any) -> str:
    if isinstance(item, str | Path):
        return describe(item)
    if isinstance(item, Mapping):
        return describe(item.get("path") or "a picture in the row")
    return f"{_media_name(item[0])} and {len(item) - 1} more" if isinstance(item, list | tuple) else "a picture"


def _is_below(path: Path, root: Path) -> bool:
    """Whether the path as written is below the root: links below the root may point anywhere, which is intended."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def _entry(source: str, place: int, error: RowError) -> dict[str, str]:
    return {"source": source, "scene": str(place), "picture": error.media, "reason": str(error)}


def _length(row: Mapping[str, Any], frames: int) -> int:
    """Approximate token count of a row: words, plus pictures by their number; 0 if the row can't be used."""
    try:
        row = _as_written(row)
        pieces = [piece for _, pieces in _turns_of(row) for piece in pieces]
    except (RowError, TypeError, RecursionError):
        return 0
    words = sum(len(piece.split()) for piece in pieces if isinstance(piece, str))
    kinds = [piece[0] for piece in pieces if isinstance(piece, tuple)]
    kinds += [kind for key, kind in MEDIA_KEYS.items() for _ in _as_items(row.get(key), kind)]
    pictures = sum(frames if kind == "video" else 1 for kind in kinds)
    return int(_WORDS_TO_TOKENS * words + _TOKENS_PER_PICTURE * pictures)


# Files


def _load(annotations: Any, split: str, streaming: bool = False) -> tuple[Any, Path | None, str]:
    """The rows, the root of their relative paths, and their name."""
    hf = require_datasets()
    if isinstance(annotations, hf.Dataset | hf.IterableDataset):
        if isinstance(annotations, hf.IterableDataset) != streaming:
            raise ValueError(
                "`annotations` that are streamed need StreamedInstructions (in a configuration: `streaming: true`), "
                f"others InstructionDataset, got a {type(annotations).__name__}."
            )
        return _undecoded(annotations), None, annotations.info.dataset_name or "instructions"
    path = Path(annotations).expanduser()
    path = _only_annotations(path, split) or path
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise FileNotFoundError(f"`annotations`: there is no file {path}. Check the path.")
        if path.suffix == ".parquet":
            rows = hf.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
            return _undecoded(rows), path.parent, path.stem
        if next(_json_rows(str(path)), None) is None:
            raise _no_rows(path.stem)
        if streaming:
            return hf.IterableDataset.from_generator(partial(_json_rows, str(path))), path.parent, path.stem
        # Part of the cache key of datasets: a changed file is read again.
        stamp = path.stat().st_mtime_ns
        features = hf.Features({RAW: hf.Value("string")})
        arguments = {"path": str(path.resolve()), "stamp": stamp}
        try:
            rows = hf.Dataset.from_generator(_json_rows, features=features, gen_kwargs=arguments)
        except hf.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        return rows, path.parent, path.stem
    rows = open_dataset(annotations, split, streaming=streaming)
    if rows.features and not {"messages", "conversations"} & set(rows.features):
        raise ValueError(
            f"`annotations` {annotations} must have a column `messages` or `conversations`, got "
            f"{', '.join(rows.features)}. Name the file of the annotations."
        )
    return _undecoded(rows), path if path.is_dir() else None, path.name


def _only_annotations(folder: Path, split: str) -> Path | None:
    """The JSON file next to its media, as in VSI-590K: `datasets` would load such a folder as one of videos."""
    if not folder.is_dir() or any((folder / name).is_file() for name in _OF_DATASETS[:2]):
        return None
    files = [file for file in folder.glob("*.json*") if file.suffix in (".json", ".jsonl")]
    files = [file for file in files if file.name not in _OF_DATASETS]
    named = [file for file in files if file.stem == split]
    return next((found[0] for found in (named, files) if len(found) == 1), None)


def _no_rows(name: str) -> ValueError:
    return ValueError(f"`annotations` must hold at least one row, got none in {name}. Check the file.")


def _undecoded(rows: Any) -> Any:
    """Keep pictures and videos undecoded, so that a broken one affects only its row."""
    hf = require_datasets()
    for column, feature in (rows.features or {}).items():
        inner = feature.feature if isinstance(feature, hf.List) else feature
        if isinstance(inner, hf.Image | hf.Video):
            undecoded = type(inner)(decode=False)
            rows = rows.cast_column(column, hf.List(undecoded) if inner is not feature else undecoded)
    return rows


def _json_rows(path: str, stamp: int = 0) -> Iterator[dict[str, str]]:
    """The rows of a JSON array or of JSON lines, one by one, as text: rows may have different keys."""
    try:
        with open(path, encoding=text_encoding(path)) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first == "[":
                for value in _json_values(iter(partial(file.read, _CHUNK), ""), path):
                    yield {RAW: value}
                return
            for line in chain([first + file.readline()], file):
                if line.strip():
                    yield {RAW: line.strip()}
    except UnicodeDecodeError as error:
        raise other_encoding(path, error) from error


def _json_values(chunks: Iterable[str], path: str) -> Iterator[str]:
    """The values of a JSON array without its opening bracket, as text."""
    decoder, text, place, chunks = json.JSONDecoder(), "", 0, iter(chunks)
    while True:
        while place < len(text) and text[place] in ", \t\r\n":
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, place)
            yield text[place:end]
            place = end
        except json.JSONDecodeError as error:
            more = next(chunks, "")
            if not more:
                raise ValueError(f"{path} is no JSON that can be read: {error}. Repair the file.") from error
            text, place = text[place:] + more, 0


__all__ = ["InstructionDataset", "InstructionMixture", "StreamedInstructions"]
