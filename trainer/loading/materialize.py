"""Giving the backbone's parameters their values: dealt to ranks, split, packed, shared."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.spectral import cost
from adapters.units import Unit, stem
from trainer.distributed.world import World
from trainer.loading.source import Request, Source
from trainer.loading.spectral_init import SpectralInit
from trainer.model.build import Backbone


@dataclass(eq=False)
class ParamTask:
    """A parameter that waits for its value, and who is to read it."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    units: Sequence[Unit]
    """What hosts adapters in it: several in a stack of experts."""
    reader: int = 0
    """The rank of this host that reads and packs it."""
    deferred: bool = False
    """Another host decomposes it: it waits until that is known here."""

    @property
    def requests(self) -> list[Request]:
        matrix = self.matrix
        return [(self.name, number) for number in (matrix.places if matrix else [None])]

    @property
    def matrix(self) -> PackedLayer | None:
        """The owner where the parameter is a matrix that it may hold packed."""
        if isinstance(self.owner, PackedLayer):
            return self.owner if self.parameter is self.owner.weight else None
        return None

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what the reader hands on."""
        shape, matrix = tuple(self.parameter.shape), self.matrix
        if matrix is None:
            return torch.empty(shape, dtype=self.parameter.dtype, device=device)
        if matrix.weight_format == "none":
            return torch.empty(matrix.matrix_shape, dtype=self.parameter.dtype, device=device)
        nbytes = FORMATS[matrix.weight_format].nbytes(matrix.matrix_shape, dtype)
        return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)


def param_tasks(
    backbone: Backbone, modules: Iterable[tuple[str, nn.Module]], seen: set[int]
) -> list[ParamTask]:
    """What waits in `modules` (path, module) for its value; `seen`: parameters already planned."""
    units: dict[str, list[Unit]] = {}
    for unit in backbone.units:
        units.setdefault(f"{stem(unit.name)}.weight", []).append(unit)
    items = []
    for path, module in modules:
        for local, parameter in module.named_parameters(prefix=path):
            if parameter.is_meta and id(parameter) not in seen:
                seen.add(id(parameter))
                owner = backbone.model.get_submodule(local.rpartition(".")[0])
                items.append(ParamTask(local, parameter, owner, units.get(local, [])))
    return items


def assign_matrices(costs: Sequence[float], workers: int) -> list[int]:
    """Which of `hands` gets what: the dearest first, each to whom has least so far."""
    load, assigned = [0.0] * workers, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        assigned[index] = load.index(min(load))
        load[assigned[index]] += costs[index]
    return assigned


def assign(group: Sequence[ParamTask], world: World, *, splits: bool) -> None:
    """Say who reads what of a group on this host. Where units are decomposed (`splits`), each is by
    one host, and is read on the others `later`."""
    costs = [
        sum(cost(unit.out_features, unit.in_features) for unit in item.units)
        if item.units and splits
        else float(item.parameter.numel())
        for item in group
    ]
    homes = assign_matrices(costs, len(world.nodes))
    for item, home in zip(group, homes, strict=True):
        item.deferred = splits and bool(item.units) and home != world.node
    ranks = world.nodes[world.node]
    for deferred in (False, True):
        some = [index for index, item in enumerate(group) if item.deferred == deferred]
        for index, worker in zip(
            some, assign_matrices([costs[i] for i in some], len(ranks)), strict=True
        ):
            group[index].reader = ranks[worker]


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
        if matrix is None or None in matrix.places:
            return self._kept(next(iter(item.units), None))
        # On the device at once: on the host there is never more than one expert's matrix.
        full = torch.empty(matrix.shape, dtype=self._dtype, device=self._world.device)
        units: dict[int | None, Unit] = {
            int(unit.name.rpartition(".")[2]): unit for unit in item.units
        }
        for index, expert in enumerate(matrix.places):
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
