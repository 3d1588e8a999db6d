"""CUDA graphs of the transformer blocks: one launch for forward, one for backward.

A block launches some hundred kernels in each pass, which takes the CPU longer than a GPU needs for
a few thousand tokens. A graph replays the kernels of all blocks at once. What it reads must stay
where it was at the capture: hidden states and the blocks' other arguments are copied to buffers,
weights, adapters, gates and gradients are in place anyway. So it holds while values change, masks
and gates among them, and is forgotten where tensors are replaced (`forget`).

Within `replaying`, each block returns its input and notes its arguments; the last one replays the
graph. Models may therefore do nothing to the hidden states between blocks, which the recorded pass
shows. If a pass differs from the recorded one, the blocks noted so far run as they are.
All graphs share memory: passes do not overlap, and a backward pass belongs to the last forward one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.cache_utils import Cache

from trainer.errors import RunFailed


class NoGraph(Exception):
    """Why the blocks cannot be captured."""


@dataclass(frozen=True)
class Call:
    """A block's call in a recorded pass."""

    index: int
    forward: Callable[..., Any]
    hidden: Tensor
    others: tuple[Any, ...]
    """(arguments behind the hidden states, keyword arguments)."""
    output: Any


class _Slot:
    """A tensor argument: where the graph reads it."""

    def __init__(self, tensor: Tensor):
        self._spans = _is_spans(tensor)
        if self._spans:  # their last document ends where the rows do; empty ones may follow
            self._values = tensor[0, 0, 0].clone()
            self.tensor = self._values.expand(tensor.shape)
            self._end = int(self._values[-1])
        else:
            self.tensor = self._values = tensor.detach().clone()

    def accepts(self, tensor: Tensor) -> bool:
        own = self.tensor
        if (tensor.dtype, tensor.device) != (own.dtype, own.device) or tensor.requires_grad:
            return False
        if not self._spans:
            return tensor.shape == own.shape
        if not _is_spans(tensor) or tensor.shape[:2] != own.shape[:2]:
            return False
        return tensor.shape[2] <= own.shape[2] and tensor.shape[3] <= own.shape[3]

    def fill(self, tensor: Tensor) -> None:
        if not self._spans:
            self._values.copy_(tensor)
            return
        count = tensor.shape[3]
        self._values[:count].copy_(tensor[0, 0, 0])
        if count < len(self._values):
            self._values[count:].fill_(self._end)


def _is_spans(tensor: Tensor) -> bool:
    """Whether it is spans of documents (`attention.py`)."""
    return tensor.dtype == torch.int32 and tensor.dim() == 4 and tensor.stride()[:3] == (0, 0, 0)


@dataclass(frozen=True)
class _Step:
    """A block within a graph."""

    index: int
    forward: Callable[..., Any]
    leaves: Sequence[Any]
    """Of its arguments behind the hidden states; slots in place of tensors."""
    spec: TreeSpec
    rest: tuple[Any, ...] | None
    """What it returns behind the hidden states; None where it returns these alone."""

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those that the graph reads."""
        tensors = [leaf.tensor if isinstance(leaf, _Slot) else leaf for leaf in self.leaves]
        return tree_unflatten(tensors, self.spec)

    def returned(self, hidden: Tensor) -> Any:
        """`hidden` in the form of the block's output."""
        return hidden if self.rest is None else (hidden, *self.rest)


class Buffers:
    """Hidden states and their gradients before and behind all blocks, for graphs of any size."""

    def __init__(self, calls: Sequence[Call]):
        """Of the size of a recorded pass. Raises NoGraph where there is none."""
        if not calls:
            raise NoGraph("no block trains")
        largest = calls[0].hidden
        self._flat = [largest.new_empty(largest.numel()) for _ in range(4)]

    def like(self, hidden: Tensor) -> list[Tensor]:
        """x, y, dy and dx of the shape of `hidden`."""
        return [flat[: hidden.numel()].view(hidden.shape) for flat in self._flat]


class BlocksGraph:
    """The pass that `calls` recorded, to be replayed on other values."""

    def __init__(self, calls: Sequence[Call], buffers: Buffers):
        """Raises NoGraph."""
        _check(calls)
        self.x, self.y, self.dy, self.dx = buffers.like(calls[0].hidden)
        # Without the tensors of the recorded pass, which would stay in memory.
        self.steps: list[_Step] = []
        slots: dict[int, _Slot] = {}
        for call in calls:
            leaves, spec = tree_flatten(call.others)
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    if id(leaf) not in slots:
                        slots[id(leaf)] = _Slot(leaf)
                    leaves[position] = slots[id(leaf)]
            rest = None if isinstance(call.output, Tensor) else call.output[1:]
            self.steps.append(_Step(call.index, call.forward, leaves, spec, rest))
        self.shapes = (tuple(self.x.shape), *(tuple(slot.tensor.shape) for slot in slots.values()))
        """Of hidden states, and of the blocks' other arguments."""
        self._ran: tuple[Tensor, Tensor] | None = None
        self.forward: Callable[[], None] = self.run_forward
        self.backward: Callable[[], None] = self.run_backward

    def sources(self, number: int, others: tuple[Any, ...], found: dict[_Slot, Tensor]) -> bool:
        """Adds to `found` the values of the slots that call `number` reads; whether its arguments
        are those of the recorded one but for the values of tensors."""
        leaves, spec = tree_flatten(others)
        if spec != self.steps[number].spec:
            return False
        for own, leaf in zip(self.steps[number].leaves, leaves, strict=True):
            if not isinstance(own, _Slot):
                if own is not leaf and (isinstance(leaf, Tensor) or own != leaf):
                    return False
            elif (
                not isinstance(leaf, Tensor)
                or found.setdefault(own, leaf) is not leaf
                or not own.accepts(leaf)
            ):
                return False
        return True

    def run_forward(self) -> None:
        """x → y, as the blocks are; keeps what backward needs."""
        with torch.enable_grad():
            x = hidden = self.x.detach().requires_grad_()
            for step in self.steps:
                args, kwargs = step.arguments()
                hidden = _hidden(step.forward(hidden, *args, **kwargs))
        self._ran = (x, hidden)
        self.y.copy_(hidden.detach())

    def run_backward(self) -> None:
        """dy → dx; adds the adapters' gradients."""
        assert self._ran is not None
        (x, hidden), self._ran = self._ran, None
        (dx,) = torch.autograd.grad(hidden, x, self.dy)
        self.dx.copy_(dx)

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Raises NoGraph where the blocks do what a graph cannot hold."""
        self.forward = _captured(self.run_forward, stream, pool)
        self.backward = _captured(self.run_backward, stream, pool)


def _check(calls: Sequence[Call]) -> None:
    """Raises NoGraph unless each block takes what the one before returned, and nothing else that is
    computed."""
    for call, after in zip(calls, [*calls[1:], None], strict=True):
        output = call.output
        rest = () if isinstance(output, Tensor) else output[1:]
        if not isinstance(output, Tensor | tuple) or any(isinstance(t, Tensor) for t in rest):
            raise NoGraph("its blocks return more than hidden states")
        if after is not None and after.hidden is not _hidden(output):
            raise NoGraph("the model computes something between its blocks")
        for leaf in tree_flatten(call.others)[0]:
            if isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.device.type == "meta"):
                raise NoGraph("its blocks take further arguments with gradients")
            if isinstance(leaf, Cache):
                raise NoGraph("its blocks append to a cache of keys")


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _captured(
    function: Callable[[], None], stream: torch.cuda.Stream, pool: Any
) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads (data, NCCL's watchdog) may call CUDA meanwhile.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            function()
        except Exception as error:
            with suppress(RuntimeError):  # the first error has invalidated it
                graph.capture_end()
            raise NoGraph(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        graph.capture_end()
    return graph.replay


class _Replay(torch.autograd.Function):
    """All blocks at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, graph: BlocksGraph, graphs: "BlockGraphs") -> Tensor:
        graph.x.copy_(hidden)
        graph.forward()
        graphs.passes += 1
        ctx.graph, ctx.graphs, ctx.number = graph, graphs, graphs.passes
        return graph.y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.number != ctx.graphs.passes:
            raise RunFailed(
                "engine.cuda_graphs: a backward pass of other than the last forward pass; "
                "accepted: false"
            )
        ctx.graph.dy.copy_(dy)
        ctx.graph.backward()
        return ctx.graph.dx.detach(), None, None


class BlockGraphs:
    """The graphs of a model's blocks, and the pass under way."""

    def __init__(self) -> None:
        self.passes = 0
        self._graphs: list[BlocksGraph] = []
        self._mode = "off"
        self._recorded: list[Call] = []
        self._like: Sequence[_Step] = ()
        self._graph: BlocksGraph | None = None  # of the pass under way
        self._noted: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._sources: dict[_Slot, Tensor] = {}
        self._hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def active(self) -> bool:
        return self._mode != "off"

    def add(self, graph: BlocksGraph) -> None:
        self._graphs.append(graph)

    def forget(self) -> None:
        """Free all graphs."""
        self._graphs.clear()

    @contextmanager
    def recording(self, like: BlocksGraph | None = None) -> Iterator[list[Call]]:
        """Context in which blocks run as they are; yields the list of their calls. With the graph
        of a pass of another size (`like`) they are not run: what they take is recorded alone, and
        what they would return has its input's values."""
        self._mode, self._recorded = "recording", []
        self._like = like.steps if like is not None else ()
        try:
            yield self._recorded
        finally:
            self._mode, self._recorded, self._like = "off", [], ()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context of a training pass, in which a graph is used if there is one for it."""
        if not self._graphs:
            yield
            return
        self._mode = "replaying"
        try:
            yield
            if self._noted:
                raise RunFailed("engine.cuda_graphs: the model left out blocks; accepted: false")
        finally:
            self._mode = "off"
            self._end_pass()

    def run(self, index: int, forward: Callable[..., Any], hidden: Tensor, others: Any) -> Any:
        """The output of block `index`, or in a replayed pass what stands for it."""
        if self._mode == "recording":
            number = len(self._recorded)
            if number < len(self._like) and self._like[number].index == index:
                output = self._like[number].returned(hidden.view_as(hidden))
            else:
                output = forward(hidden, *others[0], **others[1])
            self._recorded.append(Call(index, forward, hidden, others, output))
            return output
        if not self._noted:
            self._graph = self._begin(index, hidden, others)
            if self._graph is None:
                return forward(hidden, *others[0], **others[1])
        elif self._hidden is not hidden:
            raise RunFailed(
                "engine.cuda_graphs: the model computes something between its blocks that it did "
                "not before; accepted: false"
            )
        graph, number = self._graph, len(self._noted)
        assert graph is not None
        step = graph.steps[number]
        if step.index != index or not graph.sources(number, others, self._sources):
            hidden = self._run_noted(hidden)
            return forward(hidden, *others[0], **others[1])
        self._noted.append((forward, others))
        if number + 1 < len(graph.steps):
            self._hidden = hidden
            return step.returned(hidden)
        for slot, value in self._sources.items():
            slot.fill(value)
        self._end_pass()
        output = _Replay.apply(hidden, graph, self)
        return step.returned(output)

    def _begin(self, index: int, hidden: Tensor, others: Any) -> BlocksGraph | None:
        """The graph for a pass that begins with this call."""
        for graph in self._graphs:
            self._sources = {}
            alike = graph.x.shape == hidden.shape and graph.x.dtype == hidden.dtype
            first = alike and graph.steps[0].index == index
            if first and graph.sources(0, others, self._sources):
                return graph
        return None

    def _run_noted(self, hidden: Tensor) -> Tensor:
        """Run the noted blocks as they are."""
        for forward, (args, kwargs) in self._noted:
            hidden = _hidden(forward(hidden, *args, **kwargs))
        self._end_pass()
        return hidden

    def _end_pass(self) -> None:
        self._graph, self._noted, self._sources, self._hidden = None, [], {}, None
