"""First-order rewards per unit, from row sums of gradients and values: (n, roles, R) float64.

Roles are A, g and B, or A and B where g is constant. A reward is the change of a loss: lower is
better.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.methods.lelora.options import Step
from adapters.optimizer import MaskedAdamW
from adapters.unit import Unit


def row_sums(optimizer: MaskedAdamW, flat: Tensor) -> Tensor:
    """Sums over each component's row of A, its g and its row of B: (n, roles, R) float64."""
    return optimizer.by_component(flat).double()


def row_sizes(units: Sequence[Unit], like: Tensor) -> Tensor:
    """Number of scalars in a row of each role, (n, roles, 1), for `like` (n, roles, R)."""
    gate = [1] if like.shape[1] == 3 else []
    sizes = [[unit.in_features, *gate, unit.out_features] for unit in units]
    return torch.tensor(sizes).to(like).unsqueeze(2)


def counterfactual(
    optimizer: MaskedAdamW, gradient: Tensor, units: Sequence[Unit], step: Step
) -> Tensor:
    """Σ_{A, g, B} ⟨δ_j, G′_j⟩, (n, R): the first-order change of the current batch's loss by a unit
    step δ_j of component j against another batch's `gradient` G: −sign(G_j), Adam's first, or
    −G_j / rms(G_j), 0 where G_j = 0, to which a few large entries contribute more than to Adam's.

    The batches are independent, so gradient noise does not appear as progress.
    """
    later = optimizer.trained_gradients
    if step == "adam":
        sign = gradient.sign().where(gradient.isfinite(), torch.nan)
        return -row_sums(optimizer, sign * later).sum(1)
    dots, squares = row_sums(optimizer, gradient * later), row_sums(optimizer, gradient.square())
    rms = (squares / row_sizes(units, squares)).sqrt()
    return -torch.where(rms > 0, dots / rms.clamp(min=1e-300), 0.0).sum(1)


def step_squares(values: Tensor, changes: Tensor, gates: Tensor) -> Tensor:
    """‖δW_j‖² (n, R) of a step (δA, δg, δB) of each component j, to first order,

        g² (‖B‖² ‖δA‖² + ‖A‖² ‖δB‖²) + δg² ‖A‖² ‖B‖²,

    exact where δA ⟂ A, δB ⟂ B. `values`, `changes`: squared norms of rows, (n, roles, R);
    `gates` (n, R): g where it is constant. Components are taken as orthogonal: a slice's ‖δW‖² is
    their sum.
    """
    (a, b), (da, db) = ((part[:, 0], part[:, -1]) for part in (values, changes))
    if values.shape[1] == 2:
        return gates.double().square() * (b * da + a * db)
    return values[:, 1] * (b * da + a * db) + changes[:, 1] * a * b


def per_step(reward: Tensor, squares: Tensor) -> Tensor:
    """reward / ‖δW‖, 0 where nothing would move."""
    norm = squares.sqrt()
    return torch.where(norm > 0, reward / norm.clamp(min=1e-300), 0.0)


def unit_steps(
    optimizer: MaskedAdamW, gradient: Tensor, units: Sequence[Unit], gates: Tensor, step: Step
) -> Tensor:
    """‖δW_j‖² (n, R) of the unit steps of `counterfactual`."""
    changes = row_sums(optimizer, gradient.sign().abs())
    if step == "gradient":
        changes = torch.where(changes > 0, row_sizes(units, changes), 0.0)
    return step_squares(row_sums(optimizer, optimizer.values.square()), changes, gates)


def attributed(
    optimizer: MaskedAdamW, before: Tensor, gates: Tensor, *, by_length: bool
) -> tuple[Tensor, Tensor]:
    """(⟨∇_{θ_u} L, Δθ_u⟩, `by_length` over ‖δW_u‖; whether θ_u changed), both (n), with the current
    gradient and the change of the values since `before`."""
    change = optimizer.values - before
    reward = row_sums(optimizer, optimizer.trained_gradients * change).sum((1, 2))
    squares = row_sums(optimizer, change.square())
    if by_length:
        values = row_sums(optimizer, before.square())
        reward = per_step(reward, step_squares(values, squares, gates).sum(1))
    return reward, squares.sum((1, 2)) > 0


def by_action(
    components: Tensor, trained: Callable[[int, str], slice], ranks: Sequence[int],
    locations: Sequence[str],
) -> Tensor:  # fmt: skip
    """Sums of `components` (n, R) over the slice that each action trains: (n, |R|, |S|)."""
    table = [
        torch.stack([components[:, trained(r, s)].sum(1) for s in locations], 1) for r in ranks
    ]
    return torch.stack(table, 1)
