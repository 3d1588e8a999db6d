"""AdaLoRA (Zhang et al. 2023): ΔW = P Λ Q, with Λ pruned under a global budget.

Every unit starts with `initial_rank` components, A and B ~ N(0, 0.02), λ = 0. Each step, for every
entry w of A, λ and B (globally summed gradient, before clipping):

    I(w) = |w ∂L/∂w|          Ī ← β₁ Ī + (1 − β₁) I          Ū ← β₂ Ū + (1 − β₂) |I − Ī|

and component i of a unit scores S_i = s(λ_i) + mean_j s(A_ij) + mean_j s(B_ij), s = Ī Ū. Every
`delta_t` steps the b(t) best components of all units keep their λ, the others' become 0 and may
grow again; b falls from n · initial_rank to n · rank along a cubic. The last `tfinal` steps train
with the final choice. Orthogonality of A and B is a penalty with the weight `orthogonality`.
"""

from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.methods.base import Method, MethodOptions, check_fits

_DIGITS = 6
"""Scores are rounded to so many significant digits before they are sorted."""


class AdaLoRAOptions(MethodOptions):
    """Options of `method.kind: adalora`; `rank` is the mean rank at the end."""

    kind: Literal["adalora"] = "adalora"
    """Name of the method."""
    initial_rank: int | None = Field(None, gt=0)
    """Components per unit at the start; none: 1.5 · rank."""
    tinit: int | None = Field(None, ge=0)
    """Steps before the first pruning; none: a tenth of the run."""
    tfinal: int | None = Field(None, ge=0)
    """Steps at the end with a fixed choice; none: three tenths of the run."""
    delta_t: int = Field(10, gt=0)
    """Steps between two prunings."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Decay of the sensitivity's average."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Decay of the uncertainty's average."""
    orthogonality: float = Field(0.1, ge=0)
    """Weight of the orthogonality penalty."""
    penalty: Literal["norm", "squared"] = "norm"
    """The mean over matrices of ‖A Aᵀ − I‖ (the authors' code, PEFT), or the sum of its squares
    (paper, eq. 4)."""

    @property
    def components(self) -> int:
        return self.initial_rank if self.initial_rank is not None else round(1.5 * self.rank)

    @model_validator(mode="after")
    def _check(self):
        if self.components < self.rank:
            raise ValueError(
                f"method.initial_rank: {self.initial_rank} given; accepted: at least method.rank "
                f"({self.rank})"
            )
        return self

    def check_units(self, units):
        super().check_units(units)
        key = "method.initial_rank" + (" (1.5 · method.rank)" if self.initial_rank is None else "")
        check_fits(key, self.components, units)

    def schedule(self, steps: int) -> tuple[int, int]:
        """(tinit, steps − tfinal): between them the budget falls."""
        first = self.tinit if self.tinit is not None else steps // 10
        final = self.tfinal if self.tfinal is not None else 3 * steps // 10
        return first, steps - final

    def check_steps(self, steps):
        first, last = self.schedule(steps)
        if first >= last:
            raise ValueError(
                f"method.tinit: {first} given with method.tfinal: {steps - last}; accepted: "
                f"together fewer than the run's {steps} steps"
            )


class AdaLoRA(Method):
    """Λ is the learned gate: g = λ α/r."""

    Options = AdaLoRAOptions
    decides = True
    learns_gates = True

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._sensitivity: Tensor | None = None  # Ī, laid out as the optimizer's values
        self._uncertainty: Tensor | None = None  # Ū
        self._scores: Tensor | None = None  # S (n, R)
        self._kept = 0  # components in use; 0 before the first pruning

    def init_adapter(self, unit, generator):
        rank = self.options.components
        A = torch.empty(rank, unit.in_features).normal_(0.0, 0.02, generator=generator)
        B = torch.empty(rank, unit.out_features).normal_(0.0, 0.02, generator=generator)
        return GatedAdapter(A, torch.zeros(rank), B)

    def trainable(self, name, role, parameter, mask):
        # An Adam step on g = λ α/r that moves λ as a step on λ itself would.
        ratio = self.options.alpha / self.options.rank if role == "g" else 1.0
        plain = super().trainable(name, role, parameter, mask)
        return replace(plain, learning_rate_ratio=ratio, decay_ratio=1.0 / ratio)

    def budget(self, step: int) -> int:
        """b(t): components of all units that are kept from step t on."""
        first, last = self.options.schedule(self.steps)
        n = len(self.units)
        target, initial = n * self.options.rank, n * self.options.components
        if step <= first:
            return initial
        left = 1.0 - (step - first) / (last - first) if step < last else 0.0
        return target + int((initial - target) * left**3)

    def due(self, step):
        first, last = self.options.schedule(self.steps)
        return step == last or (first < step < last and step % self.options.delta_t == 0)

    def observe(self, step, optimizer):
        self._add_penalty()
        importance = (optimizer.values * optimizer.trained_gradients).abs()
        if self._sensitivity is None or self._uncertainty is None:
            self._sensitivity = torch.zeros_like(importance)
            self._uncertainty = torch.zeros_like(importance)
        if bool(importance.isfinite().all()):  # else the step will be skipped
            self._sensitivity.lerp_(importance, 1 - self.options.beta1)
            deviation = (importance - self._sensitivity).abs()
            self._uncertainty.lerp_(deviation, 1 - self.options.beta2)
        if self.due(step + 1):
            n, R = len(self.units), self.options.components
            sums = optimizer.row_sums(self._sensitivity * self._uncertainty)[: 3 * n * R]
            A, g, B = sums.view(n, 3, R).unbind(1)
            into = torch.tensor([unit.in_features for unit in self.units], device=A.device)
            out = torch.tensor([unit.out_features for unit in self.units], device=A.device)
            self._scores = A / into.unsqueeze(1) + g + B / out.unsqueeze(1)

    def _add_penalty(self) -> None:
        """Gradient of the orthogonality penalty, the same on every rank, after the reduction.
        Matrices of one shape at once: one by one, hundreds would keep a GPU waiting."""
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

    def decide(self, step):
        assert self._scores is not None
        scores = self._scores.double().cpu().numpy()
        mantissa, exponent = np.frexp(scores)
        kept = _best(np.ldexp(np.round(mantissa, _DIGITS), exponent), self.budget(step))
        ranks, components = kept.sum(1).tolist(), np.nonzero(kept)[1].tolist()
        ends = np.cumsum(ranks).tolist()
        names = [unit.name for unit in self.units]
        chosen = [components[end - rank : end] for rank, end in zip(ranks, ends, strict=True)]
        _, last = self.options.schedule(self.steps)
        return {
            "ranks": dict(zip(names, ranks, strict=True)),
            "kept": dict(zip(names, chosen, strict=True)),
            "final": step == last,
        }

    def check_decision(self, decision):
        super().check_decision(decision)
        kept, R = decision.get("kept", {}), self.options.components
        kept_all = all(max(kept.get(unit.name, [R]), default=0) < R for unit in self.units)
        if "final" not in decision or not kept_all:
            raise ValueError(f"without `final`, or without components below {R} of every unit")

    def apply(self, decision):
        R = self.options.components
        by_unit = [decision["kept"][unit.name] for unit in self.units]
        first = np.repeat(np.arange(len(by_unit)) * R, [len(components) for components in by_unit])
        places = first + np.fromiter(chain.from_iterable(by_unit), dtype=np.int64)
        flags = np.zeros(len(by_unit) * R, dtype=bool)
        flags[places] = True
        kept = torch.from_numpy(flags)
        self.mask_table.write_gates(self.mask_table.gates * kept.to(self.device))
        self._kept = len(places)
        if decision["final"]:  # what was pruned stays out
            self.mask_table.masks.copy_(kept)
        return False

    def scalars(self):
        kept = self._kept or len(self.units) * self.options.components
        return {"budget": kept, "mean_rank": kept / len(self.units)}

    def state_dict(self):
        held = {
            "sensitivity": self._sensitivity,
            "uncertainty": self._uncertainty,
            "scores": self._scores,
        }
        state = {name: tensor for name, tensor in held.items() if tensor is not None}
        return state | {"kept": torch.tensor(self._kept)}

    def load_state_dict(self, state):
        self._kept = int(state["kept"])
        for name in ("sensitivity", "uncertainty", "scores"):
            tensor = state.get(name)
            setattr(self, f"_{name}", None if tensor is None else tensor.to(self.device))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest entries are; of equal ones the first, NaN last."""
    flat = np.where(np.isnan(scores), -np.inf, scores).ravel()
    least = np.partition(flat, -count)[-count]
    best = flat > least
    best[np.flatnonzero(flat == least)[: count - best.sum()]] = True
    return best.reshape(scores.shape)
