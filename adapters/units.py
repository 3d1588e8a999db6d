"""Which matrices of a backbone host adapters, and their identity."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from adapters.linear import AdaptedLinear


@dataclass(frozen=True)
class Unit:
    """One 2-D matrix of the backbone that hosts one adapter.

    `name` is the module's path in the model, `layer` the index of its transformer block (None
    outside the blocks; encoder blocks are numbered before decoder blocks), `kind` its path within
    the block, such as `self_attn.q_proj`: what makes matrices of different blocks comparable.
    """

    index: int
    name: str
    layer: int | None
    kind: str
    out_features: int
    in_features: int


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every transformer block, in the order in which they run.

    A block is an element of an outermost `ModuleList` that holds linear layers: `model.layers.3`,
    `bert.encoder.layer.0`. Lists inside a block (experts) are part of it.
    """
    blocks: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside_a_block = any(path.startswith(block + ".") for block, _ in blocks)
        if isinstance(module, nn.ModuleList) and not inside_a_block and _has_linear(module):
            blocks += [(f"{path}.{name}", block) for name, block in module.named_children()]
    return blocks


def third(layer: int, blocks: int) -> str:
    """Whether a block is in the front, middle or back third of all."""
    return ("front", "middle", "back")[3 * layer // blocks]


def linear_names(model: nn.Module, heads: Sequence[str] = ()) -> list[str]:
    """Paths of all linear layers, except those at or below a path in `heads`."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | AdaptedLinear)
        and not any(path == head or path.startswith(head + ".") for head in heads)
    ]


def select_targets(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names that `targets` picks: `all-linear`, a regular expression, or a list of suffixes.

    As in PEFT a string is matched against the whole path, and a list entry against whole dotted
    components at its end. Raises ValueError naming an entry that picks nothing.
    """
    if targets == "all-linear":
        return list(names)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"method.targets: {targets!r} is no regular expression ({error}); accepted: "
                "all-linear, a regular expression for the whole path, a list of suffixes"
            ) from error
        chosen = [name for name in names if pattern.fullmatch(name)]
        if not chosen:
            raise ValueError(_nothing_matches(targets, names))
        return chosen
    for suffix in targets:
        if not any(_ends_with(name, suffix) for name in names):
            raise ValueError(_nothing_matches(suffix, names))
    return [name for name in names if any(_ends_with(name, suffix) for suffix in targets)]


def make_units(model: nn.Module, names: Sequence[str]) -> list[Unit]:
    """Units for the linear layers at `names`, in the order of the model."""
    blocks = transformer_blocks(model)
    layer_of = {path: layer for layer, (path, _) in enumerate(blocks)}
    units = []
    for index, name in enumerate(names):
        block = next((path for path in layer_of if name.startswith(path + ".")), None)
        host = model.get_submodule(name)
        assert isinstance(host, nn.Linear | AdaptedLinear)
        units.append(
            Unit(
                index=index,
                name=name,
                layer=None if block is None else layer_of[block],
                kind=name if block is None else name[len(block) + 1 :],
                out_features=host.out_features,
                in_features=host.in_features,
            )
        )
    return units


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | AdaptedLinear) for child in module.modules())


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _nothing_matches(target: str, names: Sequence[str]) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"method.targets: {target!r} matches no linear layer of this model; "
        f"accepted: all-linear, {', '.join(known)}{hint}"
    )
