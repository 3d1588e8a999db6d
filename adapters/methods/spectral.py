"""Base class of methods whose adapters are initialised from singular components of W; the frozen
matrix becomes W minus the initial ΔW."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.lora import ROW_NORM
from adapters.spectral import Triplets
from adapters.unit import Unit


def balanced(triplets: Triplets) -> GatedAdapter:
    """U Σ Vᵀ as A = √Σ Vᵀ, B = U √Σ, g = 1."""
    root = triplets.S.sqrt().unsqueeze(1)
    return GatedAdapter(root * triplets.V.T, torch.ones(len(root)), root * triplets.U.T)


def directions(triplets: Triplets, gate: float) -> GatedAdapter:
    """A = Vᵀ with rows of the norm of LoRA's, B = 0: ΔW begins at 0, and U and Σ are not used."""
    A = triplets.V.T * ROW_NORM
    return GatedAdapter(A, torch.full((len(A),), gate), torch.zeros_like(triplets.U.T))


class SpectralMethod(Method):
    """Subclasses select singular triplets (`ranges`) and turn them into an adapter (`extract`)."""

    splits_weight = True
    spectra: Mapping[str, Tensor]
    """All singular values of each unit's W."""

    def ranges(self, unit: Unit) -> list[range]:
        """Indices of the singular triplets of W for `extract` (0: the largest)."""
        raise NotImplementedError

    def extract(self, unit: Unit, triplets: Triplets) -> GatedAdapter:
        """The adapter made of these triplets; the frozen matrix becomes W − ΔW."""
        raise NotImplementedError

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        assert initial_adapters is not None
        self.spectra = {unit.name: initial_adapters[unit.name].spectrum for unit in units}
        self.adapters.attach(
            units, layers, device, lambda unit: initial_adapters[unit.name].adapter.copy()
        )
