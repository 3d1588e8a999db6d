"""Search for a learning rate: a grid of factors of 2, widened until the best one is interior."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FACTOR = 2.0
"""Between neighbours of the grid: multiplication by it is exact, so a rate is found again."""


@dataclass(frozen=True)
class Found:
    """The state of a search."""

    needed: tuple[float, ...] = ()
    """Rates whose loss decides what comes next; none: the search is over."""
    best: float | None = None
    """The rate of least loss; None while others are needed, or where no run gave a loss."""
    is_edge: bool = False
    """Whether a neighbour of the best one was not tried, or failed for another reason than its
    rate: a better rate may lie beyond."""


def search(losses: Mapping[float, float], start: Sequence[float], bounds: Sequence[float]) -> Found:
    """What the `losses` measured so far, by rate, say: ∞ of a rate at which runs diverge, NaN of
    one whose loss is not known. Begins with the rates of `start`; between `bounds`."""
    if missing := tuple(rate for rate in start if rate not in losses):
        return Found(needed=missing)
    usable = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not usable:
        lower = min(losses) / FACTOR
        if all(loss == math.inf for loss in losses.values()) and _within(lower, bounds):
            return Found(needed=(lower,))
        return Found(is_edge=True)
    best = min(usable, key=lambda rate: (usable[rate], rate))
    beside = (best / FACTOR, best * FACTOR)
    unknown = [rate for rate in beside if rate not in losses]
    if needed := tuple(rate for rate in unknown if _within(rate, bounds)):
        return Found(needed=needed)
    failed = any(math.isnan(losses[rate]) for rate in beside if rate in losses)
    return Found(best=best, is_edge=bool(unknown) or failed)


def _within(rate: float, bounds: Sequence[float]) -> bool:
    low, high = bounds
    return low * (1 - 1e-9) <= rate <= high * (1 + 1e-9)
