"""Hundreds of small operations on a GPU, launched as one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class GraphReplay:
    """`function` of tensors on a GPU, recorded as a CUDA graph when it is called the second time,
    and from then on replayed: the CPU launches once what it would otherwise launch one by one.

    It must read no value of a tensor on the CPU, take the same shapes every time, and change in
    place whatever it changes. What it returns is overwritten by the next call. Not `recorded`, it
    is called like any other.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], enabled: bool):
        self._function, self._enabled = function, enabled
        self.forget()

    def forget(self) -> None:
        """To be called where what `function` changes was put elsewhere."""
        self._warm = False  # libraries set themselves up in the first call, and optimizers
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if not (self._enabled and self._warm):
            self._warm = True
            return self._function(*inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of the GPU meanwhile, as NCCL's watchdog does, is no error.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
            self._graph = graph
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._outputs
