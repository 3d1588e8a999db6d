"""LeLoRA's actions (r, s): train r components of the bank at location s."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from adapters.methods.lelora.options import LeLoRAOptions


class Actions:
    """All pairs of a rank and a location, numbered; their masks over a unit's components."""

    def __init__(self, options: LeLoRAOptions):
        self._options = options
        self._pairs = list(product(options.dimensions, options.locations))
        self._number = {pair: number for number, pair in enumerate(self._pairs)}
        self._masks = np.zeros((len(self._pairs), options.components), dtype=bool)
        for number, pair in enumerate(self._pairs):
            self._masks[number, self.trained(*pair)] = True

    def trained(self, rank: int, location: str) -> slice:
        """Components that the action (r, s) trains: the first r of a bank, of `minor` the
        last r."""
        largest = self._options.rank
        start = self._options.locations.index(location) * largest  # type: ignore[arg-type]
        first = start + largest - rank if location == "minor" else start
        return slice(first, first + rank)

    def numbers(
        self, names: Sequence[str], ranks: Mapping[str, int], locations: Mapping[str, str]
    ) -> list[int]:
        """The units' actions."""
        return [self._number[ranks[name], locations[name]] for name in names]  # type: ignore[index]

    def masks(self, numbers: Sequence[int]) -> Tensor:
        """(n, R) bool."""
        return torch.from_numpy(self._masks[list(numbers)])

    def pairs(self, numbers: Sequence[int]) -> tuple[list[int], list[str]]:
        """Ranks and locations."""
        pairs = [self._pairs[number] for number in numbers]
        return [rank for rank, _ in pairs], [location for _, location in pairs]
