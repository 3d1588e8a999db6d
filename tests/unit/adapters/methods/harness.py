"""Drives a method as the training loop does, on a few linear layers, beside a NumPy reference.

Every unit is a linear layer with its own inputs and targets. The loss is the sum of the units'
½ · mean over records of ‖y − t‖², so that gradients are a line each by hand (`Twin`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters.decision import Decision
from adapters.layers.linear import AdaptedLinear
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.registry import METHODS
from adapters.optimizer import MaskedAdamW
from adapters.spectral import singular_triplets
from adapters.unit import Unit
from trainer.engine.base import Update
from trainer.training.step import gradients_and_decision, observed_update

SHAPES = [(12, 10), (8, 14), (12, 10), (8, 14)]
"""(out, in) of two kinds of matrices in two layers."""


def make_units(shapes: Sequence[tuple[int, int]] = SHAPES, per_layer: int = 2) -> list[Unit]:
    """Units of `per_layer` kinds in each layer."""
    return [
        Unit(
            i, f"layers.{i // per_layer}.k{i % per_layer}", i // per_layer, f"k{i % per_layer}", *s
        )
        for i, s in enumerate(shapes)
    ]


def no_validation(bench: "Bench", gradients: bool) -> float:
    raise AssertionError("the method validated, though its options need no validation")


def array(tensor: torch.Tensor) -> np.ndarray:
    """A copy in float64."""
    return tensor.detach().double().numpy().copy()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that compares bit by bit."""
    return tensor.detach().clone().view(torch.int32)


class Bench:
    """A method on its units, its optimizer, and the order of calls of `trainer/training/step.py`."""

    def __init__(
        self,
        kind: str,
        options: dict[str, Any] | None = None,
        *,
        seed: int = 0,
        shapes: Sequence[tuple[int, int]] = SHAPES,
        per_layer: int = 2,
        records: int = 24,
        steps: int = 100,
        rate: Callable[[int], float] = lambda step: 1.0,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        max_norm: float | None = None,
        validate: Callable[["Bench", bool], float] = no_validation,
        begin: bool = True,
        noise: float = 0.3,
    ):
        rng = np.random.default_rng(seed)
        self.units = make_units(shapes, per_layer)
        self.W, self.x, self.t = {}, {}, {}
        for unit in self.units:
            W = rng.normal(size=(unit.out_features, unit.in_features)) / unit.in_features**0.5
            x = rng.normal(size=(records, unit.in_features))
            change = rng.normal(size=W.shape) * noise
            self.W[unit.name] = W.astype(np.float32).astype(np.float64)
            self.x[unit.name] = x.astype(np.float32).astype(np.float64)
            self.t[unit.name] = (x @ (W + change).T).astype(np.float32).astype(np.float64)
        method = METHODS[kind]
        self.options = method.Options(kind=kind, **(options or {}))
        self.options.check_units(self.units)
        self.method: Method = method(self.options, seed)
        self.adapted_layers = {unit.name: self._host(unit) for unit in self.units}
        initial_adapters = self._split() if method.splits_weight else None
        self.method.attach(self.units, self.adapted_layers, torch.device("cpu"), initial_adapters)
        self.initial_adapters = initial_adapters
        self.optimizer = MaskedAdamW(
            self.method.adapters.trainables(), learning_rate=learning_rate, betas=betas,
            weight_decay=weight_decay, no_bias_correction=self.method.no_bias_correction,
        )  # fmt: skip
        self.max_norm, self.validate = max_norm, partial(validate, self)
        self.batch = slice(None)  # records of the next forward passes
        self.method.set_horizon(steps, rate)
        self.at = 0
        self.decisions: list[Decision | None] = []
        if begin:
            self.method.on_train_begin(self.optimizer, self.validate)

    def _host(self, unit: Unit) -> AdaptedLinear:
        linear = nn.Linear(unit.in_features, unit.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(
            torch.from_numpy(self.W[unit.name]).float(), requires_grad=False
        )
        return AdaptedLinear(linear, "none")

    def _split(self) -> dict[str, InitialAdapter]:
        initial_adapters = {}
        for unit in self.units:
            host = self.adapted_layers[unit.name]
            triplets = singular_triplets(host.weight, self.method.ranges(unit))
            adapter = self.method.extract(unit, triplets).requires_grad_(False)
            initial_adapters[unit.name] = InitialAdapter(adapter, triplets.spectrum.float())
            host.weight.data = host.weight.data - adapter.delta()
        return initial_adapters

    @property
    def adapters(self):
        return self.method.adapters

    def adapter(self, index: int):
        return self.method.adapters[self.units[index].name]

    def output(self, name: str) -> torch.Tensor:
        return self.adapted_layers[name](torch.from_numpy(self.x[name][self.batch]).float())

    def loss(self) -> torch.Tensor:
        parts = []
        for unit in self.units:
            target = torch.from_numpy(self.t[unit.name][self.batch]).float()
            error = self.output(unit.name) - target
            parts.append(0.5 * error.square().sum(1).mean())
        return torch.stack(parts).sum()

    # --- one optimizer step, and its parts for tests that look in between ------------------------

    def decide(self) -> Decision | None:
        """What holds from this step on, applied."""
        decision = None
        if self.method.due(self.at):
            decision = self.method.decide(self.at)
            if decision is not None and self.method.apply(decision):
                self.optimizer.rebind_parameters(self.method.adapters.trainables())
        self.decisions.append(decision)
        return decision

    def backward(self) -> None:
        self.loss().backward()

    def update(
        self, skip: bool = False, between: Callable[[], None] | None = None, step: bool = True
    ) -> None:
        """From the gradients on; `skip` makes them infinite, as an overflow would."""
        if skip:
            self.optimizer.gradients.fill_(float("inf"))

        def update() -> Update:
            if between is not None:
                between()
            norm = self.optimizer.clip(self.max_norm)
            skipped = not np.isfinite(norm)
            assert skipped == skip
            if not skipped and step:
                self.optimizer.step()
            self.optimizer.zero_grad()
            return Update(0.0, float(norm), skipped)

        observed_update(self.method, self.at, self.optimizer, update, self.validate)
        self.at += 1

    def step(
        self, skip: bool = False, between: Callable[[], None] | None = None
    ) -> Decision | None:
        """One optimizer step, in the order of the trainer's own."""
        gradients_and_decision(self.method, self.decide, self.backward)
        self.update(skip, between)
        return self.decisions[-1]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    # --- state, as a checkpoint carries it -----------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        def copied(state):
            return {name: tensor.detach().clone() for name, tensor in state.items()}

        return {
            "at": self.at,
            "method": copied(self.method.state_dict()),
            "decider": copied(self.method.decider_state()),
            "optimizer": {n: copied(s) for n, s in self.optimizer.state_dict().items()},
            "adapters": {
                name: {role: getattr(a, role).detach().clone() for role in ("A", "g", "B", "mask")}
                for name, a in self.adapters.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Into a bench that was made alike, with begin=False."""
        self.method.load_state_dict(state["method"])
        if self.method.changes_structure:
            self.method.adapters.resize(
                {n: parts["A"].shape[0] for n, parts in state["adapters"].items()}
            )
            self.optimizer.rebind_parameters(self.method.adapters.trainables())
        assert list(self.adapters) == list(state["adapters"])
        for name, parts in state["adapters"].items():
            for role, tensor in parts.items():
                getattr(self.adapters[name], role).data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_decider_state(state["decider"])
        self.at = state["at"]


def assert_same_state(first: Any, second: Any, path: str = "") -> None:
    """Two snapshots, bit for bit (NaN equals NaN)."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same_state(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, path
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True, msg=path)
    else:
        assert first == second, path


def check_resume(make: Callable[[bool], Bench], before: int, after: int) -> None:
    """A run that stops after `before` steps and goes on is bit for bit the run that does not."""
    whole = make(True)
    whole.run(before)
    state = whole.snapshot()
    whole.run(after)
    resumed = make(False)
    resumed.restore(state)
    resumed.run(after)
    assert resumed.decisions == whole.decisions[before:]
    assert_same_state(whole.snapshot(), resumed.snapshot())


# --- NumPy references, in float64 --------------------------------------------------------------


class Twin:
    """One unit in NumPy: A (R, in), g (R), B (R, out), and the frozen rest of W."""

    def __init__(self, bench: Bench, index: int):
        unit = bench.units[index]
        adapter = bench.adapters[unit.name]
        self.name = unit.name
        self.A, self.g, self.B = array(adapter.A), array(adapter.g), array(adapter.B)
        self.frozen = array(bench.adapted_layers[unit.name].weight)
        self.x, self.t = bench.x[unit.name], bench.t[unit.name]

    def delta(self) -> np.ndarray:
        return self.B.T @ np.diag(self.g) @ self.A

    def output(self) -> np.ndarray:
        return self.x @ (self.frozen + self.delta()).T

    def loss(self) -> float:
        return 0.5 * ((self.output() - self.t) ** 2).sum(1).mean()

    def gradients(self, batch: slice = slice(None)) -> dict[str, np.ndarray]:
        """By hand: G = ∂L/∂W = (y − t)ᵀ x / N, dA = g ∘ B G, dB = g ∘ A Gᵀ, dg_j = B_j G A_j."""
        x = self.x[batch]
        G = (self.output() - self.t)[batch].T @ x / len(x)
        return {
            "A": self.g[:, None] * (self.B @ G),
            "B": self.g[:, None] * (self.A @ G.T),
            "g": np.einsum("ro,oi,ri->r", self.B, G, self.A),
        }


def twins(bench: Bench) -> list[Twin]:
    return [Twin(bench, index) for index in range(len(bench.units))]


class AdamW:
    """Row by row: a row's t counts the steps in which it was active."""

    def __init__(
        self,
        learning_rate: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        no_bias_correction: bool = False,
        to_start: bool = False,
    ):
        """`to_start`: decay pulls a value to what it was in its first update."""
        self.to_start, self.start = to_start, {}
        self.lr, self.betas, self.wd, self.eps = learning_rate, betas, weight_decay, eps
        self.no_bias_correction = no_bias_correction
        self.state: dict[Any, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def update(
        self,
        key: Any,
        value: np.ndarray,
        gradient: np.ndarray,
        active: np.ndarray | None = None,
        ratio: float = 1.0,
    ) -> None:
        """Moves `value`, (R, …), in place."""
        rows = len(value)
        if key not in self.state:
            self.state[key] = np.zeros_like(value), np.zeros_like(value), np.zeros(rows)
            self.start[key] = value.copy() if self.to_start else np.zeros_like(value)
        m, v, t = self.state[key]
        b1, b2 = self.betas
        for row in np.flatnonzero(np.ones(rows, bool) if active is None else active):
            t[row] += 1
            m[row] = b1 * m[row] + (1 - b1) * gradient[row]
            v[row] = b2 * v[row] + (1 - b2) * gradient[row] ** 2
            mean = m[row] if self.no_bias_correction else m[row] / (1 - b1 ** t[row])
            direction = mean / (np.sqrt(v[row] / (1 - b2 ** t[row])) + self.eps)
            value[row] -= (
                self.lr * ratio * (self.wd * (value[row] - self.start[key][row]) + direction)
            )


def assert_near(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-3) -> None:
    """Relative to the largest entry."""
    tolerance = rtol * max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(array(actual), expected, rtol=0, atol=tolerance)
