"""Materialize the backbone's parameters: read, decompose, pack, broadcast within the host."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.unit import Unit
from trainer.distributed.world import World
from trainer.loading.assignment import ParamTask, assign
from trainer.loading.probes import Noted, Probes, of_all_ranks
from trainer.loading.source import Source
from trainer.loading.spectral_init import SpectralInit


class Materializer:
    """Materializes groups of parameters in order; all ranks process the same groups."""

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
        self._probes = Probes(source.config.run.verify != "off")
        self.seconds: defaultdict[str, float] = defaultdict(float)
        decompose = spectral_init is not None and not spectral_init.resumed
        for group in groups:
            assign(group, world, decompose=decompose)
        # All reads of this rank, of all groups: prefetching continues while a group is sharded.
        own = (
            task
            for group in groups
            for deferred in (False, True)
            for task in self._own(group, deferred)
        )
        self._values = source.in_turn(request for task in own for request in task.requests)

    def pack(self, group: list[ParamTask]) -> None:
        """Read, decompose and pack this rank's tasks of a group. Collective."""
        with self._world.all_or_none():
            self._pack(group, deferred=False)
        if self._spectral_init is not None:
            with self._timed("exchanging"):
                self._spectral_init.exchange()
            with self._world.all_or_none():
                self._pack(group, deferred=True)

    def assign_to_model(self, task: ParamTask) -> None:
        """Broadcast a packed parameter within the host and assign it to the model, under all its
        names. Collective."""
        value = self._packed.pop(task, None)
        with self._timed("exchanging"):
            if value is None:
                value = task.empty(self._dtype, self._world.device)
            self._world.share_(value, task.reader)
        parameter = _parameter(value, trains=task.parameter.requires_grad)
        for known_as in self._source.names[id(task.parameter)]:
            path, _, attribute = known_as.rpartition(".")
            setattr(self._model.get_submodule(path), attribute, parameter)

    def quantization_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ over the matrices packed by all ranks; the same on each. Collective."""
        parts = torch.tensor(self._world.gather(self._error.tolist()), dtype=torch.float64)
        error, norm = parts.sum(0).tolist()
        return float((error / norm) ** 0.5) if norm else 0.0

    def probes(self) -> dict[str, Noted]:
        """Probes of the parameters that all ranks packed, by name. Collective."""
        return of_all_ranks(self._world.gather(self._probes.noted))

    def _own(self, group: list[ParamTask], deferred: bool) -> list[ParamTask]:
        return [t for t in group if t.reader == self._world.rank and t.deferred == deferred]

    def _pack(self, group: list[ParamTask], deferred: bool) -> None:
        for task in self._own(group, deferred):
            full = self._full(task)
            with self._timed("packing"):
                self._packed[task] = self._value(task, full)

    def _full(self, task: ParamTask) -> Tensor:
        """The frozen value of a parameter, not yet packed; a stack is read expert by expert."""
        matrix = task.matrix
        if matrix is None or not matrix.stacked:
            return self._frozen_part(task, None, task.units)
        # Assembled on the device: host memory never holds more than one expert's matrix.
        full = torch.empty(matrix.shape, dtype=self._dtype, device=self._world.device)
        units: dict[int | None, list[Unit]] = {
            int(unit.name.rpartition(".")[2]): [unit] for unit in task.units
        }
        for index, expert in enumerate(matrix.adapted_layers):
            full[index] = self._frozen_part(task, expert, units.get(expert, []))
        return full

    def _frozen_part(self, task: ParamTask, expert: int | None, units: Sequence[Unit]) -> Tensor:
        """The next value read, that of `task`, minus the initial adapter of its unit; of several,
        where the matrix is tied, all are zero."""
        with self._timed("reading"):
            full = next(self._values)
            dtype = task.parameter.dtype if task.matrix is None else self._dtype
            self._source.check_finite(task.name, expert, full, dtype)
        if self._spectral_init is None or not units:
            return full
        with self._timed("decomposing"):
            residuals = [self._spectral_init.residual(unit, full) for unit in units]
        return residuals[0]

    def _value(self, task: ParamTask, full: Tensor) -> Tensor:
        """The parameter's value in the model: packed, or in its own dtype."""
        matrix = task.matrix
        if matrix is None or matrix.weight_format == "none":
            # A stack as one matrix: sharders split the first dimension, and there may be few
            # experts.
            value = full if matrix is None else full.view(matrix.matrix_shape)
            value = value.to(task.parameter.dtype)
            # One that trains is held in float32, and gathered in the dtype that it computes in.
            trains = self._source.config.method.trains == "backbone"
            self._probes.note(task.name, value.to(self._dtype) if trains else value)
            return value
        packed = matrix.pack(full.to(self._dtype), self._dtype)
        self._note_error(task.name, matrix, packed, full.view(matrix.matrix_shape))
        return packed

    def _note_error(self, name: str, matrix: PackedLayer, packed: Tensor, full: Tensor) -> None:
        restored = FORMATS[matrix.weight_format].unpack(packed, matrix.matrix_shape, self._dtype)
        squares = torch.zeros(2, dtype=torch.float64, device=full.device)
        for exact, approximate in zip(full.split(1024), restored.split(1024), strict=True):
            exact = exact.float()
            found = [(approximate - exact).square().sum(), exact.square().sum()]
            squares += torch.stack(found).double()
        squares = squares.cpu()
        self._error += squares
        error, norm = squares.tolist()
        self._probes.note(name, restored, (error / norm) ** 0.5 if norm else 0.0)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        self.seconds[stage] += time.perf_counter() - started


def _parameter(value: Tensor, *, trains: bool) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=trains)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # skipped by `_init_weights`
    return parameter
