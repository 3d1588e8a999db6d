"""AdaLoRA (Zhang et al. 2023): ΔW = P Λ Q, with Λ pruned under a global budget.

Every unit starts with `initial_rank` components, A and B ~ N(0, 0.02), λ = 0. Each step, for every
entry w of A, λ and B (globally summed gradient, before clipping):

    I(w) = |w ∂L/∂w|          Ī ← β₁ Ī + (1 − β₁) I          Ū ← β₂ Ū + (1 − β₂) |I − Ī|

and component i of a unit scores S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ij), s = Ī Ū. Every
`delta_t` steps the b(t) best components of all units keep their λ; the others' λ are set to 0 and
may grow again. b falls from n · initial_rank to n · rank along a cubic. The last `tfinal` steps
train the final selection. Orthogonality of A and B is a penalty with weight `orthogonality`.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.decision import Decision
from adapters.figures import BUDGET
from adapters.gated import GatedAdapter
from adapters.methods.base import Method
from adapters.methods.options import AdaLoRAOptions
from adapters.optimizer import MaskedAdamW
from adapters.unit import Unit

_DIGITS = 6
"""Significant digits to which scores are rounded before sorting."""


class AdaLoRA(Method):
    """Λ is the learned gate: g = λ α/r."""

    Options = AdaLoRAOptions
    gates = "learned"
    decides = True
    figures = (BUDGET,)

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._sensitivity: Tensor | None = None  # Ī, laid out as the optimizer's values
        self._uncertainty: Tensor | None = None  # Ū
        self._scores: Tensor | None = None  # S (n, R)
        self._kept = 0  # components kept in total; 0 before the first pruning

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        rank = self.options.components
        A = torch.empty(rank, unit.in_features).normal_(0.0, 0.02, generator=generator)
        B = torch.empty(rank, unit.out_features).normal_(0.0, 0.02, generator=generator)
        return GatedAdapter(A, torch.zeros(rank), B)

    @property
    def scales(self) -> Mapping[str, float]:
        return {"g": self.options.alpha / self.options.rank}

    def budget(self, step: int) -> int:
        """b(t): number of components that all units together keep from step t on."""
        first, last = self.options.schedule(self.steps)
        n = len(self.units)
        target, initial = n * self.options.rank, n * self.options.components
        if step <= first:
            return initial
        left = 1.0 - (step - first) / (last - first) if step < last else 0.0
        return target + int((initial - target) * left**3)

    def due(self, step: int) -> bool:
        first, last = self.options.schedule(self.steps)
        return step == last or (first < step < last and step % self.options.delta_t == 0)

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        self._add_penalty()
        importance = (optimizer.values * optimizer.trained_gradients).abs()
        if self._sensitivity is None or self._uncertainty is None:
            self._sensitivity = torch.zeros_like(importance)
            self._uncertainty = torch.zeros_like(importance)
        if bool(importance.isfinite().all()):  # otherwise the step will be skipped
            self._sensitivity.lerp_(importance, 1 - self.options.beta1)
            deviation = (importance - self._sensitivity).abs()
            self._uncertainty.lerp_(deviation, 1 - self.options.beta2)
        if self.due(step + 1):
            A, g, B = optimizer.by_component(self._sensitivity * self._uncertainty).unbind(1)
            into = torch.tensor([unit.in_features for unit in self.units], device=A.device)
            out = torch.tensor([unit.out_features for unit in self.units], device=A.device)
            self._scores = A / into.unsqueeze(1) + g + B / out.unsqueeze(1)

    def _add_penalty(self) -> None:
        """Add the gradient of the orthogonality penalty, identical on every rank, to the reduced
        gradients. Matrices of equal shape are batched to avoid hundreds of small kernels."""
        if self.options.orthogonality == 0:
            return
        matrices = [m for adapter in self.adapters.values() for m in (adapter.A, adapter.B)]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for alike in by_shape.values():
            M = torch.stack([matrix.detach() for matrix in alike])
            excess = M @ M.mT - torch.eye(M.shape[1], device=M.device)
            if self.options.penalty == "squared":  # ∂‖E‖²/∂M = 4 E M
                factor: Tensor | float = 4.0 * self.options.orthogonality
            else:  # ∂‖E‖/∂M = 2 E M / ‖E‖
                norm = torch.linalg.matrix_norm(excess, keepdim=True) + 1e-12
                factor = 2.0 * self.options.orthogonality / norm / len(matrices)
            gradients = [matrix.grad for matrix in alike if matrix.grad is not None]  # all have one
            torch._foreach_add_(gradients, ((excess * factor) @ M).unbind())

    def decide(self, step: int) -> Decision:
        assert self._scores is not None
        scores = self._scores.double().cpu().numpy()
        mantissa, exponent = np.frexp(scores)
        kept = _best(np.ldexp(np.round(mantissa, _DIGITS), exponent), self.budget(step))
        ranks, components = kept.sum(1).tolist(), np.nonzero(kept)[1].tolist()
        ends = np.cumsum(ranks).tolist()
        names = [unit.name for unit in self.units]
        chosen = [components[end - rank : end] for rank, end in zip(ranks, ends, strict=True)]
        _, last = self.options.schedule(self.steps)
        return Decision(
            ranks=dict(zip(names, ranks, strict=True)),
            extra={"kept": dict(zip(names, chosen, strict=True)), "final": step == last},
        )

    def check_decision(self, decision: Decision) -> None:
        self.check_ranks(decision)
        kept, R = decision.extra.get("kept"), self.options.components
        fit = isinstance(kept, dict) and all(_indices(kept.get(u.name), R) for u in self.units)
        if not (fit and isinstance(decision.extra.get("final"), bool)):
            raise ValueError(
                f"no `final`, or no list of components below {R} for every unit; accepted: "
                "decisions recorded by adalora"
            )

    def apply(self, decision: Decision) -> bool:
        R = self.options.components
        by_unit = [decision.extra["kept"][unit.name] for unit in self.units]
        first = np.repeat(np.arange(len(by_unit)) * R, [len(components) for components in by_unit])
        indices = first + np.fromiter(chain.from_iterable(by_unit), dtype=np.int64)
        flags = np.zeros(len(by_unit) * R, dtype=bool)
        flags[indices] = True
        kept = torch.from_numpy(flags)
        table = self.adapters.mask_table
        table.write_gates(table.gates * kept.to(self.adapters.device))
        self._kept = len(indices)
        if decision.extra["final"]:  # pruned components no longer train
            table.masks.copy_(kept)
        return False

    def scalars(self) -> dict[str, float]:
        kept = self._kept or len(self.units) * self.options.components
        return {"budget": kept, "mean_rank": kept / len(self.units)}

    def state_dict(self) -> dict[str, Tensor]:
        held = {
            "sensitivity": self._sensitivity,
            "uncertainty": self._uncertainty,
            "scores": self._scores,
        }
        state = {name: tensor for name, tensor in held.items() if tensor is not None}
        return state | {"kept": torch.tensor(self._kept)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept = int(state["kept"])
        for name in ("sensitivity", "uncertainty", "scores"):
            tensor = state.get(name)
            setattr(self, f"_{name}", None if tensor is None else tensor.to(self.adapters.device))


def _indices(value: Any, R: int) -> bool:
    """Whether `value` is a list of component indices below R."""
    return isinstance(value, list) and all(type(j) is int and 0 <= j < R for j in value)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest entries; ties go to the first, NaN sorts last."""
    flat = np.where(np.isnan(scores), -np.inf, scores).ravel()
    least = np.partition(flat, -count)[-count]
    best = flat > least
    best[np.flatnonzero(flat == least)[: count - best.sum()]] = True
    return best.reshape(scores.shape)
