"""Masks and gates of all adapters, each concatenated into one tensor.

Applying a decision about hundreds of units is then one copy, and its digest one transfer; a copy
per unit would dominate the cost of a decision.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from adapters.gated import GatedAdapter


class MaskTable:
    """Rebinds the masks and gates of `adapters` to views of its own tensors.

    An optimizer that trains the gates rebinds them to its flat buffer; they are then read there.
    """

    def __init__(self, adapters: Collection[GatedAdapter]):
        self._adapters = list(adapters)
        sizes = [adapter.rank for adapter in adapters]
        none: list[Tensor] = [] if adapters else [torch.zeros(0)]
        self._gates = torch.cat(none or [adapter.g.detach() for adapter in adapters])
        self.masks = torch.cat([t.bool() for t in none] or [adapter.mask for adapter in adapters])
        """(ΣR,) bool; the adapters' masks are views of it."""
        self.by_adapter = self.masks.split(sizes)
        """The mask (R,) of each adapter."""
        for adapter, mask, gate in zip(
            adapters, self.by_adapter, self._gates.split(sizes), strict=True
        ):
            adapter.mask, adapter.g.data = mask, gate
        self._first = self._gates.data_ptr()  # address of the first gate when last located
        self._buffer, self._indices = self._gates, torch.zeros(0)

    @property
    def gates(self) -> Tensor:
        """(ΣR,) float32: the current gates. Use `write_gates` to change them."""
        return self._buffer[self._indices] if self._rebound() else self._gates

    def write_gates(self, values: Tensor) -> None:
        """Set the gates to `values` (ΣR,), of any device."""
        if self._rebound():
            self._buffer[self._indices] = values.to(self._gates)
        else:
            self._gates.copy_(values)

    def _rebound(self) -> bool:
        """Whether an optimizer holds the gates; locates them again if their storage has changed."""
        if not self._adapters:
            return False
        first = self._adapters[0].g.data_ptr()
        if first != self._first:
            self._first = first
            self._locate()
        return first != self._gates.data_ptr()

    def _locate(self) -> None:
        """Set the optimizer's buffer and the gates' indices in it, for one indexing operation."""
        gates = [adapter.g.detach() for adapter in self._adapters]
        storage = gates[0].untyped_storage()
        assert all(gate.untyped_storage().data_ptr() == storage.data_ptr() for gate in gates)
        self._buffer = torch.empty(0, dtype=gates[0].dtype, device=gates[0].device).set_(storage)
        indices = [int(gate.storage_offset()) + torch.arange(len(gate)) for gate in gates]
        self._indices = torch.cat(indices).to(storage.device)
