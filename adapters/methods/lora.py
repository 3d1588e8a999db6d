"""LoRA (Hu et al. 2021): ΔW = (α/r) B A, A Kaiming-uniform(√5), B = 0, all components trained.

Two refinements are options: rsLoRA (Kalajdzievski 2023) scales by α/√r, LoRA+ (Hayou et al. 2024)
gives B a higher learning rate than A.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from adapters.gated import GatedAdapter
from adapters.methods.base import Method
from adapters.methods.options import LoRAOptions
from adapters.unit import Unit

ROW_NORM = 1 / math.sqrt(3)
"""Root mean square norm of a row of the initial A, whose entries are uniform in ±1/√in."""


def fresh(unit: Unit, rank: int, gate: float, generator: torch.Generator) -> GatedAdapter:
    """LoRA's initialisation of a unit: A Kaiming-uniform(√5), B = 0, all gates equal to `gate`."""
    A = torch.empty(rank, unit.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return GatedAdapter(A, torch.full((rank,), gate), torch.zeros(rank, unit.out_features))


class LoRA(Method):
    """Constant gates, no decisions."""

    Options = LoRAOptions

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        options = self.options
        divisor = math.sqrt(options.rank) if options.rank_stabilized else options.rank
        return fresh(unit, options.rank, options.alpha / divisor, generator)

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        return {"B": self.options.b_learning_rate_ratio}
