"""LoRA (Hu et al. 2021): ΔW = (α/r) B A, A Kaiming-uniform(√5), B = 0, everything trained.

Two refinements are options: rsLoRA (Kalajdzievski 2023) scales by α/√r, LoRA+ (Hayou et al. 2024)
gives B a higher learning rate than A.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from adapters.gated import GatedAdapter
from adapters.methods.base import Method, MethodOptions
from adapters.units import Unit


class LoRAOptions(MethodOptions):
    """Options of `method.kind: lora`."""

    kind: Literal["lora"] = "lora"
    """Name of the method."""
    rank_stabilized: bool = False
    """Scale by α/√r instead of α/r (rsLoRA)."""
    b_learning_rate_ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A (LoRA+; its paper recommends 16)."""


def fresh(unit: Unit, rank: int, gate: float, generator: torch.Generator) -> GatedAdapter:
    """LoRA's start of one unit: A Kaiming-uniform(√5), B = 0, all gates alike."""
    A = torch.empty(rank, unit.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return GatedAdapter(A, torch.full((rank,), gate), torch.zeros(rank, unit.out_features))


class LoRA(Method):
    """Constant gates; nothing is decided."""

    Options = LoRAOptions

    def init_adapter(self, unit, generator):
        options = self.options
        divisor = math.sqrt(options.rank) if options.rank_stabilized else options.rank
        return fresh(unit, options.rank, options.alpha / divisor, generator)

    def trainable(self, name, role, parameter, mask):
        ratio = self.options.b_learning_rate_ratio if role == "B" else 1.0
        return replace(super().trainable(name, role, parameter, mask), learning_rate_ratio=ratio)
