"""Memory: what a run will need, and what a process has used."""

import contextlib
import ctypes
import gc
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from adapters.formats.formats import FORMATS
from adapters.methods.registry import METHODS
from trainer.config.config import Config
from trainer.model.build import Backbone

GIB = 2**30

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
    backbone: Backbone,
    config: Config,
    ranks: int,
    spread: Spread,
    *,
    local_ranks: int | None = None,
) -> Estimate:
    """What `backbone` (built, not loaded) takes on each of `ranks` ranks, `near` of them on a host
    (none: all)."""
    from adapters.units import transformer_blocks

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


def trainable_parameters(backbone: Backbone, config: Config) -> int:
    """Scalars that a fixed-rank adapter on every unit and the task's heads train."""
    gates = int(METHODS[config.method.kind].gates == "learned")
    adapters = sum(
        config.method.components * (unit.in_features + unit.out_features + gates)
        for unit in backbone.units
    )
    heads = sum(p.numel() for module in backbone.heads.values() for p in module.parameters())
    return adapters + heads


def _frozen_bytes(module: nn.Module, backbone: Backbone, *, adapted_only: bool = False) -> int:
    """Bytes of a module once loaded, or of what hosts hold of it; a tied parameter counts once."""
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


def readable(nbytes: int) -> str:
    """A number of bytes for a person: MiB below a tenth of a GiB, else GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"


_outside = 0


def count_outside(nbytes: int) -> None:
    """What a process takes of its GPU beside torch's allocator, or (below 0) gives back."""
    global _outside
    _outside += nbytes


def allowance(device: torch.device, fraction: float) -> int:
    """Most bytes that this process may hold for `fraction` of its GPU to be taken: what others hold
    counts too."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + _outside
    return int(fraction * total) - (total - free - own)


def held_bytes(device: torch.device) -> int:
    """What this process holds now: the GPU's tensors, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _outside
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def release(device: torch.device) -> None:
    """Collect what is unreachable, and hand freed memory back to the GPU and to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Ask the C library to give freed pages back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """Most that this process has held: the GPU's tensors, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _outside
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB
