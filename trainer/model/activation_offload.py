"""Activations that wait for backward in the host's memory, where the GPU has no room for them.

A block's saved tensors are copied out while the blocks after it run, and copied back while those
are differentiated. Between two micro-batches a block's place on the host stays its own: page-locked
memory is slow to get.
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
"""Bytes of a tensor that is worth the way; smaller ones stay."""

_ALIGNMENT = 64


class _Ticket(NamedTuple):
    """In place of a saved tensor: which of its block's it is."""

    block: int
    number: int


class _Parcel:
    """What one block saved in one forward pass."""

    def __init__(self) -> None:
        self.views: list[tuple[torch.Size, tuple[int, ...], torch.dtype, slice]] = []
        self.leaving: list[Tensor] = []  # until their copies are there, nobody may take their place
        self.arrived: list[Tensor] = []
        self.numbers: dict[Any, int] = {}

    @property
    def nbytes(self) -> int:
        return self.views[-1][3].stop if self.views else 0


class HostMemory:
    """Places on the host for the activations of blocks; blocks are known by their index."""

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._places: dict[int, Tensor] = {}
        self._parcels: dict[int, _Parcel] = {}
        self._left: dict[int, torch.cuda.Event] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._leaving: int | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is moved."""
        return bool(self._places)

    @property
    def used(self) -> int:
        """Bytes that are on the host now, or on their way."""
        return sum(parcel.nbytes for parcel in self._parcels.values())

    def reserve(self, blocks: Sequence[int], nbytes: int | None) -> None:
        """A place of `nbytes` (none: as large as those that there are) for each of `blocks`,
        page-locked; RunFailed where the host has no more. What was saved is forgotten: its backward
        will not come."""
        if self._on_gpu and self.busy:
            torch.cuda.synchronize(self._device)
        self._parcels.clear()
        self._leaving = None
        held, self._places = list(self._places.values()), {}
        if nbytes is None:
            nbytes = max((len(place) for place in held), default=0)
        fitting = [place for place in held if len(place) == nbytes][: len(blocks)]
        del held
        for index in blocks:
            self._places[index] = fitting.pop() if fitting else self._locked(nbytes)

    def journey(self, nbytes: int) -> float:
        """Seconds in which so many bytes come over from a place."""
        source = next(iter(self._places.values()))[:nbytes]
        target = torch.empty_like(source, device=self._device)
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    @contextmanager
    def saving(self, block: int, held: set[int]) -> Iterator[None]:
        """A block's forward pass. `held`: storages that others hold anyway, by address."""
        if block in self._parcels:
            raise RunFailed(
                f"engine.activation_offload: block {block} runs twice in one pass; accepted: 0"
            )
        self.settle()
        parcel = self._parcels[block] = _Parcel()
        if block in self._arrived:  # its place may still be read
            self._out.wait_event(self._arrived[block])

        def pack(tensor: Tensor) -> Tensor | _Ticket:
            return self._pack(tensor, block, parcel, held)

        with saved_tensors_hooks(pack, self._unpack):
            yield
        if self._on_gpu:
            self._left[block] = self._out.record_event()
        self._leaving = block

    def settle(self) -> None:
        """What left last: from here on its memory may be used for other things."""
        if self._leaving is None:
            return
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._left[self._leaving])
        self._parcels[self._leaving].leaving.clear()
        self._leaving = None

    def before_backward(self, block: int) -> None:
        """The gradient has come to this block: fetch what it needs, and the next one below it."""
        self.settle()
        for index in [index for index in self._parcels if index > block]:
            del self._parcels[index]
        below = max((index for index in self._parcels if index < block), default=block)
        for index in {block, below} & self._parcels.keys():
            self._fetch(index)

    def _pack(
        self, tensor: Tensor, block: int, parcel: _Parcel, held: set[int]
    ) -> Tensor | _Ticket:
        place, nbytes = self._places[block], tensor.numel() * tensor.element_size()
        if tensor.device != self._device or nbytes < _LEAST:
            return tensor
        if tensor.untyped_storage().data_ptr() in held or not _dense(tensor):
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in parcel.numbers:
            start = round_up(parcel.nbytes, _ALIGNMENT)
            if start + nbytes > len(place):
                return tensor
            part = slice(start, start + nbytes)
            self._copy(place[part], _flat(tensor).view(torch.uint8))
            parcel.numbers[key] = len(parcel.views)
            parcel.views.append((tensor.shape, tensor.stride(), tensor.dtype, part))
            parcel.leaving.append(tensor)
        return _Ticket(block, parcel.numbers[key])

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if not self._on_gpu:
            target.copy_(source)
            return
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)

    def _fetch(self, block: int) -> None:
        parcel, place = self._parcels[block], self._places[block]
        if parcel.arrived or not parcel.views:
            return
        parcel.arrived = [
            torch.empty(part.stop - part.start, dtype=torch.uint8, device=self._device)
            for *_, part in parcel.views
        ]
        if not self._on_gpu:
            for target, (*_, part) in zip(parcel.arrived, parcel.views, strict=True):
                target.copy_(place[part])
            return
        self._in.wait_stream(torch.cuda.current_stream())  # whose memory it was before
        with torch.cuda.stream(self._in):
            for target, (*_, part) in zip(parcel.arrived, parcel.views, strict=True):
                target.copy_(place[part], non_blocking=True)
            self._arrived[block] = self._in.record_event()

    def _unpack(self, saved: Tensor | _Ticket) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parcel = self._parcels[saved.block]
        self._fetch(saved.block)
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._arrived[saved.block])
        shape, stride, dtype, _ = parcel.views[saved.number]
        return parcel.arrived[saved.number].view(dtype).as_strided(shape, stride)

    def _locked(self, nbytes: int) -> Tensor:
        try:
            place = torch.empty(nbytes, dtype=torch.uint8)
            if self._on_gpu:
                # Not by pin_memory, which rounds up to the next power of two.
                address = place.data_ptr()
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
                weakref.finalize(place, _unlock, address)
        except RuntimeError as error:
            raise RunFailed(
                "engine.activation_offload: the host has no more memory for it "
                f"({first_line(error)}); accepted: less"
            ) from error
        return place


def _unlock(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order."""
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
    """A dense tensor's elements in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
