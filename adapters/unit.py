"""A unit: one adapted matrix. Does not import torch, so that run records can be read without it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A 2-D matrix of the backbone with one adapter.

    `name` is the module's path in the model, `layer` the index of its transformer block (None
    outside the blocks; encoder blocks come before decoder blocks), `kind` its path within the
    block, such as `self_attn.q_proj`, equal for corresponding matrices of all blocks. An expert's
    matrix is named `mlp.experts.down_proj.3`, its kind is `mlp.experts.down_proj`.
    """

    index: int
    name: str
    layer: int | None
    kind: str
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """Parameters of A and B per component."""
        return self.out_features + self.in_features


def third(layer: int, blocks: int) -> str:
    """The third of all blocks that a block is in: front, middle or back."""
    return ("front", "middle", "back")[3 * layer // blocks]


def by_kind_and_third(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Indices into `units`, by matrix type and by third of the blocks."""
    groups: dict[str, list[int]] = {}
    blocks = 1 + max((unit.layer for unit in units if unit.layer is not None), default=0)
    for index, unit in enumerate(units):
        groups.setdefault(unit.kind, []).append(index)
        if unit.layer is not None:
            groups.setdefault(third(unit.layer, blocks), []).append(index)
    return groups


def stem(name: str) -> str:
    """The name without the index of an expert in its stack."""
    return re.sub(r"(\bexperts\.\w+)\.\d+$", r"\1", name)
