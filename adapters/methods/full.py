"""Full fine-tuning, and that of the biases (BitFit: Ben Zaken et al. 2022) or normalisation layers
alone: parameters of the backbone train.

By the engine's sharded optimizer or, where the backbone is whole, by that of the adapters."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.baseline_options import BitFitOptions, FullOptions, LayerNormOptions
from adapters.unit import Unit


class Full(Method):
    """No adapters, no decisions; `options.selects` says what trains."""

    Options = FullOptions

    def __init__(self, options: FullOptions, seed: int):
        super().__init__(options, seed)
        self._trained: dict[str, nn.Parameter] = {}

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        """No adapter is attached."""

    def attach_modules(self, model: nn.Module) -> None:
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @property
    def trained_parameters(self) -> Mapping[str, nn.Parameter]:
        return self._trained


class BitFit(Full):
    """Biases."""

    Options = BitFitOptions  # type: ignore[assignment]


class LayerNorm(Full):
    """Scales and biases of normalisation layers."""

    Options = LayerNormOptions  # type: ignore[assignment]
