"""Coordinates of LeLoRA's banks, and rewards per length of the step, against NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from adapters.factors import lora_factors
from adapters.methods.lelora.reinforce import Reinforce
from adapters.methods.lelora.rewards import counterfactual
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    array,
    assert_near,
    bits,
    check_resume,
    twins,
)
from tests.unit.adapters.methods.lelora.banks import PLACES, RANKS, SHAPES, held

COORDINATES = ["singular", "balanced", "delta"]

each = pytest.mark.parametrize("coordinates", COORDINATES)


def bench_of(coordinates, policy=None, **settings):
    options = {
        "ranks": settings.pop("ranks", RANKS), "locations": settings.pop("locations", PLACES),
        "coordinates": coordinates, "wake": settings.pop("wake", "gradual"),
        "policy": policy or {}, "alpha": settings.pop("alpha", 8.0),
    }  # fmt: skip
    return Bench("lelora", options, shapes=SHAPES, **settings)


@pytest.mark.parametrize("coordinates", ["balanced", "delta"])
def test_the_start(coordinates):
    bench = bench_of(coordinates)
    for unit in bench.units:
        W, adapter = bench.W[unit.name], bench.adapters[unit.name]
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        indices = held(unit, PLACES)
        A, g, B = array(adapter.A), array(adapter.g), array(adapter.B)
        frozen = array(bench.adapted_layers[unit.name].weight)
        if coordinates == "balanced":
            triplets = S[indices, None, None] * U.T[indices, :, None] * Vh[indices, None, :]
            np.testing.assert_allclose(B[:, :, None] * A[:, None, :], triplets, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.sqrt(S[indices]), atol=1e-5)
            np.testing.assert_allclose(frozen, W - triplets.sum(0), atol=1e-5)
            assert (g == 1).all()
        else:
            cosines = np.einsum("ri,ri->r", A, Vh[indices]) * math.sqrt(3)
            np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
            assert not B.any() and (g == 8.0 / 4).all() and (frozen == W).all()
        assert not adapter.g.requires_grad
        expected = bench.x[unit.name] @ W.T
        np.testing.assert_allclose(array(bench.output(unit.name)), expected, atol=5e-5)


def test_rows_of_a_are_as_long_as_loras():
    torch.manual_seed(0)
    drawn = nn.init.kaiming_uniform_(torch.empty(2000, 50), a=math.sqrt(5))
    adapter = bench_of("delta").adapter(0)
    expected = float(drawn.square().sum(1).mean())  # its standard error is 0.4 % of it
    np.testing.assert_allclose(adapter.A.detach().square().sum(1).numpy(), expected, rtol=0.02)


@pytest.mark.parametrize("coordinates", ["balanced", "delta"])
def test_training_is_numpy_s(coordinates):
    """Decay pulls to the start where W was split, else to 0 as LoRA's."""
    bench = bench_of(coordinates, weight_decay=0.3, learning_rate=5e-3)
    references = twins(bench)
    optimizer = AdamW(
        5e-3, weight_decay=0.3, no_bias_correction=True, to_start=coordinates == "balanced"
    )
    for _ in range(8):
        bench.decide()
        bench.backward()
        bench.update()
        for index, twin in enumerate(references):
            active = bench.adapter(index).mask.numpy()
            gradients = twin.gradients()
            for role in ("A", "B"):
                optimizer.update((index, role), getattr(twin, role), gradients[role], active)
    for index, twin in enumerate(references):
        for role in ("A", "B"):
            assert_near(getattr(bench.adapter(index), role), getattr(twin, role), 2e-3)
    assert bench.method.scalars()["touched_parameters"] == sum(
        (row.any(1).sum() * (unit.in_features + unit.out_features)).item()
        for unit in bench.units
        for row in [torch.from_numpy(optimizer.state[unit.index, "B"][2] > 0).unsqueeze(1)]
    )


def test_decay_keeps_a_part_of_w_that_has_no_gradient():
    bench = bench_of("singular", {"mode": "uniform"}, weight_decay=0.5, noise=0.0)
    before = {name: bits(adapter.A) for name, adapter in bench.adapters.items()}
    for _ in range(3):  # as if the loss were at its minimum
        bench.decide()
        bench.update()
    assert all(torch.equal(bits(a.A), before[name]) for name, a in bench.adapters.items())


def test_one_fixed_slice_of_delta_is_lora_with_these_directions():
    settings = {"weight_decay": 0.1, "learning_rate": 5e-3}
    ours = bench_of("delta", ranks=[4], locations=["medium"], wake="at_once", **settings)
    lora = Bench("lora", {"rank": 4, "alpha": 8.0}, shapes=SHAPES, **settings)
    for unit in ours.units:
        lora.adapters[unit.name].A.data.copy_(ours.adapters[unit.name].A.detach())
    ours.run(6)
    lora.run(6)
    for unit in ours.units:
        for role in ("A", "g", "B"):
            pair = (getattr(b.adapters[unit.name], role) for b in (ours, lora))
            torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_delta_exports_what_was_touched():
    bench = bench_of("delta", {"mode": "uniform"})
    bench.run(3)
    touched = 0
    for unit in bench.units:
        adapter = bench.adapters[unit.name]
        A, B = lora_factors(adapter, bench.initial_adapters[unit.name].adapter)
        assert A.shape[0] == B.shape[1] == int(bench.method._touched[unit.index].sum())
        torch.testing.assert_close(B @ A, adapter.delta(), rtol=1e-5, atol=1e-7)
        touched += A.shape[0]
    assert 0 < touched < 12 * len(bench.units)


def unit_step(G, step):
    """Adam's first step, or one along the gradient, without their sign."""
    G = np.atleast_1d(G)
    if step == "adam":
        return np.where(G > 0, 1.0, np.where(G < 0, -1.0, 0.0))
    rms = np.sqrt((G**2).mean())
    return G / rms if rms else 0 * G


def lengths(now, gradients, j, step):
    """The three first-order parts of component j's change of W, as matrices, by unit steps."""
    A, g, B = now.A[j], now.g[j], now.B[j]
    along = {role: unit_step(gradients[role][j], step) for role in "AgB"}
    parts = [g * np.outer(along["B"], A), g * np.outer(B, along["A"])]
    return parts, along["g"] * np.outer(B, A)


@each
@pytest.mark.parametrize("score", ["loss", "per_step"])
@pytest.mark.parametrize("step", ["adam", "gradient"])
def test_counterfactual_rewards(coordinates, score, step, monkeypatch):
    """Worth of each component over the roles that train, per length of the slice's step."""
    found = []
    learn = Reinforce.learn
    monkeypatch.setattr(
        Reinforce, "learn", lambda self, reward: found.append(reward.clone()) or learn(self, reward)
    )
    bench = bench_of(coordinates, {"score": score, "step": step})
    roles = ["A", "g", "B"] if coordinates == "singular" else ["A", "B"]
    expected, before = [], None
    for number in range(4):
        bench.batch = slice(6 * number, 6 * number + 6)
        now = twins(bench)
        gradients = [twin.gradients(bench.batch) for twin in now]
        if before is not None:
            table = np.zeros((4, 3, 3))
            for u, (twin, G, later) in enumerate(zip(*before, gradients, strict=True)):
                for (a, r), (b, s) in itertools.product(enumerate(RANKS), enumerate(PLACES)):
                    first = 4 * b + (4 - r if s == "minor" else 0)
                    worth = squares = 0.0
                    for j in range(first, first + r):
                        for role in roles:
                            worth -= (unit_step(G[role][j], step) * later[role][j]).sum()
                        parts, of_gate = lengths(twin, G, j, step)
                        parts += [of_gate] if "g" in roles else []
                        squares += sum((part**2).sum() for part in parts)
                    length = np.sqrt(squares) if score == "per_step" else 1.0
                    table[u, a, b] = worth / length if r else 0.0
            expected.append(table)
        before = now, gradients
        bench.step()
    assert len(found) == 2
    for reward, reference in zip(found, expected, strict=False):
        np.testing.assert_allclose(
            reward.numpy(), reference, rtol=2e-3, atol=2e-4 * np.abs(reference).max()
        )


@pytest.mark.parametrize("step", ["adam", "gradient"])
def test_a_gradient_that_is_not_finite_promises_nothing(step):
    """Only its own component: of an idle one it does not skip the step."""
    bench = bench_of("delta")
    bench.backward()
    gradient = bench.optimizer.trained_gradients.clone()
    gradient[0] = torch.inf
    found = counterfactual(bench.optimizer, gradient, bench.units, step)
    assert found[0, 0].isnan() and found.isfinite().sum() == found.numel() - 1


@each
def test_attributed_reward_per_step(coordinates, monkeypatch):
    """⟨∇L, Δθ⟩ / ‖δW‖ of what the update changed."""
    found = []
    learn = Reinforce.learn
    monkeypatch.setattr(
        Reinforce, "learn", lambda self, reward: found.append(reward.clone()) or learn(self, reward)
    )
    bench = bench_of(coordinates, {"credit": "attributed", "score": "per_step"}, weight_decay=0.2)
    expected, before = [], None
    for step in range(4):
        bench.batch = slice(6 * step, 6 * step + 6)
        now = twins(bench)
        if before is not None:
            rewards = []
            for twin, old in zip(now, before, strict=True):
                gradients = twin.gradients(bench.batch)
                change = {role: getattr(twin, role) - getattr(old, role) for role in "AgB"}
                reward = sum((gradients[role] * change[role]).sum() for role in "AgB")
                squares = 0.0
                for j in range(len(old.g)):
                    for part in (
                        old.g[j] * np.outer(change["B"][j], old.A[j]),
                        old.g[j] * np.outer(old.B[j], change["A"][j]),
                        change["g"][j] * np.outer(old.B[j], old.A[j]),
                    ):
                        squares += (part**2).sum()
                rewards.append(reward / np.sqrt(squares) if squares else 0.0)
            expected.append(rewards)
        before = now
        bench.step()
    assert len(found) == 2
    for reward, reference in zip(found, expected, strict=False):
        np.testing.assert_allclose(
            reward.numpy(), reference, rtol=3e-3, atol=1e-3 * np.abs(reference).max()
        )


@each
@pytest.mark.parametrize("credit", ["counterfactual", "attributed"])
def test_resume(coordinates, credit):
    def make(begin):
        policy = {"score": "per_step", "credit": credit}
        return bench_of(coordinates, policy, begin=begin)

    check_resume(make, 3, 4)


def test_current_gates_are_features_of_singular_coordinates_only():
    with pytest.raises(ValueError, match=r"method.policy.features: current given .*accepted: init"):
        bench_of("delta", {"features": "current"})
    points = 256
    widths = {c: bench_of(c).method.features().shape[1] for c in COORDINATES}
    assert widths == {"singular": 1 + points + 12, "balanced": 1 + points, "delta": 1 + points}
