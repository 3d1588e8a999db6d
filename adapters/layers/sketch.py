"""What data-driven starts measure in a layer: products of a sum over tokens with a few vectors.

    S = P M        M = Σ_t a_t b_tᵀ        a, b: the layer's input x or its output's gradient dy

P (k, n) is given; S (k, m) and some moments of x are summed while the layer's backward pass runs,
for M is never formed. Tokens t are those that reach the loss, whose dy is not 0: padding does not,
nor does in the last block what is not learned. Sums over tokens add up over micro-batches and
ranks.
"""

from typing import Literal

import torch
from torch import Tensor

Side = Literal["input", "gradient"]

_ROWS = 4096
"""Tokens at a time, since they are taken in float32."""


class Sketch:
    """S of one layer for P on the layer's device.

    `count` (1): tokens; `energy` (1): Σ ‖x‖²; `total` (in): Σ x, all in float64.
    """

    def __init__(self, test: Tensor, left: Side, right: Side, in_features: int, columns: int):
        """`test`: P; `left` and `right`: what a and b are; `columns`: m."""
        self.test, self._left, self._right = test, left, right
        self.sums = torch.zeros(len(test), columns, dtype=torch.float32, device=test.device)
        self._moments = torch.zeros(in_features + 2, dtype=torch.float64, device=test.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All that is summed over ranks."""
        return self.sums, self._moments

    @property
    def count(self) -> Tensor:
        return self._moments[0]

    @property
    def energy(self) -> Tensor:
        return self._moments[1]

    @property
    def total(self) -> Tensor:
        return self._moments[2:]

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add the tokens of x (T, in) and dy (T, out)."""
        for inputs, gradients in zip(x.split(_ROWS), dy.split(_ROWS), strict=True):
            reached = (gradients != 0).any(1, keepdim=True)
            rows = {
                "input": torch.where(reached, inputs, 0).float(),
                "gradient": gradients.float(),
            }
            self.sums += (rows[self._left] @ self.test.T).T @ rows[self._right]
            self.count.add_(reached.sum())
            self.energy.add_(rows["input"].square().sum(dtype=torch.float64))
            self.total.add_(rows["input"].sum(0, dtype=torch.float64))
