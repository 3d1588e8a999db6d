"""The singular indices of LeLoRA's banks. Does not import torch: options are checked with it."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

LOCATIONS = ("primary", "medium", "minor")
"""Locations of a bank in the spectrum: at the largest, middle or smallest singular values."""


def bank(location: str, rank: int, d: int) -> range:
    """LeLoRA's `rank` consecutive singular indices of d at one of `LOCATIONS` (§3.1).

    "minor" is the last `rank` indices (a choice: the paper leaves it open). Banks may overlap; see
    `largest_rank`. Raises ValueError for another location.
    """
    starts = {"primary": 0, "medium": d // 2, "minor": d - rank}
    if location not in starts:
        raise ValueError(f"location {location!r}: accepted are {', '.join(LOCATIONS)}")
    return range(starts[location], starts[location] + rank)


def largest_rank(locations: Sequence[str], d: int) -> int:
    """The largest rank at which the banks of `locations` are disjoint and within [0, d)."""

    def too_large(rank: int) -> bool:
        return not fits([bank(location, rank, d) for location in locations], d)

    return bisect_left(range(1, d + 1), True, key=too_large)  # banks only grow with the rank


def fits(ranges: Sequence[range], d: int) -> bool:
    """Whether the ranges are disjoint, of step 1 and within [0, d)."""
    filled = sorted((r for r in ranges if r), key=lambda r: r.start)
    edges = [0, *(edge for r in filled for edge in (r.start, r.stop)), d]
    return all(r.step == 1 for r in filled) and all(a <= b for a, b in pairwise(edges))
