"""Micro-batches of tokenised records: order, packing, and a resumable position.

An epoch is a list of *sequences* (one record, or several packed), the same for every world size. An
optimizer step takes the next `batch_size` of them, splits them into micro-batches of
`micro_batch_size`, and assigns micro-batch j to rank j mod world size. So micro-batches do not
depend on the number of ranks. A rank without one in the last round runs an empty one, since all
ranks must run the same number of forward passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.sections import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.tasks.base import Batch, Task


@dataclass
class Step:
    """One rank's micro-batches of an optimizer step, and figures of the global batch."""

    micro_batches: list[tuple[int, Batch]]
    """(global index, batch) pairs."""
    weight: int
    """Terms of the summed loss over all ranks: the divisor of the mean."""
    tokens: int
    """Tokens over all ranks, without padding."""
    epoch: float
    """Passes over the data after this step."""


class Loader:
    """Endless iterator of optimizer steps, from the position set by `load_state_dict` (else 0)."""

    def __init__(
        self, data: TokenDataset, task: Task, options: DataOptions, seed: int, rank: int,
        world: int, left_out: Sequence[int] | np.ndarray = (),
    ):  # fmt: skip
        self.micro_batch_size = options.micro_batch_size
        self._records = np.setdiff1d(np.arange(len(data)), left_out)
        self.data, self.task, self.options = data, task, options
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.offset = 0, 0  # of the next sequence
        self._order: tuple[int, list[np.ndarray]] | None = None

    def sequences(self, epoch: int) -> list[np.ndarray]:
        """Record indices of each sequence of an epoch, in order."""
        if self._order is None or self._order[0] != epoch:
            order = self._records
            if self.options.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            if self.options.packing:
                sequences = pack(order, self.data.lengths, self.options.max_length)
            else:
                sequences = list(order[:, None])
            self._order = (epoch, sequences)
        return self._order[1]

    def steps_for(self, epochs: float) -> int:
        """Number of optimizer steps of `epochs` epochs; the last may extend into the next epoch."""
        whole = sum(len(self.sequences(epoch)) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        # Rounded first: 1.1 epochs of 50 sequences are 55, not a little more.
        rest = round(part * len(self.sequences(int(epochs))), 6) if part else 0
        return max(1, int(np.ceil((whole + rest) / self.options.batch_size)))

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield self.next_step()

    def next_step(self) -> Step:
        """The next `batch_size` sequences, as this rank's micro-batches."""
        taken: list[np.ndarray] = []
        while len(taken) < self.options.batch_size:
            sequences = self.sequences(self.epoch)
            more = sequences[self.offset : self.offset + self.options.batch_size - len(taken)]
            taken += more
            self.offset += len(more)
            if self.offset == len(sequences):
                self.epoch, self.offset = self.epoch + 1, 0
        # Sorted by length, so that micro-batches hold less padding. The step's sum is the same in
        # any order.
        taken.sort(key=lambda packed: int(self.data.lengths[packed].sum()))
        records = np.concatenate(taken)
        return Step(
            micro_batches=list(
                assign_micro_batches(
                    taken, self.data, self.task, self.micro_batch_size, self.rank, self.world
                )
            ),
            weight=int(self.data.weights[records].sum()),
            tokens=int(self.data.lengths[records].sum()),
            epoch=self.epoch + self.offset / len(self.sequences(self.epoch)),
        )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Position of the next sequence; independent of rank and world size."""
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where these data lack the position."""
        self.epoch, self.offset = state["epoch"], state["offset"]
        if not 0 <= self.offset < len(self.sequences(self.epoch)):
            raise ValueError(
                f"offset {self.offset}, of {len(self.sequences(self.epoch))} sequences"
            )


def assign_micro_batches(
    sequences: list[np.ndarray],
    data: TokenDataset,
    task: Task,
    micro_batch_size: int,
    rank: int,
    world: int,
) -> Iterator[tuple[int, Batch]]:
    """(global index, micro-batch) of one rank; all ranks have the same number, the last may be
    empty."""
    starts = range(0, len(sequences), micro_batch_size)
    for first in range(0, len(starts), world):
        index = first + rank
        empty = index >= len(starts)
        start = 0 if empty else starts[index]
        chosen = sequences[start : start + (1 if empty else micro_batch_size)]
        examples = [[data[int(record)] for record in packed] for packed in chosen]
        batch = task.collate(examples, empty=empty)
        batch.records = [] if empty else [int(r) for packed in chosen for r in packed]
        yield index, batch


def pack(order: np.ndarray, lengths: np.ndarray, max_length: int) -> list[np.ndarray]:
    """Pack records, in the order given, into sequences of at most `max_length` tokens."""
    sequences, start, used = [], 0, 0
    for position, length in enumerate(lengths[order]):
        if used + length > max_length and position > start:
            sequences.append(order[start:position])
            start, used = position, 0
        used += length
    if len(order):
        sequences.append(order[start:])
    return sequences


def left_out(data: TokenDataset, count: int, seed: int) -> np.ndarray:
    """The examples of `count` records drawn by `seed`, record by record: independent of the world
    size, and a prefix of those of every larger draw."""
    records = int(data.records[-1]) + 1
    drawn = np.random.default_rng([seed, 0x1EF7]).permutation(records)[:count]
    first = np.searchsorted(data.records, drawn)
    last = np.searchsorted(data.records, drawn, side="right")
    ranges = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
    return np.concatenate([np.arange(0), *ranges])
