"""LeLoRA's policy network, its log-probabilities and its draws, against NumPy references."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adapters.methods.lelora.policy import (
    NETWORKS,
    PolicyNetwork,
    entropy,
    log_probability,
    sample,
    sparsemax,
)

SIZES = {"layers": 4, "kinds": 7, "features": 20, "ranks": 7, "locations": 3}

each_network = pytest.mark.parametrize("network", NETWORKS)


def policy(network, seed=0, **sizes):
    return PolicyNetwork(network, **{**SIZES, **sizes}, seed=seed)


def units(features=20, seed=0):
    """Every kind in every layer: (28,), (28,), (28, features), as log-norms and spectra are."""
    layer, kind = torch.cartesian_prod(torch.arange(4), torch.arange(7)).unbind(1)
    rng = np.random.default_rng(seed)
    spectra = -np.sort(-rng.random((28, features)), axis=1)
    spectra[:, 0] = rng.uniform(0, 6, 28)
    return layer, kind, torch.from_numpy(spectra).float()


@each_network
def test_shapes(network):
    rank_logits, location_logits = policy(network)(*units())
    assert rank_logits.shape == (28, 7) and location_logits.shape == (28, 3)
    assert rank_logits.dtype == location_logits.dtype == torch.float32


def test_unknown_network():
    with pytest.raises(ValueError, match="'cnn' is none of mlp, resnet, tabnet"):
        policy("cnn")


@each_network
def test_reproducible_by_seed_and_global_state_untouched(network):
    state = torch.get_rng_state()
    first = policy(network, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    with torch.device("meta"):  # a caller's default device is not followed either
        again = policy(network, seed=3).state_dict()
    other = policy(network, seed=4).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        random = value.dim() == 2
        assert torch.equal(value, other[name]) is not random, name


@each_network
def test_initial_values(network):
    network = policy(network, layers=50)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / module.in_features) ** 0.5 * (0.01 if name.endswith("head") else 1)
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any(), name
    assert network.layer.weight.std().item() == pytest.approx(1, abs=0.02)


@each_network
def test_a_row_does_not_see_the_others(network):
    network = policy(network)
    layer, kind, features = units()
    with torch.no_grad():
        whole = network(layer, kind, features)
        changed = network(layer.flip(0), kind.flip(0), torch.cat((features[:1], features[1:] * 9)))
        layer[1:], kind[1:], features[1:] = layer.flip(0)[1:], kind.flip(0)[1:], features[1:] * 9
        kept = network(layer, kind, features)
        alone = network(layer[:1], kind[:1], features[:1])
    for i in range(2):
        assert not torch.equal(whole[i], changed[i])
        assert torch.equal(whole[i][0], kept[i][0])
        torch.testing.assert_close(whole[i][0], alone[i][0], rtol=1e-4, atol=1e-6)


@each_network
@pytest.mark.parametrize("features", [0, 257])
def test_starts_near_uniform(network, features):
    for seed in range(3):
        inputs = units(max(features, 1), seed)
        logits = policy(network, seed, features=features)(*inputs[:2], inputs[2][:, :features])
        rank, location = map(entropy, logits)
        assert rank.min() > 0.9 * np.log(7) and location.min() > 0.9 * np.log(3)
        assert logits[0].std(0).min() > 0  # but not the same for all units


def test_parameters_of_the_mlp():
    embeddings, inputs = 200 * (4 + 7), 400 + 20
    hidden = (inputs + 1) * 1024 + (1024 + 1) * 256 + (256 + 1) * 64
    heads = (64 + 1) * (7 + 3)
    assert sum(p.numel() for p in policy("mlp").parameters()) == embeddings + hidden + heads


@each_network
def test_fits_one_class_per_kind(network):
    network, inputs = policy(network), units()
    rank, location = inputs[1], inputs[1] % 3
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(200):
        rank_logits, location_logits = network(*inputs)
        loss = F.cross_entropy(rank_logits, rank) + F.cross_entropy(location_logits, location)
        if loss < 0.3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    assert torch.equal(rank_logits.argmax(1), rank)
    assert torch.equal(location_logits.argmax(1), location)


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def test_log_probability_and_entropies():
    rng = np.random.default_rng(0)
    rank_logits, location_logits = rng.normal(size=(9, 5)) * 3, rng.normal(size=(9, 3)) * 3
    rank, location = rng.integers(0, 5, 9), rng.integers(0, 3, 9)
    p, q = softmax(rank_logits), softmax(location_logits)
    row, counts = np.arange(9), rank > 0
    expected = np.log(p[row, rank]) + np.where(counts, np.log(q[row, location]), 0)

    logits = [torch.tensor(x, requires_grad=True) for x in (rank_logits, location_logits)]
    drawn = [torch.from_numpy(x) for x in (rank, location)]
    actual = log_probability(*logits, *drawn, location_counts=torch.from_numpy(counts))
    np.testing.assert_allclose(actual.detach(), expected, rtol=1e-12)
    for value, reference in zip(map(entropy, logits), (p, q), strict=True):
        expected = -(reference * np.log(reference)).sum(1)
        np.testing.assert_allclose(value.detach(), expected, rtol=1e-12)

    actual.sum().backward()  # ∇ log p = onehot − p, and none where the location did not count
    np.testing.assert_allclose(logits[0].grad, np.eye(5)[rank] - p, atol=1e-12)
    gradient = (np.eye(3)[location] - q) * counts[:, None]
    np.testing.assert_allclose(logits[1].grad, gradient, atol=1e-12)


def test_sampling_frequencies():
    p = np.array([0.5, 0.0, 0.3, 0.15, 0.0499997, 3e-7])
    n = 200_000
    draws = torch.from_numpy(np.random.default_rng(0).random(n))
    drawn = sample(torch.from_numpy(p).expand(n, -1), draws)
    counts = np.bincount(drawn, minlength=6)
    assert counts[1] == counts[5] == 0  # the last one is rounded to 0
    expected = n * p[p > 1e-6]
    chi_square = ((counts[p > 1e-6] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, 99.9 %


def test_extreme_draws():
    p = torch.tensor([[0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    last = 1 - 2.0**-53
    for draw, expected in ((0.0, [1, 0, 3]), (last, [2, 0, 3]), (0.25, [2, 0, 3])):
        drawn = sample(p, torch.full((3,), draw, dtype=torch.float64))
        assert drawn.tolist() == expected and drawn.dtype == torch.int64
    p = torch.softmax(torch.randn(1000, 9) * 4, 1)  # rows whose rounded sum is not 1
    for draw in (0.0, last):
        drawn = sample(p, torch.full((1000,), draw, dtype=torch.float64))
        assert (p.gather(1, drawn[:, None]) > 4.9e-7).all()


def test_last_bits_do_not_change_a_draw():
    p = torch.softmax(torch.randn(5000, 7), 1)
    noisy = p * (1 + 1e-7 * torch.randn_like(p))
    draws = torch.rand(5000, dtype=torch.float64)
    assert not torch.equal(p, noisy)
    assert torch.equal(sample(p, draws), sample(noisy, draws))


def test_sampling_refuses():
    half = torch.full((2, 2), 0.5)
    for probabilities, draws, message in (
        (half, [0.1], r"\(1,\) draws for \(2, 2\)"),
        (half, [0.1, 1.0], r"\[0, 1\)"),
        (half, [0.1, float("nan")], r"\[0, 1\)"),
        (half * float("nan"), [0.1, 0.1], "finite"),
        (-half, [0.1, 0.1], "negative"),
        (half * 0, [0.1, 0.1], "zero"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(probabilities, torch.tensor(draws, dtype=torch.float64))


def nearest_on_the_simplex(z):
    """Of all supports that give a point of the simplex, the one nearest to z."""
    best = None
    for support in chain.from_iterable(combinations(range(len(z)), k + 1) for k in range(len(z))):
        point = np.zeros(len(z))
        index = list(support)
        point[index] = z[index] - (z[index].sum() - 1) / len(index)
        if (point >= 0).all() and (best is None or ((point - z) ** 2).sum() < best[0]):
            best = ((point - z) ** 2).sum(), point
    return best[1]


def test_sparsemax():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(10, 6)) * scale for scale in (0.01, 0.3, 1, 10)])
    rows = np.concatenate([rows, np.zeros((1, 6)), np.round(rows[20:30])])  # ties
    actual = sparsemax(torch.from_numpy(rows))
    np.testing.assert_allclose(actual, [nearest_on_the_simplex(z) for z in rows], atol=1e-12)
    wide = sparsemax(torch.randn(50, 600) * torch.logspace(-3, 9, 50)[:, None])
    assert (wide >= 0).all()
    torch.testing.assert_close(wide.sum(1), torch.ones(50))
    assert torch.autograd.gradcheck(sparsemax, torch.randn(5, 6).double().requires_grad_())
