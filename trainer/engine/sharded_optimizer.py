"""The optimizer of a backbone that trains and is sharded.

Every rank has its part of the float32 values and of both moments. The engine's library makes the
update; this is what the loop and the checkpoints ask of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gathered:
    """A parameter and its moments, whole, in float32."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class ShardedOptimizer(ABC):
    """AdamW over sharded parameters."""

    learning_rate: float = 0.0
    """Of the next step; set by the loop."""
    steps: int = 0
    """Updates made, t."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]):
        """`parameters` by name, tied ones once; `shapes`: those of the whole parameters."""
        self.parameters, self.shapes = dict(parameters), dict(shapes)

    @property
    def numel(self) -> int:
        """Number of trained scalars, over all ranks."""
        return sum(shape.numel() for shape in self.shapes.values())

    @abstractmethod
    def update(self, loss: float, max_norm: float | None) -> tuple[float, bool]:
        """Clip the reduced gradients, update, zero them. Returns (norm of the gradient before
        clipping, whether the update was skipped as that or `loss` is not finite). Collective."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def gathered(self, name: str) -> Gathered:
        """A parameter with its moments, zeros before the first step. Collective."""

    @abstractmethod
    def load(self, name: str, whole: Gathered, steps: int) -> None:
        """Set this rank's part of a parameter and of its moments after `steps` updates. All ranks
        load all parameters, in one order."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that train, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
