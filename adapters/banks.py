"""Which singular indices of a matrix LeLoRA's banks hold. Free of torch: options check them."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

LOCATIONS = ("primary", "medium", "minor")
"""Where in the spectrum a bank may lie: at its largest, middle or smallest singular values."""


def bank(location: str, rank: int, d: int) -> range:
    """LeLoRA's slice of `rank` singular indices at one of `LOCATIONS`, of d in all (§3.1).

    "minor" are the last ones (a choice: the paper leaves it open). Whether banks fit side by side
    is for `largest_rank` to say; ValueError for another location.
    """
    starts = {"primary": 0, "medium": d // 2, "minor": d - rank}
    if location not in starts:
        raise ValueError(f"location {location!r}: accepted are {', '.join(LOCATIONS)}")
    return range(starts[location], starts[location] + rank)


def largest_rank(locations: Sequence[str], d: int) -> int:
    """The largest rank whose banks at `locations` do not overlap and lie within [0, d)."""

    def too_large(rank: int) -> bool:
        return not fits([bank(location, rank, d) for location in locations], d)

    return bisect_left(range(1, d + 1), True, key=too_large)  # banks only grow with the rank


def fits(ranges: Sequence[range], d: int) -> bool:
    """Whether the ranges are disjoint, of step 1 and within [0, d)."""
    filled = sorted((r for r in ranges if r), key=lambda r: r.start)
    edges = [0, *(edge for r in filled for edge in (r.start, r.stop)), d]
    return all(r.step == 1 for r in filled) and all(a <= b for a, b in pairwise(edges))
