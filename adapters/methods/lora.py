"""LoRA (Hu et al. 2021): ΔW = (α/r) B A, A Kaiming-uniform(√5), B = 0, all components trained.

Two refinements are options: rsLoRA (Kalajdzievski 2023) scales by α/√r, LoRA+ (Hayou et al. 2024)
gives B a higher learning rate than A.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.gated import GatedAdapter
from adapters.methods.base import Method
from adapters.methods.options import LoRAOptions
from adapters.starts import Start, distribute
from adapters.unit import Unit

ROW_NORM = 1 / math.sqrt(3)
"""Root mean square norm of a row of the initial A, whose entries are uniform in ±1/√in."""
_SMALLEST_GAIN = 0.1
"""Gates grow at most tenfold, for directions that the data hardly has."""


def fresh(unit: Unit, rank: int, gate: float, generator: torch.Generator) -> GatedAdapter:
    """LoRA's initialisation of a unit: A Kaiming-uniform(√5), B = 0, all gates equal to `gate`."""
    A = torch.empty(rank, unit.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return GatedAdapter(A, torch.full((rank,), gate), torch.zeros(rank, unit.out_features))


def started_rows(start: Start, rank: int, scale: str) -> tuple[Tensor, Tensor]:
    """(A, factors of its gates) of `rank` components; `scale`: `method.start_options.scale`."""
    A = start.A[:rank]
    if scale == "output":
        return A, (1 / start.gain[:rank].clamp(min=_SMALLEST_GAIN)).float()
    return A * (ROW_NORM if scale == "lora" else 1.0), torch.ones(rank)


class LoRA(Method):
    """Constant gates, no decisions."""

    Options = LoRAOptions

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self.changes_structure = options.start_options.ranks != "fixed"

    @property
    def _scale(self) -> float:
        options = self.options
        return options.alpha / (
            math.sqrt(options.rank) if options.rank_stabilized else options.rank
        )

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        return fresh(unit, self.options.rank, self._scale, generator)

    def adopt(self, starts: Mapping[str, Start]) -> bool:
        options = self.options.start_options
        if options.ranks == "fixed":
            for name, start in starts.items():
                A, gains = started_rows(start, self.options.rank, options.scale)
                self.adapters[name].A.data.copy_(A)
                self.adapters[name].g.data.copy_(gains * self._scale)
            return False
        ranks = self._distributed(starts)
        for unit, rank in zip(self.units, ranks, strict=True):
            if rank == 0:
                self.adapters.remove(unit.name)
                continue
            A, gains = started_rows(starts[unit.name], rank, options.scale)
            zeros = torch.zeros(rank, unit.out_features)
            self.adapters.set_adapter(unit, GatedAdapter(A, gains * self._scale, zeros))
        return True

    def _distributed(self, starts: Mapping[str, Start]) -> list[int]:
        """The rank of every unit, by `method.start_options`; the scale stays that of `rank`."""
        options, units = self.options.start_options, self.units
        costs = [
            unit.in_features + unit.out_features if options.count == "parameters" else 1
            for unit in units
        ]
        worths = [starts[unit.name].worth.tolist() for unit in units]
        return distribute(worths, costs, options.budget or self.options.rank)

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        return {"B": self.options.b_learning_rate_ratio}
