"""Run the transformer blocks: compiled or not; saving, offloading or recomputing activations.

Each block's `forward` is wrapped, inside the hooks by which sharders gather its parameters. Blocks
of one class share one compiled program: their differences (weights, adapters) are inputs of it or
hidden from it (`adapters/layers/handles.py`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
from trainer.model.graphs import BlockGraphs

BACKEND = "inductor"


def configure_compiler(cache: str | None = None, *, constant_floats: bool | None = None) -> None:
    """Set torch.compile's global options. Must be called before anything is compiled. `cache`:
    folder of compiled programs and kernels; None: torch's and Triton's own. `constant_floats`:
    whether numbers such as the ε of a norm are the same in all blocks; None: as it was."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch.fx.experimental._config

    if cache is not None:
        folder = Path(cache).absolute()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    # Programs differ by gradients, mask, and one sequence or several. Beyond the limit blocks would
    # silently run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    # Else a sequence length that happens to equal the hidden size is compiled as equal to it.
    torch.fx.experimental._config.use_duck_shape = False
    # Recompute every pointwise operation in backward, also where its result is an operator's input
    # there: inputs of the projections are pointwise functions of tensors that are saved anyway. A
    # block of 70B then saves 0.73 instead of 1.06 GiB, for 0.2 ms of pointwise kernels.
    torch._functorch.config.ban_recompute_materialized_backward = False
    # Else each number is traced as an input first, found to be none (attention's scale), and the
    # trace thrown away: the miss of AOTAutograd's cache in a warm start.
    if constant_floats is not None:
        torch._dynamo.config.specialize_float = constant_floats


class Blocks:
    """Wraps the blocks of `model`; must be made before they are sharded."""

    def __init__(
        self, model: nn.Module, device: torch.device, *, compiled: bool, cache: str | None = None
    ):
        """`cache`: as for `configure_compiler`."""
        found = transformer_blocks(model)
        if compiled or device.type == "cuda":  # weight formats compile kernels on GPUs
            alike = have_same_floats([block for _, block in found])
            configure_compiler(cache, constant_floats=alike)
        self.host, self.graphs = HostMemory(device), BlockGraphs()
        self._blocks = [
            _Block(index, block, self.host, self.graphs, compiled)
            for index, (_, block) in enumerate(found)
        ]
        stacks = {path.rpartition(".")[0]: index for index, (path, _) in enumerate(found)}
        self.last_of_stacks = list(stacks.values())
        """Index of the last block of each list of blocks: an encoder's, a decoder's."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def saved(self) -> int:
        """Number of blocks that keep their activations for backward."""
        return sum(not (block.checkpointed or block.offloaded) for block in self._blocks)

    @property
    def offloaded(self) -> int:
        """Number of blocks that offload them to the host; the others recompute them."""
        return sum(block.offloaded for block in self._blocks)

    @property
    def offloadable(self) -> range:
        """Indices of the blocks that can offload: those after the first trained one, whose backward
        runs last, and before the last, whose backward runs immediately."""
        first = next((block.index for block in self._blocks if block.trains), len(self))
        return range(first + 1, len(self) - 1)

    @property
    def has_trained_parameters(self) -> bool:
        """Whether blocks have trained parameters beside adapters (routers)."""
        return any(block.has_trained_parameters for block in self._blocks)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Context in which the blocks run as written, so that hooks on modules in them are called
        and no program is compiled for a few passes."""
        for block in self._blocks:
            block.compiles = False
        try:
            yield
        finally:
            for block in self._blocks:
                block.compiles = True

    def keep_only(self, index: int) -> None:
        """Let one block keep its activations, and all others recompute them."""
        self.keep(0)
        self._blocks[index].checkpointed = False

    def keep(self, count: int, offloaded: int = 0, nbytes: int | None = None) -> None:
        """Let `count` blocks keep their activations, `offloaded` ones offload them to host buffers
        of `nbytes` each (None: the size of the present ones), and the others recompute them.

        Offloading blocks are spread evenly, so that their copies overlap with the blocks in
        between. Of the others the last keep theirs: backward reaches them first and frees their
        activations before it recomputes others. Raises RunFailed where the host lacks the memory.
        """
        offloadable = self.offloadable[::-1]
        indices = {offloadable[index * len(offloadable) // offloaded] for index in range(offloaded)}
        assert len(indices) == offloaded
        self.host.reserve(sorted(indices), nbytes)
        others = [block for index, block in enumerate(self._blocks) if index not in indices]
        for block in self._blocks:
            block.offloaded, block.checkpointed = block.index in indices, False
        for block in others[: len(others) - count]:
            block.checkpointed = True


def have_same_floats(blocks: Sequence[nn.Module]) -> bool:
    """Whether blocks of one class have the same numbers, as attributes of their modules, so that
    they share a program in which those are constants; numbers elsewhere (a configuration's) would
    cost a program for each value, not a result."""
    known: dict[tuple[type, str, str], float] = {}
    return all(
        known.setdefault((type(block), path, name), value) == value
        for block in blocks
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
    )


def check_unsharded_blocks(options: EngineOptions, count: int) -> None:
    """Raises UserError where `engine.unsharded_blocks` exceeds the number of blocks, `count`."""
    asked = options.unsharded_blocks
    if asked != "auto" and asked > count:
        raise UserError(
            f"engine.unsharded_blocks: {asked} given; accepted: at most {count}, all blocks"
        )


class _Block:
    """Wraps a block's `forward`."""

    def __init__(
        self, index: int, block: nn.Module, host: HostMemory, graphs: BlockGraphs, compiled: bool
    ):
        self.index, self._block, self._host, self._graphs = index, block, host, graphs
        self._written: Callable[..., Any] = block.forward
        self._compiled = self._written
        self.compiles = True
        if compiled:
            # Dynamic: sequences differ in length from one micro-batch to the next.
            self._compiled = torch.compile(block.forward, dynamic=True, backend=BACKEND)
        self.checkpointed = self.offloaded = False
        # Registered before any sharder's hooks, which release a block when the gradient of its
        # input is ready.
        block.register_forward_pre_hook(self._begin_gradient)
        block.forward = self._run  # type: ignore[assignment,method-assign]

    @property
    def _forward(self) -> Callable[..., Any]:
        return self._compiled if self.compiles else self._written

    def _begin_gradient(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Make the input of the first trained block require gradients, as in all blocks after it:
        they then share a program, and sharders treat them alike."""
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
        if self._graphs.active and self.compiles and args:
            return self._graphs.run(self.index, self._forward, args[0], (args[1:], kwargs))
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
        """Storages that stay allocated in any case: arguments shared by all blocks, and weights."""
        shared = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, torch.Tensor)]
        return {t.untyped_storage().data_ptr() for t in (*shared, *self._block.parameters())}

    @property
    def trains(self) -> bool:
        """Whether the block has an adapter or a trained router."""
        modules = self._block.modules()
        adapts = any(isinstance(module, PackedLayer) and module.adapts for module in modules)
        return adapts or self.has_trained_parameters

    @property
    def has_trained_parameters(self) -> bool:
        """Whether it has a trained router."""
        return any(parameter.requires_grad for parameter in self._block.parameters())


def hidden_state(output: Any) -> torch.Tensor:
    """The hidden states in a block's output."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
