"""LeLoRA's policy in NumPy, in float64, and policies like it to compare with."""

import numpy as np
import pytest
import torch

from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.reinforce import Reinforce

LAYERS, KINDS, FEATURES = 2, 3, 6
RANKS = [0, 2, 4]
UNITS = LAYERS * KINDS
SIZES = np.array([37, 42, 30, 37, 42, 30])

LITERAL = {
    "credit": "global", "optimizer": "sgd", "advantage": "raw", "entropy": 0.0,
    "learning_rate": 2.0,
}  # fmt: skip


def reinforce(seed=0, n=UNITS, ranks=RANKS, kind=Reinforce, **options):
    return kind(
        PolicyOptions(**options),
        layer=torch.arange(n) // KINDS, kind=torch.arange(n) % KINDS, features=FEATURES,
        ranks=ranks, locations=3, sizes=torch.from_numpy(SIZES[:n]), seed=seed,
        device=torch.device("cpu"),
    )  # fmt: skip


def inputs(n=UNITS, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, FEATURES))).float()


# --- the policy in NumPy, in float64 -----------------------------------------------------------


def parameters(policy):
    return {
        name: p.detach().double().numpy().copy() for name, p in policy.network.named_parameters()
    }


def softmax(z):
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def probabilities(Ω, features, parts=()):
    """Embeddings and features, 1024, 256 and 64 ReLUs, two softmax heads; with a budget the logits
    of ranks are less the mean slope along the rank of the units of each of its parts."""
    index = np.arange(len(features))
    h = np.concatenate(
        [Ω["layer.weight"][index // KINDS], Ω["kind.weight"][index % KINDS], features], 1
    )
    for stage in (0, 2, 4):
        h = np.maximum(h @ Ω[f"body.{stage}.weight"].T + Ω[f"body.{stage}.bias"], 0)
    ranks, locations = (
        h @ Ω[f"{head}_head.weight"].T + Ω[f"{head}_head.bias"] for head in ("rank", "location")
    )
    for units in parts:
        slopes = [np.polyfit(RANKS, z, 1)[0] for z in ranks[units]]
        ranks[units] -= np.mean(slopes) * np.array(RANKS)
    return softmax(ranks), softmax(locations)


def log_p(Ω, features, drawn, idle_location=False):
    """log p_r + log p_s; the latter is left out where r = 0 was drawn."""
    p_r, p_s = probabilities(Ω, features)
    r, s = drawn
    n = np.arange(len(r))
    counts = (np.array(RANKS)[r] > 0) | idle_location
    return np.log(p_r[n, r]) + np.where(counts, np.log(p_s[n, s]), 0)


def check_step(before, after, objective, learning_rate, entries=6):
    """Ω moved by −η ∇ objective, by central differences at the largest moves of every tensor."""
    rng = np.random.default_rng(0)
    checked = 0
    for name, value in before.items():
        change = after[name] - value
        flat = np.argsort(-np.abs(change).ravel())[:entries]
        flat = np.concatenate([flat, rng.integers(0, value.size, 2)])
        for place in flat:
            index = np.unravel_index(place, value.shape)
            kept = value[index]
            value[index] = kept + 1e-5
            above = objective(before)
            value[index] = kept - 1e-5
            below = objective(before)
            value[index] = kept
            expected = -learning_rate * (above - below) / 2e-5
            assert change[index] == pytest.approx(expected, rel=5e-3, abs=1e-6), name
            checked += expected != 0
    assert checked > 20
