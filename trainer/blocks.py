"""How the transformer blocks of a model run: compiled once for all of them, some checkpointed.

Both wrap a block's `forward` and stay inside the hooks by which sharders gather its parameters.
Blocks of one class share one compiled program: what tells two of them apart (weights, adapters) is
input to it or hidden from it (`adapters/opaque.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.fx.experimental._config
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapters.experts import StackedLinear
from adapters.linear import AdaptedLinear
from adapters.units import Host, transformer_blocks

BACKEND = "inductor"

# Programs: with gradients and without, with a mask and without, one sequence or several. Past the
# limit blocks would silently run uncompiled.
torch._dynamo.config.recompile_limit = 64
# A sequence as long as the model is wide would be taken to be always so.
torch.fx.experimental._config.use_duck_shape = False
# Recompute every pointwise operation in backward, also where its result is an operator's input
# there: inputs of the projections are pointwise results of what is kept anyway. A block of 70B then
# keeps 0.73 instead of 1.06 GiB, for 0.2 ms of pointwise kernels.
torch._functorch.config.ban_recompute_materialized_backward = False


class Blocks:
    """Takes over the blocks of `model`, before they are sharded."""

    def __init__(self, model: nn.Module, *, compiled: bool):
        self._blocks = [_Block(block, compiled) for _, block in transformer_blocks(model)]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def kept(self) -> int:
        """How many blocks keep their activations for backward; the others compute them again."""
        return sum(not block.checkpointed for block in self._blocks)

    def keep(self, count: int) -> None:
        """Let the last `count` blocks keep their activations. The last, whose backward comes
        first: their activations are gone when the others are computed again."""
        for index, block in enumerate(self._blocks):
            block.checkpointed = index < len(self) - count


class _Block:
    """Stands in for a block's `forward`."""

    def __init__(self, block: nn.Module, compiled: bool):
        self._block = block
        self._forward: Callable[..., Any] = block.forward
        if compiled:
            # Dynamic: sequences differ in length from one micro-batch to the next.
            self._forward = torch.compile(block.forward, dynamic=True, backend=BACKEND)
        self.checkpointed = False
        # Before any sharder's hooks: these release a block once its input has its gradient.
        block.register_forward_pre_hook(self._begin_gradient)
        block.forward = self._run  # type: ignore[assignment,method-assign]

    def _begin_gradient(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The first block that trains has an input with a gradient, as all after it: it is then the
        same program, and treated alike by sharders."""
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
            return None
        if hidden.requires_grad or not torch.is_grad_enabled() or not self._trains():
            return None
        return (hidden.detach().requires_grad_(), *args[1:])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        needed = any(_needs_gradient(value) for value in (*args, *kwargs.values()))
        if not needed and not self._trains():  # and nothing below either
            with torch.no_grad():
                return self._forward(*args, **kwargs)
        if self.checkpointed:
            return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
        return self._forward(*args, **kwargs)

    def _trains(self) -> bool:
        hosts: list[Host] = []
        for module in self._block.modules():
            if isinstance(module, StackedLinear):
                hosts += module.hosts
            elif isinstance(module, AdaptedLinear):
                hosts.append(module)
        return any(host.adapter is not None for host in hosts) or any(
            parameter.requires_grad
            for parameter in self._block.parameters()  # a router
        )


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
