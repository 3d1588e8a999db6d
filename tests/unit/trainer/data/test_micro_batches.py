"""Micro-batches by tokens: nothing lost, none too large, balanced."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.micro_batches import MicroBatch, by_tokens

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=16)


def cut(lengths: list[int], capacity: int, multiple: int = 1, *, padded: bool) -> list[list[int]]:
    """Lengths of the sequences of each micro-batch."""
    sequences = [np.array([index]) for index in range(len(lengths))]
    parts: list[MicroBatch] = by_tokens(
        sequences, np.array(lengths)[:, None], capacity, multiple, padded=padded
    )
    assert sorted(int(s[0]) for part in parts for s in part) == list(range(len(lengths)))
    return [[lengths[int(sequence[0])] for sequence in part] for part in parts]


def size(part: list[int], padded: bool) -> int:
    return max(part) * len(part) if padded else sum(part)


@settings(deadline=None, derandomize=True)
@given(
    lengths=LENGTHS, capacity=st.integers(12, 40), multiple=st.integers(1, 4), padded=st.booleans()
)
def test_none_is_too_large(lengths, capacity: int, multiple: int, padded: bool) -> None:
    parts = cut(lengths, capacity, multiple, padded=padded)
    assert all(size(part, padded) <= capacity for part in parts)
    if not padded:
        assert [sum(part) for part in parts] == sorted(map(sum, parts), reverse=True)
        assert len(parts) % multiple == 0 or len(parts) == len(lengths)
        fewest = math.ceil(sum(lengths) / capacity)
        assert len(parts) <= max(2 * fewest, 1) + multiple


@settings(deadline=None, derandomize=True, max_examples=30)
@given(lengths=st.lists(st.integers(4, 12), min_size=1, max_size=6), capacity=st.integers(16, 30))
def test_balanced_within_grahams_bound(lengths, capacity: int) -> None:
    parts = cut(lengths, capacity, padded=False)
    count = len(parts)
    best = min(
        max(
            sum(n for n, at in zip(lengths, places, strict=True) if at == part)
            for part in range(count)
        )
        for places in itertools.product(range(count), repeat=len(lengths))
    )
    assert max(map(sum, parts)) <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9), capacity=st.integers(12, 30))
def test_padded_ones_are_as_few_and_as_small_as_neighbours_allow(lengths, capacity: int) -> None:
    parts = cut(lengths, capacity, padded=True)
    ordered = sorted(lengths, reverse=True)
    ways = []
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        bounds = [0, *(i + 1 for i, here in enumerate(cuts) if here), len(ordered)]
        sizes = [size(ordered[a:b], True) for a, b in itertools.pairwise(bounds)]
        if max(sizes) <= capacity:
            ways.append((len(sizes), max(sizes)))
    count, largest = min(ways)
    assert len(parts) <= count and max(size(part, True) for part in parts) <= largest


def test_a_long_record_and_many_short_ones_take_equal_time() -> None:
    parts = cut([1000, *[100] * 30], 1000, padded=False)
    assert sorted(map(sum, parts)) == [1000] * 4
    assert len(cut([1000, *[100] * 30], 2000, 8, padded=False)) == 8


@settings(deadline=None, derandomize=True)
@given(
    widths=st.lists(st.tuples(st.integers(1, 12), st.integers(2, 8)), min_size=1, max_size=16),
    capacity=st.integers(20, 60),
)
def test_rows_of_sources_and_of_targets_are_padded_apart(widths, capacity: int) -> None:
    sequences = [np.array([index]) for index in range(len(widths))]
    parts = by_tokens(sequences, np.array(widths), capacity, 1, padded=True)
    found = [[widths[int(s[0])] for s in part] for part in parts]
    assert sorted(one for part in found for one in part) == sorted(widths)
    for part in found:
        sources, targets = zip(*part, strict=True)
        assert len(part) * (max(sources) + max(targets)) <= capacity
