"""Instruction batches in a predetermined order that is independent of the workers and can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.trainer_pt_utils import get_length_grouped_indices

from spa3r.data.batches import ResumableBatches


class InstructionBatches(ResumableBatches):
    """Collated batches of this process.

    Every row is used once per epoch, in a different order each time; rows from the start of the epoch are repeated if
    they are needed for an equal number of batches in all processes. A streamed data set keeps its own order.

    Args:
        examples: Data set of examples with ``messages``.
        collator: Collates a list of examples into a batch.
        batch_size: Rows per batch.
        group_by_length: Whether rows of similar length are grouped, by ``examples.lengths``.
        accumulate: Batches per step and process: lengths are similar within this many.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
        max_bad_share: Share of rows that may be broken; None: no limit.

    Raises:
        ValueError: `group_by_length` is set but there are no lengths, or there are no rows.
    """

    def __init__(
        self,
        examples: Dataset | Sequence[Any],
        collator: Callable[[list[Any]], dict[str, Any]],
        batch_size: int = 1,
        *,
        group_by_length: bool = False,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_share: float | None = 0.05,
    ):
        super().__init__()
        self.examples: Any = examples
        self.collator, self.batch_size = collator, batch_size
        self.group_by_length, self.accumulate, self.seed = group_by_length, accumulate, seed
        self.rank, self.world_size, self.max_bad_share = rank, world_size, max_bad_share
        self.is_streamed = not hasattr(examples, "__getitem__") or isinstance(examples, IterableDataset)
        if group_by_length and (self.is_streamed or getattr(examples, "lengths", None) is None):
            raise ValueError("`group_by_length` needs a data set with `lengths`, and this one has none. Leave it out.")
        if not self.is_streamed and len(self.examples) == 0:
            raise ValueError("`examples` must hold at least one row, got none.")

    def __len__(self) -> int:
        """Number of batches per epoch and process.

        Raises:
            TypeError: The rows are streamed.
        """
        if self.is_streamed:
            raise TypeError("A streamed data set doesn't know how many batches it has.")
        return -(-len(self.examples) // (self.batch_size * self.world_size))

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, for all processes."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if not self.group_by_length:
            return torch.randperm(len(self.examples), generator=generator).tolist()
        step = self.batch_size * self.world_size * self.accumulate
        return get_length_grouped_indices(self.examples.lengths, step, generator=generator)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        skip, epoch = int(self._skip), int(self._epoch)
        if self.is_streamed:
            yield from self._stream(skip, epoch, number, workers)
            return
        order, size, processes = self.order(epoch), self.batch_size, self.world_size
        for batch in range(skip + number, len(self), workers):
            first = (batch * processes + self.rank) * size
            yield self._batch([self.examples[order[place % len(order)]] for place in range(first, first + size)])

    def _stream(self, skip: int, epoch: int, number: int, workers: int) -> Iterator[dict[str, Any]]:
        """Every worker reads the whole stream, since its state depends on everything that came before."""
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)
        rows, batch = iter(self.examples), 0
        while len(rows_of_all := list(islice(rows, self.batch_size * self.world_size))) == (
            self.batch_size * self.world_size
        ):
            if batch >= skip and (batch - skip) % workers == number:
                yield self._batch(rows_of_all[self.rank * self.batch_size :][: self.batch_size])
            batch += 1

    def _batch(self, examples: list[Any]) -> dict[str, Any]:
        names = [example.get("row") or "" for example in examples]
        return {"num_rows": len(examples), "skipped": []} | self.collator(examples) | {"rows": names}
