"""Masks and gates of many adapters, each end to end in one tensor.

A decision about hundreds of units is then one copy, and a digest of it one transfer, where handling
them one by one would take longer than all else about a decision.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from adapters.gated import GatedAdapter


class Rows:
    """Takes over the masks and gates of `adapters`: they become views of its own tensors.

    Gates that an optimizer trains live in its buffer instead, from the moment on that it took them.
    """

    def __init__(self, adapters: Collection[GatedAdapter]):
        self._adapters = list(adapters)
        self._sizes = [adapter.rank for adapter in adapters]
        none: list[Tensor] = [] if adapters else [torch.zeros(0)]
        self._gates = torch.cat(none or [adapter.g.detach() for adapter in adapters])
        self.masks = torch.cat([t.bool() for t in none] or [adapter.mask for adapter in adapters])
        """(ΣR,) bool: what is written here holds for the adapters."""
        self.by_adapter = self.masks.split(self._sizes)
        """The mask (R,) of each."""
        self._views = list(self._gates.split(self._sizes))
        for adapter, mask, gate in zip(adapters, self.by_adapter, self._views, strict=True):
            adapter.mask, adapter.g.data = mask, gate

    @property
    def gates(self) -> Tensor:
        """(ΣR,) float32: the gates as they are; written to by `write_gates` alone."""
        return torch.cat(self._views) if self._moved() else self._gates

    def write_gates(self, values: Tensor) -> None:
        """`values` (ΣR,), on any device."""
        if self._moved():
            parts = values.to(self._gates).split(self._sizes)
            torch._foreach_copy_(self._views, parts)
        else:
            self._gates.copy_(values)

    def _moved(self) -> bool:
        """Whether an optimizer holds them; where it has moved them, they are looked up anew."""
        if not self._adapters:
            return False
        first = self._adapters[0].g
        if first.data_ptr() != self._views[0].data_ptr():
            self._views = [adapter.g.detach() for adapter in self._adapters]
        return first.data_ptr() != self._gates.data_ptr()
