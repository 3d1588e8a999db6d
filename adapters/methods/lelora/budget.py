"""A hard budget of trained parameters: the price at which every unit's own choice meets it.

Unit u pays λ c_u(r) for rank r, c_u(r) = r · size_u parameters, and takes the rank of least

    v_u(r) + λ c_u(r).

The total Σ_u c_u falls as λ rises, so that bisection finds the smallest λ at which it is at most
the budget. Equal values go to the smaller rank. The units are in one or several parts, each of
which has a budget and a price of its own. A part of few units leaves much of it to no one at that
price (a fifth, of seven matrices and ranks 0 to 16), which, with `fill`, then goes to what is worth
most per parameter of what still fits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 60
"""Bisections: the price is then known to 2⁻⁶⁰ of its largest possible value."""

_DECIMALS = 9
"""Decimals to which values are rounded before they are compared."""


@dataclass(frozen=True)
class Budget:
    """What n units in p parts may cost."""

    costs: Tensor
    """c (n, |R|), float64, ascending by rank."""
    part: Tensor
    """The part of each unit (n,), int64; none is empty."""
    limits: Tensor
    """Budgets (p,), float64, of which each part's cheapest choices must be within its own."""
    fill: bool = False
    """Whether what the choices at the price leave goes to what still fits."""

    @classmethod
    def of_rank(
        cls, rank: float, costs: Tensor, sizes: Tensor, part: Tensor, *, fill: bool
    ) -> "Budget":
        """In every part the parameters of mean rank `rank`. `sizes` (n,): parameters of one
        component of each unit; `part` (n,): any number for each part."""
        names, part = part.unique(return_inverse=True)
        empty = costs.new_zeros(len(names))
        return cls(costs, part, rank * empty.index_add(0, part, sizes.double()), fill)

    def to(self, device: torch.device) -> "Budget":
        costs, part, limits = (t.to(device) for t in (self.costs, self.part, self.limits))
        return Budget(costs, part, limits, self.fill)

    def charge(self, price: Tensor) -> Tensor:
        """λ c_u(r), (n, |R|), at the price of each part (p,)."""
        return price[self.part].unsqueeze(1) * self.costs

    def centred(self, logits: Tensor) -> Tensor:
        """Logits (n, |R|) less the slope along the rank, by least squares, that the units of each
        part have in common. Their curvature stays: it says how equal the ranks should be."""
        rank = (self.costs / self.costs.amax(1, keepdim=True).clamp(min=1)).to(logits)
        away = rank - rank.mean(1, keepdim=True)
        numbers = torch.arange(len(self.limits), device=self.part.device)
        of_part = (self.part == numbers.unsqueeze(1)).to(logits)  # a product: sums in one order
        spread = of_part @ away.square().sum(1)
        slope = of_part @ (away * logits).sum(1) / spread.clamp(min=1e-12)
        return logits - slope[self.part].unsqueeze(1) * rank

    def chosen(self, values: Tensor, price: Tensor) -> Tensor:
        """The cost (n,) of each unit's choice, given v (n, |R|)."""
        priced = values + self.charge(price)
        best = priced <= priced.amin(1, keepdim=True)
        return torch.where(best, self.costs, torch.inf).amin(1)

    def totals(self, spent: Tensor) -> Tensor:
        """Sums by part (p,) of what units cost (n,): whole numbers, exact in any order."""
        return torch.zeros_like(self.limits).index_add(0, self.part, spent)

    def solve(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(below, λ), (p,) each: λ is a part's smallest price at which its choices are within its
        budget, `below` the largest smaller one that was tried. Without synchronisation of a device;
        prices may be negative."""
        spread = values.amax() - values.amin()
        many = self.costs.shape[1] > 1
        gaps = self.costs.diff(dim=1).amin() if many else self.costs.amax().clamp(min=1)
        high = (2 * spread / gaps + 1).expand_as(self.limits)
        low = -high
        for _ in range(_STEPS):
            middle = (low + high) / 2
            exceeds = self.totals(self.chosen(values, middle)) > self.limits
            low, high = torch.where(exceeds, middle, low), torch.where(exceeds, high, middle)
        return low, high

    def allocate(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(index of each unit's rank (n,), λ (p,)), on the CPU.

        Of units that would leave their rank at exactly λ, as many as fit stay, those of lower index
        first. What is then unspent is less than the next rank of one unit or, with `fill`, in each
        part less than that of any of its units.
        """
        values = values.double().mul(10.0**_DECIMALS).round() / 10.0**_DECIMALS
        below, price = self.solve(values)
        taken, larger = self.chosen(values, price), self.chosen(values, below)
        left = (self.limits - self.totals(taken)).tolist()
        for unit in torch.nonzero(larger > taken).flatten().tolist():
            part, more = int(self.part[unit]), float(larger[unit] - taken[unit])
            if more <= left[part]:
                taken[unit], left[part] = larger[unit], left[part] - more
        if self.fill:
            taken = self._filled(values, taken)
        return self._index(taken), price

    def _filled(self, values: Tensor, taken: Tensor) -> Tensor:
        """The costs (n,) after one unit after another took a larger rank, of those that fit the one
        with the least (v(r′) − v(r)) / (c(r′) − c(r)), at equal ones the first."""
        while True:
            more = self.costs - taken.unsqueeze(1)
            left = (self.limits - self.totals(taken))[self.part].unsqueeze(1)
            fits = (more > 0) & (more <= left)
            if not fits.any():
                return taken
            change = values - values.gather(1, self._index(taken).unsqueeze(1))
            first = torch.where(fits, change / more, torch.inf).argmin()
            unit = first // self.costs.shape[1]
            taken = taken.index_put((unit,), self.costs.flatten()[first])

    def _index(self, taken: Tensor) -> Tensor:
        """The index of the rank (n,) of each cost (n,)."""
        return torch.searchsorted(self.costs, taken.unsqueeze(1)).squeeze(1)
