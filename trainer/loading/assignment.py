"""Assign parameters to the ranks that read, decompose and pack them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.spectral import cost
from adapters.unit import Unit, stem
from trainer.distributed.world import World
from trainer.loading.source import Request


@dataclass(eq=False)
class ParamTask:
    """A parameter to materialize, and the rank that reads it."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    units: Sequence[Unit]
    """Units to split whose matrices it holds: several in a stack of experts."""
    reader: int = 0
    """The rank on this host that reads and packs it."""
    deferred: bool = False
    """Read after `SpectralInit.exchange`, since another host decomposes its matrices."""

    @property
    def requests(self) -> list[Request]:
        matrix = self.matrix
        return [(self.name, number) for number in (matrix.adapted_layers if matrix else [None])]

    @property
    def matrix(self) -> PackedLayer | None:
        """The owner, if the parameter is a matrix that can be packed."""
        if isinstance(self.owner, PackedLayer):
            return self.owner if self.parameter is self.owner.weight else None
        return None

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor for the value that the reader sends."""
        shape, matrix = tuple(self.parameter.shape), self.matrix
        if matrix is None:
            return torch.empty(shape, dtype=self.parameter.dtype, device=device)
        if matrix.weight_format == "none":
            return torch.empty(matrix.matrix_shape, dtype=self.parameter.dtype, device=device)
        nbytes = FORMATS[matrix.weight_format].nbytes(matrix.matrix_shape, dtype)
        return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)


def param_tasks(
    model: nn.Module,
    split: Sequence[Unit],
    modules: Iterable[tuple[str, nn.Module]],
    seen: set[int],
) -> list[ParamTask]:
    """Tasks for the meta parameters of `modules` (path, module) of a model whose ids are not in
    `seen`; adds them to it. `split`: units of whose matrices a part is taken out."""
    units: dict[int, list[Unit]] = {}  # by id: a tied matrix is a parameter of several modules
    for unit in split:
        units.setdefault(id(model.get_submodule(stem(unit.name)).weight), []).append(unit)
    tasks = []
    for path, module in modules:
        for local, parameter in module.named_parameters(prefix=path):
            if parameter.is_meta and id(parameter) not in seen:
                seen.add(id(parameter))
                owner = model.get_submodule(local.rpartition(".")[0])
                tasks.append(ParamTask(local, parameter, owner, units.get(id(parameter), [])))
    return tasks


def assign_matrices(costs: Sequence[float], workers: int) -> list[int]:
    """Greedy balancing: the costliest matrix first, each to the least loaded worker. Returns the
    worker of each matrix."""
    load, assigned = [0.0] * workers, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        assigned[index] = load.index(min(load))
        load[assigned[index]] += costs[index]
    return assigned


def assign(group: Sequence[ParamTask], world: World, *, decompose: bool) -> None:
    """Set `reader` and `deferred` of the tasks of a group for this host. With `decompose` each unit
    is decomposed by one host, and the others defer it."""
    costs = [
        sum(cost(unit.out_features, unit.in_features) for unit in task.units)
        if task.units and decompose
        else float(task.parameter.numel())
        for task in group
    ]
    homes = assign_matrices(costs, len(world.nodes))
    for task, home in zip(group, homes, strict=True):
        task.deferred = decompose and bool(task.units) and home != world.node
    ranks = world.nodes[world.node]
    for deferred in (False, True):
        some = [index for index, task in enumerate(group) if task.deferred == deferred]
        for index, worker in zip(
            some, assign_matrices([costs[i] for i in some], len(ranks)), strict=True
        ):
            group[index].reader = ranks[worker]
