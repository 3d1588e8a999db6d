"""A hard budget of trained parameters: the price at which every unit's own choice meets it.

Unit u pays λ c_u(r) for rank r, c_u(r) = r · size_u parameters, and takes the rank of least

    v_u(r) + λ c_u(r).

The total Σ_u c_u falls as λ rises, so that bisection finds the smallest λ at which it is at most
the budget. Equal values go to the smaller rank.
"""

import torch
from torch import Tensor

_STEPS = 60
"""Bisections: the price is then known to 2⁻⁶⁰ of its largest possible value."""

_DECIMALS = 9
"""Decimals to which values are rounded before they are compared."""


def chosen(values: Tensor, costs: Tensor, price: Tensor) -> Tensor:
    """The cost (n,) of each unit's choice. `values`, `costs`: (n, |R|), costs ascending by rank."""
    priced = values + price * costs
    best = priced <= priced.amin(1, keepdim=True)
    return torch.where(best, costs, torch.inf).amin(1)


def solve(values: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """(below, λ), 0-d: λ is the smallest price at which the choices cost at most `budget`, `below`
    the largest smaller one that was tried. Without synchronisation of a device; prices may be
    negative. The cheapest choices must be within the budget."""
    spread = values.amax() - values.amin()
    gaps = costs.diff(dim=1).amin() if costs.shape[1] > 1 else costs.amax().clamp(min=1)
    high = 2 * spread / gaps + 1
    low = -high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        exceeds = chosen(values, costs, middle).sum() > budget
        low, high = torch.where(exceeds, middle, low), torch.where(exceeds, high, middle)
    return low, high


def allocate(values: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, float]:
    """(index of each unit's rank (n,), λ), on the CPU.

    Of units that would leave their rank at exactly λ, as many as fit stay, those of lower index
    first. What is then unspent is less than one unit's next rank.
    """
    values = values.double().mul(10.0**_DECIMALS).round() / 10.0**_DECIMALS
    below, price = solve(values, costs, budget)
    taken, larger = chosen(values, costs, price), chosen(values, costs, below)
    left = budget - float(taken.sum())
    for unit in torch.nonzero(larger > taken).flatten().tolist():
        more = float(larger[unit] - taken[unit])
        if more <= left:
            taken[unit], left = larger[unit], left - more
    return torch.searchsorted(costs, taken.unsqueeze(1)).squeeze(1), float(price)
