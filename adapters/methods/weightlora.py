"""WeightLoRA and WeightLoRA+: select K adapters by learned weights ω, remove the others.

    W_u = W_u⁰ + ω_u (α/r) B_u A_u                            (1)
    min over ‖ω‖₀ ≤ K of min over {A, B} of L                 (2)

Phase 1, T warm-up steps with all units: A and B are updated by the optimizer, ω by StoIHT,

    ω ← H_K(ω − η g_ω),        g_ω = ∂L/∂ω

where H_K keeps the K entries of largest score and zeroes the rest (`threshold: last`: the T steps
add up, and H_K is applied once). Phase 2: units with ω > 0 survive, with A redrawn, B = 0 and
without the factor ω (`expand`); the others are removed, and their tensors and optimizer state
freed. WeightLoRA+ gives each survivor the rank r ⌊n/K⌋, so that Σ r_u ≤ n r; with K as a share p of
the parameters (`keep_parameters`) r ⌊1/p⌋, so that Σ r_u size_u ≤ r Σ size_u. With `rounds` the
survivors are selected from again, from ω = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adapters.decision import Decision
from adapters.figures import UnitScores
from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Validate
from adapters.methods.options import MethodOptions
from adapters.methods.rlora import Selection
from adapters.methods.selection_options import WeightLoRAOptions, WeightLoRAPlusOptions
from adapters.optimizer import MaskedAdamW
from adapters.unit import Unit

_NO_GRADIENT = 1e-10
"""Largest ‖g_ω‖ without thresholding: in the first step B = 0, hence g_ω = 0."""

_PRECISION = 2.0**-20
"""A step of ω is rounded to this fraction of its largest entry, so that the order of summation does
not affect decisions."""


class WeightLoRA(Selection):
    """Selects units by their importance weights ω."""

    Options: ClassVar[type[MethodOptions]] = WeightLoRAOptions
    gates = "observed"  # in phase 1
    figures = (UnitScores("omega", "Importance ω", "ω", neutral=1.0),)

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self.rounds = options.rounds
        self._gradient: Tensor | None = None  # g_ω of the last step's adapters, until used
        self._omega: list[float] = []  # of the last applied decision
        # Rank 0 only:
        self._offset = np.zeros(0)  # ω − 1 (n), float64: more digits than ω; −1 where removed
        self._counted = 0  # steps of this round so far
        self._moved = False  # whether ω made a step in this round

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        super().attach(units, layers, device, initial_adapters)
        self._offset = np.zeros(len(self.units))

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        """g_ω,u = (α/r) Σ_j ∂L/∂g_j, reduced over all ranks."""
        if not self.selected:
            gates = torch.stack([adapter.gate_gradient for adapter in self.adapters.values()])
            self._gradient = gates.double().sum(1) * self._gate(gates.shape[1])

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        if skipped:
            self._gradient = None

    # --- rank 0 --------------------------------------------------------------------------------

    def decide(self, step: int) -> Decision:
        candidates = np.array([unit.name in self.adapters for unit in self.units])
        ties: list[str] = []
        if self._gradient is not None:
            rate = self._rate(step - 1)
            moves = self._descend(candidates, self._gradient.cpu().numpy(), rate)
            if moves and self.options.threshold == "every":
                ties = self._threshold(candidates)
            self._gradient = None
            self._counted += rate > 0
        decision = Decision()
        if self._counted >= self.options.warmup(self.steps) and self._moved:
            if self.options.threshold == "last":
                ties = self._threshold(candidates)
            decision = self._select(int(candidates.sum()))
        names = [unit.name for unit in self.units]
        omega = dict(zip(names, (1 + self._offset).tolist(), strict=True))
        # Steps of ω are rounded (`_PRECISION`): ties, as survivors, are the same on every engine.
        return replace(decision, scores={"omega": omega}, extra={"ties": ties} if ties else {})

    def _descend(self, candidates: np.ndarray, gradient: np.ndarray, rate: float) -> bool:
        """ω ← ω − η g_ω of the candidates; False where there is no gradient."""
        if np.linalg.norm(gradient) <= _NO_GRADIENT:
            return False
        main = self.options.omega_schedule == "main"
        change = self.options.omega_learning_rate * (rate if main else 1.0) * gradient
        largest = np.abs(change).max()
        if largest > 0:
            unit = 2.0 ** np.floor(np.log2(largest * _PRECISION))
            change = np.round(change / unit) * unit
        self._offset = self._offset.copy()
        self._offset[candidates] -= change
        self._moved = True
        return True

    def _threshold(self, candidates: np.ndarray) -> list[str]:
        """ω ← H_K(ω). Returns the units whose scores tie at the K-th place, if any of them were
        zeroed."""
        sizes = [unit.size for unit in self.units]
        score = np.where(candidates, scores(self._offset, sizes, self.options.score), -np.inf)
        order = np.argsort(-score, kind="stable")[: candidates.sum()]  # ties: lower unit first
        kept = self.options.survivors(order.tolist(), self.units)
        groups = self.options.groups(order.tolist(), self.units)
        for group in groups:  # in a further round: the smallest may be gone
            if not set(group) & set(kept):
                layer = self.units[group[0]].layer
                where = f" in layer {layer}" if self.options.within == "layer" else ""
                raise ValueError(
                    f"method.keep_parameters: none of the {len(group)} survivors{where} fits into "
                    "this share of their parameters; accepted: a larger one, or fewer method.rounds"
                )
        zeroed = np.setdiff1d(order, kept)
        self._offset = self._offset.copy()
        self._offset[zeroed] = -1.0
        tied: list[int] = []
        for group in groups:
            border = min((score[unit] for unit in group if unit in kept), default=np.inf)
            at_border = [unit for unit in group if score[unit] == border]
            tied += at_border if not set(at_border) <= set(kept) else []
        return [self.units[index].name for index in sorted(tied)]

    def _select(self, candidates: int) -> Decision:
        """The units with ω > 0, of so many candidates, and their ranks."""
        survivors = [u.name for u, o in zip(self.units, self._offset, strict=True) if o > -1]
        if not survivors:
            raise ValueError("no unit has ω > 0; lower method.omega_learning_rate")
        growth, largest = self.options.growth(candidates), self.options.final_rank(len(self.units))
        # Of fewer candidates than K (others had ω ≤ 0) the factor may be larger: 3, of 3.
        ranks = {name: min(self.adapters[name].rank * growth, largest) for name in survivors}
        return Decision(survivors=survivors, ranks=ranks)

    def summary(self, decision: Decision) -> dict[str, str]:
        """ω before the selection, then the survivors."""
        texts = decision.summary()
        omega = texts.pop("omega")
        return texts if decision.survivors is not None else {"ω": omega, **texts}

    # --- every rank ----------------------------------------------------------------------------

    def check_decision(self, decision: Decision) -> None:
        super().check_decision(decision)
        omega = decision.scores.get("omega")
        for unit in self.units:
            if not isinstance(omega, Mapping) or unit.name not in omega:
                raise ValueError(
                    f"no omega of {unit.name}; accepted: decisions of a run with the same units"
                )
        if self.rounds > 1 and len(set(decision.ranks.values())) > 1:
            raise ValueError("survivors of different ranks; accepted with method.rounds: equal")

    def apply(self, decision: Decision) -> bool:
        if decision.survivors is not None:
            self._gradient, self._counted, self._moved = None, 0, False
            changed = super().apply(decision)
            if not self.selected:
                held = [unit.name in self.adapters for unit in self.units]
                self._offset = np.where(held, 0.0, -1.0)
            return changed
        by_name = _omega(decision)
        self._omega = [by_name[name] for name in self.adapters]
        ranks = torch.tensor([adapter.rank for adapter in self.adapters.values()])
        gates = torch.tensor([self._gate(int(rank)) for rank in ranks])
        omega = torch.tensor(self._omega)
        self.adapters.mask_table.write_gates((omega * gates).repeat_interleave(ranks))
        self.adapters.mask_table.masks.copy_((omega != 0).repeat_interleave(ranks))
        return False

    def _factor(self, unit: Unit, held: int, rank: int, decision: Decision) -> float:
        return _omega(decision)[unit.name] * super()._factor(unit, held, rank, decision)

    def scalars(self) -> dict[str, float]:
        if self.selected:
            return super().scalars()
        held = [omega for omega in self._omega if omega != 0]
        return {"survivors": len(held), "omega_spread": max(held) - min(held) if held else 0.0}

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        pending = {} if self._gradient is None else {"gradient": self._gradient}
        return super().state_dict() | pending

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._gradient = state.get("gradient")

    def decider_state(self) -> dict[str, Tensor]:
        return {
            "offset": torch.from_numpy(self._offset.copy()),
            "counted": torch.tensor(self._counted),
            "thresholded": torch.tensor(self._moved),
        }

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        self._offset = state["offset"].numpy().copy()
        self._counted, self._moved = int(state["counted"]), bool(state["thresholded"])


class WeightLoRAPlus(WeightLoRA):
    """Redistributes the ranks of the removed units to the survivors."""

    Options = WeightLoRAPlusOptions

    def _gate(self, rank: int) -> float:
        return self.options.alpha / rank if self.options.rescale_alpha else self.scale


def scores(offset: np.ndarray, sizes: Sequence[int], score: str) -> np.ndarray:
    """What H_K orders the units (n) by, from ω − 1: |ω| − 1, ω − 1 or (ω − 1) / √size. (|ω| − 1 is
    computed from ω − 1, which loses no digits.)"""
    match score:
        case "magnitude":
            return np.where(offset < -1, -2 - offset, offset)
        case "per_parameter":
            return offset / np.sqrt(sizes)
    return offset


def _omega(decision: Decision) -> Mapping[str, float]:
    """ω by unit."""
    omega = decision.scores["omega"]
    assert isinstance(omega, Mapping)
    return omega
