"""WeightLoRA, WeightLoRA+ and their ablation RLoRA: select K adapters, remove the others.

    W_u = W_u⁰ + ω_u (α/r) B_u A_u                            (1)
    min over ‖ω‖₀ ≤ K of min over {A, B} of L                 (2)

Phase 1, T warm-up steps with all units: A and B are updated by the optimizer, ω by StoIHT,

    ω ← H_K(ω − η g_ω),        g_ω = ∂L/∂ω

where H_K keeps the K entries of largest magnitude and zeroes the rest. Phase 2: units with ω > 0
survive, with A redrawn, B = 0 and without the factor ω; the others are removed, and their tensors
and optimizer state freed. WeightLoRA+ gives each survivor the rank r ⌊n/K⌋, so that Σ r_u ≤ n r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adapters import seeds
from adapters.decision import Decision
from adapters.figures import UnitScores
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Method, Validate
from adapters.methods.lora import fresh
from adapters.methods.options import (
    MethodOptions,
    RLoRAOptions,
    WeightLoRAOptions,
    WeightLoRAPlusOptions,
)
from adapters.optimizer import MaskedAdamW
from adapters.unit import Unit

_NO_GRADIENT = 1e-10
"""Largest ‖g_ω‖ without thresholding: in the first step B = 0, hence g_ω = 0."""

_PRECISION = 2.0**-20
"""A step of ω is rounded to this fraction of its largest entry, so that the order of summation does
not affect decisions."""


class RLoRA(Method):
    """Keeps K random units before the first step and removes the others."""

    Options: ClassVar[type[MethodOptions]] = RLoRAOptions
    decides = True
    changes_structure = True
    selected = False
    """Whether phase 2 has begun."""

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        return fresh(unit, self.options.rank, self.scale, generator)

    @property
    def scale(self) -> float:
        """α/r of the base rank."""
        return self.options.alpha / self.options.rank

    @property
    def micro_batch_size(self) -> int | None:
        return self.options.after_selection.micro_batch_size if self.selected else None

    def largest_micro_batch(self, given: int) -> int:
        return max(given, self.options.after_selection.micro_batch_size or 0)

    def due(self, step: int) -> bool:
        return not self.selected

    def decide(self, step: int) -> Decision:
        generator = seeds.generator(self.seed, step)
        order = torch.randperm(len(self.units), generator=generator).tolist()
        return self._selection(sorted(order[: self.options.kept(len(self.units))]))

    def _selection(self, survivors: Sequence[int]) -> Decision:
        rank = self.options.final_rank(len(self.units))
        names = [self.units[index].name for index in survivors]
        return Decision(survivors=names, ranks=dict.fromkeys(names, rank))

    def check_decision(self, decision: Decision) -> None:
        largest, ranks = self.options.final_rank(len(self.units)), decision.ranks
        if set(decision.survivors or ()) != ranks.keys():
            raise ValueError("survivors and ranks name different units; accepted: the same")
        for name, rank in ranks.items():
            if not 0 < rank <= largest:
                raise ValueError(f"rank {rank} for {name}; accepted: 1 to {largest}")
        self._check_scores(decision)

    def _check_scores(self, decision: Decision) -> None:
        if not decision.survivors:
            raise ValueError("no survivors; accepted: decisions recorded by rlora")

    def apply(self, decision: Decision) -> bool:
        """Remove and redraw adapters: the only structural change in a run."""
        self._enter_phase_2()
        for unit in self.units:
            if unit.name in decision.ranks:
                survivor = self._survivor(unit, decision.ranks[unit.name], decision)
                self.adapters.set_adapter(unit, survivor)
            else:
                self.adapters.remove(unit.name)
        return True

    def _enter_phase_2(self) -> None:
        """Make gates constant."""
        self.selected, self.adapters.gates = True, "constant"

    def _survivor(self, unit: Unit, rank: int, decision: Decision) -> GatedAdapter:
        return fresh(unit, rank, self.scale, self.generator(unit, purpose=1))

    def scalars(self) -> dict[str, float]:
        held = sum(adapter.rank for adapter in self.adapters.values())
        budget = len(self.units) * self.options.rank
        return {"survivors": len(self.adapters), "rank_left_over": budget - held}

    def state_dict(self) -> dict[str, Tensor]:
        return {"selected": torch.tensor(self.selected)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if bool(state["selected"]):
            self._enter_phase_2()


class WeightLoRA(RLoRA):
    """Selects units by their importance weights ω."""

    Options: ClassVar[type[MethodOptions]] = WeightLoRAOptions
    gates = "observed"  # in phase 1
    figures = (UnitScores("omega", "Importance ω", "ω", neutral=1.0),)

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._gradient: Tensor | None = None  # g_ω (n) of the last step, until used
        self._omega: list[float] = []  # of the last applied decision
        # Rank 0 only:
        self._offset = np.zeros(0)  # ω − 1 (n), float64: more digits than ω
        self._counted = 0  # warm-up steps so far
        self._thresholded = False

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
            self._gradient = gates.double().sum(1) * self.scale

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        if skipped:
            self._gradient = None

    def decide(self, step: int) -> Decision:
        ties: list[str] = []
        if self._gradient is not None:
            rate = self._rate(step - 1)
            ties = self._stoiht(self._gradient.cpu().numpy(), rate)
            self._gradient = None
            self._counted += rate > 0
        if self._counted >= self.options.warmup(self.steps) and self._thresholded:
            survivors = np.flatnonzero(self._offset > -1)
            if not len(survivors):
                raise ValueError("no unit has ω > 0; lower method.omega_learning_rate")
            decision = self._selection(survivors.tolist())
        else:
            decision = Decision()
        names = [unit.name for unit in self.units]
        omega = dict(zip(names, (1 + self._offset).tolist(), strict=True))
        # Steps of ω are rounded (`_PRECISION`): ties, as survivors, are the same on every engine.
        return replace(decision, scores={"omega": omega}, extra={"ties": ties} if ties else {})

    def _check_scores(self, decision: Decision) -> None:
        omega = decision.scores.get("omega")
        for unit in self.units:
            if not isinstance(omega, Mapping) or unit.name not in omega:
                raise ValueError(
                    f"no omega of {unit.name}; accepted: decisions of a run with the same units"
                )

    def summary(self, decision: Decision) -> dict[str, str]:
        """ω before the selection, then the survivors."""
        texts = decision.summary()
        omega = texts.pop("omega")
        return texts if decision.survivors is not None else {"ω": omega, **texts}

    def _stoiht(self, gradient: np.ndarray, rate: float) -> list[str]:
        """ω ← H_K(ω − η g_ω). Returns the units whose scores tie at the K-th place, if any were
        zeroed."""
        if np.linalg.norm(gradient) <= _NO_GRADIENT:
            return []
        main = self.options.omega_schedule == "main"
        change = self.options.omega_learning_rate * (rate if main else 1.0) * gradient
        largest = np.abs(change).max()
        if largest > 0:
            unit = 2.0 ** np.floor(np.log2(largest * _PRECISION))
            change = np.round(change / unit) * unit
        offset = self._offset - change
        # |ω| − 1 computed from ω − 1, which loses no digits
        score = np.where(offset < -1, -2 - offset, offset)
        if self.options.score == "signed":
            score = offset.copy()
        keep = self.options.kept(len(offset))
        order = np.argsort(-score, kind="stable")  # ties: lower unit first
        offset[order[keep:]] = -1.0
        self._offset, self._thresholded = offset, True
        border = score[order[keep - 1]]
        if keep < len(order) and score[order[keep]] == border:
            return [self.units[index].name for index in np.flatnonzero(score == border)]
        return []

    def apply(self, decision: Decision) -> bool:
        if decision.survivors is not None:
            self._gradient = None
            return super().apply(decision)
        by_name = _omega(decision)
        self._omega = list(by_name.values())
        omega = torch.tensor([by_name[name] for name in self.adapters])
        omega = omega.repeat_interleave(self.options.rank)
        self.adapters.mask_table.write_gates(omega * self.scale)
        self.adapters.mask_table.masks.copy_(omega != 0)
        return False

    def scalars(self) -> dict[str, float]:
        if self.selected:
            return super().scalars()
        held = [omega for omega in self._omega if omega != 0]
        return {"survivors": len(held), "omega_spread": max(held) - min(held) if held else 0.0}

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
            "thresholded": torch.tensor(self._thresholded),
        }

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        self._offset = state["offset"].numpy().copy()
        self._counted, self._thresholded = int(state["counted"]), bool(state["thresholded"])


class WeightLoRAPlus(WeightLoRA):
    """Redistributes the ranks of the removed units to the survivors."""

    Options = WeightLoRAPlusOptions

    def check_decision(self, decision: Decision) -> None:
        super().check_decision(decision)
        for name, rank in decision.ranks.items():
            if self.options.expand == "qr" and rank < self.options.rank:
                raise ValueError(
                    f"rank {rank} for {name}; accepted with method.expand=qr: at least "
                    f"{self.options.rank}, method.rank"
                )

    def _survivor(self, unit: Unit, rank: int, decision: Decision) -> GatedAdapter:
        gate = self.options.alpha / (rank if self.options.rescale_alpha else self.options.rank)
        drawn = fresh(unit, rank, gate, self.generator(unit, purpose=1))
        if self.options.expand == "reinit":
            return drawn
        learned = self.adapters[unit.name].copy().to("cpu")
        held = learned.rank
        # ΔW stays ω (α/r) B A: ω and the change of scale are folded into B.
        factor = _omega(decision)[unit.name] * self.scale / gate
        A, B = drawn.A.detach().clone(), drawn.B.detach().clone()
        A[:held], B[:held] = learned.A.detach(), learned.B.detach() * factor
        Q = torch.linalg.qr(A.T.double())[0].T[held:]
        norms = A[held:].norm(dim=1, keepdim=True)
        A[held:] = Q.to(A.dtype) * norms
        return GatedAdapter(A, drawn.g, B)


def _omega(decision: Decision) -> Mapping[str, float]:
    """ω by unit."""
    omega = decision.scores["omega"]
    assert isinstance(omega, Mapping)
    return omega
