"""Masks and gates of many adapters, each end to end in one tensor.

A decision about hundreds of units is then one copy, and a digest of it one transfer, where handling
them one by one would take longer than all else about a decision.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from adapters.gated import GatedAdapter


class MaskTable:
    """Takes over the masks and gates of `adapters`: they become views of its own tensors.

    Gates that an optimizer trains live in its buffer instead, from the moment on that it took them.
    """

    def __init__(self, adapters: Collection[GatedAdapter]):
        self._adapters = list(adapters)
        sizes = [adapter.rank for adapter in adapters]
        none: list[Tensor] = [] if adapters else [torch.zeros(0)]
        self._gates = torch.cat(none or [adapter.g.detach() for adapter in adapters])
        self.masks = torch.cat([t.bool() for t in none] or [adapter.mask for adapter in adapters])
        """(ΣR,) bool: what is written here holds for the adapters."""
        self.by_adapter = self.masks.split(sizes)
        """The mask (R,) of each."""
        for adapter, mask, gate in zip(
            adapters, self.by_adapter, self._gates.split(sizes), strict=True
        ):
            adapter.mask, adapter.g.data = mask, gate
        self._first = self._gates.data_ptr()  # of the gates, where they were last seen
        self._buffer, self._places = self._gates, torch.zeros(0)

    @property
    def gates(self) -> Tensor:
        """(ΣR,) float32: the gates as they are; written to by `write_gates` alone."""
        return self._buffer[self._places] if self._moved() else self._gates

    def write_gates(self, values: Tensor) -> None:
        """`values` (ΣR,), on any device."""
        if self._moved():
            self._buffer[self._places] = values.to(self._gates)
        else:
            self._gates.copy_(values)

    def _moved(self) -> bool:
        """Whether an optimizer holds them; where it has moved them, they are looked up anew."""
        if not self._adapters:
            return False
        first = self._adapters[0].g.data_ptr()
        if first != self._first:
            self._first = first
            self._find()
        return first != self._gates.data_ptr()

    def _find(self) -> None:
        """All of them lie in one buffer, which one indexing then reads."""
        gates = [adapter.g.detach() for adapter in self._adapters]
        storage = gates[0].untyped_storage()
        assert all(gate.untyped_storage().data_ptr() == storage.data_ptr() for gate in gates)
        self._buffer = torch.empty(0, dtype=gates[0].dtype, device=gates[0].device).set_(storage)
        places = [int(gate.storage_offset()) + torch.arange(len(gate)) for gate in gates]
        self._places = torch.cat(places).to(storage.device)
