"""Steps of tokenised records: order, packing, micro-batches, and a resumable position.

An epoch is a list of *sequences* (one record, or several packed), the same for every world size. An
optimizer step takes the next `batch_size` of them, which `micro_batches.py` cuts and assigns to
ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.micro_batches import (
    MicroBatch,
    assign_micro_batches,
    by_count,
    by_tokens,
    row_length,
)
from trainer.data.mixture import MixedDataset, MixedOrder
from trainer.data.packing import best_fit, fill
from trainer.data.rows import Rows
from trainer.tasks.base import Batch, Task

_LOOKED_AHEAD = 200
"""Steps by whose rows the row lengths are chosen."""
_PADDING = 4
"""Documents of padding in a row, about, at most."""
_PACKED_TOGETHER = 8192
"""Records of a mixture that are packed together: enough to fill rows."""


@dataclass
class Step:
    """One rank's micro-batches of an optimizer step, and figures of the global batch."""

    micro_batches: list[tuple[int, Batch]]
    """(global index, batch) pairs."""
    weight: int
    """Terms of the summed loss over all ranks: the divisor of the mean."""
    tokens: int
    """Tokens over all ranks, without padding."""
    lengths: np.ndarray
    """Tokens of each document, over all ranks."""
    epoch: float
    """Passes over the data after this step."""


class Loader:
    """Endless iterator of optimizer steps, from the position set by `load_state_dict` (else 0)."""

    def __init__(
        self, data: TokenDataset, task: Task, options: DataOptions, seed: int, rank: int,
        world: int, left_out: Sequence[int] | np.ndarray = (), rows: Rows = Rows(),  # noqa: B008
    ):  # fmt: skip
        # Examples without loss are for evaluation: choices that are not the right one.
        unused = np.union1d(np.asarray(left_out, dtype=int), np.flatnonzero(data.weights == 0))
        self._records = np.setdiff1d(np.arange(len(data)), unused)
        self._mixed: MixedOrder | None = None
        if isinstance(data, MixedDataset):
            self._mixed = MixedOrder(data, unused, seed, options.shuffle)
        self.data, self.task, self.options = data, task, options
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch, self.offset = 0, 0  # of the next sequence
        self._order: tuple[int, list[np.ndarray]] | None = None
        self.rows = rows
        self.micro_batch_size = options.micro_batch_size

    @property
    def micro_batch_size(self) -> int | None:
        """Sequences of a micro-batch; None: `data.micro_batch_tokens`."""
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int | None) -> None:
        self._micro_batch_size = size
        self.rows = self._fitted_rows()

    def sequences(self, epoch: int) -> list[np.ndarray]:
        """Record indices of each sequence of an epoch, in order; of a mixture, an epoch can have a
        few more than another."""
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if self._mixed is not None:
                # Packed part by part, so that the shares hold long before the end of an epoch.
                order = self._mixed(epoch)
                parts = np.split(order, range(_PACKED_TOGETHER, len(order), _PACKED_TOGETHER))
            else:
                parts = [rng.permutation(self._records) if self.options.shuffle else self._records]
            self._order = (epoch, [row for part in parts for row in self._packed(part, rng)])
        return self._order[1]

    def _packed(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """The sequences of some records."""
        together = self.task.options.records_together
        rows = packed_records(order, self.data, self.options, together=together)
        if self.options.packing and self.options.shuffle:
            return [rows[row] for row in rng.permutation(len(rows))]
        return rows

    def fill(self) -> float:
        """Real tokens of packed sequences over their length, `data.max_length`."""
        return fill(self.sequences(self.epoch), self.data.lengths, self.options.max_length)

    def steps_for(self, epochs: float) -> int:
        """Number of optimizer steps of `epochs` epochs; the last may extend into the next epoch."""
        # Rounded first: 1.1 epochs of 50 sequences are 55, not a little more.
        sequences = round(epochs * len(self.sequences(0)), 6)  # also of a run that resumes
        return max(1, int(np.ceil(sequences / self.options.batch_size)))

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield self.next_step()

    def next_step(self) -> Step:
        """The next `batch_size` sequences, as this rank's micro-batches."""
        parts = self._next_parts()
        records = np.concatenate([packed for part in parts for packed in part])
        return Step(
            micro_batches=list(
                assign_micro_batches(
                    parts, self.data, self.task, self.rows, self.rank, self.world
                )
            ),
            weight=int(self.data.weights[records].sum()),
            tokens=int(self.data.lengths[records].sum()),
            lengths=self.data.lengths[records],
            epoch=self.epoch + self.offset / len(self.sequences(self.epoch)),
        )  # fmt: skip

    def _next_parts(self) -> list[MicroBatch]:
        """All ranks' micro-batches of the next step."""
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
        return cut(taken, self.data, self.options, self.micro_batch_size, self.rows)

    def _fitted_rows(self) -> Rows:
        """Rows of few lengths, by the first epoch's steps: the same after a resume."""
        if self.rows.few == 0:
            return self.rows
        position, order = self.state_dict(), self._order
        self.epoch = self.offset = 0
        ahead = min(_LOOKED_AHEAD, self.steps_for(1))
        parts = [part for _ in range(ahead) for part in self._next_parts()]
        seen = [row_length(part, self.data, self.rows) for part in parts]
        largest = max(self.largest_row(), *seen)
        together = sum if self.rows.end_to_end else max
        counts = [together(map(len, part)) for part in parts]
        documents = max(counts)
        self.epoch, self.offset, self._order = position["epoch"], position["offset"], order
        fitted = self.rows.fitted(seen, largest)
        if self.options.shuffle:  # else later steps may be of other lengths
            fitted = fitted.without_rare(seen)
        return replace(
            fitted,
            documents=documents + documents // 4 + _PADDING,
            longest=int(self.data.lengths[self._records].max()),
            apart=self.rows.end_to_end and 2 * counts.count(1) < len(counts),
        )

    def largest_row(self) -> int:
        """Length of the longest row that a micro-batch can have."""
        lengths = np.sort(self._sequence_lengths())[::-1]
        longest = int(lengths[0])
        if not self.rows.end_to_end:
            return longest
        if self.micro_batch_size is not None:
            return int(lengths[: self.micro_batch_size].sum())
        assert self.options.micro_batch_tokens is not None
        return max(longest, min(self.options.micro_batch_tokens, int(lengths.sum())))

    def _sequence_lengths(self) -> np.ndarray:
        if not self.options.packing and not self.task.options.records_together:
            return self.data.lengths[self._records]
        return np.array([self.data.lengths[row].sum() for row in self.sequences(self.epoch)])

    def state_dict(self) -> dict[str, int]:
        """Position of the next sequence; independent of rank and world size."""
        number = len(self.sequences(self.epoch))
        return {"epoch": self.epoch, "offset": self.offset, "sequences": number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where these data lack the position, or are packed otherwise."""
        self.epoch, self.offset = state["epoch"], state["offset"]
        number = len(self.sequences(self.epoch))
        if state.get("sequences", 0 if self.options.packing else number) != number:
            raise ValueError(
                f"an epoch of {state.get('sequences', 'other')} sequences, {number} expected"
            )
        if not 0 <= self.offset < number:
            raise ValueError(f"offset {self.offset}, of {number} sequences")


def cut(
    sequences: list[np.ndarray],
    data: TokenDataset,
    options: DataOptions,
    size: int | None,
    rows: Rows,
) -> list[MicroBatch]:
    """Micro-batches of `size` sequences, or of `data.micro_batch_tokens`."""
    if size is not None:
        return by_count(sequences, size)
    assert options.micro_batch_tokens is not None
    sums = (
        [of_all[packed].sum() for packed in sequences] for of_all in (data.lengths, data.weights)
    )
    return by_tokens(
        sequences, rows.widths(*map(np.array, sums)), options.micro_batch_tokens,
        options.micro_batches_multiple_of or 1,
        padded=not rows.end_to_end,
    )  # fmt: skip


def packed_records(
    records: np.ndarray, data: TokenDataset, options: DataOptions, *, together: bool = False
) -> list[np.ndarray]:
    """Sequences of some records in order, packed with `data.packing`; `together`: all examples of
    a record each (`TaskOptions.records_together`)."""
    if together:
        return data.whole_records(records)
    if options.packing:
        return best_fit(records, data.lengths, options.max_length)
    return list(records[:, None])
