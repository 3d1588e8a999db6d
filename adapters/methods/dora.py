"""DoRA (Liu et al. 2024): LoRA, and a trained norm m for every row of W + ΔW.

m starts as the norms of W's rows, so the model starts unchanged; `adapters/layers/magnitude.py` has
the equations. Dropout, where there is any, is LoRA's. m is no component: masks and ranks are not
about it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adapters.gated import Magnitude
from adapters.layers.linear import AdaptedLinear
from adapters.methods.lora import LoRA
from adapters.methods.options import DoRAOptions
from adapters.unit import Unit, stem


class DoRA(LoRA):
    """LoRA with magnitudes."""

    Options = DoRAOptions  # type: ignore[assignment]

    def check(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if stem(unit.name) != unit.name:
                raise ValueError(
                    f"method.targets: {unit.name} is a matrix of a stack of experts, which has no "
                    "magnitudes under dora; accepted: linear layers"
                )

    def read_weights(self, names: Sequence[str], dtype: torch.dtype) -> None:
        for name in names:
            layer = self.adapters.layers[name]
            assert isinstance(layer, AdaptedLinear)
            self.adapters[name].magnitude = Magnitude(layer.dequantised(dtype))

    @property
    def trained_parameters(self) -> Mapping[str, nn.Parameter]:
        return {
            f"{name}.magnitude": adapter.magnitude.m
            for name, adapter in self.adapters.items()
            if adapter.magnitude is not None
        }
