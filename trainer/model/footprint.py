"""Bytes of the backbone, adapters and optimizer on each rank, without activations."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from adapters.formats.formats import FORMATS
from adapters.methods.registry import METHODS
from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.model.backbone import BuiltModel

Spread = Literal["whole", "split", "blocks"]
"""How an engine distributes the backbone. "whole": replicated on every rank; "split": sharded over
all ranks; "blocks": the blocks' matrices sharded over the ranks of a host, the rest replicated."""


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank, without activations."""

    backbone: int
    """The rank's part of what is frozen of the backbone, between steps."""
    block: int
    """The largest transformer block, unsharded; 0 where no block is gathered."""
    gathered: int
    """Peak of gathered parameters: one block in use and one prefetched, and the layers outside the
    blocks where these are sharded too."""
    held: int
    """Adapters, heads and rows of added tokens with gradients and two moments, float32 (with
    `optim.shard_state` only the rank's shard of the moments), and casts to the model's dtype."""
    update: int
    """Temporaries of the optimizer's step, sharded likewise."""

    @property
    def trainable(self) -> int:
        """Peak bytes of the adapters and heads, their optimizer included."""
        return self.held + self.update

    @property
    def total(self) -> int:
        return self.backbone + self.gathered + self.trainable


def estimate(
    backbone: BuiltModel,
    config: Config,
    ranks: int,
    spread: Spread,
    *,
    local_ranks: int | None = None,
) -> Estimate:
    """Bytes of `backbone` (built, not loaded) on each of `ranks` ranks, `local_ranks` of them per
    host (None: all)."""
    blocks = [block for _, block in transformer_blocks(backbone.model)]
    sizes = [_frozen_bytes(block, backbone, adapted_only=spread == "blocks") for block in blocks]
    full = _frozen_bytes(backbone.model, backbone)
    local_ranks, rest, largest = local_ranks or ranks, full - sum(sizes), max(sizes, default=0)
    backbone_bytes, gathered = {
        "whole": (full, 0),
        "split": (-(-full // ranks), rest + 2 * largest if ranks > 1 else 0),
        "blocks": (rest - (-sum(sizes) // local_ranks), 2 * largest),
    }[spread]
    trained = trainable_parameters(backbone, config)
    if config.method.trains == "backbone":
        shards = ranks if spread == "split" else 1
        in_use = backbone.dtype.itemsize / 4  # gathered in the dtype that it computes in
        return Estimate(
            backbone=-(-(full - 4 * trained) // shards),
            block=int(in_use * largest) if gathered else 0,
            gathered=int(in_use * gathered),
            held=16 * -(-trained // shards),  # weights, gradients, two moments
            update=update_bytes(trained, shards),
        )
    share = ranks if config.optim.shard_state else 1
    split = -(-trained // share)
    casts = config.method.trains == "adapters" and backbone.dtype.itemsize < 4
    cast = backbone.dtype.itemsize if casts else 0
    return Estimate(
        backbone=backbone_bytes,
        block=largest if gathered else 0,
        gathered=gathered,
        held=4 * (2 * trained + 2 * split) + cast * trained,
        update=update_bytes(trained, share),
    )


def update_bytes(trained: int, share: int) -> int:
    """Temporary bytes of the optimizer's step on `trained` scalars, sharded over `share` ranks."""
    return 4 * 3 * -(-trained // share)


def blocks_that_fit(blocks: int, nbytes: int, available: int) -> int:
    """How many of `blocks`, `nbytes` each, fit into `available` bytes."""
    return min(blocks, max(0, available) // nbytes) if nbytes else 0


def trainable_parameters(backbone: BuiltModel, config: Config) -> int:
    """Number of trained scalars: fixed-rank adapters on every unit, the task's heads, and rows of
    added tokens; or what trains of the backbone."""
    if config.method.trains == "backbone":
        return sum(p.numel() for p in backbone.model.parameters() if p.requires_grad)
    heads = sum(p.numel() for module in backbone.heads.values() for p in module.parameters())
    if config.method.trains == "modules":
        names = [unit.name for unit in backbone.units]
        return (
            METHODS[config.method.kind].trained_size(backbone.model, config.method, names) + heads
        )
    gates = int(METHODS[config.method.kind].initial_gates(config.method) == "learned")
    adapters = sum(
        config.method.components * (unit.in_features + unit.out_features + gates)
        for unit in backbone.units
    )
    if config.method.scales_rows:
        adapters += sum(unit.out_features for unit in backbone.units)
    return adapters + heads + backbone.row_parameters


def _frozen_bytes(module: nn.Module, backbone: BuiltModel, *, adapted_only: bool = False) -> int:
    """Bytes of a module once loaded, or only of its adapted layers; tied parameters count once."""
    adapted = backbone.adapted_layers.values()
    packed = {id(layer.weight): layer.layer for layer in adapted}
    total = 0
    for parameter in module.parameters():
        layer = packed.get(id(parameter))
        if layer is not None:
            total += FORMATS[layer.weight_format].nbytes(layer.matrix_shape, backbone.dtype)
        elif not adapted_only:
            total += parameter.numel() * parameter.element_size()
    return total
