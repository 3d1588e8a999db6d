"""Training records that are not trained on: those to evaluate on, those that are left out.

Both are drawn by the seed, whatever the number of ranks. Draws are given as examples, record by
record.
"""

import numpy as np

from trainer.data.dataset import TokenDataset
from trainer.data.mixture import MixedDataset


def left_out(
    data: TokenDataset, count: int, seed: int, evaluated: np.ndarray | None = None
) -> np.ndarray:
    """The examples of `count` records, none of them `evaluated`; a prefix of those of every larger
    draw."""
    records = int(data.records[-1]) + 1
    drawn = np.random.default_rng([seed, 0x1EF7]).permutation(records)
    if evaluated is not None:
        drawn = drawn[~np.isin(drawn, data.records[evaluated])]
    return _examples_of(data, drawn[:count])


def for_evaluation(data: TokenDataset, count: int, seed: int, *, by_label: bool) -> np.ndarray:
    """The examples of `count` records: of each source of a mixture, and with `by_label` of each
    label, in proportion to its records."""
    first = np.flatnonzero(np.diff(data.records, prepend=-1))  # examples, one of each record
    labels = data.labels[first] if by_label else np.zeros(len(first))
    sources = data.source_of(first) if isinstance(data, MixedDataset) else np.zeros(len(first))
    _, stratum, sizes = np.unique(
        np.stack([sources, labels]), axis=1, return_inverse=True, return_counts=True
    )
    quotas = apportion(count, sizes)
    drawn = np.random.default_rng([seed, 0xE7A1]).permutation(len(first))
    drawn = drawn[np.argsort(stratum[drawn], kind="stable")]  # stratum by stratum
    place = np.arange(len(drawn)) - (np.cumsum(sizes) - sizes)[stratum[drawn]]
    return _examples_of(data, np.sort(drawn[place < quotas[stratum[drawn]]]))


def apportion(count: int, sizes: np.ndarray) -> np.ndarray:
    """`count` in parts proportional to `sizes`, by largest remainders."""
    exact = count * sizes / sizes.sum()
    parts = np.floor(exact).astype(np.int64)
    most = np.argsort(parts - exact, kind="stable")[: count - parts.sum()]
    parts[most] += 1
    return parts


def _examples_of(data: TokenDataset, records: np.ndarray) -> np.ndarray:
    first = np.searchsorted(data.records, records)
    last = np.searchsorted(data.records, records, side="right")
    ranges = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
    return np.concatenate([np.arange(0), *ranges])
