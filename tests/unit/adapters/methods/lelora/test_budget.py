"""LeLoRA's hard budget: the price against a brute-force search, draws and learning under it."""

import itertools

import numpy as np
import pytest
import torch

from adapters import seeds
from adapters.methods.lelora.budget import Budget
from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.reinforce import Reinforce
from tests.unit.adapters.methods.harness import Bench, check_resume
from tests.unit.adapters.methods.lelora.numpy_policy import (
    KINDS,
    LAYERS,
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
PARTS = {
    "model": [np.arange(UNITS)],
    "layer": [np.arange(UNITS)[n * KINDS : (n + 1) * KINDS] for n in range(LAYERS)],
}
"""The units that meet a budget together (`numpy_policy.reinforce` has the layers one by one)."""


def together(costs, limit):
    """All units in one part."""
    costs = torch.as_tensor(costs).double()
    part = torch.zeros(len(costs), dtype=torch.int64)
    return Budget(costs, part, torch.tensor([limit], dtype=torch.float64))


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


def filled(values, costs, budget, chosen):
    """`chosen` with further ranks, one by one: the best per parameter of all that still fit."""
    chosen = chosen.copy()
    while True:
        left = budget - costs[np.arange(len(costs)), chosen].sum()
        raises = [
            ((values[u, r] - values[u, now]) / (costs[u, r] - costs[u, now]), u, r)
            for u, now in enumerate(chosen) for r in range(now + 1, values.shape[1])
            if costs[u, r] - costs[u, now] <= left
        ]  # fmt: skip
        if not raises:
            return chosen
        _, unit, rank = min(raises)
        chosen[unit] = rank


def by_part(within, values, mean_rank):
    """(λ by unit, ranks), each part by itself."""
    prices, ranks = np.zeros(UNITS), np.zeros(UNITS, dtype=int)
    for units in PARTS[within]:
        budget = mean_rank * SIZES[units].sum()
        price, chosen = smallest_price(values[units], COSTS[units], budget)
        if within == "layer":
            chosen = filled(values[units], COSTS[units], budget, chosen)
        prices[units], ranks[units] = price, chosen
    return prices, ranks


@pytest.mark.parametrize("mean_rank", [0.0, 0.7, 2.0, 3.3, 4.0])
def test_the_price_is_the_smallest_that_meets_the_budget(mean_rank):
    rng = np.random.default_rng(int(10 * mean_rank))
    for _ in range(20):
        values = np.round(rng.normal(size=(UNITS, 3)), 6)
        budget = mean_rank * SIZES.sum()
        found, price = together(COSTS, budget).allocate(torch.from_numpy(values))
        spent = COSTS[np.arange(UNITS), found.numpy()].sum()
        assert spent <= budget
        if mean_rank == 4.0:
            assert (found == 2).all()
            continue
        expected, ranks = smallest_price(values, COSTS, budget)
        assert float(price) == pytest.approx(expected, abs=1e-9)
        np.testing.assert_array_equal(found.numpy(), ranks)
        # No allocation that costs no more is worth more; at a negative price, none that costs no
        # less.
        every = np.array(list(itertools.product(range(3), repeat=UNITS)))
        costs = COSTS[np.arange(UNITS), every].sum(1)
        totals = values[np.arange(UNITS), every].sum(1)
        best = totals[costs <= spent if price >= 0 else costs >= spent].min()
        assert totals[(every == found.numpy()).all(1)][0] == pytest.approx(best)


@pytest.mark.parametrize("mean_rank", [0.0, 0.7, 2.0, 3.3, 4.0])
def test_every_part_meets_its_budget_by_itself(mean_rank):
    rng = np.random.default_rng(int(10 * mean_rank))
    sizes, part = torch.from_numpy(SIZES), torch.arange(UNITS) // KINDS
    costs = torch.from_numpy(COSTS).double()
    budget = Budget.of_rank(mean_rank, costs, sizes, 3 * part + 1, fill=True)
    spent = []
    for _ in range(20):
        # Both parts have all units' sizes; the second is worth a hundred times as much.
        values = np.round(rng.normal(size=(UNITS, 3)), 6) * np.repeat([1, 100], KINDS)[:, None]
        found, price = budget.allocate(torch.from_numpy(values))
        costs = COSTS[np.arange(UNITS), found.numpy()]
        for units in PARTS["layer"]:
            left = mean_rank * SIZES[units].sum() - costs[units].sum()
            more = np.diff(COSTS, append=np.inf)[units, found.numpy()[units]]
            assert 0 <= left < more.min()
        if 0 < mean_rank < 4:
            prices, ranks = by_part("layer", values, mean_rank)
            np.testing.assert_array_equal(found.numpy(), ranks)
            np.testing.assert_allclose(price.numpy()[part.numpy()], prices, atol=1e-7)
            spent.append(costs.sum() / (mean_rank * SIZES.sum()))
    assert not spent or np.mean(spent) > 0.6


def test_what_a_part_costs_is_counted_in_it_alone():
    """Numbers of parts need not be in order or without gaps."""
    sizes = torch.tensor([10, 20, 30, 40])
    costs = sizes.unsqueeze(1) * torch.tensor([0.0, 1.0, 4.0]).double()
    budget = Budget.of_rank(1.0, costs, sizes, torch.tensor([7, 2, 7, 2]), fill=False)
    assert budget.limits.tolist() == [60.0, 40.0]
    assert budget.totals(torch.tensor([1.0, 2.0, 4.0, 8.0]).double()).tolist() == [10.0, 5.0]
    charged = budget.charge(torch.tensor([3.0, 5.0]).double())
    assert charged.tolist() == [[0, 50, 200], [0, 60, 240], [0, 150, 600], [0, 120, 480]]


def test_equal_units_are_served_in_order():
    values, costs = torch.tensor([[0.0, -2.0, -4.0]] * 5), torch.tensor([[0.0, 20.0, 40.0]] * 5)
    found, price = together(costs, 100.0).allocate(values)
    assert found.tolist() == [2, 2, 0, 0, 0] and float(price) == pytest.approx(0.1)


def test_one_rank_only_needs_no_price():
    found, _ = together(torch.full((3, 1), 8.0), 24.0).allocate(torch.zeros(3, 1))
    assert found.tolist() == [0, 0, 0]


def test_the_price_of_rewards_is_never_negative():
    """Where few ranks are worth anything, the budget is not spent."""
    values = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, -2.0]]).double()
    budget = together([[0.0, 2.0, 4.0]] * 2, 6.0)
    assert float(budget.solve(values)[1]) < 0
    assert budget.chosen(values, torch.zeros(1).double()).sum() == 4.0


def gumbel(step, n=UNITS):
    """e (n, |R|), after the 2 n numbers for draws without a budget."""
    generator = torch.Generator().manual_seed(seeds.mixed(0, step))
    torch.rand(2, n, dtype=torch.float64, generator=generator)
    u = torch.rand(n, len(RANKS), dtype=torch.float64, generator=generator).numpy()
    return -np.log(-np.log(u))


def rounded_logs(policy, features, within):
    """log p (n, |R|) under the policy's current Ω."""
    p, _ = probabilities(parameters(policy), features.double().numpy(), PARTS[within])
    return np.round(np.log(p), 4)


def tilted(p, prices):
    """p_λ, given p (n, |R|) and λ (n,)."""
    unscaled = p * np.exp(-prices[:, None] * COSTS)
    return unscaled / unscaled.sum(1, keepdims=True)


@pytest.mark.parametrize("within", PARTS)
def test_draws_are_at_the_price_of_each_part(within):
    """argmin_r −log p(r) − e(r) + λ r size with λ by part; at the end of it without e."""
    options = {"credit": "attributed", "budget": 1.5, "within": within, "head_scale": 1.0}
    policy, features = reinforce(**options), inputs()
    logs = rounded_logs(policy, features, within)
    for step in range(10):
        r, _ = policy.draw(step, features)
        prices, ranks = by_part(within, np.round(-logs - gumbel(step), 9), 1.5)
        np.testing.assert_array_equal(r.numpy(), ranks)
        tilt = policy._draws[-1].tilt.numpy()
        np.testing.assert_allclose(tilt, prices[:, None] * COSTS, atol=1e-6)
        assert policy.scalars["price"] == pytest.approx(prices.mean(), abs=1e-8)
    r, _ = policy.most_probable(features)
    np.testing.assert_array_equal(r.numpy(), by_part(within, -logs, 1.5)[1])


def test_a_model_of_one_block_meets_its_budget_as_a_block():
    """At the price of the whole model, and then in what still fits."""
    unspent = {}
    for within in PARTS:
        policy = reinforce(n=KINDS, mode="uniform", budget=1.5, within=within)
        spent = []
        for step in range(40):
            r, _ = policy.draw(step, inputs(KINDS))
            values = np.round(1.0986 - gumbel(step, KINDS), 9)  # −log ⅓
            limit = 1.5 * SIZES[:KINDS].sum()
            _, ranks = smallest_price(values, COSTS[:KINDS], limit)
            if within == "layer":
                ranks = filled(values, COSTS[:KINDS], limit, ranks)
            np.testing.assert_array_equal(r.numpy(), ranks)
            spent.append(COSTS[np.arange(KINDS), ranks].sum())
        unspent[within] = 1 - np.mean(spent) / limit
    assert unspent["layer"] < unspent["model"] / 2


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
    found, price = together(costs, 1.6 * n).allocate(-(torch.from_numpy(np.log(p)) + noise))
    tilted = p * np.exp(-float(price) * np.array([0.0, 2.0, 4.0]))
    tilted /= tilted.sum()
    shares = np.bincount(found.numpy(), minlength=3) / n
    np.testing.assert_allclose(shares, tilted, atol=4 * 0.5 / np.sqrt(n))
    assert shares @ [0, 2, 4] == pytest.approx(1.6, abs=0.01)


@pytest.mark.parametrize("within", PARTS)
def test_known_rewards_are_priced_for_the_budget(within):
    """R̄(r, s) + μ r size with the μ ≥ 0 at which argmin_r min_s meets it, by its largest entry, is
    expected of the tilted policy."""
    options = {**LITERAL, "credit": "counterfactual", "advantage": "normalised", "budget": 1.5,
               "within": within}  # fmt: skip
    policy, features = reinforce(**options), inputs()
    R = -np.abs(np.random.default_rng(0).normal(size=(UNITS, 3, 3)))
    R[:, 0] = 0
    if within == "layer":  # no component of the second layer is worth anything: it pays nothing
        R[KINDS:] *= -1
    before = parameters(policy)
    logs = rounded_logs(policy, features, within)
    of_draw, _ = by_part(within, np.round(-logs - gumbel(0), 9), 1.5)
    policy.draw(0, features)
    policy.learn(torch.from_numpy(R))
    prices = by_part(within, R.min(2), 1.5)[0].clip(0)
    assert prices.tolist() == (
        [prices[0]] * KINDS + [0.0 if within == "layer" else prices[0]] * KINDS
    )
    priced = R + (prices[:, None] * COSTS)[:, :, None]
    priced /= np.abs(priced).max((1, 2), keepdims=True)
    x = features.double().numpy()

    def objective(Ω):
        p_r, p_s = probabilities(Ω, x, PARTS[within])
        return np.einsum("ur,us,urs->u", tilted(p_r, of_draw), p_s, priced).mean()

    check_step(before, parameters(policy), objective, 2.0)


@pytest.mark.parametrize("within", PARTS)
def test_eq_10_is_of_the_tilted_policy(within):
    options = {**LITERAL, "credit": "attributed", "budget": 1.5, "within": within}
    policy, features = reinforce(**options), inputs()
    R = np.random.default_rng(0).normal(size=(2, UNITS))
    policy.draw(0, features)
    policy.learn(torch.from_numpy(R[0]))
    before = parameters(policy)
    r, s = (index.numpy() for index in policy.draw(1, features))
    logs = rounded_logs(policy, features, within)
    prices, _ = by_part(within, np.round(-logs - gumbel(1), 9), 1.5)
    assert len(set(prices)) == len(PARTS[within])
    policy.learn(torch.from_numpy(R[1]))
    x, n = features.double().numpy(), np.arange(UNITS)

    def objective(Ω):
        p_r, p_s = probabilities(Ω, x, PARTS[within])
        p_r = tilted(p_r, prices)
        log_p = np.log(p_r[n, r]) + np.where(r > 0, np.log(p_s[n, s]), 0)
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


@pytest.mark.parametrize("within", PARTS)
@pytest.mark.parametrize("best", [1, 2, 4])
def test_a_small_budget_goes_to_what_is_worth_most(best, within):
    """Sizes, number of features and likeness of features as of a Llama's blocks. Most matrices are
    to have nothing, and yet what all have in common does not hide which one is worth most: soon
    nearly every draw gives it components."""
    layers, sizes = 6, torch.tensor([1152, 768, 768, 1152, 2112, 2112, 2112])
    kinds = len(sizes)
    kind = torch.arange(layers * kinds) % kinds
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 2, size=300) + 0.1 * rng.normal(size=(layers * kinds, 300))
    budget = 2 * float(sizes[best] / sizes.sum()) * 1.01
    policy = Reinforce(
        PolicyOptions(credit="counterfactual", budget=budget, within=within),
        layer=torch.arange(layers * kinds) // kinds, kind=kind, features=300, ranks=[0, 2],
        locations=3, sizes=sizes[kind], seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    features = torch.from_numpy(features).float()
    worth = np.where(kind.numpy() == best, 2.0, 1.0) * sizes[kind].numpy()
    drawn = []
    for step in range(20):
        drawn.append(policy.draw(step, features)[0].numpy())
        noisy = worth[:, None] * rng.uniform(0.8, 1.2, size=(len(kind), 1)) * np.array([0, 2])
        policy.learn(torch.from_numpy(-np.repeat(noisy[:, :, None], 3, 2)))
    assert np.mean(drawn[5:], axis=0)[kind == best].mean() > 0.95
    ranks, _ = policy.most_probable(features)
    np.testing.assert_array_equal(ranks.numpy(), kind.numpy() == best)


@pytest.mark.parametrize("within", PARTS)
def test_ranks_are_equal_where_all_gain_alike_and_less_with_every_component(within):
    """What all units have in common over the ranks, but for a slope, is learned too."""
    policy = reinforce(credit="counterfactual", budget=2.0, within=within)
    features, rng = inputs(), np.random.default_rng(0)
    gain = SIZES[:, None] * np.sqrt(RANKS)
    for step in range(40):
        policy.draw(step, features)
        noisy = gain * rng.uniform(0.9, 1.1, size=(UNITS, 1))
        policy.learn(torch.from_numpy(-np.repeat(noisy[:, :, None], 3, 2)))
    assert np.array(RANKS)[policy.most_probable(features)[0].numpy()].tolist() == [2] * UNITS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": {"budget": 9}}, r"policy.budget: 9 given; accepted: 0 to 8"),
        ({"ranks": [2, 4], "policy": {"budget": 1}}, r"policy.budget: 1 given; accepted: 2 to 4"),
        ({"policy": {"budget": 2, "cost": 1e-3}}, r"policy.cost: 0.001 given with policy.budget"),
        (
            {"policy": {"within": "layer"}},
            r"policy.within: layer given without method.policy.budget; accepted: with it",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Bench("lelora", options, shapes=[(40, 40)])


def test_every_layer_of_a_method_meets_the_budget():
    policy = {"budget": 1.5, "within": "layer", "freeze_after": 6}
    options = {"ranks": RANKS, "coordinates": "delta", "policy": policy}
    shapes = [(16, 20), (24, 17), (32, 20), (16, 40), (16, 20), (24, 40)]
    bench = Bench("lelora", options, shapes=shapes)
    bench.run(8)
    drawn = [d.ranks for d in bench.decisions if d is not None]
    assert len(drawn) == 7 and len({tuple(ranks.values()) for ranks in drawn}) > 2
    for layer in range(3):
        sizes = {u.name: u.size for u in bench.units if u.layer == layer}
        for ranks in drawn:
            left = 1.5 * sum(sizes.values()) - sum(ranks[name] * sizes[name] for name in sizes)
            assert 0 <= left < 2 * min((sizes[n] for n in sizes if ranks[n] < 4), default=np.inf)


@pytest.mark.parametrize(
    ("credit", "within"),
    [("counterfactual", "model"), ("attributed", "model"), ("attributed", "layer")],
)
def test_resume(credit, within):
    def make(begin):
        policy = {"budget": 1.5, "credit": credit, "within": within}
        options = {"ranks": RANKS, "coordinates": "delta", "policy": policy}
        return Bench("lelora", options, shapes=[(16, 20), (24, 17)] * 2, begin=begin)

    check_resume(make, 3, 4)
