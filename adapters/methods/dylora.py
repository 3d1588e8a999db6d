"""DyLoRA (Valipour et al. 2023): one LoRA that works at every rank up to r.

Before each step b is drawn uniformly from 1 … r; forward uses the first b components, scaled by
α/b, and either all of them train or only the b-th.
"""

from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, model_validator

from adapters import seeds
from adapters.methods.base import Method, MethodOptions
from adapters.methods.lora import fresh


class DyLoRAOptions(MethodOptions):
    """Options of `method.kind: dylora`."""

    kind: Literal["dylora"] = "dylora"
    """Name of the method."""
    only_bth: bool = False
    """Train only component b in a step (the paper's frozen variant)."""
    export_rank: int | None = Field(None, gt=0)
    """Components used in evaluation and export; none: all r."""

    @model_validator(mode="after")
    def _check(self):
        if self.export_rank is not None and self.export_rank > self.rank:
            raise ValueError(
                f"method.export_rank: {self.export_rank} given; accepted: at most method.rank "
                f"({self.rank})"
            )
        return self


class DyLoRA(Method):
    """Gates α/b · 1[j < b]."""

    Options = DyLoRAOptions
    decides = True

    def init_adapter(self, unit, generator):
        return fresh(unit, self.options.rank, self.options.alpha / self.options.rank, generator)

    def due(self, step):
        return True

    def decide(self, step):
        generator = seeds.generator(self.seed, step)
        return {
            "ranks": {"all": int(torch.randint(self.options.rank, (), generator=generator)) + 1}
        }

    @property
    def decided(self):
        return ["all"]

    def check_decision(self, decision):
        super().check_decision(decision)
        if decision["ranks"]["all"] < 1:
            raise ValueError("rank 0; accepted: at least 1")

    def apply(self, decision):
        b = decision["ranks"]["all"]
        index = torch.arange(self.options.rank)
        trained = index == b - 1 if self.options.only_bth else index < b
        self.mask_table.write_gates(_gates(self.options, b).repeat(len(self.adapters)))
        self.mask_table.masks.copy_(trained.repeat(len(self.adapters)))
        return False

    @contextmanager
    def inference(self):
        held = self.mask_table.gates.clone()
        gates = _gates(self.options, self.options.export_rank or self.options.rank)
        self.mask_table.write_gates(gates.repeat(len(self.adapters)))
        try:
            yield
        finally:
            self.mask_table.write_gates(held)

    @classmethod
    def inference_gates(cls, options, gates):
        return _gates(options, options.export_rank or options.rank)


def _gates(options: DyLoRAOptions, b: int) -> torch.Tensor:
    return torch.where(torch.arange(options.rank) < b, options.alpha / b, 0.0)
