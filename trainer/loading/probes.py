"""Probes of the loaded values: a few numbers per tensor, by which it is recognised later.

For a tensor as a matrix W (rows, columns), with fixed random v (columns) and s (rows),

    probe_k = Σ_{i in group k} s_i (W v)_i,    size_k = √(Σ_{i in group k} s_i² ‖W_i‖²)

over at most 256 groups of consecutive rows; each group is judged by its own size. The rank that
reads a tensor takes the probe of what it packed, before it is broadcast and sharded;
`trainer/verification` takes it again of what the engine gathers. Any changed, shifted or exchanged
row changes the sum of its group.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from adapters import seeds

_GROUPS = 256
_SCALARS = 2**24  # of W in float32 at a time: 64 MiB
_SEED = 0x9806E

Noted = tuple[list[list[float]], float]
"""A probe (sums, sizes), and ‖W − Ŵ‖ / ‖W‖ of what was packed."""


class Probes:
    """Probes of the parameters that this rank reads; none are taken unless `wanted`."""

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self.noted: dict[str, Noted] = {}

    def note(self, name: str, value: Tensor, error: float = 0.0) -> None:
        """Note a parameter's value; of a quantised one, dequantised, with its relative error."""
        if self.wanted:
            self.noted[name] = probe(value).tolist(), error


def probe(value: Tensor) -> Tensor:
    """The probe (2, groups: at most 256) of a tensor of any shape, in float64 on its device."""
    value = value.detach()
    matrix = value.reshape(value.shape[0] if value.dim() else 1, -1)
    rows, columns = matrix.shape
    v, s = (_random(size, matrix.device) for size in (columns, rows))
    # Not `@`: TF32 would round, and other numbers of rows take other kernels.
    parts = matrix.split(max(1, _SCALARS // max(1, columns)))
    products = torch.cat([(part.float() * v).sum(1) for part in parts]).double()
    # float64: squares of what float32 holds may be larger than it.
    norms = torch.cat([torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in parts])
    size = -(-rows // _GROUPS)
    weighted = torch.nn.functional.pad(torch.stack([products, norms]) * s, (0, -rows % size))
    sums, norms = weighted.view(2, -1, size)
    return torch.stack([sums.sum(1), torch.linalg.vector_norm(norms, dim=1)])


def differences(found: Tensor, expected: Tensor) -> Tensor:
    """Of two probes of as many groups, by group: |found − expected| of sum or size, relative to the
    expected size; NaN where a value is not finite, infinite where all values were 0."""
    errors = (found - expected).abs().amax(0)
    return torch.where(errors == 0, 0.0, errors / expected[1])


def of_all_ranks(parts: Iterable[dict[str, Noted]]) -> dict[str, Noted]:
    """The ranks' probes by parameter name."""
    return {name: noted for part in parts for name, noted in part.items()}


@functools.lru_cache(maxsize=64)
def _random(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=seeds.generator(_SEED, size), dtype=torch.float32).to(device)
