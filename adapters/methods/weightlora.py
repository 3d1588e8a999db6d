"""WeightLoRA, WeightLoRA+ and their ablation RLoRA: which adapters are worth keeping.

    W_u = W_u⁰ + ω_u (α/r) B_u A_u                            (1)
    min over ‖ω‖₀ ≤ K of min over {A, B} of L                 (2)

Phase 1, T warm-up steps, every unit active: A and B by the optimizer, ω by StoIHT,

    ω ← H_K(ω − η g_ω),        g_ω = ∂L/∂ω

where H_K keeps the K entries of largest magnitude and zeroes the rest. Phase 2: units with ω > 0
survive, with A redrawn and B = 0, and ω no longer multiplies; the others are removed, tensors and
optimizer state freed. WeightLoRA+ gives each survivor the rank r ⌊n/K⌋, so that Σ r_u ≤ n r.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from adapters import seeds
from adapters.gated import GatedAdapter
from adapters.methods.base import Decision, Method, MethodOptions
from adapters.methods.lora import fresh
from adapters.options import Section
from adapters.units import Unit

_NO_GRADIENT = 1e-10
"""‖g_ω‖ up to which nothing is thresholded: B = 0 in the first step, so that g_ω = 0."""

_PRECISION = 2.0**-20
"""A step of ω is rounded to this part of its largest entry, so that what the order of summation
leaves in the last bits decides nothing."""


class AfterSelection(Section):
    """What may change once adapters were removed."""

    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward pass from then on, since memory was freed; none: as before."""


class SelectionOptions(MethodOptions):
    """Keys of the methods that remove units."""

    keep: int | None = Field(None, gt=0)
    """Units that survive, K; none: half of them, rounded down."""
    after_selection: AfterSelection = Field(default_factory=AfterSelection)
    """What changes once adapters were removed."""

    def kept(self, units: int) -> int:
        """K of n units."""
        return self.keep if self.keep is not None else max(1, units // 2)

    def final_rank(self, units: int) -> int:
        """Rank of a survivor."""
        return self.rank

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        if self.kept(len(units)) > len(units):
            raise ValueError(
                f"method.keep: {self.keep} given; accepted: at most {len(units)}, the number of "
                "units"
            )
        rank = self.final_rank(len(units))
        for unit in units:
            if rank > min(unit.out_features, unit.in_features):
                raise ValueError(
                    f"method.keep: {self.kept(len(units))} of {len(units)} units would give each "
                    f"survivor rank {rank}, more than the smaller side of {unit.name} "
                    f"({unit.out_features} x {unit.in_features}); accepted: a larger method.keep "
                    "or a smaller method.rank"
                )


class RLoRAOptions(SelectionOptions):
    """Options of `method.kind: rlora`."""

    kind: Literal["rlora"] = "rlora"
    """Name of the method."""


class OmegaOptions(SelectionOptions):
    """Keys of the methods that learn ω."""

    warmup_steps: int | None = Field(None, gt=0)
    """Steps of phase 1, T; none: 0.5 % of all steps, rounded up. Only steps with a learning rate
    above 0 count, and phase 1 goes on until something was thresholded."""
    omega_learning_rate: float = Field(5.0, gt=0)
    """η of the step on ω."""
    omega_schedule: Literal["constant", "main"] = "constant"
    """Whether η stays or follows the main learning-rate schedule (the authors' code)."""
    score: Literal["magnitude", "signed"] = "magnitude"
    """What H_K keeps: the largest |ω| (paper, appendix B) or the largest ω (the authors' code)."""

    def warmup(self, steps: int) -> int:
        """T of a run of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(0.005 * steps)

    def check_steps(self, steps: int) -> None:
        if self.warmup(steps) >= steps:
            raise ValueError(
                f"method.warmup_steps: {self.warmup(steps)} given; accepted: fewer than the run's "
                f"{steps} steps"
            )


class WeightLoRAOptions(OmegaOptions):
    """Options of `method.kind: weightlora`."""

    kind: Literal["weightlora"] = "weightlora"
    """Name of the method."""


class WeightLoRAPlusOptions(OmegaOptions):
    """Options of `method.kind: weightlora_plus`."""

    kind: Literal["weightlora_plus"] = "weightlora_plus"
    """Name of the method."""
    expand: Literal["reinit", "qr"] = "reinit"
    """How survivors get their larger rank: drawn anew (paper), or (`qr`) what was learned kept,
    with new rows of A orthogonal to it and new columns of B zero."""
    rescale_alpha: bool = False
    """Scale survivors by α over their own rank instead of the base rank r."""

    def final_rank(self, units: int) -> int:
        return self.rank * (units // self.kept(units))


class RLoRA(Method):
    """K units kept at random, before the first step; the others removed."""

    Options: ClassVar[type[MethodOptions]] = RLoRAOptions
    decides = True
    changes_structure = True
    selected = False
    """Whether phase 2 has begun."""

    def init_adapter(self, unit, generator):
        return fresh(unit, self.options.rank, self.scale, generator)

    @property
    def scale(self) -> float:
        """α/r of the base rank."""
        return self.options.alpha / self.options.rank

    @property
    def micro_batch_size(self):
        return self.options.after_selection.micro_batch_size if self.selected else None

    def due(self, step):
        return not self.selected

    def decide(self, step):
        generator = seeds.generator(self.seed, step)
        order = torch.randperm(len(self.units), generator=generator).tolist()
        return self._selection(sorted(order[: self.options.kept(len(self.units))]))

    def _selection(self, survivors: Sequence[int]) -> Decision:
        rank = self.options.final_rank(len(self.units))
        names = [self.units[index].name for index in survivors]
        return {"survivors": names, "ranks": dict.fromkeys(names, rank)}

    def check_decision(self, decision):
        largest, ranks = self.options.final_rank(len(self.units)), decision.get("ranks", {})
        if set(decision.get("survivors", ())) != ranks.keys():
            raise ValueError("survivors and ranks name different units; accepted: the same")
        for name, rank in ranks.items():
            if not 0 < rank <= largest:
                raise ValueError(f"rank {rank} for {name}; accepted: 1 to {largest}")
        self._check_scores(decision)

    def _check_scores(self, decision):
        if not decision.get("survivors"):
            raise ValueError("no survivors; accepted: what rlora recorded")

    def apply(self, decision):
        """Removal: the only change of structure in a run."""
        self.selected = True
        for unit in self.units:
            if unit.name in decision["ranks"]:
                self._place(unit, self._survivor(unit, decision["ranks"][unit.name], decision))
            else:
                self._remove(unit.name)
        return True

    def _survivor(self, unit: Unit, rank: int, decision: Decision) -> GatedAdapter:
        return fresh(unit, rank, self.scale, self.generator(unit, purpose=1))

    def scalars(self):
        held = sum(adapter.rank for adapter in self.adapters.values())
        budget = len(self.units) * self.options.rank
        return {"survivors": len(self.adapters), "rank_left_over": budget - held}

    def state_dict(self):
        return {"selected": torch.tensor(self.selected)}

    def load_state_dict(self, state):
        self.selected = bool(state["selected"])


class WeightLoRA(RLoRA):
    """Units survive by their importance weights ω."""

    Options: ClassVar[type[MethodOptions]] = WeightLoRAOptions

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._gradient: Tensor | None = None  # g_ω (n) of the last step, until it is used
        self._omega: list[float] = []  # as applied last
        # Rank 0 only:
        self._offset = np.zeros(0)  # ω − 1 (n), float64: digits that ω itself would lose
        self._counted = 0  # warm-up steps so far
        self._thresholded = False

    @property
    def observes_gates(self):  # type: ignore[override]
        return not self.selected

    def attach(self, units, adapted_layers, device, initial_adapters=None):
        super().attach(units, adapted_layers, device, initial_adapters)
        self._offset = np.zeros(len(self.units))

    def observe(self, step, optimizer):
        """g_ω,u = (α/r) Σ_j ∂L/∂g_j, over all ranks."""
        if not self.selected:
            gates = torch.stack([adapter.gate_gradient for adapter in self.adapters.values()])
            self._gradient = gates.double().sum(1) * self.scale

    def after_step(self, step, optimizer, *, skipped, validate):
        if skipped:
            self._gradient = None

    def decide(self, step):
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
            decision = {}
        names = [unit.name for unit in self.units]
        decision["omega"] = dict(zip(names, (1 + self._offset).tolist(), strict=True))
        return decision | ({"ties": ties} if ties else {})

    def _check_scores(self, decision):
        for unit in self.units:
            if unit.name not in decision.get("omega", {}):
                raise ValueError(f"no omega of {unit.name}; accepted: a run of the same units")

    def _stoiht(self, gradient: np.ndarray, rate: float) -> list[str]:
        """ω ← H_K(ω − η g_ω); the units of equal score on both sides of the border, if any."""
        if np.linalg.norm(gradient) <= _NO_GRADIENT:
            return []
        main = self.options.omega_schedule == "main"
        change = self.options.omega_learning_rate * (rate if main else 1.0) * gradient
        largest = np.abs(change).max()
        if largest > 0:
            unit = 2.0 ** np.floor(np.log2(largest * _PRECISION))
            change = np.round(change / unit) * unit
        offset = self._offset - change
        # |ω| − 1 from ω − 1, without the digits that 1 would swallow
        score = np.where(offset < -1, -2 - offset, offset)
        if self.options.score == "signed":
            score = offset.copy()
        keep = self.options.kept(len(offset))
        order = np.argsort(-score, kind="stable")  # equal scores: the lower unit first
        offset[order[keep:]] = -1.0
        self._offset, self._thresholded = offset, True
        border = score[order[keep - 1]]
        if keep < len(order) and score[order[keep]] == border:
            return [self.units[index].name for index in np.flatnonzero(score == border)]
        return []

    def apply(self, decision):
        if "survivors" in decision:
            self._gradient = None
            return super().apply(decision)
        omega = torch.tensor([decision["omega"][name] for name in self.adapters])
        self._omega = list(decision["omega"].values())
        omega = omega.repeat_interleave(self.options.rank)
        self.mask_table.write_gates(omega * self.scale)
        self.mask_table.masks.copy_(omega != 0)
        return False

    def scalars(self):
        if self.selected:
            return super().scalars()
        held = [omega for omega in self._omega if omega != 0]
        return {"survivors": len(held), "omega_spread": max(held) - min(held) if held else 0.0}

    def state_dict(self):
        pending = {} if self._gradient is None else {"gradient": self._gradient}
        return super().state_dict() | pending

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._gradient = state.get("gradient")

    def decider_state(self):
        return {
            "offset": torch.from_numpy(self._offset.copy()),
            "counted": torch.tensor(self._counted),
            "thresholded": torch.tensor(self._thresholded),
        }

    def load_decider_state(self, state):
        self._offset = state["offset"].numpy().copy()
        self._counted, self._thresholded = int(state["counted"]), bool(state["thresholded"])


class WeightLoRAPlus(WeightLoRA):
    """Survivors share the rank of those that were removed."""

    Options = WeightLoRAPlusOptions

    def _survivor(self, unit, rank, decision):
        gate = self.options.alpha / (rank if self.options.rescale_alpha else self.options.rank)
        drawn = fresh(unit, rank, gate, self.generator(unit, purpose=1))
        if self.options.expand == "reinit":
            return drawn
        learned = self.adapters[unit.name].copy().to("cpu")
        held = learned.rank
        # The update stays ω (α/r) B A: ω and the change of scale go into B.
        factor = decision["omega"][unit.name] * self.scale / gate
        A, B = drawn.A.detach().clone(), drawn.B.detach().clone()
        A[:held], B[:held] = learned.A.detach(), learned.B.detach() * factor
        Q = torch.linalg.qr(A.T.double())[0].T[held:]
        norms = A[held:].norm(dim=1, keepdim=True)
        A[held:] = Q.to(A.dtype) * norms
        return GatedAdapter(A, drawn.g, B)
