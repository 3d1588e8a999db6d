"""A and B of all adapters in the dtype of the products, cast by one kernel for a whole micro-batch.

Otherwise each layer casts its own, in forward and again in backward: thousands of small kernels a
step. Only while the values cannot change, that is from the forward to the backward pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from adapters.gated import GatedAdapter, Held
from adapters.optimizer import MaskedAdamW


class Casts:
    """Casts of the values in the optimizer's buffer."""

    def __init__(
        self,
        optimizer: MaskedAdamW | None,
        adapters: Mapping[str, GatedAdapter],
        dtype: torch.dtype,
    ):
        """`optimizer`: whose buffer holds `adapters`; None without one. Without adapters, or in
        float32, nothing is cast."""
        self._optimizer, self._adapters, self._dtype = optimizer, adapters, dtype
        self._held = Held()
        self._values: Tensor | None = None
        self._cast: Tensor | None = None
        self._bind()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Context in which layers use casts of the present values, which must not change in it."""
        if self._optimizer is not None and self._values is not self._optimizer.values:
            self._bind()  # the optimizer was bound anew
        if self._cast is None:
            yield
            return
        assert self._values is not None
        self._cast.copy_(self._values)
        self._held.valid = True
        try:
            yield
        finally:
            self._held.valid = False

    def _bind(self) -> None:
        self._values = self._cast = None
        for adapter in self._adapters.values():  # with theirs the old casts are freed
            adapter.held = None
        if self._optimizer is None:
            return
        values = self._optimizer.values
        if self._adapters and self._dtype != torch.float32:
            self._cast = torch.empty_like(values, dtype=self._dtype)
        self._values = values
        if self._cast is None:
            return
        for adapter in self._adapters.values():
            if all(self._holds(t) for t in (adapter.A, adapter.B)):
                adapter.held = (self._held, self._view(adapter.A), self._view(adapter.B))

    def _holds(self, tensor: Tensor) -> bool:
        """Whether it lies in the optimizer's buffer, as what is trained does."""
        assert self._values is not None
        return tensor.untyped_storage().data_ptr() == self._values.untyped_storage().data_ptr()

    def _view(self, tensor: Tensor) -> Tensor:
        assert self._cast is not None and self._values is not None
        start = tensor.storage_offset() - self._values.storage_offset()
        return self._cast[start : start + tensor.numel()].view(tensor.shape)
