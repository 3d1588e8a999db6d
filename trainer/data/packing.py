"""Packing by best fit: records into rows of at most `max_length` tokens, few of them unfilled.

Best fit decreasing (Johnson et al., 1974; for packing, Ding et al., "Fewer Truncations Improve
Language Modeling", 2024): the longest records first, each into the fullest row that has room.
Records of one length are placed together: a row takes as many of them as fit before the next
row does. So the cost depends on the number of different lengths and rooms, and a million records
take a second.
"""

import bisect

import numpy as np


def best_fit(order: np.ndarray, lengths: np.ndarray, max_length: int) -> list[np.ndarray]:
    """Rows of record indices, ordered by the first of their records in `order`; within a row,
    records stand as in `order`. `lengths`: of all records, by index."""
    if not len(order):
        return []
    place = np.empty(len(order), np.int64)
    by_length = np.argsort(-lengths[order], kind="stable")
    sorted_lengths = lengths[order][by_length]
    starts = np.flatnonzero(np.diff(sorted_lengths, prepend=-1))
    rooms = _Rooms(max_length)
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        length, records = int(sorted_lengths[start]), by_length[start:end]
        # A longer record than a row is a row of its own: records are never split.
        place[records] = rooms.take(max(1, min(length, max_length)), len(records))
    rows = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place))
    packed = np.split(order[rows], ends[:-1])
    first = rows[np.concatenate([[0], ends[:-1]])]
    return [packed[row] for row in np.argsort(first)]


def fill(rows: list[np.ndarray], lengths: np.ndarray, max_length: int) -> float:
    """Real tokens over the length of all rows."""
    return int(lengths[np.concatenate(rows)].sum()) / (len(rows) * max_length)


class _Rooms:
    """Rows by the tokens that they have left."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self._made = 0
        self._rows: dict[int, list[int]] = {}
        self._sizes: list[int] = []  # keys of `_rows`, ascending

    def take(self, length: int, count: int) -> np.ndarray:
        """The row of each of `count` records of `length` tokens, by best fit."""
        taken = []
        while count:
            at = bisect.bisect_left(self._sizes, length)
            if at == len(self._sizes):
                rows = -(-count // (self.max_length // length))
                self._add(self.max_length, list(range(self._made, self._made + rows)))
                self._made += rows
                continue
            room = self._sizes[at]
            each = room // length
            filled = min(len(self._rows[room]), count // each)
            # Rows that take as many as fit, or at last one row that takes the rest.
            rows, times = (filled, each) if filled else (1, count)
            chosen = self._remove(room, rows)
            taken.append(np.repeat(chosen, times))
            self._add(room - times * length, chosen)
            count -= rows * times
        return np.concatenate(taken)

    def _add(self, room: int, rows: list[int]) -> None:
        if room not in self._rows:
            self._rows[room] = []
            bisect.insort(self._sizes, room)
        self._rows[room] += rows

    def _remove(self, room: int, count: int) -> list[int]:
        """The last `count` rows that have `room` tokens left."""
        rows = self._rows[room]
        chosen = rows[-count:]
        del rows[-count:]
        if not rows:
            del self._rows[room], self._sizes[bisect.bisect_left(self._sizes, room)]
        return chosen
