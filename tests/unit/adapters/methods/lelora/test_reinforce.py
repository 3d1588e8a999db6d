"""LeLoRA's policy: eq. 10 by hand, baselines, prices; and that REINFORCE learns a bandit."""

import numpy as np
import pytest
import torch

from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.reinforce import Reinforce
from tests.unit.adapters.methods.lelora.numpy_policy import (
    LITERAL,
    RANKS,
    SIZES,
    UNITS,
    check_step,
    inputs,
    log_p,
    parameters,
    probabilities,
    reinforce,
)

# --- eq. 10 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle_location", [False, True])
def test_eq_10_with_one_reward_for_all(idle_location):
    policy, features = reinforce(idle_location=idle_location, **LITERAL), inputs()
    policy.draw(0, features)
    policy.learn(torch.tensor([3.0], dtype=torch.float64))  # no baseline yet
    before = parameters(policy)
    drawn = [index.numpy() for index in policy.draw(1, features)]
    assert (drawn[0] == 0).any()
    policy.learn(torch.tensor([1.5], dtype=torch.float64))
    x = features.double().numpy()

    def objective(Ω):
        return (1.5 - 3.0) * log_p(Ω, x, drawn, idle_location).mean()

    check_step(before, parameters(policy), objective, 2.0)


def test_eq_10_with_a_reward_and_a_baseline_for_each_unit():
    policy, features = reinforce(**{**LITERAL, "credit": "attributed"}), inputs()
    rng = np.random.default_rng(0)
    R = rng.normal(size=(3, UNITS))
    for step in range(2):  # the first teaches nothing; the second moves Ω
        policy.draw(step, features)
        policy.learn(torch.from_numpy(R[step]))
    before = parameters(policy)
    drawn = [index.numpy() for index in policy.draw(2, features)]
    policy.learn(torch.from_numpy(R[2]))
    x, advantage = features.double().numpy(), R[2] - R[:2].mean(0)
    check_step(before, parameters(policy), lambda Ω: (advantage * log_p(Ω, x, drawn)).mean(), 2.0)


def test_the_gradient_is_that_of_the_policy_that_drew():
    """Two draws wait; when the second is learned, Ω has moved since it was drawn."""
    policy, features = reinforce(**{**LITERAL, "learning_rate": 20.0}), inputs()
    policy.draw(0, features)
    policy.learn(torch.tensor([0.0]))
    policy.draw(1, inputs(seed=1))
    drew = parameters(policy)
    x = inputs(seed=2)
    drawn = [index.numpy() for index in policy.draw(2, x)]
    policy.learn(torch.tensor([-2.0]))
    before = parameters(policy)
    assert any(np.abs(before[name] - drew[name]).max() > 1e-2 for name in drew)
    policy.learn(torch.tensor([1.0]))
    after = parameters(policy)
    advantage, x = 1.0 - (0.0 - 2.0) / 2, x.double().numpy()
    moved = {name: drew[name] + after[name] - before[name] for name in drew}
    check_step(drew, moved, lambda Ω: advantage * log_p(Ω, x, drawn).mean(), 20.0)


def test_the_entropy_bonus():
    policy, features = reinforce(**{**LITERAL, "entropy": 0.5}), inputs()
    policy.draw(0, features)
    policy.learn(torch.tensor([1.0]))
    before = parameters(policy)
    drawn = [index.numpy() for index in policy.draw(1, features)]
    policy.learn(torch.tensor([2.0]))
    x = features.double().numpy()

    def objective(Ω):
        entropy = sum(-(p * np.log(p)).sum(1).mean() for p in probabilities(Ω, x))
        return log_p(Ω, x, drawn).mean() - 0.5 * entropy

    check_step(before, parameters(policy), objective, 2.0)


@pytest.mark.parametrize("advantage", ["raw", "normalised"])
def test_counterfactual_descent(advantage):
    """Ω ← Ω − η (1/n) Σ_u ∇ Σ_a p(a) R̄_u(a), R̄ over the window, by its largest if normalised."""
    options = {**LITERAL, "credit": "counterfactual", "advantage": advantage, "baseline_window": 2}
    policy, features = reinforce(**options), inputs()
    tables = np.random.default_rng(0).normal(size=(3, UNITS, 3, 3))
    tables[:, :, 0] = 0
    for step in range(2):
        policy.draw(step, features)
        policy.learn(torch.from_numpy(tables[step]))
    before = parameters(policy)
    policy.draw(2, features)
    policy.learn(torch.from_numpy(tables[2]))
    mean = tables[1:].mean(0)
    if advantage == "normalised":
        mean = mean / np.abs(mean).max((1, 2), keepdims=True)
    x = features.double().numpy()

    def objective(Ω):
        p_r, p_s = probabilities(Ω, x)
        return np.einsum("ur,us,urs->u", p_r, p_s, mean).mean()

    check_step(before, parameters(policy), objective, 2.0)


def test_adam_is_torch_s():
    """The first step of Adam is η · sign of eq. 10's gradient."""
    policy, features = (
        reinforce(**{**LITERAL, "optimizer": "adam", "learning_rate": 1e-3}),
        inputs(),
    )
    policy.draw(0, features)
    policy.learn(torch.tensor([1.0]))
    before = parameters(policy)
    policy.draw(1, features)
    policy.learn(torch.tensor([2.0]))
    change = parameters(policy)["rank_head.weight"] - before["rank_head.weight"]
    strong = np.abs(change) > 5e-4
    assert strong.mean() > 0.3 and np.abs(np.abs(change[strong]) - 1e-3).max() < 1e-4


# --- baselines, advantages, prices -------------------------------------------------------------


def advantages(rewards, **options):
    """What each reward is multiplied with, read off the move of the rank head's bias: under SGD it
    is −η A_u/n (onehot − p), for one unit."""
    options = {**LITERAL, "credit": "attributed", "learning_rate": 1e-3, **options}
    policy, features = reinforce(n=1, ranks=[2, 4, 8], **options), inputs(1)
    found = []
    for step, reward in enumerate(rewards):
        Ω = parameters(policy)
        p = probabilities(Ω, features.double().numpy())[0][0]
        drawn = int(policy.draw(step, features)[0])
        policy.learn(torch.tensor([reward], dtype=torch.float64))
        change = parameters(policy)["rank_head.bias"] - Ω["rank_head.bias"]
        direction = np.eye(3)[drawn] - p
        found.append(-(change @ direction) / (direction @ direction) / 1e-3)
    return np.array(found)


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=count) + 5


@pytest.mark.parametrize("window", [1, 4, 20])
def test_baseline_is_the_mean_of_the_earlier_rewards(window):
    R = noise(12)
    expected = [0.0] + [R[t] - R[max(0, t - window) : t].mean() for t in range(1, 12)]
    np.testing.assert_allclose(
        advantages(R, baseline_window=window), expected, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("window", [4, 20])
def test_baseline_may_follow_the_trend(window):
    R = noise(12) - 0.7 * np.arange(12)
    expected = [0.0]
    for t in range(1, 12):
        earlier = R[max(0, t - window) : t]
        line = np.polyfit(np.arange(len(earlier)), earlier, 1 if len(earlier) > 2 else 0)
        expected.append(R[t] - np.polyval(line, len(earlier)))
    found = advantages(R, baseline_window=window, baseline="trend")
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_normalised_advantage_is_over_the_spread_of_the_earlier_rewards():
    R = noise(12) * 1e-3
    R[9] = 1.0  # no outlier rules: it is cut to 3
    found = advantages(R, advantage="normalised", baseline_window=5)
    expected = [0.0, 0.0]  # no spread is known yet
    for t in range(2, 12):
        earlier = R[max(0, t - 5) : t]
        expected.append(np.clip((R[t] - earlier.mean()) / earlier.std(ddof=1), -3, 3))
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)
    assert expected[9] == 3
    scaled = advantages(R * 1e6, advantage="normalised", baseline_window=5)
    np.testing.assert_allclose(scaled, found, rtol=1e-2, atol=1e-2)
    assert not advantages(np.full(6, 2.5), advantage="normalised").any()  # nothing varies


def test_a_reward_that_is_not_finite_drops_its_draw_only():
    R = noise(8)
    gaps = advantages([*R[:3], np.nan, *R[3:5], np.inf, *R[5:]])
    assert gaps[3] == gaps[6] == 0
    # the same baselines as without them (other draws, but the advantage does not depend on those)
    np.testing.assert_allclose(np.delete(gaps, [3, 6]), advantages(R), rtol=2e-3, atol=2e-3)


def test_a_unit_without_a_reward_learns_nothing_and_keeps_its_baseline():
    """An expert that saw no token: the others learn as if it had been told to stay as it is."""
    rng = np.random.default_rng(0)
    R = rng.normal(size=(6, UNITS))
    R[3, 1], R[4, 1] = np.nan, np.nan
    found = []

    class Spy(Reinforce):
        def _update(self, draw, advantage):
            found.append(advantage.numpy().copy())

    for baseline in ("mean", "trend"):
        found.clear()
        policy, features = (
            reinforce(kind=Spy, **{**LITERAL, "credit": "attributed", "baseline": baseline}),
            inputs(),
        )
        for step, rewards in enumerate(R):
            policy.draw(step, features)
            policy.learn(torch.from_numpy(rewards))
        assert (found[2][1], found[3][1]) == (0.0, 0.0)  # draws 3 and 4
        if baseline == "mean":
            expected = R[5] - np.nanmean(R[:5], 0)
            assert expected[1] == R[5, 1] - R[:3, 1].mean()
        else:
            line = np.polyfit([0, 1, 2], R[:3, 1], 1)
            np.testing.assert_allclose(found[4][1], R[5, 1] - np.polyval(line, 5), atol=1e-3)
            line = np.polyfit(range(5), R[:5, 0], 1)
            expected = np.full(UNITS, R[5, 0] - np.polyval(line, 5))
        np.testing.assert_allclose(found[4][0], expected[0], atol=1e-3)


def test_actions_of_a_unit_without_rewards_keep_their_logits():
    """The gradient is that of the other units alone."""
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(UNITS, len(RANKS), 3)))
    moved = []
    for unknown in (float("nan"), 0.0):
        policy, features = (
            reinforce(**{**LITERAL, "credit": "counterfactual", "advantage": "raw"}),
            inputs(),
        )
        policy.draw(0, features)
        holed = table.clone()
        holed[1] = unknown
        policy.learn(holed)
        moved.append(torch.cat([p.detach().flatten() for p in policy.network.parameters()]))
    assert torch.isfinite(moved[0]).all()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("credit", ["attributed", "global", "counterfactual"])
def test_a_price_for_every_parameter_that_trains(credit):
    policy, features = reinforce(**{**LITERAL, "credit": credit, "cost": 1e-3}), inputs()
    r, s = (index.numpy() for index in policy.draw(0, features))
    price = 1e-3 * np.array(RANKS)[r] * SIZES
    rng = np.random.default_rng(0)
    if credit == "global":
        policy.learn(torch.tensor([2.0], dtype=torch.float64))
        expected = 2.0 + price.sum()
    elif credit == "attributed":
        R = rng.normal(size=UNITS)
        policy.learn(torch.from_numpy(R))
        expected = (R + price).mean()
    else:
        R = rng.normal(size=(UNITS, 3, 3))
        policy.learn(torch.from_numpy(R))
        expected = (R[np.arange(UNITS), r, s] + price).mean()
    assert policy.scalars["reward"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("credit", ["attributed", "counterfactual"])
def test_the_price_is_rounded_as_in_earlier_versions(credit):
    """Of sampled rewards r · cost in float32; else cost · size before r: 3, not a power of two."""
    ranks, cost = [0, 2, 3], 1e-6
    policy = reinforce(**{**LITERAL, "credit": credit, "cost": cost}, ranks=ranks)
    r, _ = policy.draw(0, inputs())
    if credit == "attributed":
        expected = np.float64(np.float32(cost) * np.float32(ranks))[r.numpy()] * SIZES
        assert (expected != cost * (np.array(ranks)[r.numpy()] * SIZES)).any()
    else:
        expected = np.zeros((UNITS, 3, 3)) + (cost * SIZES)[:, None, None] * np.c_[ranks]
        assert (expected[..., 0] != cost * (np.outer(SIZES, ranks))).any()
    policy.learn(torch.zeros(expected.shape))
    np.testing.assert_array_equal(policy.state_dict()["earlier"][0].numpy(), expected)


def test_draws_follow_the_probabilities():
    policy, features = reinforce(mode="frozen"), inputs()
    policy.network.rank_head.bias.data.copy_(torch.tensor([1.0, 0.0, -1.0]))
    p_r, p_s = probabilities(parameters(policy), features.double().numpy())
    shown = [p.numpy() for p in policy.probabilities(features)[:2]]
    np.testing.assert_allclose(shown[0], p_r, rtol=1e-4)
    np.testing.assert_allclose(shown[1], p_s, rtol=1e-4)
    counts = np.zeros((UNITS, 3, 3))
    for step in range(600):
        r, s = policy.draw(step, features)
        counts[np.arange(UNITS), r.numpy(), s.numpy()] += 1
    expected = 600 * p_r[:, :, None] * p_s[:, None, :]
    assert ((counts - expected) ** 2 / expected).sum() < 85  # 6 · 8 degrees of freedom, 99.9 %


# --- REINFORCE learns --------------------------------------------------------------------------

CHOICES = [0, 2, 4, 8]


class Bandit:
    """4 layers x 7 matrix types. Each type has its own best (r, s), for one of them it is r = 0;
    rewards are a loss, noisy, and of another size in every unit."""

    def __init__(self, seed, noise):
        self.rng = np.random.default_rng(seed)
        self.kind = np.tile(np.arange(7), 4)
        actions = [(r, s) for r in (1, 2, 3) for s in range(3)]
        picked = [actions[i] for i in self.rng.permutation(9)[:6]] + [(0, 0)]
        self.best = np.array([picked[i] for i in self.rng.permutation(7)])[self.kind]
        scale = np.exp(self.rng.normal(size=28))
        self.mean = np.zeros((28, 4, 3))
        for unit, (best_r, best_s) in enumerate(self.best):
            for r, s in actions:
                if best_r == 0:
                    value = 0.3 + 0.7 * CHOICES[r] / 8
                else:
                    value = -1.0 if (r, s) == (best_r, best_s) else -0.1
                    value -= 0.3 * (s == best_s != best_r) * (value > -1) + 0.1 * (r == best_r)
                self.mean[unit, r, s] = value * scale[unit]
        self.deviation = noise * scale
        spectra = -np.sort(-self.rng.random((28, 280)), axis=1)
        norms = self.rng.uniform(0, 4, (28, 1))
        self.features = torch.from_numpy(np.concatenate([norms, spectra], 1)).float()

    def rewards(self):
        """Of all actions (28, 4, 3); r = 0 changes nothing, so there is no noise in it either."""
        noisy = self.mean + self.deviation[:, None, None] * self.rng.normal(size=(28, 4, 3))
        noisy[:, 0] = 0
        return noisy

    def probability_of_best(self, policy):
        p_r, p_s = (p.numpy() for p in policy.probabilities(self.features)[:2])
        n = np.arange(28)
        r, s = self.best.T
        return p_r[n, r] * np.where(r > 0, p_s[n, s], 1)


def learn(seed, steps, credit, sign=1, noise=0.5, **options):
    """(steps until every unit gives more than 90 % to its own best or None, final probabilities).

    A draw's reward is learned two draws later, as with `signal: next_batch`."""
    bandit = Bandit(seed, noise)
    policy = Reinforce(
        PolicyOptions(credit=credit, **options),
        layer=torch.arange(28) // 7, kind=torch.from_numpy(bandit.kind), features=281,
        ranks=CHOICES, locations=3, sizes=torch.ones(28), seed=seed, device=torch.device("cpu"),
    )  # fmt: skip
    waiting = []
    for step in range(steps):
        if len(waiting) == 2:
            policy.learn(waiting.pop(0))
        r, s = (index.numpy() for index in policy.draw(step, bandit.features))
        table = sign * bandit.rewards()
        if credit == "attributed":
            table = table[np.arange(28), r, s]
        waiting.append(torch.from_numpy(table))
        if step % 25 == 24:
            p = bandit.probability_of_best(policy)
            if p.min() > 0.9:
                return step + 1, p
    return None, p


@pytest.mark.parametrize("seed", range(5))
def test_the_defaults_learn_each_type_s_own_best(seed):
    options = PolicyOptions()
    needed, p = learn(seed, 400 if options.credit == "attributed" else 150, options.credit)
    assert needed is not None, f"lowest {p.min():.2g}, {(p > 0.9).mean():.0%} of units learned"


SAMPLED = {"credit": "attributed", "learning_rate": 1e-4, "entropy": 0.1}
"""One action's reward a step teaches less, so it takes smaller steps and more exploration."""


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_learns_each_type_s_own_best(seed):
    needed, p = learn(seed, 400, **SAMPLED)
    assert needed is not None, f"lowest {p.min():.2g}, {(p > 0.9).mean():.0%} of units learned"


@pytest.mark.parametrize("options", [{"credit": PolicyOptions().credit}, SAMPLED])
def test_with_the_sign_flipped_nothing_of_the_kind_is_learned(options):
    needed, p = learn(0, 75, **options, sign=-1)
    assert needed is None and np.median(p) < 0.05
