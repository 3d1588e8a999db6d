"""ξ: the policy's numeric inputs, in addition to layer and matrix type (paper, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.cuda.graph_replay import GraphReplay
from adapters.spectral import resample


class Features:
    """Features (n, F) of n units: log1p of W's norm, the resampled spectrum divided by σ₁, and if
    `current` the banks' gates divided by σ₁, which then also enter the norm.

    `spectra`: all singular values of each W, resampled to `points`; `held`: the indices of those in
    its banks.
    """

    def __init__(
        self,
        spectra: Sequence[Tensor],
        held: Sequence[list[int]],
        device: torch.device,
        *,
        points: int,
        current: bool,
    ):
        self._current = current
        spectra = [spectrum.double().cpu() for spectrum in spectra]
        curves = [resample(spectrum, points) for spectrum in spectra]
        energy = torch.stack([spectrum.square().sum() for spectrum in spectra])
        if self._current:
            pairs = zip(spectra, held, strict=True)
            energy = energy - torch.stack([s[banks].square().sum() for s, banks in pairs])
        largest = torch.stack([spectrum[0].clamp(min=1e-30) for spectrum in spectra])
        self._curves, self._energy = torch.stack(curves).to(device), energy.to(device)
        self._largest = largest.to(device)
        self._replay = GraphReplay(self._compute, enabled=device.type == "cuda")

    def __call__(self, gates: Tensor) -> Tensor:
        """(n, F) float32, from the gates (nR) of all units; overwritten by the next call."""
        return self._replay(gates)[0]

    def _compute(self, gates: Tensor) -> tuple[Tensor]:
        energy, parts = self._energy, [self._curves]
        if self._current:
            gates = gates.double().view(len(energy), -1)
            energy = energy + gates.square().sum(1)  # approximate: U and V drift
            parts.append(gates / self._largest.unsqueeze(1))
        norm = energy.clamp(min=0).sqrt().log1p().unsqueeze(1)
        return (torch.cat([norm, *parts], dim=1).float(),)
