"""Micro-batches of an optimizer step: cut by a number of sequences or of tokens, assigned to ranks.

Micro-batch j is run by rank j mod world size. How a step is cut does not depend on the number of
ranks, so neither do results. A rank without one in the last round runs an empty one, since all
ranks must run the same number of forward passes.
"""

import bisect
import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from adapters.rounding import round_up
from trainer.data.dataset import TokenDataset
from trainer.data.rows import Rows
from trainer.tasks.base import Batch, Task
from trainer.tasks.documents import Documents

MicroBatch = list[np.ndarray]
"""Its sequences, each the indices of its records."""


def by_count(sequences: Sequence[np.ndarray], size: int) -> list[MicroBatch]:
    """Micro-batches of `size` sequences, in the order given; the last may be smaller."""
    return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def by_tokens(
    sequences: Sequence[np.ndarray], widths: np.ndarray, capacity: int, multiple: int, *,
    padded: bool,
) -> list[MicroBatch]:  # fmt: skip
    """Micro-batches of at most `capacity` tokens, the largest first, so that those of one round of
    all ranks are of like size; `widths` (sequences, rows of one): tokens of each row. Their number
    is rounded up to a multiple of `multiple`, where there are so many sequences. `padded`: padding
    counts."""
    cut = _padded if padded else _balanced
    parts = cut(np.asarray(widths), capacity, multiple)
    return [[sequences[index] for index in part] for part in parts]


def _balanced(widths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Sequences of as few parts as the longest-processing-time rule can cut: each sequence, the
    longest first, goes to the part with the fewest tokens (Graham, 1969)."""
    lengths = widths.sum(1)
    order = np.argsort(-lengths, kind="stable").tolist()
    count = round_up(-(-int(lengths.sum()) // capacity), multiple)
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, part) for part in range(count)]
        for index in order:
            load, part = loads[0]
            heapq.heapreplace(loads, (load + int(lengths[index]), part))
            parts[part].append(index)
        fits = all(load <= capacity or len(parts[part]) == 1 for load, part in loads)
        if fits or count >= len(order):
            loads.sort(key=lambda item: (-item[0], item[1]))
            return [parts[part] for load, part in loads if load]
        count += multiple


def _padded(widths: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Sequences of parts whose rows are padded to their longest: neighbours in length, in as many
    parts as `capacity` asks for, and no larger than this number needs."""
    order = np.argsort(-widths.sum(1), kind="stable").tolist()
    descending = widths[order]
    totals = descending.sum(1).tolist()

    def starts(limit: int) -> list[int]:
        found, start = [], 0
        while start < len(order):
            found.append(start)
            most = max(1, limit // totals[start])
            if widths.shape[1] > 1:  # the longest of each row may be of several sequences
                longest = np.maximum.accumulate(descending[start : start + most]).sum(1)
                most = max(1, int((longest * np.arange(1, len(longest) + 1) <= limit).sum()))
            start += most
        return found

    count = round_up(len(starts(capacity)), multiple)
    limits = range(1, capacity)
    smaller = bisect.bisect_left(limits, True, key=lambda limit: len(starts(limit)) <= count)
    cuts = starts(limits[smaller] if smaller < len(limits) else capacity)
    return [order[a:b] for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def row_length(part: MicroBatch, data: TokenDataset, rows: Rows) -> int:
    """Length of a micro-batch's rows, before it is rounded."""
    lengths = [int(data.lengths[packed].sum()) for packed in part]
    return sum(lengths) if rows.end_to_end else max(lengths)


def assign_micro_batches(
    parts: Sequence[MicroBatch], data: TokenDataset, task: Task, rows: Rows, rank: int, world: int
) -> Iterator[tuple[int, Batch]]:
    """(global index, micro-batch) of one rank; all ranks have the same number, the last may be
    empty."""
    shortest = min(
        (packed for part in parts for packed in part), key=lambda p: data.lengths[p].sum()
    )
    for first in range(0, len(parts), world):
        index = first + rank
        empty = index >= len(parts)
        chosen = [shortest] if empty else parts[index]
        examples = [[data[int(record)] for record in packed] for packed in chosen]
        width = rows.rounded(row_length(chosen, data, rows))
        batch = task.collate(rows.laid(examples), empty=empty, width=width)
        batch.sequences = [len(packed) for packed in chosen]
        if rows.apart and batch.documents is None:
            _mark_document(batch, len(examples[0][0].input_ids))
        batch.records = [] if empty else [int(r) for packed in chosen for r in packed]
        yield index, batch


def _mark_document(batch: Batch, length: int) -> None:
    """Give the documents of a row with a single one of `length` tokens: it, and padding."""
    positions = torch.arange(batch.inputs["input_ids"].shape[1]).remainder(length).unsqueeze(0)
    batch.inputs["position_ids"], batch.documents = positions, Documents.of(positions)
