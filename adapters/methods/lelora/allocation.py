"""Numbers about an allocation, for the log: the paper's Fig. 3 and Table 4."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.unit import Unit, by_kind_and_third


def allocation_figures(
    units: Sequence[Unit], ranks: Sequence[int], locations: Sequence[str], banks: Sequence[str]
) -> dict[str, float]:
    """Mean rank, distinct actions, and by matrix type and third of the blocks the mean rank and the
    share of each of `banks` among the units that train."""
    found: dict[str, float] = {
        "mean_rank": sum(ranks) / len(ranks),
        "distinct_actions": len({(r, r and s) for r, s in zip(ranks, locations, strict=True)}),
    }
    for group, members in by_kind_and_third(units).items():
        found[f"mean_rank/{group}"] = sum(ranks[i] for i in members) / len(members)
        trained = [i for i in members if ranks[i] > 0]
        for bank in banks if trained else ():
            share = sum(locations[i] == bank for i in trained) / len(trained)
            found[f"share_{bank}/{group}"] = share
    return found


def idle_change(adapters: Iterable[GatedAdapter], mask: Tensor) -> float:
    """‖ΔW‖ of the components outside `mask` (n, R) over that of all, summed in squares over
    components and units; 0 where nothing was learned."""
    idle = whole = 0.0
    for adapter, kept in zip(adapters, mask, strict=True):
        norms = (adapter.g * adapter.A.norm(dim=1) * adapter.B.norm(dim=1)).detach()
        squares = norms.double().square().cpu()
        idle, whole = idle + float(squares[~kept].sum()), whole + float(squares.sum())
    return math.sqrt(idle / whole) if whole else 0.0
