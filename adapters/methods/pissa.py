"""PiSSA (Meng et al. 2024) and MiLoRA (Wang et al. 2024): LoRA initialised as a part of W.

The r largest (PiSSA) or smallest (MiLoRA) singular triplets move from the frozen matrix to the
adapter: A = √Σ Vᵀ, B = U √Σ, g = 1. All components train, without decisions.
"""

from typing import ClassVar

from adapters.banks import bank
from adapters.gated import GatedAdapter
from adapters.methods.options import MethodOptions, MiLoRAOptions, PiSSAOptions
from adapters.methods.spectral import SpectralMethod, balanced
from adapters.spectral import Triplets
from adapters.unit import Unit


class PiSSA(SpectralMethod):
    """The r principal components of W train."""

    Options: ClassVar[type[MethodOptions]] = PiSSAOptions
    location = "primary"

    def ranges(self, unit: Unit) -> list[range]:
        return [bank(self.location, self.options.rank, min(unit.out_features, unit.in_features))]

    def extract(self, unit: Unit, triplets: Triplets) -> GatedAdapter:
        return balanced(triplets)


class MiLoRA(PiSSA):
    """The r minor components of W train."""

    Options = MiLoRAOptions
    location = "minor"
