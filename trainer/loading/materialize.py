"""Giving the backbone's parameters their values: read, split, packed, shared with the host."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.units import Unit
from trainer.distributed.world import World
from trainer.loading.assignment import ParamTask, assign
from trainer.loading.source import Source
from trainer.loading.spectral_init import SpectralInit


class Materializer:
    """Fills groups of items, one after the other; every rank goes through the same groups."""

    def __init__(
        self,
        source: Source,
        world: World,
        spectral_init: SpectralInit | None,
        groups: list[list[ParamTask]],
    ):
        self._source, self._world, self._spectral_init = source, world, spectral_init
        self._model, self._dtype = source.model, source.backbone.dtype
        self._packed: dict[ParamTask, Tensor] = {}
        self._error = torch.zeros(2, dtype=torch.float64)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        splits = spectral_init is not None and not spectral_init.resumed
        for group in groups:
            assign(group, world, splits=splits)
        # All that this rank will ever read: reading goes on while a group is shared and sharded.
        mine = (
            item
            for group in groups
            for deferred in (False, True)
            for item in self._own(group, deferred)
        )
        self._values = source.in_turn(request for item in mine for request in item.requests)

    def pack(self, group: list[ParamTask]) -> None:
        """Read, split and pack this rank's items of a group; all ranks call it together."""
        with self._world.all_or_none():
            self._pack(group, deferred=False)
        if self._spectral_init is not None:
            with self._timed("sharing"):
                self._spectral_init.exchange()
            with self._world.all_or_none():
                self._pack(group, deferred=True)

    def assign_to_model(self, item: ParamTask) -> None:
        """Put an item of a packed group into the model, the same on all ranks of the host."""
        value = self._packed.pop(item, None)
        with self._timed("sharing"):
            if value is None:
                value = item.empty(self._dtype, self._world.device)
            self._world.share_(value, item.reader)
        if item.matrix is not None and item.matrix.weight_format != "none":
            item.matrix.weight = _frozen(value)
            return
        frozen = _frozen(value)
        for known_as in self._source.names[id(item.parameter)]:
            path, _, attribute = known_as.rpartition(".")
            setattr(self._model.get_submodule(path), attribute, frozen)

    def quantization_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ over the matrices that all ranks have packed, the same on each."""
        parts = torch.tensor(self._world.gather(self._error.tolist()), dtype=torch.float64)
        error, norm = parts.sum(0).tolist()
        return float((error / norm) ** 0.5) if norm else 0.0

    def _own(self, group: list[ParamTask], deferred: bool) -> list[ParamTask]:
        return [i for i in group if i.reader == self._world.rank and i.deferred == deferred]

    def _pack(self, group: list[ParamTask], deferred: bool) -> None:
        for item in self._own(group, deferred):
            full = self._full(item)
            with self._timed("packing"):
                self._packed[item] = self._value(item, full)

    def _full(self, item: ParamTask) -> Tensor:
        """What the backbone keeps of an item, before it is packed."""
        matrix = item.matrix
        if matrix is None or not matrix.stacked:
            return self._kept(next(iter(item.units), None))
        # On the device at once: on the host there is never more than one expert's matrix.
        full = torch.empty(matrix.shape, dtype=self._dtype, device=self._world.device)
        units: dict[int | None, Unit] = {
            int(unit.name.rpartition(".")[2]): unit for unit in item.units
        }
        for index, expert in enumerate(matrix.adapted_layers):
            full[index] = self._kept(units.get(expert))
        return full

    def _kept(self, unit: Unit | None) -> Tensor:
        """The next value in turn, without the part that the method takes of `unit`."""
        with self._timed("reading"):
            full = next(self._values)
        if self._spectral_init is None or unit is None:
            return full
        with self._timed("splitting"):
            return self._spectral_init.residual(unit, full)

    def _value(self, item: ParamTask, full: Tensor) -> Tensor:
        """What the model holds: packed, or in the parameter's own dtype."""
        matrix = item.matrix
        if matrix is None:
            return full.to(item.parameter.dtype)
        if matrix.weight_format == "none":
            # A stack as one matrix: sharders split the first dimension, and experts may be few.
            return full.view(matrix.matrix_shape).to(item.parameter.dtype)
        packed = matrix.pack(full.to(self._dtype), self._dtype)
        self._note_error(matrix, packed, full.view(matrix.matrix_shape))
        return packed

    def _note_error(self, matrix: PackedLayer, packed: Tensor, full: Tensor) -> None:
        restored = FORMATS[matrix.weight_format].unpack(packed, matrix.matrix_shape, self._dtype)
        squares = torch.zeros(2, dtype=torch.float64, device=full.device)
        for exact, approximate in zip(full.split(1024), restored.split(1024), strict=True):
            exact = exact.float()
            found = [(approximate - exact).square().sum(), exact.square().sum()]
            squares += torch.stack(found).double()
        self._error += squares.cpu()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        self.seconds[stage] += time.perf_counter() - started


def _frozen(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # `_init_weights` passes it by
    return parameter
