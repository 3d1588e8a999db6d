"""Data-driven starts of A: the leading right singular vectors of what a layer sees in some batches.

    activation   M = Σ_t (x_t − x̄)(x_t − x̄)ᵀ  (in, in)      EVA, arXiv 2410.07170
    gradient     M = ∂L/∂W = Σ_t dy_t x_tᵀ    (out, in)     LoRA-GA, 2407.05000; GoRA, 2502.12171

M is too large to form for every layer, so V is found by subspace iteration (Halko et al. 2011,
algorithm 4.4), each step of which is a pass over the batches that sums a `Sketch`, in O((in + out) k)
memory a layer: P₁ is Gaussian, the next P is orth(P Mᵀ) or orth(P M), and A holds the rows of V in
P_q M = U Σ Vᵀ. With k twice the number of components r, two passes leave

    E ‖M − M V Vᵀ‖_F ≤ (1 + r/(r − 1))^½ (Σ_{j>r} σ_j²)^½

for V of all k rows (theorem 10.5), which each two further passes bring nearer the minimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.layers.sketch import Sketch

_DIGITS = 6
"""Significant digits of a component's worth that are compared: sums over another number of ranks
differ in the last ones."""


@dataclass(frozen=True)
class Start:
    """What a unit's adapter starts from, the best component first."""

    A: Tensor
    """(k, in) float32, orthonormal rows."""
    worth: Tensor
    """(k,) float64, descending: share of the variance of x that the component explains, or
    singular value of the gradient."""
    gain: Tensor
    """(k,) float64: root mean square of a·x over that of a row of LoRA's own A (Kaiming)."""


def sketch_size(components: int, *sides: int) -> int:
    """k, the rows of P for so many components of an M with these sides."""
    return min(max(2 * components, components + 8), *sides)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows (k, n) float32 with the span of `rows`; of deficient ones, a completion."""
    return torch.linalg.qr(rows.double().T)[0].T.float().contiguous()


def centred(sketch: Sketch) -> Tensor:
    """S (k, in) about the mean of x, of a sketch of Σ x xᵀ."""
    image = sketch.test.double() @ sketch.total
    return sketch.sums.double() - torch.outer(image, sketch.total / sketch.count)


def right_vectors(sums: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(V, σ) of S (k, in): `components` right singular vectors as rows, in float32, each with its
    largest entry positive, and singular values in float64."""
    _, values, vectors = torch.linalg.svd(sums.double(), full_matrices=False)
    rows = vectors[:components]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return (rows * largest.sign()).float().contiguous(), values[:components]


def explained(values: Tensor, sketch: Sketch, *, center: bool) -> Tensor:
    """Shares of the variance (`center`), or else of Σ ‖x‖², given eigenvalues of its matrix."""
    mean = sketch.total.square().sum() / sketch.count if center else 0.0
    return values.cpu() / (sketch.energy - mean).cpu()


def gains(sketch: Sketch) -> Tensor:
    """`Start.gain` from a sketch of Σ x xᵀ whose P is A."""
    squares = (sketch.sums.double() * sketch.test.double()).sum(1).clamp(min=0)
    of_kaiming = sketch.energy / (3 * sketch.sums.shape[1])  # rows uniform in ±1/√in
    return (squares / of_kaiming).sqrt()


def distribute(worths: Sequence[Sequence[float]], costs: Sequence[int], mean: float) -> list[int]:
    """Ranks of units under the budget Σ_u r_u cost_u ≤ mean · Σ_u cost_u.

    Components of all units are taken in the order of worth over cost, the first of equal ones first
    (EVA with costs of 1: the largest shares of explained variance). What no longer fits, and the
    same unit's after it, is left out.
    """
    budget = mean * sum(costs)
    found = [
        (-float(f"{worth / cost:.{_DIGITS}g}"), unit, component)
        for unit, (of_unit, cost) in enumerate(zip(worths, costs, strict=True))
        for component, worth in enumerate(of_unit)
    ]
    ranks = np.zeros(len(costs), dtype=int)
    spent = 0
    for _, unit, component in sorted(found):
        if ranks[unit] == component and spent + costs[unit] <= budget:
            ranks[unit] += 1
            spent += costs[unit]
    return ranks.tolist()
