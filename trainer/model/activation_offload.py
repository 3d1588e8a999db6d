"""Offload of saved activations to pinned host memory.

A block's saved tensors are copied to the host while the blocks after it run forward, and copied
back while those run backward. Each block keeps its host buffer between micro-batches, since
allocating pinned memory is slow.
"""

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from adapters.rounding import round_up
from trainer.errors import RunFailed, first_line

_LEAST = 2**20
"""Smaller tensors (bytes) stay on the GPU."""

_ALIGNMENT = 64


class _Reference(NamedTuple):
    """Saved by autograd in place of an offloaded tensor: its block and its index there."""

    block: int
    number: int


class _SavedTensors:
    """The tensors that one block saved in one forward pass."""

    def __init__(self) -> None:
        self.views: list[tuple[torch.Size, tuple[int, ...], torch.dtype, slice]] = []
        self.leaving: list[Tensor] = []  # sources of copies in flight
        self.arrived: list[Tensor] = []
        self.numbers: dict[Any, int] = {}

    @property
    def nbytes(self) -> int:
        return self.views[-1][3].stop if self.views else 0


class HostMemory:
    """Host buffers for the activations of blocks, by the block's index."""

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: dict[int, Tensor] = {}
        self._saved: dict[int, _SavedTensors] = {}
        self._left: dict[int, torch.cuda.Event] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._leaving: int | None = None

    @property
    def busy(self) -> bool:
        """Whether any block offloads its activations."""
        return bool(self._buffers)

    @property
    def used(self) -> int:
        """Bytes offloaded now, copies in flight included."""
        return sum(saved.nbytes for saved in self._saved.values())

    def reserve(self, blocks: Sequence[int], nbytes: int | None) -> None:
        """Allocate a pinned host buffer of `nbytes` (none: the size of the present ones) for each
        of `blocks`. Discards what was saved. Raises RunFailed where the host lacks the memory."""
        if self._on_gpu and self.busy:
            torch.cuda.synchronize(self._device)
        self._saved.clear()
        self._leaving = None
        held, self._buffers = list(self._buffers.values()), {}
        if nbytes is None:
            nbytes = max((len(buffer) for buffer in held), default=0)
        reusable = [buffer for buffer in held if len(buffer) == nbytes][: len(blocks)]
        del held
        for index in blocks:
            self._buffers[index] = reusable.pop() if reusable else self._pinned(nbytes)

    def transfer_seconds(self, nbytes: int) -> float:
        """Measured seconds of a copy of `nbytes` from a host buffer to the GPU."""
        source = next(iter(self._buffers.values()))[:nbytes]
        target = torch.empty_like(source, device=self._device)
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    @contextmanager
    def saving(self, block: int, held: set[int]) -> Iterator[None]:
        """Context of a block's forward pass. `held`: addresses of storages that stay on the GPU
        anyway."""
        if block in self._saved:
            raise RunFailed(
                f"engine.activation_offload: block {block} runs twice in one pass; accepted: 0"
            )
        self.settle()
        saved = self._saved[block] = _SavedTensors()
        if block in self._arrived:  # its buffer may still be read
            self._out.wait_event(self._arrived[block])

        def pack(tensor: Tensor) -> Tensor | _Reference:
            return self._pack(tensor, block, saved, held)

        with saved_tensors_hooks(pack, self._unpack):
            yield
        if self._on_gpu:
            self._left[block] = self._out.record_event()
        self._leaving = block

    def settle(self) -> None:
        """Wait for the latest copy to the host and free its source tensors."""
        if self._leaving is None:
            return
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._left[self._leaving])
        self._saved[self._leaving].leaving.clear()
        self._leaving = None

    def before_backward(self, block: int) -> None:
        """Backward has reached this block: fetch its activations, and prefetch the block below."""
        self.settle()
        for index in [index for index in self._saved if index > block]:
            del self._saved[index]
        below = max((index for index in self._saved if index < block), default=block)
        for index in {block, below} & self._saved.keys():
            self._fetch(index)

    def _pack(
        self, tensor: Tensor, block: int, saved: _SavedTensors, held: set[int]
    ) -> Tensor | _Reference:
        buffer, nbytes = self._buffers[block], tensor.numel() * tensor.element_size()
        if tensor.device != self._device or nbytes < _LEAST:
            return tensor
        if tensor.untyped_storage().data_ptr() in held or not _dense(tensor):
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in saved.numbers:
            start = round_up(saved.nbytes, _ALIGNMENT)
            if start + nbytes > len(buffer):
                return tensor
            part = slice(start, start + nbytes)
            self._copy(buffer[part], _flat(tensor).view(torch.uint8))
            saved.numbers[key] = len(saved.views)
            saved.views.append((tensor.shape, tensor.stride(), tensor.dtype, part))
            saved.leaving.append(tensor)
        return _Reference(block, saved.numbers[key])

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if not self._on_gpu:
            target.copy_(source)
            return
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)

    def _fetch(self, block: int) -> None:
        saved, buffer = self._saved[block], self._buffers[block]
        if saved.arrived or not saved.views:
            return
        saved.arrived = [
            torch.empty(part.stop - part.start, dtype=torch.uint8, device=self._device)
            for *_, part in saved.views
        ]
        if not self._on_gpu:
            for target, (*_, part) in zip(saved.arrived, saved.views, strict=True):
                target.copy_(buffer[part])
            return
        # The current stream may still use the memory just allocated.
        self._in.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._in):
            for target, (*_, part) in zip(saved.arrived, saved.views, strict=True):
                target.copy_(buffer[part], non_blocking=True)
            self._arrived[block] = self._in.record_event()

    def _unpack(self, packed: Tensor | _Reference) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        saved = self._saved[packed.block]
        self._fetch(packed.block)
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._arrived[packed.block])
        shape, stride, dtype, _ = saved.views[packed.number]
        return saved.arrived[packed.number].view(dtype).as_strided(shape, stride)

    def _pinned(self, nbytes: int) -> Tensor:
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            if self._on_gpu:
                # Not by pin_memory, which rounds up to the next power of two.
                address = buffer.data_ptr()
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
                weakref.finalize(buffer, _unpin, address)
        except RuntimeError as error:
            raise RunFailed(
                "engine.activation_offload: the host has no more memory for it "
                f"({first_line(error)}); accepted: less"
            ) from error
        return buffer


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a contiguous range of memory, in any order."""
    sides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in sides:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
