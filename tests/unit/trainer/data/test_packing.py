"""Best fit against a plain one, the optimum of small cases, and on real data."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import best_fit, fill

LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=40)


def plain(lengths: list[int], room: int) -> list[int]:
    """Tokens of the rows by best fit decreasing, record by record."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= room]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return sorted(rows)


def fewest(lengths: list[int], room: int) -> int:
    """The fewest rows, by trying every placement."""
    best = len(lengths)

    def place(index: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best:
            return
        if index == len(lengths):
            best = len(rows)
            return
        for row in range(len(rows)):
            if rows[row] + lengths[index] <= room:
                rows[row] += lengths[index]
                place(index + 1, rows)
                rows[row] -= lengths[index]
        place(index + 1, [*rows, lengths[index]])

    place(0, [])
    return best


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, room=st.integers(14, 40), seed=st.integers(0, 99))
def test_is_best_fit_decreasing(lengths: list[int], room: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = best_fit(order, np.array(lengths), room)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert sorted(sum(lengths[record] for record in row) for row in rows) == plain(lengths, room)
    place = {int(record): number for number, record in enumerate(order)}
    for row in rows:  # records as in the order given
        assert [place[int(record)] for record in row] == sorted(place[int(r)] for r in row)
    assert [place[int(row[0])] for row in rows] == sorted(place[int(row[0])] for row in rows)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), room=st.integers(12, 24))
def test_is_near_the_optimum(lengths: list[int], room: int) -> None:
    rows = best_fit(np.arange(len(lengths)), np.array(lengths), room)
    assert len(rows) <= fewest(lengths, room) * 11 / 9 + 6 / 9


def test_no_records_and_long_ones() -> None:
    assert best_fit(np.arange(0), np.array([], int), 8) == []
    rows = best_fit(np.array([2, 0, 1, 3]), np.array([9, 3, 5, 1]), 8)
    assert [row.tolist() for row in rows] == [[2, 1], [0], [3]]  # never split


def words(text: str) -> int:
    """About as many tokens as a tokenizer makes of a text."""
    return 1 + len(text) // 4


def gsm8k(folder: Path) -> np.ndarray:
    lines = (folder / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return np.array([words(record["question"] + record["answer"]) for record in records])


def test_fill_of_real_data(shared_data) -> None:
    """Short records, and the same mixed with pieces of books of random lengths."""
    short = gsm8k(shared_data)
    rows = best_fit(np.random.default_rng(0).permutation(len(short)), short, 4096)
    assert fill(rows, short, 4096) >= 0.99
    text = words((shared_data / "books/valid.txt").read_text(encoding="utf-8"))
    cuts = np.cumsum(np.random.default_rng(1).integers(200, 4097, 1000))
    long = np.diff(cuts[cuts < text], prepend=0)
    assert len(long) > 50
    for mixed in (np.concatenate([short[: 4 * len(long)], long]), np.concatenate([short, long])):
        rows = best_fit(np.random.default_rng(2).permutation(len(mixed)), mixed, 4096)
        assert fill(rows, mixed, 4096) >= 0.97
        assert max(sum(mixed[row]) for row in rows) <= 4096
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(mixed)))


@pytest.mark.parametrize("seed", range(3))
def test_records_of_one_length_change_rows_with_the_order(seed: int) -> None:
    lengths = np.repeat([3, 4], 50)
    first, second = (
        {
            tuple(sorted(row))
            for row in best_fit(np.random.default_rng(s).permutation(100), lengths, 10)
        }
        for s in (seed, seed + 10)
    )
    assert len(first) == len(second) and first != second
