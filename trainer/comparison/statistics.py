"""Scores of runs over records and seeds, their paired differences, and intervals of these.

A score is a smooth function of sums over the records (`Measure`): of losses and of their weights,
of right answers, of the cells of a confusion matrix, of moments. A bootstrap sample of records
weighs each record by how often it was drawn, so all samples of a run are one matrix product.

Records are the same for all seeds and both arms: seeds and records are drawn independently of each
other (Owen 2007, the pigeonhole bootstrap), and a sample's difference is the mean over its seeds of
the differences between both arms' runs on its records. Of S seeds S − 1 are drawn, with which the
variance of a mean is unbiased (Rao & Wu 1988). The percentiles are stretched about the estimate by
t over z with the degrees of freedom of Welch and Satterthwaite, since of 5 seeds they are too near.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Records = Mapping[str, Sequence[Any]]
"""What is kept of a run's evaluation by record: lists of equal length by name."""

SAMPLES = 4000
"""Of the bootstrap."""
_COUNTS = 2**24
"""Of records by sample, that are held at a time: 128 MiB."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """A score as a function of sums over records."""

    summands: Callable[[Records], Values]
    """(records, k)"""
    value: Callable[[Values], Values]
    """(…, k) sums to (…) scores."""
    less_is_better: bool = False


def _columns(*names: str) -> Callable[[Records], Values]:
    def summands(records: Records) -> Values:
        columns = [
            np.ones(len(records["id"])) if name == "1" else np.asarray(records[name], np.float64)
            for name in names
        ]
        return np.stack(columns, -1)

    return summands


def _ratio(sums: Values) -> Values:
    return sums[..., 0] / sums[..., 1]


def _confusion(records: Records) -> Values:
    """Indicators of true and false positives and negatives; the second of two labels, in the order
    of their names (or numbers), is the positive one."""
    answers, labels = ([str(value) for value in records[name]] for name in ("answer", "label"))
    positive = max({*answers, *labels})
    guess, truth = (np.array([v == positive for v in one]) for one in (answers, labels))
    cells = (guess & truth, guess & ~truth, ~guess & truth, ~guess & ~truth)
    return np.stack(cells, -1).astype(np.float64)


def _f1(sums: Values) -> Values:
    tp, fp, fn, _ = np.moveaxis(sums, -1, 0)
    return 2 * tp / np.maximum(2 * tp + fp + fn, 1e-300)


def _matthews(sums: Values) -> Values:
    """0 where all answers, or all labels, are the same."""
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    scale = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(scale > 0, (tp * tn - fp * fn) / np.where(scale > 0, scale, 1), 0.0)


def _moments(records: Records) -> Values:
    x, y = (np.asarray(records[name], np.float64) for name in ("answer", "label"))
    x, y = x - x.mean(), y - y.mean()
    return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], -1)


def _pearson(sums: Values) -> Values:
    """0 where all answers are the same."""
    x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
    scale = np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 0))
    return np.where(scale > 0, (n * xy - x * y) / np.where(scale > 0, scale, 1), 0.0)


MEASURES: dict[str, Measure] = {
    "eval_loss": Measure(_columns("loss", "weight"), _ratio, less_is_better=True),
    "eval_accuracy": Measure(_columns("score", "1"), _ratio),
    "eval_f1": Measure(_confusion, _f1),
    "eval_matthews": Measure(_confusion, _matthews),
    "eval_pearson": Measure(_moments, _pearson),
}
"""What can be compared, by the score's name in metrics.jsonl."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval of `CONFIDENCE`."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_0(self) -> bool:
        return self.low > 0 or self.high < 0


def score(measure: Measure, runs: Sequence[Records]) -> Interval:
    """The mean score over runs of several seeds on the same records."""
    return _interval(measure, runs, None)


def difference(measure: Measure, runs: Sequence[Records], others: Sequence[Records]) -> Interval:
    """The mean over seeds of the score of each run minus that of the other arm's run with the same
    seed, at the same place in `others`, on the same records. Raises ValueError where they are not
    the same."""
    return _interval(measure, runs, others)


def _interval(
    measure: Measure, runs: Sequence[Records], others: Sequence[Records] | None
) -> Interval:
    records = list(runs[0]["id"])
    if any(list(run["id"]) != records for run in [*runs, *(others or [])]):
        raise ValueError("the runs were not evaluated on the same records")
    generator = np.random.default_rng(0)
    n, S = len(records), len(runs)
    summands = [
        np.stack([measure.summands(run) for run in arm])
        for arm in (runs, others)
        if arm is not None
    ]

    def scores(weights: Values) -> Values:
        """(samples, seeds) by the weights (samples, n) of the records."""
        found = [measure.value(weights @ arm).T for arm in summands]
        return found[0] - found[1] if len(found) > 1 else found[0]

    by_seed = scores(np.ones((1, n)))[0]  # the records as they are
    samples, block = [], max(1, _COUNTS // n)
    for first in range(0, SAMPLES, block):
        count = min(block, SAMPLES - first)
        drawn = generator.multinomial(n, np.full(n, 1 / n), count)
        samples.append(scores(drawn.astype(np.float64)))
    seeds = generator.integers(S, size=(SAMPLES, max(1, S - 1)))
    means = np.take_along_axis(np.concatenate(samples), seeds, 1).mean(1)
    tail = (1 - CONFIDENCE) / 2
    estimate = float(by_seed.mean())
    low, high = np.quantile(means, [tail, 1 - tail]) - estimate
    stretch = _stretch(by_seed, float(means.var()))
    return Interval(estimate, estimate + float(low) * stretch, estimate + float(high) * stretch)


def _stretch(by_seed: Values, variance: float) -> float:
    """t over z; `variance`: of the mean, by the bootstrap."""
    from scipy import stats

    S = len(by_seed)
    of_seeds = float(by_seed.var(ddof=1)) / S if S > 1 else 0.0
    if of_seeds == 0 or variance == 0:
        return 1.0
    degrees = (S - 1) * max(1.0, variance / of_seeds) ** 2
    quantile = (1 + CONFIDENCE) / 2
    return float(stats.t.ppf(quantile, degrees) / stats.norm.ppf(quantile))


def mcnemar(runs: Sequence[Records], others: Sequence[Records]) -> float:
    """p of the exact McNemar test on records that one arm answers right and the other does not; of
    several seeds, right in more of them."""
    from scipy import stats

    right = sum(np.asarray(run["score"], np.float64) for run in runs)
    gained = np.sign(right - sum(np.asarray(run["score"], np.float64) for run in others))
    more, less = int((gained > 0).sum()), int((gained < 0).sum())
    return float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0
