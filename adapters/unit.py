"""A unit's identity: one adapted matrix. Free of torch, so that records are read without it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """One 2-D matrix of the backbone that hosts one adapter.

    `name` is the module's path in the model, `layer` the index of its transformer block (None
    outside the blocks; encoder blocks are numbered before decoder blocks), `kind` its path within
    the block, such as `self_attn.q_proj`: what makes matrices of different blocks comparable. An
    expert's matrix is `mlp.experts.down_proj.3`, its kind `mlp.experts.down_proj`.
    """

    index: int
    name: str
    layer: int | None
    kind: str
    out_features: int
    in_features: int


def third(layer: int, blocks: int) -> str:
    """Whether a block is in the front, middle or back third of all."""
    return ("front", "middle", "back")[3 * layer // blocks]


def by_kind_and_third(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Places among `units` of those of each matrix type, and of each third of the blocks."""
    groups: dict[str, list[int]] = {}
    blocks = 1 + max((unit.layer for unit in units if unit.layer is not None), default=0)
    for index, unit in enumerate(units):
        groups.setdefault(unit.kind, []).append(index)
        if unit.layer is not None:
            groups.setdefault(third(unit.layer, blocks), []).append(index)
    return groups


def stem(name: str) -> str:
    """A name without the number of an expert in a stack."""
    return re.sub(r"(\bexperts\.\w+)\.\d+$", r"\1", name)
