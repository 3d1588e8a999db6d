"""What neither the compiler nor a sharder looks into: a host's adapter, and how W is read.

A compiled transformer block is one program for all layers and the whole run only if nothing that a
method may change (ranks, gates, survivors, dropout) shows in it. So a host hands its operator a
*handle*, a tensor whose value the compiler does not look at, and the operator finds the host by it,
with its adapter and with whatever W is at that moment. Nothing of W is then saved for backward:
compiled programs save a second reference to it, which would hold ZeRO-3's gathered copy through
the whole step. The handle requires gradients, which makes the host's output require them; the
operator's backward adds the adapter's gradients to where the optimizer keeps them.
"""

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class RegisteredLayer(nn.Module):
    """A module whose operator finds it by `handle`, a float64 scalar on the CPU."""

    handle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        _layers[number] = self
        # Past nn.Module's registration: it is no part of the backbone, and stays on the CPU.
        self.__dict__["handle"] = torch.tensor(
            float(number), dtype=torch.float64, device="cpu", requires_grad=True
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # a copy is a host of its own
        self._register()


def layer_of(handle: Tensor) -> Any:
    """The host that hands out this handle."""
    return _layers[int(handle)]


def add_gradients(found: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """What autograd does for leaves, for parameters that it does not see."""
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
