"""Choose the matrices that take adapters, and say which are left out and why."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from adapters.methods.options import MethodOptions
from adapters.unit import Unit, stem
from adapters.units import linear_names, make_units, select_targets, transformer_blocks
from trainer.errors import UserError
from trainer.model.matrices import refuse_tied

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_LARGE = 2**40
"""A side that no method's rank exceeds."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The matrices that take adapters, by path, and those of `all-linear` that do not."""

    chosen: list[str]
    too_small: list[str]
    unreached: list[str]
    """Matrices that were named, or are of `all-linear`, whose output does not reach the loss."""
    lost: list[str]
    """PEFT would not find their adapters."""


def choose_targets(
    model: nn.Module,
    method: MethodOptions,
    excluded: Sequence[str],
    read: set[str],
    unreached: Collection[str],
    lost: Mapping[str, str] = MappingProxyType({}),
) -> Targets:
    """Choose among the linear layers that are not at or below a path in `excluded`. `read`: layers
    whose weight the model reads itself; `lost`: those whose adapters PEFT would not find, and the
    error that says so. `all-linear` leaves both out, and matrices too small for the method; where
    they are named, raises UserError.
    `unreached`, layers whose output does not reach the loss, are always left out: `q_proj` names
    those of every attention."""
    try:
        targets = select_targets(linear_names(model, excluded), method.targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    everything = method.targets == "all-linear"
    dead = [name for name in targets if name in read]
    if dead and not everything:
        raise UserError(
            f"method.targets: {dead[0]}: {type(model).__name__} reads its weight itself instead of "
            "calling the layer, so an adapter would have no effect; accepted: other layers"
        )
    targets = [name for name in targets if name not in read]
    without_effect = [name for name in targets if name in unreached]
    targets = [name for name in targets if name not in unreached]
    if without_effect and not targets:
        raise UserError(
            f"method.targets: {method.targets!r} picks only layers of {type(model).__name__} whose "
            f"output does not reach the loss of a text, such as {without_effect[0]}; accepted: "
            "other layers"
        )
    not_found = [name for name in targets if name in lost]
    if not_found and not everything:
        raise UserError(lost[not_found[0]])
    targets = [name for name in targets if name not in lost]
    small = _too_small(make_units(model, targets), method) if everything else set()
    if len(small) < len(targets):  # else the method says what does not fit
        targets = [name for name in targets if name not in small]
    if not targets:
        raise UserError(
            f"method.targets: {method.targets!r} picks no linear layer of {type(model).__name__}; "
            "accepted: a model whose projections are nn.Linear, and at least one of them"
        )
    try:
        method.check_units(make_units(model, targets))
    except ValueError as error:
        raise UserError(str(error)) from error
    if method.takes_from_weight:
        refuse_tied(model, method, targets)
    return Targets(targets, sorted(small), without_effect, sorted(not_found))


def _too_small(units: Sequence[Unit], method: MethodOptions) -> set[str]:
    """Names of the units that the method refuses for their size alone: it would accept them if they
    were larger."""
    large = [dataclasses.replace(u, out_features=_LARGE, in_features=_LARGE) for u in units]
    if not units or _refuses(method, large):
        return set()
    refused: dict[tuple[int, int], bool] = {}
    for index, unit in enumerate(units):
        shape = unit.out_features, unit.in_features
        if shape not in refused:
            refused[shape] = _refuses(method, [*large[:index], unit, *large[index + 1 :]])
    return {unit.name for unit in units if refused[unit.out_features, unit.in_features]}


def _refuses(method: MethodOptions, units: Sequence[Unit]) -> bool:
    try:
        method.check_units(units)
    except ValueError:
        return True
    return False


def output_head(model: "PreTrainedModel") -> list[str]:
    """The path of the output head, if there is one."""
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if head is not None and module is head]


def within_blocks(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The distinct paths within a block, of paths in a model: `mixer.dt_proj` for that layer of
    every block."""
    blocks = [f"{path}." for path, _ in transformer_blocks(model)]
    return sorted({
        stem(next((path.removeprefix(b) for b in blocks if path.startswith(b)), path))
        for path in paths
    })  # fmt: skip
