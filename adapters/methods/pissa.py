"""PiSSA (Meng et al. 2024) and MiLoRA (Wang et al. 2024): LoRA that starts as a part of W.

The r largest (PiSSA) or smallest (MiLoRA) singular triplets leave the frozen matrix and become
the adapter: A = √Σ Vᵀ, B = U √Σ, g = 1. Everything trains, nothing is decided.
"""

from typing import ClassVar, Literal

import torch

from adapters.gated import GatedAdapter
from adapters.methods.base import Method, MethodOptions
from adapters.spectral import bank


class PiSSAOptions(MethodOptions):
    """Options of `method.kind: pissa`."""

    kind: Literal["pissa"] = "pissa"
    """Name of the method."""


class MiLoRAOptions(MethodOptions):
    """Options of `method.kind: milora`."""

    kind: Literal["milora"] = "milora"
    """Name of the method."""


class PiSSA(Method):
    """The r principal components of W train."""

    Options: ClassVar[type[MethodOptions]] = PiSSAOptions
    splits_weight = True
    location = "primary"

    def ranges(self, unit):
        return [bank(self.location, self.options.rank, min(unit.out_features, unit.in_features))]

    def extract(self, unit, triplets):
        root = triplets.S.sqrt().unsqueeze(1)
        return GatedAdapter(root * triplets.V.T, torch.ones(len(root)), root * triplets.U.T)


class MiLoRA(PiSSA):
    """The r minor components of W train."""

    Options = MiLoRAOptions
    location = "minor"
