"""Which rank reads, splits and packs which parameter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.layers.base import PackedLayer
from adapters.spectral import cost
from adapters.units import Unit, stem
from trainer.distributed.world import World
from trainer.loading.source import Request
from trainer.model.backbone import BuiltModel


@dataclass(eq=False)
class ParamTask:
    """A parameter that waits for its value, and who is to read it."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    units: Sequence[Unit]
    """What takes adapters in it: several in a stack of experts."""
    reader: int = 0
    """The rank of this host that reads and packs it."""
    deferred: bool = False
    """Another host decomposes it: it waits until that is known here."""

    @property
    def requests(self) -> list[Request]:
        matrix = self.matrix
        return [(self.name, number) for number in (matrix.adapted_layers if matrix else [None])]

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
    backbone: BuiltModel, modules: Iterable[tuple[str, nn.Module]], seen: set[int]
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
    """Worker by matrix: the dearest matrix first, each to the worker with the least so far."""
    load, assigned = [0.0] * workers, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        assigned[index] = load.index(min(load))
        load[assigned[index]] += costs[index]
    return assigned


def assign(group: Sequence[ParamTask], world: World, *, splits: bool) -> None:
    """Say who reads what of a group on this host. Where units are decomposed (`splits`), each is by
    one host, and the others read it later (`deferred`)."""
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
