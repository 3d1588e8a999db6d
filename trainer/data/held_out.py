"""Training records that are not trained on: those to evaluate on, those that are left out.

Both are drawn by the seed, whatever the number of ranks. Draws are given as examples, record by
record.
"""

import numpy as np

from trainer.config.config import Config
from trainer.config.data_options import LEFT_OUT
from trainer.data.dataset import TokenDataset
from trainer.data.mixture import MixedDataset
from trainer.errors import UserError
from trainer.tasks.base import Task


def hold_out(config: Config, data: TokenDataset, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(examples of training records that are not trained on, those of them that are evaluated on).

    Methods' validation and `data.eval=left_out` each use the first records; those that `data.eval`
    draws are others, the last ones. Raises UserError where none would be left to train on."""
    options, seed, records = config.data, config.run.seed, data.counts.used
    evaluated, drawn = np.arange(0), options.eval_drawn
    if drawn is not None:
        count = drawn if isinstance(drawn, int) else max(1, round(drawn * records))
        if count >= records:
            raise UserError(
                f"data.eval: {drawn} given; accepted: fewer than {records}, the training records"
            )
        evaluated = for_evaluation(data, count, seed, by_label=bool(task.labels_state()))
        records -= count
    count = max(options.leave_out, config.method.validation_samples)
    if count >= records:
        key = "data.leave_out" if options.leave_out == count else "method.policy.validation_samples"
        raise UserError(
            f"{key}: {count} given; accepted: fewer than {records}, the training records"
        )
    left = left_out(data, count, seed, evaluated)
    held = np.concatenate([left, evaluated])
    _refuse_used_up(data, held)
    if options.eval == LEFT_OUT:
        evaluated = data.first_records(left, options.leave_out)
    return held, evaluated


def _refuse_used_up(data: TokenDataset, held: np.ndarray) -> None:
    """Raises UserError where nothing of a mixture's source is left to train on."""
    if not isinstance(data, MixedDataset):
        return
    for index, source in enumerate(data.sources):
        if np.count_nonzero(data.source_of(held) == index) == len(source.data):
            raise UserError(
                f"data.mixture: all {source.data.counts.used} records of {source.name} are held "
                "out; accepted: a lower data.eval or data.leave_out, or more records"
            )


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
