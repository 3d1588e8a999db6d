"""A tensor that the optimizer trains."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """What a new tensor θ′ takes over from the one, θ, that was trained under its name before: its
    first rows are `scale` times the rows `rows` of θ, and `added` new rows follow.

    As ∂L/∂θ′ = ∂L/∂θ / scale, where the model computes what it did, m′ = m / scale and
    v′ = v / scale². New rows have no moments and no steps."""

    rows: Tensor
    scale: float = 1.0
    added: int = 0

    def state(self, former: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments and step counts of θ′, given those of θ."""
        divisors = {"exp_avg": self.scale, "exp_avg_sq": self.scale**2}
        found = {}
        for part, tensor in former.items():
            kept = tensor[self.rows] / divisors.get(part, 1.0)
            found[part] = torch.cat([kept, kept.new_zeros(self.added, *kept.shape[1:])])
        return found


@dataclass(frozen=True)
class Trainable:
    """A tensor to train. `mask`, if given, has one bool per row (dimension 0).

    `learning_rate_ratio` multiplies the learning rate (LoRA+), decay included; `decay_ratio` the
    decay alone. `scale`: the tensor is that many times a parameter that is to learn as if it were
    trained itself (AdaLoRA's λ, of g = λ α/r). `decays_to_start`: weight decay pulls towards the
    values that the tensor had when the optimizer first held it, those of the initial adapter,
    instead of 0. The gradient of an `observed` tensor is averaged with the others, but neither
    clipped nor used by the optimizer: the method updates that tensor. `kept`: of a new
    tensor under an old name.
    `token_counter`: an observed parameter and an index into it; a gradient of 0 there means that
    the tensor saw no token in the step, and all of its rows are inactive. `role`: A, g or B of an
    adapter, whose rows are its components.
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor | None = None
    role: str | None = None
    learning_rate_ratio: float = 1.0
    decay_ratio: float = 1.0
    scale: float = 1.0
    decays_to_start: bool = False
    observed: bool = False
    kept: Kept | None = None
    token_counter: tuple[nn.Parameter, int] | None = None
