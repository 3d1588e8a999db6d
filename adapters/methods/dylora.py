"""DyLoRA (Valipour et al. 2023): one LoRA usable at every rank up to r.

Before each step b is drawn uniformly from 1 … r. The forward pass uses the first b components,
scaled by α/b; either all of them train or only the b-th.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adapters import seeds
from adapters.decision import Decision
from adapters.gated import GatedAdapter
from adapters.methods.base import Method
from adapters.methods.lora import fresh
from adapters.methods.options import DyLoRAOptions
from adapters.unit import Unit


class DyLoRA(Method):
    """Gates α/b · 1[j < b]."""

    Options = DyLoRAOptions
    decides = True

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        return fresh(unit, self.options.rank, self.options.alpha / self.options.rank, generator)

    def decide(self, step: int) -> Decision:
        generator = seeds.generator(self.seed, step)
        b = int(torch.randint(self.options.rank, (), generator=generator)) + 1
        return Decision(ranks={"all": b})

    @property
    def decided(self) -> Sequence[str]:
        return ["all"]

    def check_decision(self, decision: Decision) -> None:
        self.check_ranks(decision)
        if decision.ranks["all"] < 1:
            raise ValueError("rank 0; accepted: at least 1")

    def apply(self, decision: Decision) -> bool:
        b = decision.ranks["all"]
        index = torch.arange(self.options.rank)
        trained = index == b - 1 if self.options.only_bth else index < b
        table, units = self.adapters.mask_table, len(self.adapters)
        table.write_gates(_gates(self.options, b).repeat(units))
        table.masks.copy_(trained.repeat(units))
        return False

    @contextmanager
    def inference(self) -> Iterator[None]:
        table = self.adapters.mask_table
        held = table.gates.clone()
        gates = _gates(self.options, self.options.export_rank or self.options.rank)
        table.write_gates(gates.repeat(len(self.adapters)))
        try:
            yield
        finally:
            table.write_gates(held)

    @classmethod
    def inference_gates(cls, options: DyLoRAOptions, gates: Tensor) -> Tensor:
        return _gates(options, options.export_rank or options.rank)


def _gates(options: DyLoRAOptions, b: int) -> Tensor:
    return torch.where(torch.arange(options.rank) < b, options.alpha / b, 0.0)
