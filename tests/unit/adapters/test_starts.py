"""Sketches of layers and the mathematics of data-driven starts, against NumPy."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from adapters.layers.experts import StackedLinear, adapted_experts
from adapters.layers.linear import AdaptedLinear
from adapters.layers.sketch import Sketch
from adapters.methods.options import DoRAOptions, LaLoRAOptions, LoRAOptions
from adapters.starts import centred, distribute, explained, gains, orthonormal, right_vectors

IN, OUT, K = 12, 8, 5


def linear(fmt="none"):
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(IN, OUT, bias=False), "none")
    layer.weight.requires_grad_(False)
    return layer


def spectrum(rng, tokens=40):
    """(x, dy, P): inputs with a mean and a falling spectrum; some tokens do not reach the loss."""
    x = rng.normal(size=(tokens, IN)) * 0.7 ** np.arange(IN) + rng.normal(size=IN)
    dy = rng.normal(size=(tokens, OUT))
    dy[::4] = 0
    P = np.linalg.qr(rng.normal(size=(IN, K)))[0].T
    return tuple(a.astype(np.float32) for a in (x, dy, P))


def test_a_layer_sums_the_tokens_that_reach_the_loss():
    layer, (x, dy, P) = linear(), spectrum(np.random.default_rng(0))
    kept = x[dy.any(1)].astype(float)
    expected = {
        ("input", "input"): P @ kept.T @ kept,
        ("input", "gradient"): P @ x.T @ dy,
        ("gradient", "input"): P[:, :OUT] @ dy.T @ x,
    }
    for (left, right), sums in expected.items():
        test = torch.from_numpy(P if left == "input" else np.ascontiguousarray(P[:, :OUT]))
        layer.sketch = Sketch(test, left, right, IN, sums.shape[1])
        for rows in (slice(0, 24), slice(24, None)):  # two micro-batches
            layer(torch.from_numpy(x[rows]).unsqueeze(0)).backward(
                torch.from_numpy(dy[rows]).unsqueeze(0)
            )
        np.testing.assert_allclose(layer.sketch.sums, sums, rtol=1e-4, atol=1e-4)
        assert int(layer.sketch.count) == len(kept)
        np.testing.assert_allclose(layer.sketch.total, kept.sum(0), rtol=1e-6)
        assert float(layer.sketch.energy) == pytest.approx((kept**2).sum(), rel=1e-6)


def test_each_expert_sums_its_own_tokens():
    rng = np.random.default_rng(1)
    x, dy, P = spectrum(rng, tokens=32)
    stack = StackedLinear(nn.Parameter(torch.randn(4, OUT, IN), requires_grad=False), "none")
    ends = [8, 8, 24, 32]  # the second sees none
    for layer in stack.layers:
        layer.sketch = Sketch(torch.from_numpy(P), "input", "gradient", IN, OUT)
    rows = torch.from_numpy(x).requires_grad_()
    y = adapted_experts(rows, torch.tensor(ends, dtype=torch.int32), stack.handle, OUT)
    y.backward(torch.from_numpy(dy))
    start = 0
    for layer, stop in zip(stack.layers, ends, strict=True):
        own = slice(start, stop)
        np.testing.assert_allclose(layer.sketch.sums, P @ x[own].T @ dy[own], rtol=1e-4, atol=1e-4)
        assert int(layer.sketch.count) == dy[own].any(1).sum()
        start = stop


def test_directions_shares_and_gains_are_those_of_the_centred_inputs():
    rng = np.random.default_rng(2)
    x, dy, P = spectrum(rng, tokens=400)
    kept = x[dy.any(1)].astype(float)

    def sketch(rows):
        made = Sketch(rows, "input", "input", IN, IN)
        made.add(torch.from_numpy(x), torch.from_numpy(dy))
        return made

    test = torch.from_numpy(P)
    for _ in range(12):  # to convergence
        found = sketch(test)
        sums = centred(found)
        test = orthonormal(sums)
    A, values = right_vectors(sums, 3)
    about_mean = kept - kept.mean(0)
    _, S, V = np.linalg.svd(about_mean, full_matrices=False)
    np.testing.assert_allclose(np.abs(A.double().numpy() @ V[:3].T), np.eye(3), atol=1e-4)
    assert all(row[row.abs().argmax()] > 0 for row in A)
    shares = explained(values, found, center=True)
    np.testing.assert_allclose(shares, S[:3] ** 2 / (about_mean**2).sum(), rtol=1e-4)
    uncentred = np.sqrt(((kept @ A.double().numpy().T) ** 2).mean(0))
    kaiming = np.sqrt((kept**2).sum(1).mean() / (3 * IN))  # of rows uniform in ±1/√in
    np.testing.assert_allclose(gains(sketch(A)), uncentred / kaiming, rtol=1e-4)


def test_two_passes_are_near_the_best_approximation_of_a_gradient():
    """Halko et al. 2011, theorem 10.5, on the mean of ten draws."""
    rng = np.random.default_rng(3)
    G = np.linalg.qr(rng.normal(size=(60, 60)))[0] * 0.9 ** np.arange(60)
    G = G @ np.linalg.qr(rng.normal(size=(80, 60)))[0].T
    r, errors = 8, []
    for _ in range(10):
        first = rng.normal(size=(2 * r, 80)) @ G.T
        second = orthonormal(torch.from_numpy(first)).double().numpy() @ G
        A, _ = right_vectors(torch.from_numpy(second), 2 * r)
        V = A.double().numpy()
        errors.append(np.linalg.norm(G - G @ V.T @ V))
    best = np.sqrt((0.9 ** (2 * np.arange(r, 60))).sum())
    assert np.mean(errors) <= best * np.sqrt(1 + r / (r - 1))


@pytest.mark.parametrize("mean", [1, 2.5, 4])
def test_ranks_take_the_largest_worth_of_their_cost_within_the_budget(mean):
    rng = np.random.default_rng(4)
    worths = -np.sort(-rng.random((6, 5)), axis=1)
    costs = [3, 1, 1, 2, 1, 2]
    ranks = distribute(worths.tolist(), costs, mean)
    budget = mean * sum(costs)
    spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
    assert budget - max(costs) < spent <= budget
    cheapest_taken = min(worths[u, r - 1] / costs[u] for u, r in enumerate(ranks) if r)
    for unit, rank in enumerate(ranks):
        if rank < 5 and spent + costs[unit] <= budget:
            raise AssertionError("a component that fits was left out")
        if rank < 5 and costs[unit] == 1:  # one that was left out is worth no more than any taken
            assert worths[unit, rank] <= cheapest_taken


def test_equal_worths_go_to_the_first_units():
    assert distribute([[0.5, 0.5], [0.5, 0.5], [0.5000000001, 0.5]], [1, 1, 1], 1) == [2, 1, 0]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (LoRAOptions, {"start_options": {"batches": 2}}, "start_options.batches: given with"),
        (LoRAOptions, {"start": "gradient", "start_options": {"passes": 3}}, "an even number"),
        (LoRAOptions, {"start": "gradient", "start_options": {"center": True}}, "center: given"),
        (LoRAOptions, {"start": "activation", "start_options": {"rho": 3.0}}, "rho: given with"),
        (DoRAOptions, {"start": "gradient", "start_options": {"ranks": "redistributed"}}, "=dora"),
        (LaLoRAOptions, {"start": "gradient", "start_options": {"scale": "output"}}, "=lalora"),
        (LoRAOptions, {"start": "random"}, "activation"),
    ],
)  # fmt: skip
def test_options_without_an_effect_are_refused(cls, options, message):
    with pytest.raises(ValidationError, match=message):
        cls(**options)
