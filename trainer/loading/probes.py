"""Probes of the loaded values: a few numbers per tensor, by which it is recognised later.

For a tensor as a matrix W (rows, columns), with fixed random v (columns) and s (rows),

    probe_k = Σ_{i in group k} s_i (W v)_i

over at most 256 groups of consecutive rows. The rank that reads a tensor takes the probe of what it
packed, before it is broadcast and sharded; `trainer/verification` takes it again of what the engine
gathers. Any changed, shifted or exchanged row changes the sum of its group. Reads W once.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from adapters import seeds

_GROUPS = 256
_SCALARS = 2**24  # of W in float32 at a time: 64 MiB
_SEED = 0x9806E

Noted = tuple[list[float], float]
"""A probe, and ‖W − Ŵ‖ / ‖W‖ of what was packed."""


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
    """The probe (at most 256) of a tensor of any shape, in float64 on its device."""
    value = value.detach()
    matrix = value.reshape(value.shape[0] if value.dim() else 1, -1)
    rows, columns = matrix.shape
    v, s = (_random(size, matrix.device) for size in (columns, rows))
    # Not `@`: TF32 would round, and other numbers of rows take other kernels.
    parts = matrix.split(max(1, _SCALARS // max(1, columns)))
    products = torch.cat([(part.float() * v).sum(1) for part in parts])
    size = -(-rows // _GROUPS)
    weighted = torch.nn.functional.pad(products.double() * s, (0, -rows % size))
    return weighted.view(-1, size).sum(1)


def difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ of two probes; NaN where a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    norm = torch.linalg.vector_norm(expected)
    error = torch.linalg.vector_norm(found - expected)
    return float(error / norm) if norm != 0 else float(error)


def of_all_ranks(parts: Iterable[dict[str, Noted]]) -> dict[str, Noted]:
    """The ranks' probes by parameter name."""
    return {name: noted for part in parts for name, noted in part.items()}


@functools.lru_cache(maxsize=64)
def _random(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=seeds.generator(_SEED, size), dtype=torch.float32).to(device)
