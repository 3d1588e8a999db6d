"""The search for a learning rate ends only between two rates that are worse."""

import math

import pytest

from trainer.comparison.search import Found, search

START, BOUNDS = [1e-3, 2e-3, 4e-3], [1e-4, 1e-1]


def run_search(loss, start=START, bounds=BOUNDS):
    """The end of a search, and the rates that were tried."""
    known: dict[float, float] = {}
    for _ in range(30):
        found = search(known, start, bounds)
        if not found.needed:
            return found, sorted(known)
        known |= {rate: loss(rate) for rate in found.needed}
    raise AssertionError("no end")


@pytest.mark.parametrize("best", [2.5e-4, 1e-3, 2e-3, 3.2e-2])
def test_a_grid_is_widened_until_the_best_rate_lies_within(best):
    found, tried = run_search(lambda rate: abs(math.log2(rate / best)))
    assert found.best == pytest.approx(best) and not found.is_edge
    assert tried[0] < found.best < tried[-1]
    assert tried == pytest.approx([tried[0] * 2**k for k in range(len(tried))])


@pytest.mark.parametrize(("loss", "best"), [(lambda r: r, 1.25e-4), (lambda r: -r, 6.4e-2)])
def test_a_rate_at_a_bound_is_marked(loss, best):
    found, _ = run_search(loss)
    assert found.best == pytest.approx(best) and found.is_edge


def test_a_rate_that_diverges_is_never_the_best_and_bounds_the_rest():
    found, tried = run_search(lambda rate: math.inf if rate > 3e-3 else -rate)
    assert found == Found(best=2e-3) and tried == START  # 4e-3 is known to be worse


def test_where_all_rates_diverge_lower_ones_are_tried():
    found, tried = run_search(lambda rate: math.inf if rate > 3e-4 else 1 / rate)
    assert found == Found(best=2.5e-4) and tried[0] == 1.25e-4
    found, tried = run_search(lambda rate: math.inf)
    assert found == Found(is_edge=True) and tried[0] == 1.25e-4


def test_beside_a_rate_of_unknown_loss_the_best_one_is_at_an_edge():
    found, _ = run_search(lambda rate: math.nan if rate > 3e-3 else -rate)
    assert found == Found(best=2e-3, is_edge=True)
    assert search({1e-3: math.nan}, [1e-3], BOUNDS) == Found(is_edge=True)
