"""CUDA graph capture and replay of a function made of many small operations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GraphReplay:
    """Captures `function` as a CUDA graph in its second call and replays the graph from then on:
    one launch by the CPU instead of one per operation.

    The function must not synchronise with the CPU, must take tensors of the same shapes in every
    call and must mutate state in place. Its outputs are overwritten by the next call. Without
    `enabled` the function is simply called.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], enabled: bool):
        self._function, self._enabled = function, enabled
        self.forget()

    def forget(self) -> None:
        """Discard the graph. Call when captured tensors were reallocated."""
        self._warm = False  # the first call initialises libraries and optimizer state
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if not (self._enabled and self._warm):
            self._warm = True
            return self._function(*inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog) may call CUDA while this one captures.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
            self._graph = graph
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._outputs
