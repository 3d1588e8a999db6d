"""LeLoRA's hard budget: the price against a brute-force search, draws and learning under it."""

import itertools

import numpy as np
import pytest
import torch

from adapters.methods.lelora.budget import allocate, chosen, solve
from tests.unit.adapters.methods.harness import Bench, check_resume
from tests.unit.adapters.methods.lelora.numpy_policy import (
    LITERAL,
    RANKS,
    SIZES,
    UNITS,
    check_step,
    inputs,
    parameters,
    probabilities,
    reinforce,
)

COSTS = SIZES[:, None] * np.array(RANKS)


def smallest_price(values, costs, budget):
    """(λ, choices) by trying every price at which some unit changes its mind."""
    pairs = itertools.combinations(range(values.shape[1]), 2)
    crossings = [(values[:, a] - values[:, b]) / (costs[:, b] - costs[:, a]) for a, b in pairs]
    for price in sorted(np.concatenate(crossings)):
        # at a crossing the smaller rank wins: argmin takes the first
        chosen = (np.round(values + (price + 1e-12) * costs, 12)).argmin(1)
        if costs[np.arange(len(costs)), chosen].sum() <= budget:
            return price, chosen
    raise AssertionError("no price")


@pytest.mark.parametrize("mean_rank", [0.0, 0.7, 2.0, 3.3, 4.0])
def test_the_price_is_the_smallest_that_meets_the_budget(mean_rank):
    rng = np.random.default_rng(int(10 * mean_rank))
    for _ in range(20):
        values = np.round(rng.normal(size=(UNITS, 3)), 6)
        budget = mean_rank * SIZES.sum()
        found, price = allocate(torch.from_numpy(values), torch.from_numpy(COSTS).double(), budget)
        spent = COSTS[np.arange(UNITS), found.numpy()].sum()
        assert spent <= budget
        if mean_rank == 4.0:
            assert (found == 2).all()
            continue
        expected, ranks = smallest_price(values, COSTS, budget)
        assert price == pytest.approx(expected, abs=1e-9)
        np.testing.assert_array_equal(found.numpy(), ranks)
        # No allocation that costs no more is worth more; at a negative price, none that costs no
        # less.
        every = np.array(list(itertools.product(range(3), repeat=UNITS)))
        costs = COSTS[np.arange(UNITS), every].sum(1)
        totals = values[np.arange(UNITS), every].sum(1)
        best = totals[costs <= spent if price >= 0 else costs >= spent].min()
        assert totals[(every == found.numpy()).all(1)][0] == pytest.approx(best)


def test_equal_units_are_served_in_order():
    values, costs = torch.tensor([[0.0, -2.0, -4.0]] * 5), torch.tensor([[0.0, 20.0, 40.0]] * 5)
    found, price = allocate(values, costs, 100.0)
    assert found.tolist() == [2, 2, 0, 0, 0] and price == pytest.approx(0.1)


def test_one_rank_only_needs_no_price():
    found, _ = allocate(torch.zeros(3, 1), torch.full((3, 1), 8.0), 24.0)
    assert found.tolist() == [0, 0, 0]


def test_the_price_of_rewards_is_never_negative():
    """Where few ranks are worth anything, the budget is not spent."""
    values = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, -2.0]])
    costs = torch.tensor([[0.0, 2.0, 4.0]] * 2)
    assert float(solve(values, costs, 6.0)[1]) < 0
    assert chosen(values, costs, torch.tensor(0.0)).sum() == 4.0


@pytest.mark.parametrize("mode", ["learned", "uniform", "frozen"])
def test_every_draw_meets_the_budget_and_is_the_policy_s_at_its_price(mode):
    """argmax_r log p(r) + e(r) − λ r size, with the noise of (seed, step)."""
    policy, features = reinforce(mode=mode, credit="attributed", budget=1.5), inputs()
    seen = set()
    for step in range(30):
        r, _ = policy.draw(step, features)
        spent = COSTS[np.arange(UNITS), r.numpy()].sum()
        slack = 1.5 * SIZES.sum() - spent
        assert 0 <= slack < 2 * 42 * 2
        seen.add(tuple(r.tolist()))
        price = policy.scalars["price"]
        if mode == "learned":
            np.testing.assert_allclose(policy._draws[-1].tilt.numpy(), price * COSTS)
    assert len(seen) > 10
    again = reinforce(mode=mode, credit="attributed", budget=1.5)
    assert tuple(again.draw(29, features)[0].tolist()) == tuple(r.tolist())


def test_samples_have_the_tilted_probabilities():
    """Of many equal units the price hardly varies, so that their ranks are independent samples."""
    n = 6000
    p = np.array([0.2, 0.5, 0.3])
    costs = torch.tensor([[0.0, 2.0, 4.0]] * n)
    u = torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = -(-u.log()).log()
    found, price = allocate(-(torch.from_numpy(np.log(p)) + noise), costs, 1.6 * n)
    tilted = p * np.exp(-price * np.array([0.0, 2.0, 4.0]))
    tilted /= tilted.sum()
    shares = np.bincount(found.numpy(), minlength=3) / n
    np.testing.assert_allclose(shares, tilted, atol=4 * 0.5 / np.sqrt(n))
    assert shares @ [0, 2, 4] == pytest.approx(1.6, abs=0.01)


def test_known_rewards_are_priced_for_the_budget():
    """R̄(r, s) + μ r size with the μ at which argmin_r min_s meets it, by its largest entry."""
    options = {**LITERAL, "credit": "counterfactual", "advantage": "normalised", "budget": 1.5}
    policy, features = reinforce(**options), inputs()
    R = -np.abs(np.random.default_rng(0).normal(size=(UNITS, 3, 3)))
    R[:, 0] = 0
    before = parameters(policy)
    policy.draw(0, features)
    policy.learn(torch.from_numpy(R))
    price, _ = smallest_price(R.min(2), COSTS, 1.5 * SIZES.sum())
    assert price > 0
    priced = R + (price * COSTS)[:, :, None]
    priced /= np.abs(priced).max((1, 2), keepdims=True)
    x = features.double().numpy()

    def objective(Ω):
        p_r, p_s = probabilities(Ω, x)
        return np.einsum("ur,us,urs->u", p_r, p_s, priced).mean()

    check_step(before, parameters(policy), objective, 2.0)


def test_eq_10_is_of_the_tilted_policy():
    options = {**LITERAL, "credit": "attributed", "budget": 1.5}
    policy, features = reinforce(**options), inputs()
    R = np.random.default_rng(0).normal(size=(2, UNITS))
    policy.draw(0, features)
    policy.learn(torch.from_numpy(R[0]))
    before = parameters(policy)
    r, s = (index.numpy() for index in policy.draw(1, features))
    price = policy.scalars["price"]
    policy.learn(torch.from_numpy(R[1]))
    x, n = features.double().numpy(), np.arange(UNITS)

    def objective(Ω):
        p_r, p_s = probabilities(Ω, x)
        tilted = p_r * np.exp(-price * COSTS)
        tilted /= tilted.sum(1, keepdims=True)
        log_p = np.log(tilted[n, r]) + np.where(r > 0, np.log(p_s[n, s]), 0)
        return ((R[1] - R[0]) * log_p).mean()

    check_step(before, parameters(policy), objective, 2.0)


def test_ranks_follow_worth_and_differ_between_units():
    """Half of the units gain ten times as much per component: they get the components."""
    policy, features = reinforce(credit="counterfactual", budget=2.0, learning_rate=1e-3), inputs()
    worth = np.where(np.arange(UNITS) % 2 == 0, 10.0, 1.0) * SIZES
    rng = np.random.default_rng(0)
    for step in range(120):
        policy.draw(step, features)
        noisy = worth[:, None] * rng.uniform(0.5, 1.5, size=(UNITS, 1)) * np.array(RANKS)
        policy.learn(torch.from_numpy(-np.repeat(noisy[:, :, None], 3, 2)))
    r, _ = policy.draw(120, features)
    rank = np.array(RANKS)[r.numpy()]
    assert (rank[::2] == 4).all() and rank[1::2].max() < 4 and len(set(rank)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": {"budget": 9}}, r"policy.budget: 9 given; accepted: 0 to 8"),
        ({"ranks": [2, 4], "policy": {"budget": 1}}, r"policy.budget: 1 given; accepted: 2 to 4"),
        ({"policy": {"budget": 2, "cost": 1e-3}}, r"policy.cost: 0.001 given with policy.budget"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Bench("lelora", options, shapes=[(40, 40)])


@pytest.mark.parametrize("credit", ["counterfactual", "attributed"])
def test_resume(credit):
    def make(begin):
        policy = {"budget": 1.5, "credit": credit}
        options = {"ranks": RANKS, "coordinates": "delta", "policy": policy}
        return Bench("lelora", options, shapes=[(16, 20), (24, 17)], begin=begin)

    check_resume(make, 3, 4)
