"""The planner's probe on fake tensors: memory of a forward and backward pass, from shapes alone.

The task's own loss and its backward run with every block checkpointed. Blocks are replaced by the
figures of `block_trace.py`; embedding, loss head and everything else outside the blocks are counted
as they run. Nothing here depends on an architecture.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.data.dataset import TokenDataset
from trainer.errors import UserError, first_line
from trainer.memory import block_trace
from trainer.memory.block_trace import BlockBytes, Call, Meter, Products, WorstCase
from trainer.memory.planner import Needs, largest_batch, longest_lengths
from trainer.model.backbone import BuiltModel, TrainedModule, set_module
from trainer.model.blocks import hidden_state
from trainer.tasks.base import Batch, Task


@dataclass(frozen=True)
class Probe:
    """Bytes in addition to backbone and adapters, with every block checkpointed."""

    inputs: int
    """Saved by the checkpointed blocks: their inputs."""
    forward: int
    """Peak of forward, the loss included."""
    backward: int
    """Peak of backward, which recomputes one block at a time."""
    added: tuple[int, ...]
    """Of each block: what saving its activations adds."""

    def plan(self, budget: int, room: int = 0) -> tuple[int, int]:
        """Numbers of blocks that `activation_checkpointing: auto` lets save their activations, and
        offload them to `room` bytes of the host, assuming that the copies are fast enough."""
        blocks, added = len(self.added), max(1, *self.added)
        most = min(room // (added + self.input), max(0, blocks - 2))
        needs = Needs(self.forward, self.backward, added, self.input, most)
        offloaded = needs.offloaded(blocks, budget)
        return max(0, needs.saved(blocks, offloaded, budget)), offloaded

    @property
    def input(self) -> int:
        """Bytes of one block's input."""
        return self.inputs // len(self.added)

    def saved(self, count: int) -> int:
        """Bytes added by the last `count` blocks if they save their activations."""
        return sum(self.added[len(self.added) - count :])

    def peaks(self, count: int, offloaded: int = 0) -> tuple[int, int]:
        """Peak of forward and of backward, where the last `count` blocks save their activations and
        `offloaded` ones have theirs on the host, one of them in flight. `backward` already includes
        the activations of the block being differentiated."""
        held = self.saved(count) - max(0, offloaded - 1) * self.input
        in_flight = max(self.added) * bool(offloaded)
        own = self.added[-1] * bool(count)
        return self.forward + held + in_flight, self.backward + held + in_flight - own


def probe(
    backbone: BuiltModel, config: Config, task: Task, *, compiled: bool,
    records: TokenDataset | None = None,
) -> Probe:  # fmt: skip
    """Run the probe on the largest micro-batch of `records`; without them, of
    `data.micro_batch_size` sequences of `data.max_length` tokens. Consumes `backbone`, which must
    be just built. Raises UserError where the model cannot run on fake tensors."""
    for path, module in backbone.heads.items():
        set_module(backbone.model, path, TrainedModule(module))
    data = config.data
    size = data.micro_batch_size
    lengths = [data.max_length] * (size or 1)
    if backbone.rows.source_apart:
        lengths = [*config.task.limits(data.max_length).values()]
    if records is not None:
        lengths = longest_lengths(records, task, backbone.rows, size)
    batch = largest_batch(task, data, backbone.rows, lengths, size)
    model = backbone.model.train()
    drops_input = config.method.dropout > 0 and config.method.dropout_on == "input"
    products = Products(model.modules(), drops_input)
    blocks = [block for _, block in transformer_blocks(model)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # its messages on a failure are long
    log.disabled, was_disabled = True, log.disabled
    try:
        with mode, WorstCase():
            _make_fake(model)
            batch = batch.to(torch.device("cpu"))
            batch.inputs = {name: mode.from_tensor(t) for name, t in batch.inputs.items()}
            batch.targets, batch.learned = mode.from_tensor(batch.targets), None
            calls = _calls(task, model, batch, blocks)
            measure = block_trace.compiled if compiled else block_trace.eager
            figures = {key: measure(call, products) for key, call in calls.items()}
            return _run(task, backbone, batch, blocks, calls, figures, products)
    except UserError:
        raise
    except Exception as error:  # e.g. the model's code reads values, which fake tensors lack
        raise UserError(
            f"model.id: {config.model.id}: {type(model).__name__} does not run on shapes alone "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        log.disabled = was_disabled


def _make_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one on the CPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                module._buffers[name] = made


def _key(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """A key that is equal for blocks that run the same program."""
    return (
        tuple((type(m).__name__, getattr(m, "weight_format", "")) for m in block.modules()),
        tuple((p.shape, p.dtype) for p in block.parameters()),
        tuple((t.shape, t.dtype) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)),
    )


def _calls(task: Task, model: nn.Module, batch: Batch, blocks: list[nn.Module]) -> dict[Any, Call]:
    """One call of each distinct program among the blocks."""
    calls: dict[Any, Call] = {}

    def run(block: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        key = _key(block, args, kwargs)
        if key not in calls:
            calls[key] = Call(block, args, kwargs, forward(*args, **kwargs))
        return tree_map_only(Tensor, torch.clone, calls[key].output)

    with torch.no_grad():
        _with_blocks(blocks, run, lambda: task.loss(model, batch))
    return calls


class _Checkpointed(torch.autograd.Function):
    """Replaces a block: saves its inputs, and registers the block's peaks with the meter."""

    @staticmethod
    def forward(ctx, like, figures: BlockBytes, meter: Meter, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.figures, ctx.meter = figures, meter
        # Without a graph, a checkpointed block frees its activations as it runs.
        meter.spike(figures.forward)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx, dy):
        ctx.meter.spike(max(ctx.figures.forward, ctx.figures.backward))
        return None, None, None, *(torch.empty_like(x) for x in ctx.saved_tensors)


def _run(
    task: Task,
    backbone: BuiltModel,
    batch: Batch,
    blocks: list[nn.Module],
    calls: dict[Any, Call],
    figures: dict[Any, BlockBytes],
    products: Products,
) -> Probe:
    model = backbone.model
    units = {unit.layer for unit in backbone.units}
    trains = {
        id(block): layer in units or any(p.requires_grad for p in block.parameters())
        for layer, block in enumerate(blocks)
    }
    added: dict[int, int] = {}
    inputs = 0
    known = [*model.parameters(), *model.buffers(), *batch.inputs.values(), batch.targets]
    meter = Meter([*known, *(t for c in calls.values() for t in tree_leaves(c.output))], products)

    def run(block: nn.Module, _: Callable, args: Any, kwargs: Any) -> Any:
        nonlocal inputs
        key = _key(block, args, kwargs)
        x, output, of_block = args[0], calls[key].output, figures[key]
        hidden = hidden_state(output)
        added[id(block)] = 0
        if not x.requires_grad and not trains[id(block)]:  # as in blocks.py
            meter.spike(of_block.forward)
            made = torch.empty_like(hidden)
        else:
            added[id(block)] = of_block.saved
            inputs += x.numel() * x.element_size()
            x = x if x.requires_grad else x.detach().requires_grad_()
            # An encoder's states, through which a decoder's blocks reach its blocks.
            others = tree_leaves((args[1:], kwargs))
            shared = [t for t in others if isinstance(t, Tensor) and t.requires_grad]
            made = _Checkpointed.apply(hidden, of_block, meter, x, *shared)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    def step() -> tuple[int, int]:
        with meter:
            loss, _ = task.loss(model, batch)
            forward, meter.peak = meter.peak, meter.held
            loss.backward()
        return forward, meter.peak

    forward, backward = _with_blocks(blocks, run, step)
    return Probe(inputs, forward, backward, tuple(added[id(block)] for block in blocks))


def _with_blocks(blocks: list[nn.Module], run: Callable, step: Callable[[], Any]) -> Any:
    """`step()`, with every block's forward replaced by `run(block, forward, args, kwargs)`."""
    for block in blocks:
        _replace(block, run)
    try:
        return step()
    finally:
        for block in blocks:
            del block.forward


def _replace(block: nn.Module, run: Callable) -> None:
    forward = block.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return run(block, forward, args, kwargs)

    block.forward = replaced  # type: ignore[assignment,method-assign]
