"""La-LoRA: ranks per layer by contribution, under a budget that grows with the norms.

Layer i of L is transformer block i; its units share the rank r_i ∈ [1, r], initially 1. The
forward pass uses the first r_i components, scaled by α/r. After every update, with A_u and B_u
truncated to r_i:

    s_i   = (1/r_i) Σ_{u∈i} (‖B_u‖ + ‖A_u‖)                                    (7)
    IR_i  = (s_i − s_i^prev) / s_i^prev                                         (6)
    D     = clip(D^prev (1 + γ mean_i IR_i), L, r L), starting at L             (5)
    c_i   = Σ_{u∈i} (f_A ‖B_u‖ + f_B ‖A_u‖)                                     (9), f: (10)
    r_i   = softmax(c)_i · D                                                    (8)

in Frobenius norms. Choices, with the other readings as options: f is the truncated norm over the
full norm, as in the text (`fidelity`; the printed eq. 10 is `previous_over_current`); eq. 9
combines A's fidelity with B's norm as printed; s^prev is taken at the new rank, so that a change of
rank alone does not count as growth (`growth`). Eq. 8 is rounded to integers in [1, r] by largest
remainder, so that Σ r_i = round(D) exactly; the excess of a layer at r is distributed among the
others in proportion. `allocation: uniform` is the control: eq. 8 with c = 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.decision import Decision
from adapters.figures import BUDGET
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Method, Validate
from adapters.methods.lora import fresh, started_rows
from adapters.methods.options import LaLoRAOptions
from adapters.optimizer import MaskedAdamW
from adapters.starts import Start
from adapters.unit import Unit

_DECIMALS = 6
"""Decimals to which budget and shares are rounded before they are compared."""

_FISHER_DECAY = 0.9


class LaLoRA(Method):
    """One rank per layer, decided after every update."""

    Options = LaLoRAOptions
    decides = True
    figures = (BUDGET,)

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._squares: Tensor | None = None  # (n, 2, r): ‖A_j‖², ‖B_j‖² by unit; on all ranks
        self._fisher: Tensor | None = None  # (n, 2, r): running mean of ‖∂L/∂A_j‖², ‖∂L/∂B_j‖²
        self._applied: Decision | None = None
        # Rank 0 only:
        self.ranks = np.zeros(0, dtype=np.int64)
        self.budget = 0.0  # D
        self._previous_s = np.zeros(0)
        self._previous_squares = np.zeros(0)  # of the previous decision
        self._initial = np.zeros(0)  # ‖A_u‖² at the start

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        adapter = fresh(unit, self.options.rank, self._scale, generator)
        adapter.mask[1:] = False
        adapter.g.data[1:] = 0.0
        return adapter

    def adopt(self, starts: Mapping[str, Start]) -> bool:
        for name, start in starts.items():
            A, _ = started_rows(start, self.options.rank, self.options.start_options.scale)
            self.adapters[name].A.data.copy_(A)
        return False

    @property
    def uniform(self) -> bool:
        """Whether all layers are to have the same rank, whatever they contribute."""
        return self.options.allocation == "uniform"

    @property
    def _scale(self) -> float:
        return self.options.alpha / self.options.rank

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        super().attach(units, layers, device, initial_adapters)
        numbers = sorted({unit.layer for unit in units if unit.layer is not None})
        position: dict[int | None, int] = {layer: index for index, layer in enumerate(numbers)}
        self.layers = numbers
        self._layer_of = np.array([position[unit.layer] for unit in units])

    def on_train_begin(self, optimizer: MaskedAdamW, validate: Validate) -> None:
        self._squares = _squares(optimizer, optimizer.values)

    def due(self, step: int) -> bool:
        return step % self.options.every == 0

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        if self.options.contribution == "fisher":
            squares = _squares(optimizer, optimizer.trained_gradients)
            if not bool(squares.isfinite().all()):
                return  # the step will be skipped
            if self._fisher is None:
                self._fisher = squares * (1 - _FISHER_DECAY)
            else:
                self._fisher = torch.lerp(squares, self._fisher, _FISHER_DECAY)

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        if self.due(step + 1):
            self._squares = _squares(optimizer, optimizer.values)

    # --- rank 0 --------------------------------------------------------------------------------

    def decide(self, step: int) -> Decision:
        assert self._squares is not None
        squares, r, layers = self._squares.cpu().numpy(), self.options.rank, len(self.layers)
        if not len(self.ranks):  # the first decision: the initial ranks
            self.budget = float(r * layers if self.options.budget == "full" else layers)
            self._initial, self._previous_squares = squares[:, 0].sum(1), squares
            full = self.options.budget == "full"
            self.ranks = np.full(layers, r if full else 1)
        else:
            size = self.size(squares, self.ranks)
            if self.options.budget == "gradual":
                growth = float(np.mean((size - self._previous_s) / self._previous_s))
                budget = self.budget * (1 + self.options.gamma * growth)  # (5)
                self.budget = round(float(np.clip(budget, layers, r * layers)), _DECIMALS)
            c = np.zeros(layers) if self.uniform else self.contribution(squares)
            old, self.ranks = self.ranks, allocate(c, self.budget, r)
            self._previous_squares = squares
            if self.options.growth == "printed":
                self._previous_s = self.size(squares, old)
                return self._decision()
        self._previous_s = self.size(squares, self.ranks)
        return self._decision()

    def _decision(self) -> Decision:
        ranks = dict(zip(map(str, self.layers), self.ranks.tolist(), strict=True))
        return Decision(ranks=ranks, scores={"budget": self.budget})

    def _norms(self, squares: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """‖A_u‖, ‖B_u‖ (n, 2) over each unit's first r_i components."""
        kept = np.arange(squares.shape[2]) < ranks[self._layer_of][:, None]
        return np.sqrt((squares * kept[:, None, :]).sum(2))

    def _by_layer(self, values: np.ndarray) -> np.ndarray:
        """Σ over the units of each layer."""
        return np.bincount(self._layer_of, weights=values, minlength=len(self.layers))

    def size(self, squares: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """s (L), eq. 7."""
        return self._by_layer(self._norms(squares, ranks).sum(1)) / ranks

    def contribution(self, squares: np.ndarray) -> np.ndarray:
        """c (L) by eq. 9 and 10, or by Fisher information."""
        counts = self._by_layer(np.ones(len(self.units)))
        divisor = counts if self.options.contribution_scale == "mean" else 1.0
        if self.options.contribution == "fisher":
            if self._fisher is None:  # no gradients yet
                return np.zeros(len(self.layers))
            kept = self._norms(self._fisher.cpu().numpy(), self.ranks) ** 2
            c = self._by_layer(kept.sum(1)) / divisor
            return c / c.mean() if c.mean() > 0 else c
        norms = self._norms(squares, self.ranks)
        f_a, f_b = self._fidelity(squares, norms).T
        return self._by_layer(f_a * norms[:, 1] + f_b * norms[:, 0]) / divisor

    def _fidelity(self, squares: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """f_A, f_B (n, 2); 0/0 counts as 1."""
        match self.options.fidelity:
            case "truncated_over_full":
                return _ratio(norms, np.sqrt(squares.sum(2)))
            case "previous_over_current":
                return _ratio(self._norms(self._previous_squares, self.ranks), norms)
            case "truncated_over_initial":
                f_a = _ratio(norms[:, 0], np.sqrt(self._initial))
                return np.stack([f_a, np.ones_like(f_a)], axis=1)
        return np.ones_like(norms)

    # --- every rank ----------------------------------------------------------------------------

    @property
    def decided(self) -> Sequence[str]:
        return [str(layer) for layer in self.layers]

    def check_decision(self, decision: Decision) -> None:
        self.check_ranks(decision)
        if not isinstance(decision.scores.get("budget"), float):
            raise ValueError("no budget; accepted: decisions recorded by lalora")

    def apply(self, decision: Decision) -> bool:
        ranks = [decision.ranks[str(unit.layer)] for unit in self.units]
        self._applied = decision
        used = torch.arange(self.options.rank) < torch.tensor(ranks).unsqueeze(1)
        self.adapters.mask_table.masks.copy_(used.flatten())
        self.adapters.mask_table.write_gates(used.flatten() * self._scale)
        return False

    def scalars(self) -> dict[str, float]:
        if self._applied is None:
            return {}
        budget, ranks = self._applied.scores["budget"], self._applied.ranks.values()
        assert isinstance(budget, float)
        return {"budget": budget, "mean_rank": sum(ranks) / len(ranks)}

    def state_dict(self) -> dict[str, Tensor]:
        held = {"squares": self._squares, "fisher": self._fisher}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._squares, self._fisher = state.get("squares"), state.get("fisher")
        if self._fisher is not None:
            self._fisher = self._fisher.to(self.adapters.device)

    def decider_state(self) -> dict[str, Tensor]:
        return {
            "ranks": torch.from_numpy(self.ranks.copy()),
            "budget": torch.tensor(self.budget, dtype=torch.float64),
            "previous_s": torch.from_numpy(self._previous_s.copy()),
            "previous_squares": torch.from_numpy(self._previous_squares.copy()),
            "initial": torch.from_numpy(self._initial.copy()),
        }

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        self.ranks, self.budget = state["ranks"].numpy().copy(), float(state["budget"])
        self._previous_s = state["previous_s"].numpy().copy()
        self._previous_squares = state["previous_squares"].numpy().copy()
        self._initial = state["initial"].numpy().copy()


def _squares(optimizer: MaskedAdamW, flat: Tensor) -> Tensor:
    """Squared norms (n, 2, r) of the components' rows of A and B."""
    return optimizer.by_component(flat * flat).double()


def allocate(contribution: np.ndarray, budget: float, largest: int) -> np.ndarray:
    """Integers r_i in [1, largest] with Σ r_i = round(budget), the nearest to eq. 8.

    Shares are clip(e^(c_i + τ), 1, largest), proportional to softmax(c) within the bounds, with τ
    such that they sum to the budget. They are rounded down, and the rest goes to the largest
    remainders; ties to the lower layer.
    """
    spent = float(np.clip(budget, len(contribution), largest * len(contribution)))

    def shares(tau: float) -> np.ndarray:
        return np.exp(np.clip(contribution + tau, 0.0, np.log(largest)))

    low = -float(contribution.max())
    high = np.log(largest) - float(contribution.min())
    while low < (middle := (low + high) / 2) < high:  # bisection to the last bit
        low, high = (middle, high) if shares(middle).sum() < spent else (low, middle)
    real = np.round(shares(high), _DECIMALS)
    ranks = np.floor(real).astype(np.int64)
    remainder = np.where(ranks < largest, real - ranks, -1.0)
    extra = np.argsort(-remainder, kind="stable")[: round(spent) - int(ranks.sum())]
    ranks[extra] += 1
    return ranks


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.ones_like(below), where=below > 0)
