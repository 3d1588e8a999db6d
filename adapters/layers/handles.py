"""Registry by which custom ops find their layer, hidden from torch.compile and the sharders.

A transformer block compiles to one program for all layers and the whole run only if the graph
contains nothing that a method may change (ranks, gates, survivors, dropout). So a layer passes its
operator a *handle*, a scalar tensor that the compiler treats as data, and the operator looks the
layer up: its adapter, and W as it is at that moment. W is then never saved for backward: a compiled
program would save a second reference to it, which keeps ZeRO-3's gathered copy alive through the
step. The handle requires gradients, so the layer's output does too; the operator's backward adds
the adapter's gradients to `.grad` itself.
"""

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_MOST = 2**24
"""Up to which float32 counts. torch.compile would take a float64 scalar for a number of its caller,
find that it is none, and trace all again."""


class RegisteredLayer(nn.Module):
    """A module that its operator finds by `handle`, a float32 scalar on the CPU."""

    handle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        _layers[number] = self
        assert number < _MOST
        # Not registered with nn.Module: it is no part of the backbone and stays on the CPU.
        self.__dict__["handle"] = torch.tensor(
            float(number), dtype=torch.float32, device="cpu", requires_grad=True
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # a copy is a layer of its own
        self._register()


def layer_of(handle: Tensor) -> Any:
    """The layer with this handle."""
    return _layers[int(handle)]


def add_gradients(found: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Accumulate into `.grad`, as autograd does for leaves; these parameters are hidden from it."""
    sums, terms = [], []
    for parameter, gradient in found:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype, copy=True)
        else:
            sums.append(parameter.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)
