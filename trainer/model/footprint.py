"""Bytes that the backbone and what trains on it take on each rank, without activations."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from adapters.formats.formats import FORMATS
from adapters.methods.registry import METHODS
from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.model.backbone import BuiltModel

Spread = Literal["whole", "split", "blocks"]
"""How an engine spreads the backbone: every rank holds all of it; all of it is split over all
ranks; the blocks' matrices are split over the ranks of a host, and the rest is whole everywhere."""


@dataclass(frozen=True)
class Estimate:
    """Bytes a rank, without activations."""

    backbone: int
    """The rank's share of the frozen backbone, between steps."""
    block: int
    """The largest transformer block, whole; 0 where no block is gathered."""
    gathered: int
    """What a sharder gathers of it at a time: one block in use and one on its way, and the layers
    outside the blocks where these are split too."""
    held: int
    """Adapters and heads with gradients and two moments, float32; of the moments the rank's part,
    where `optim.shard_state` splits them."""
    update: int
    """Temporaries of the optimizer's step, split likewise."""

    @property
    def trainable(self) -> int:
        """What training the adapters and heads takes at most."""
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
    """What `backbone` (built, not loaded) takes on each of `ranks` ranks, `local_ranks` of them on
    a host (none: all)."""
    blocks = [block for _, block in transformer_blocks(backbone.model)]
    sizes = [_frozen_bytes(block, backbone, adapted_only=spread == "blocks") for block in blocks]
    whole = _frozen_bytes(backbone.model, backbone)
    local_ranks, rest, largest = local_ranks or ranks, whole - sum(sizes), max(sizes, default=0)
    backbone_bytes, gathered = {
        "whole": (whole, 0),
        "split": (-(-whole // ranks), rest + 2 * largest if ranks > 1 else 0),
        "blocks": (rest - (-sum(sizes) // local_ranks), 2 * largest),
    }[spread]
    trained = trainable_parameters(backbone, config)
    share = ranks if config.optim.shard_state else 1
    split = -(-trained // share)
    return Estimate(
        backbone=backbone_bytes,
        block=largest if gathered else 0,
        gathered=gathered,
        held=4 * (2 * trained + 2 * split),
        update=update_bytes(trained, share),
    )


def update_bytes(trained: int, share: int) -> int:
    """Temporaries of the optimizer's step on so many parameters, split over `share` ranks."""
    return 4 * 3 * -(-trained // share)


def blocks_that_fit(blocks: int, nbytes: int, left: int) -> int:
    """How many of `blocks`, `nbytes` each, find room in what is left."""
    return min(blocks, max(0, left) // nbytes) if nbytes else 0


def trainable_parameters(backbone: BuiltModel, config: Config) -> int:
    """Scalars that a fixed-rank adapter on every unit and the task's heads train."""
    gates = int(METHODS[config.method.kind].gates == "learned")
    adapters = sum(
        config.method.components * (unit.in_features + unit.out_features + gates)
        for unit in backbone.units
    )
    heads = sum(p.numel() for module in backbone.heads.values() for p in module.parameters())
    return adapters + heads


def _frozen_bytes(module: nn.Module, backbone: BuiltModel, *, adapted_only: bool = False) -> int:
    """Bytes of a module once loaded, or of its adapted layers' matrices; a tied parameter
    counts once."""
    places = backbone.adapted_layers.values()
    packed = {id(place.weight): place.layer for place in places}
    total = 0
    for parameter in module.parameters():
        layer = packed.get(id(parameter))
        if layer is not None:
            total += FORMATS[layer.weight_format].nbytes(layer.matrix_shape, backbone.dtype)
        elif not adapted_only:
            total += parameter.numel() * parameter.element_size()
    return total
