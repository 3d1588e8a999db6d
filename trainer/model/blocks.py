"""How the transformer blocks of a model run: compiled once for all of them; which of them keep what
backward needs, which move it to the host, and which compute it again.

All of it wraps a block's `forward` and stays inside the hooks by which sharders gather its
parameters. Blocks of one class share one compiled program: what tells two of them apart (weights,
adapters) is input to it or hidden from it (`adapters/layers/handles.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from adapters.layers.base import PackedLayer
from adapters.units import transformer_blocks
from trainer.config.sections import EngineOptions
from trainer.errors import UserError
from trainer.model.activation_offload import HostMemory

BACKEND = "inductor"


def configure_compiler() -> None:
    """Set torch.compile's global options: to be called before anything is compiled."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch.fx.experimental._config

    # Programs: with gradients and without, with a mask and without, one sequence or several. Past
    # the limit blocks would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # A sequence as long as the model is wide would be taken to be always so.
    torch.fx.experimental._config.use_duck_shape = False
    # Recompute every pointwise operation in backward, also where its result is an operator's input
    # there: inputs of the projections are pointwise results of what is kept anyway. A block of 70B
    # then keeps 0.73 instead of 1.06 GiB, for 0.2 ms of pointwise kernels.
    torch._functorch.config.ban_recompute_materialized_backward = False


class Blocks:
    """Takes over the blocks of `model`, before they are sharded."""

    def __init__(self, model: nn.Module, device: torch.device, *, compiled: bool):
        if compiled or device.type == "cuda":  # where weight formats compile kernels of their own
            configure_compiler()
        self.host = HostMemory(device)
        self._blocks = [
            _Block(index, block, self.host, compiled)
            for index, (_, block) in enumerate(transformer_blocks(model))
        ]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def saved(self) -> int:
        """How many blocks keep their activations for backward."""
        return sum(not (block.checkpointed or block.offloaded) for block in self._blocks)

    @property
    def offloaded(self) -> int:
        """How many let them wait on the host; what is left computes them again."""
        return sum(block.offloaded for block in self._blocks)

    @property
    def offloadable(self) -> range:
        """Blocks that may move theirs: between the first that has a gradient, whose backward comes
        last, and the last, whose backward comes at once."""
        first = next((block.index for block in self._blocks if block.trains), len(self))
        return range(first + 1, len(self) - 1)

    def keep(self, count: int, offloaded: int = 0, place: int | None = None) -> None:
        """Let `count` blocks keep their activations and `offloaded` of the offloadable ones move
        them to host buffers of `place` bytes (None: the buffers that there are).

        Offloaded blocks lie apart, so that their copies overlap with what runs in between. Of the
        others the last keep theirs: backward comes to them first, and they are gone when the others
        are computed again.
        """
        offloadable = self.offloadable[::-1]
        away = {offloadable[index * len(offloadable) // offloaded] for index in range(offloaded)}
        assert len(away) == offloaded
        self.host.reserve(sorted(away), place)
        others = [block for index, block in enumerate(self._blocks) if index not in away]
        for block in self._blocks:
            block.offloaded, block.checkpointed = block.index in away, False
        for block in others[: len(others) - count]:
            block.checkpointed = True


def check_unsharded_blocks(options: EngineOptions, count: int) -> None:
    """Whether there are as many blocks (`count`) as are to stay whole."""
    whole = options.unsharded_blocks
    if whole != "auto" and whole > count:
        raise UserError(
            f"engine.unsharded_blocks: {whole} given; accepted: at most {count}, all there are"
        )


class _Block:
    """Stands in for a block's `forward`."""

    def __init__(self, index: int, block: nn.Module, host: HostMemory, compiled: bool):
        self.index, self._block, self._host = index, block, host
        self._forward: Callable[..., Any] = block.forward
        if compiled:
            # Dynamic: sequences differ in length from one micro-batch to the next.
            self._forward = torch.compile(block.forward, dynamic=True, backend=BACKEND)
        self.checkpointed = self.offloaded = False
        # Before any sharder's hooks: these release a block once its input has its gradient.
        block.register_forward_pre_hook(self._begin_gradient)
        block.forward = self._run  # type: ignore[assignment,method-assign]

    def _begin_gradient(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The first block that trains has an input with a gradient, as all after it: it is then the
        same program, and treated alike by sharders."""
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
            return None
        if hidden.requires_grad or not torch.is_grad_enabled() or not self.trains:
            return None
        return (hidden.detach().requires_grad_(), *args[1:])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        needed = any(_needs_gradient(value) for value in (*args, *kwargs.values()))
        if not needed and not self.trains:  # and nothing below either
            with torch.no_grad():
                return self._forward(*args, **kwargs)
        if self.checkpointed:
            output = checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
        elif self.offloaded:
            with self._host.saving(self.index, self._held_anyway(args, kwargs)):
                output = self._forward(*args, **kwargs)
        else:
            output = self._forward(*args, **kwargs)
        if self._host.busy:
            hidden = hidden_state(output)
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._host.before_backward(self.index))
        return output

    def _held_anyway(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        """Storages that this block does not hold alone: what all blocks are given, and weights."""
        shared = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, torch.Tensor)]
        return {t.untyped_storage().data_ptr() for t in (*shared, *self._block.parameters())}

    @property
    def trains(self) -> bool:
        """Whether it holds anything that trains."""
        modules = self._block.modules()
        return any(isinstance(module, PackedLayer) and module.adapts for module in modules) or any(
            parameter.requires_grad
            for parameter in self._block.parameters()  # a router
        )


def hidden_state(output: Any) -> torch.Tensor:
    """The hidden states among what a block returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
