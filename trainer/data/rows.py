"""How the sequences of a micro-batch become rows: padded to one length, or end to end in one row.

End to end a micro-batch costs its real tokens; its documents are kept apart as packed ones are.
Row lengths may be rounded up to a few, so that attention plans and compiled programs are reused:
what is added is padding, in documents of its own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from adapters.rounding import round_up
from trainer.tasks.base import Example

_ALIGNED = 16
"""Row lengths are multiples of it, and of 1/256 of the longest."""
_HARDLY = 1 / 200
"""Share of all tokens that fewer row lengths may add: each costs a CUDA graph at the start."""
_RARE = 1 / 50
"""Share of the micro-batches below which a row length is rare."""


@dataclass(frozen=True)
class Rows:
    """The form of a micro-batch's rows."""

    end_to_end: bool = False
    reason: str = ""
    """Why rows are not end to end, for the log."""
    few: int = 0
    """Number of different row lengths; 0: as they come."""
    limit: int | None = None
    """Longest row that the model's position tables cover."""
    source_apart: bool = False
    """What is not learned is a row of its own; the other begins with a token before the target."""
    lengths: tuple[int, ...] = ()
    """Row lengths, ascending, to which shorter ones are rounded up."""
    frequent: tuple[int, ...] = ()
    """Those of `lengths` that many micro-batches have, and the longest."""
    documents: int = 0
    """Documents of a row, hardly ever more; 0: not known."""
    longest: int = 0
    """Length of the longest document; 0: not known."""
    apart: bool = False
    """Whether a row of a single document is marked as one too, though attention would need no mask:
    where most rows hold several, so that all of a length run the same program and CUDA graph."""

    def widths(self, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(sequences, rows of one): tokens of each row, of sequences of `lengths` tokens, `weights`
        of which are learned."""
        if not self.source_apart:
            return lengths[:, None]
        return np.stack([lengths - weights, weights + 1], axis=1)

    def laid(self, sequences: Sequence[Sequence[Example]]) -> Sequence[Sequence[Example]]:
        """The sequences of a micro-batch as rows of documents."""
        if not self.end_to_end:
            return sequences
        return [[example for packed in sequences for example in packed]]

    def rounded(self, length: int) -> int:
        """The length of a row of `length` tokens with its padding."""
        return next((size for size in self.lengths if size >= length), length)

    def fitted(self, seen: Sequence[int], largest: int) -> "Rows":
        """With at most `few` lengths, all of them frequent: those that pad rows of the lengths
        `seen` least, and no more than make a difference. None is longer than `largest`."""
        if self.few == 0:
            return self
        step = round_up(max(_ALIGNED, largest // 256), _ALIGNED)
        highest = round_up(largest, step)
        if self.limit is not None:
            highest = min(highest, max(self.limit, largest))
        rounded = [min(round_up(length, step), highest) for length in seen]
        sizes = enough_lengths(rounded, self.few - (highest not in rounded))
        lengths = tuple(sorted({*sizes, highest}))
        return replace(self, lengths=lengths, frequent=lengths)

    def without_rare(self, seen: Sequence[int]) -> "Rows":
        """With those lengths frequent that at least a fiftieth of the rows of the lengths `seen`
        are rounded up to, and the longest: rows of it set what memory is needed."""
        met = Counter(map(self.rounded, seen))
        kept = (size for size in self.lengths[:-1] if met[size] >= _RARE * len(seen))
        return replace(self, frequent=(*kept, *self.lengths[-1:]))

    def __str__(self) -> str:
        sizes = f", {len(self.lengths)} lengths up to {self.lengths[-1]}" if self.lengths else ""
        if self.end_to_end:
            return f"end to end in one row a micro-batch, without padding{sizes}"
        return f"padded to the longest of a micro-batch ({self.reason}){sizes}"


def enough_lengths(seen: Sequence[int], count: int) -> list[int]:
    """The fewest of the values `seen`, at most `count`, to which all of them rounded up have hardly
    more tokens than rounded up to `count` of them."""
    least = _rounded_sum(seen, few_lengths(seen, count))
    fewer = (few_lengths(seen, number) for number in range(1, count + 1))
    return next((s for s in fewer if _rounded_sum(seen, s) <= (1 + _HARDLY) * least), [])


def _rounded_sum(seen: Sequence[int], sizes: Sequence[int]) -> int:
    return int(np.asarray(sizes)[np.searchsorted(sizes, seen)].sum()) if len(sizes) else 0


def few_lengths(seen: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values `seen`, ascending, to which rounding all of them up adds least;
    the largest is one of them. By dynamic programming over the values in order:

        cost_n(j) = min over i < j of cost_{n−1}(i) + Σ_{i < k ≤ j} (v_j − v_k) · times_k
    """
    if not len(seen) or count < 1:
        return []
    values, times = np.unique(np.asarray(seen), return_counts=True)
    if len(values) <= count:
        return values.tolist()
    # Prefixes of `times` and of tokens: added[i, j] is the sum of the formula.
    number = np.concatenate([[0], np.cumsum(times)])
    tokens = np.concatenate([[0], np.cumsum(times * values)])
    ends = np.arange(1, len(values) + 1)
    added = (number[ends] - number[:, None]) * values - (tokens[ends] - tokens[:, None])
    added = np.where(np.arange(len(values) + 1)[:, None] < ends, added, np.inf)
    cost = np.concatenate([[0.0], np.full(len(values), np.inf)])
    before = []
    for _ in range(count):
        total = cost[:, None] + added
        before.append(total.argmin(0))
        cost = np.concatenate([[np.inf], total.min(0)])
    chosen, end = [], len(values)
    for choice in reversed(before):
        chosen.append(int(values[end - 1]))
        end = int(choice[end - 1])
    return chosen[::-1]
