"""Scores over records, intervals of paired differences, and McNemar's test, against scipy,
scikit-learn and values worked out by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from trainer.comparison import statistics as ours
from trainer.comparison.statistics import MEASURES, difference, mcnemar, score


def records(**columns):
    return {"id": list(range(len(next(iter(columns.values()))))), **columns}


def losses(*values, weights=None):
    return records(loss=list(values), weight=weights or [1] * len(values))


def answers(given, labels):
    right = [float(g == t) for g, t in zip(given, labels, strict=True)]
    return records(answer=list(given), label=list(labels), score=right)


def value(name, run):
    measure = MEASURES[name]
    return float(measure.value(measure.summands(run).sum(0)))


def test_scores_are_those_of_the_whole_set():
    rng = np.random.default_rng(0)
    guess, truth = rng.integers(0, 2, (2, 50))
    run = answers(["no yes".split()[g] for g in guess], ["no yes".split()[t] for t in truth])
    assert value("eval_accuracy", run) == metrics.accuracy_score(truth, guess)
    assert value("eval_f1", run) == pytest.approx(metrics.f1_score(truth, guess))
    assert value("eval_matthews", run) == pytest.approx(metrics.matthews_corrcoef(truth, guess))
    x, y = rng.normal(size=(2, 50)) + 3
    run = records(answer=x.tolist(), label=y.tolist())
    assert value("eval_pearson", run) == pytest.approx(stats.pearsonr(x, y)[0])
    # 6 nats on 4 tokens, which is not the mean of 1 and 5 / 3
    assert value("eval_loss", losses(1.0, 5.0, weights=[1, 3])) == 1.5


def test_a_constant_answer_correlates_with_nothing():
    assert value("eval_matthews", answers(["a", "a", "a"], ["a", "b", "a"])) == 0
    assert value("eval_pearson", records(answer=[1.0, 1.0], label=[0.0, 2.0])) == 0


def test_one_seed_has_the_paired_bootstrap_interval_of_scipy():
    rng = np.random.default_rng(1)
    first, second = rng.gamma(2.0, size=(2, 200))
    weights = rng.integers(1, 9, 200)
    found = difference(
        MEASURES["eval_loss"],
        [losses(*first, weights=weights.tolist())],
        [losses(*second, weights=weights.tolist())],
    )
    theirs = stats.bootstrap(
        (first, second, weights), lambda a, b, w, axis: (a - b).sum(axis) / w.sum(axis),
        paired=True, method="percentile", n_resamples=20_000, rng=2, vectorized=True,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert found.estimate == pytest.approx((first - second).sum() / weights.sum())
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_seeds_alone_give_the_interval_of_student():
    """Where all records of a run have one loss, only the seeds differ."""
    by_seed = np.array([0.3, 0.1, 0.6, 0.2, 0.4])
    runs = [losses(*[1 + d] * 40) for d in by_seed]
    found = difference(MEASURES["eval_loss"], runs, [losses(*[1.0] * 40)] * 5)
    low, high = stats.t.interval(0.95, 4, by_seed.mean(), stats.sem(by_seed))
    assert found.estimate == pytest.approx(0.32)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.04 * (high - low))


def test_intervals_of_records_and_seeds_hold_the_truth_in_95_of_100_cases(monkeypatch):
    """True difference 0.1; effects of record, of seed, and of both together."""
    monkeypatch.setattr(ours, "SAMPLES", 400)
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        of_record = rng.normal(size=(1, 60))
        of_seed = rng.normal(size=(4, 1)) * 0.1
        gains = 0.1 + of_record * 0.5 + of_seed + rng.normal(size=(4, 60)) * 0.3
        found = difference(
            MEASURES["eval_loss"], [losses(*g) for g in gains], [losses(*[0.0] * 60)] * 4
        )
        held += found.low <= 0.1 <= found.high
    assert 182 <= held <= 200  # 190 expected, with a standard deviation of 3


def test_runs_on_other_records_are_refused():
    with pytest.raises(ValueError, match="same records"):
        difference(MEASURES["eval_loss"], [losses(1.0, 2.0)], [losses(1.0)])


def test_a_difference_excludes_0_or_not():
    plain = [losses(*np.linspace(1, 2, 100))] * 3
    better = [losses(*np.linspace(0.9, 1.9, 100))] * 3
    assert difference(MEASURES["eval_loss"], better, plain).excludes_0
    assert not difference(MEASURES["eval_loss"], plain, plain).excludes_0
    assert score(MEASURES["eval_loss"], plain).estimate == pytest.approx(1.5)


def test_mcnemar_counts_the_records_on_which_arms_differ():
    truth = ["x"] * 12
    first = answers(["x"] * 9 + ["y"] * 3, truth)
    second = answers(["y"] * 6 + ["x"] * 4 + ["y"] * 2, truth)  # 6 gained, 1 lost
    by_hand = 2 * (1 + 7) / 2**7  # P(at most 1 of 7), two-sided
    assert mcnemar([first], [second]) == pytest.approx(by_hand)
    assert mcnemar([first], [first]) == 1.0
    # a record that one seed gains and another loses counts for none
    assert mcnemar([first, second], [second, first]) == 1.0


def test_the_interval_does_not_depend_on_how_many_samples_are_held(monkeypatch):
    rng = np.random.default_rng(5)
    runs, others = ([losses(*rng.gamma(2.0, size=60)) for _ in range(3)] for _ in range(2))
    whole = difference(MEASURES["eval_loss"], runs, others)
    monkeypatch.setattr(ours, "_COUNTS", 60 * 37)
    in_blocks = difference(MEASURES["eval_loss"], runs, others)
    for name in ("estimate", "low", "high"):
        assert getattr(in_blocks, name) == pytest.approx(getattr(whole, name), rel=1e-9)
