"""Scenes in Hugging Face `datasets`: a list of pictures per row, or one picture per row with a scene name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
from torch.utils.data import get_worker_info

from spa3r.data.source import LoadedScene, SceneError, SceneSource, check_stride
from spa3r.media.files import describe
from spa3r.media.images import is_path, to_rgb

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class DatasetScenes(SceneSource):
    """A data set with random access.

    Args:
        dataset: A ``datasets.Dataset``; or an argument of ``datasets.load_dataset``: a name on the hub, ``"parquet"``,
            ``"imagefolder"``, ...; or a folder that ``save_to_disk`` wrote.
        images_column: Column of lists of pictures, one scene per row; or, with `scene_column`, of single pictures,
            which are grouped by `scene_column`, in the order of the rows.
        scene_column: Column of scene names; None: scenes are named by their row.
        split: Split of the data set, if it is loaded by name.
        config: Configuration of the data set, if it is loaded by name and has several.
        data_files: Files of the data set, if it is loaded as ``"parquet"`` and the like.
        data_dir: Folder of the data set, if it is loaded as ``"imagefolder"`` and the like.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports.

    Raises:
        ValueError: The data set is streamed or empty, or a column is missing or of the wrong type.
    """

    def __init__(
        self,
        dataset: Dataset | str | Path,
        images_column: str = "images",
        scene_column: str | None = None,
        split: str = "train",
        config: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        data_dir: str | None = None,
        stride: Sequence[int] = (1, 4),
        name: str = "dataset",
    ):
        datasets = require_datasets()
        self.name, self.stride = name, check_stride(stride)
        self.images_column, self.scene_column = images_column, scene_column
        loaded = open_dataset(dataset, split, config, data_files, data_dir, streaming=False)
        if not isinstance(loaded, datasets.Dataset):
            raise ValueError(
                f"`dataset` must be a datasets.Dataset, got {type(loaded).__name__}. Use StreamedScenes (in a "
                "configuration: `streaming: true`) for data that is streamed."
            )
        columns, is_list = _checked_columns(loaded.features, images_column, scene_column)
        if not len(loaded):
            raise _no_rows(name)
        self._rows = loaded.select_columns(columns).with_format("arrow")
        self._groups = None if is_list else self._group_rows()

    def _group_rows(self) -> _Groups:
        keys = self._rows.select_columns([self.scene_column])[:][self.scene_column].combine_chunks()
        if keys.null_count:
            raise ValueError(
                f"`scene_column` {self.scene_column!r} must name a scene in every row, got none in {keys.null_count} "
                f"of {len(keys)} rows. Fill or filter them."
            )
        keys = keys.dictionary_encode()
        groups = keys.indices.to_numpy(zero_copy_only=False)
        order = np.argsort(groups, kind="stable").astype(np.uint32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(groups))])
        return _Groups([str(name) for name in keys.dictionary.to_pylist()], order, starts)

    def __len__(self) -> int:
        return len(self._rows) if self._groups is None else len(self._groups.names)

    def scene_name(self, scene: int) -> str:
        if self._groups is not None:
            return self._groups.names[scene]
        return str(scene if self.scene_column is None else self._rows[scene][self.scene_column][0].as_py())

    def num_frames(self, scene: int) -> int:
        return len(self._cells(scene) if self._groups is None else self._groups.rows(scene))

    def _cells(self, row: int) -> Any:
        """The pictures of a row, undecoded and without a copy: an Arrow array."""
        cells = self._rows[row][self.images_column][0].values
        return [] if cells is None else cells

    def load(self, scene: int, frames: Sequence[int]) -> LoadedScene:
        if self._groups is None:
            cells = self._cells(scene)
            return _decode(frames, (cells[int(frame)].as_py() for frame in frames), len(cells))
        rows = self._groups.rows(scene)[np.asarray(frames, int)]
        return _decode(frames, (self._rows[int(row)][self.images_column][0].as_py() for row in rows), len(rows))


class _Groups(NamedTuple):
    """Rows grouped by scene, scenes in order of their first row: `order` lists all rows, scene by scene."""

    names: list[str]
    order: np.ndarray
    starts: np.ndarray

    def rows(self, scene: int) -> np.ndarray:
        """The rows of a scene, in order."""
        return self.order[self.starts[scene] : self.starts[scene + 1]]


@dataclass
class StreamedScene:
    """A scene from a stream: its name and its undecoded pictures."""

    name: str
    cells: list[Any]


class StreamedScenes(SceneSource):
    """A streamed data set, pass after pass.

    Each rank reads its own shards if the number of shards is divisible by the number of ranks; otherwise every rank
    reads everything and keeps its share. All workers of a rank read the same stream, and each decodes its own scenes.

    Args:
        dataset: A ``datasets.IterableDataset``, or an argument of ``datasets.load_dataset``; see
            :class:`DatasetScenes`.
        images_column: As in :class:`DatasetScenes`; rows with single pictures of a scene must be contiguous, in one
            shard.
        scene_column: As in :class:`DatasetScenes`; None: scenes are numbered in stream order.
        split: As in :class:`DatasetScenes`.
        config: As in :class:`DatasetScenes`.
        data_files: As in :class:`DatasetScenes`.
        data_dir: As in :class:`DatasetScenes`.
        shuffle_buffer: Size of the buffer of undecoded scenes from which the next one is drawn; the shards are shuffled
            too. 1: the order of the stream. Single pictures are not shuffled, since that would split their scenes.
        stride: Lowest and highest step between drawn frames.
        name: Name of the source in reports.

    Raises:
        ValueError: The data set is not streamed, or a column is missing or of the wrong type.
    """

    def __init__(
        self,
        dataset: IterableDataset | str | Path,
        images_column: str = "images",
        scene_column: str | None = None,
        split: str = "train",
        config: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        data_dir: str | None = None,
        shuffle_buffer: int = 16,
        stride: Sequence[int] = (1, 4),
        name: str = "stream",
    ):
        datasets = require_datasets()
        self.name, self.stride, self.shuffle_buffer = name, check_stride(stride), shuffle_buffer
        self.images_column, self.scene_column = images_column, scene_column
        loaded = open_dataset(dataset, split, config, data_files, data_dir, streaming=True)
        if not isinstance(loaded, datasets.IterableDataset):
            raise ValueError(
                f"`dataset` must be a datasets.IterableDataset, got {type(loaded).__name__}. Use DatasetScenes, or "
                "`dataset.to_iterable_dataset()`."
            )
        features, is_decoded = loaded.features, loaded.features is None
        if is_decoded:  # only the rows show the columns
            features = next(iter(loaded), None)
            if features is None:
                raise _no_rows(name)
        columns, self._is_list = _checked_columns(features, images_column, scene_column)
        loaded = loaded.select_columns(columns)
        self.dataset = loaded if is_decoded else loaded.decode(False)

    def __len__(self) -> int:
        raise TypeError("The number of scenes of a stream is not known. Give `scenes_per_epoch`.")

    def splits(self, world_size: int) -> bool:
        """Whether each of `world_size` ranks reads its own shards."""
        return world_size > 1 and self.dataset.num_shards % world_size == 0

    def scenes(self, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[StreamedScene]:
        """One pass over the stream, undecoded; the order is a pure function of the seed.

        Args:
            seed: Seed of the order.
            rank: Rank of the reader; all ranks get the same scenes if the shards are not split.
            world_size: Number of ranks.
        """
        import fsspec.asyn

        dataset = self.dataset
        if self._is_list and self.shuffle_buffer > 1:
            dataset = dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        if self.splits(world_size):
            dataset = require_datasets().distributed.split_dataset_by_node(dataset, rank, world_size, strategy="shards")
        if get_worker_info():
            fsspec.asyn.reset_lock()  # a lock that a forked process inherits is never released
        # Unlike iter(dataset), this doesn't split the shards among the DataLoader's workers.
        rows = ({column: values[0] for column, values in row.items()} for row in dataset.iter(batch_size=1))
        if self._is_list:
            for number, row in enumerate(rows):
                name = str(number) if self.scene_column is None else str(row[self.scene_column])
                yield StreamedScene(name, row[self.images_column] or [])
        else:
            for name, group in groupby(rows, key=lambda row: row[self.scene_column]):
                yield StreamedScene(str(name), [row[self.images_column] for row in group])

    def scene_name(self, scene: StreamedScene) -> str:
        return scene.name

    def num_frames(self, scene: StreamedScene) -> int:
        return len(scene.cells)

    def load(self, scene: StreamedScene, frames: Sequence[int]) -> LoadedScene:
        return _decode(frames, (scene.cells[int(frame)] for frame in frames), len(scene.cells))


def require_datasets() -> Any:
    """Import Hugging Face `datasets`, which only some sources need."""
    try:
        import datasets.distributed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Data sets need `datasets`. pip install 'spa3r[train]'.") from error
    return datasets


def open_dataset(
    dataset: Any,
    split: str,
    config: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
) -> Any:
    """The data set, loaded if only its name or folder is given."""
    if not isinstance(dataset, str | Path):
        return dataset
    datasets = require_datasets()
    folder = Path(dataset).expanduser()
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(folder))
        loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return loaded.to_iterable_dataset(num_shards=min(64, len(loaded))) if streaming else loaded
    return datasets.load_dataset(
        str(dataset), config, split=split, data_files=data_files, data_dir=data_dir, streaming=streaming
    )


def _no_rows(name: str) -> ValueError:
    return ValueError(f"`dataset` must hold at least one row, got none in {name!r}. Check the split.")


def _checked_columns(
    columns: Mapping[str, Any], images_column: str, scene_column: str | None
) -> tuple[list[str], bool]:
    """The columns that are read, and whether a row holds a list of pictures.

    Args:
        columns: By name the feature of each column, or its value in the first row.
        images_column: Column of the pictures.
        scene_column: Column of the scene names, or None.
    """
    features = require_datasets().features
    wanted = [column for column in (images_column, scene_column) if column is not None]
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"`dataset` has no column {missing[0]!r}; it has {', '.join(columns)}. Give `images_column` and, for "
            "single pictures, `scene_column`."
        )
    is_list = isinstance(columns[images_column], features.List | features.LargeList | list)
    if not is_list and scene_column is None:
        raise ValueError(
            f"`images_column` {images_column!r} holds single pictures, and `scene_column` must name their scenes, got "
            "None. Give it, or a column of lists of pictures."
        )
    return wanted, is_list


def _decode(frames: Sequence[int], cells: Iterable[Any], num_frames: int) -> LoadedScene:
    """Decode the cells of some frames to pictures: bytes, paths, both, or already decoded pictures."""
    if not num_frames:
        raise SceneError("Its row holds no pictures.")
    loaded = LoadedScene([], [])
    for frame, cell in zip(frames, cells):
        name = f"frame {frame}"
        if isinstance(cell, Mapping) and cell.get("path"):
            name = f"{name} ({PurePosixPath(cell['path']).name})"
        try:
            loaded.images.append(decode_picture(cell))
        except ValueError as error:
            loaded.unread.append((name, str(error)))
        else:
            loaded.frames.append(int(frame))
    return loaded


def decode_picture(cell: Any) -> PIL.Image.Image:
    """Decode a cell to a picture: bytes, a dictionary of `datasets`, a path, or an already decoded picture.

    Raises:
        ValueError: There is no picture, or it can't be read.
    """
    path: Any = None
    if isinstance(cell, Mapping):
        path, cell = cell.get("path"), cell.get("bytes")
    if cell is None and path is None:
        raise ValueError("The row holds no picture.")
    if cell is None and "://" in str(path) and is_path(path):  # in an archive or remote storage
        try:
            return to_rgb(require_datasets().Image().decode_example({"path": str(path), "bytes": None}))
        except Exception as error:  # from any file system
            raise ValueError(f"The picture {describe(path)} can't be read ({error}). Check the address.") from error
    return to_rgb(path if cell is None else cell)
