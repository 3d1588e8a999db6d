"""LoRA (Hu et al. 2021): ΔW = (α/r) B A, A Kaiming-uniform(√5), B = 0, everything trained."""

import math
from typing import Literal

import torch
from torch import nn

from adapters.gated import GatedAdapter
from adapters.method import Method, MethodOptions
from adapters.units import Unit


class LoRAOptions(MethodOptions):
    """Options of `method.kind: lora`."""

    kind: Literal["lora"] = "lora"
    """Name of the method."""


class LoRA(Method):
    """Constant gates g = α/r; nothing is decided."""

    Options = LoRAOptions

    def start(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        rank = self.options.rank
        A = torch.empty(rank, unit.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        gates = torch.full((rank,), self.options.alpha / rank)
        return GatedAdapter(A, gates, torch.zeros(rank, unit.out_features))
