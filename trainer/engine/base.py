"""The engine interface: how the frozen backbone is distributed over the ranks.

Adapters (and a task's head) are small, so every rank holds a full replica, outside any sharder:
they are attached after `shard`, their gradients are summed by one flat all-reduce, and their
update is the same on every rank, or sharded by the optimizer (`optim.shard_state`), in every engine
alike. Engines, one file each, differ only in where they keep the frozen backbone's bytes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapters.optimizer import MaskedAdamW
from trainer.config.config import Config
from trainer.config.engines import AUTO, takes
from trainer.distributed.world import World
from trainer.engine.sharded_optimizer import ShardedOptimizer
from trainer.errors import RunFailed, UserError
from trainer.model.backbone import BuiltModel
from trainer.model.footprint import Spread

Optimizer = MaskedAdamW | ShardedOptimizer


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer step."""

    loss: float
    """Mean loss of the step's global batch, before the update."""
    grad_norm: float
    """Norm of the summed gradient before clipping."""
    skipped: bool
    """No update: the loss or the gradient is not finite."""


class Engine(ABC):
    """One way to distribute the frozen backbone over the ranks."""

    kind: ClassVar[str]
    spread: ClassVar[Spread]
    """How the frozen backbone is distributed."""
    collective_gather: ClassVar[bool]
    """Whether blocks are gathered by a collective: a rank that fails within a block then leaves the
    others blocked in it."""

    holds_gather_buffers: ClassVar[bool] = False
    """Whether the buffers of gathered blocks stay allocated between passes."""

    largest_block: int = 0
    """Bytes of the largest block unsharded, where `supports_unsharded_blocks`."""
    unsharded_blocks: int = 0
    """Number of blocks now kept unsharded between steps."""

    reason: str = ""
    """Why `engine.kind: auto` chose this engine; empty where the configuration names it."""
    gathers: str = ""
    """How blocks are gathered, for the log; empty where there is only one way."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world

    @property
    def supports_unsharded_blocks(self) -> bool:
        """Whether blocks can stay unsharded between steps (`keep_unsharded`)."""
        return takes(self.kind, "unsharded_blocks")

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raises UserError where the engine does not support the configuration, as far as that
        shows without processes or GPUs."""

    @classmethod
    def obstacle(cls, world: World) -> str | None:
        """Why these ranks cannot use the engine, or None; found by a trial, for `engine.kind:
        auto`. Collective; the same answer on all ranks."""
        return None

    def meet(self) -> None:  # noqa: B027
        """Collective setup before the first `shard_block`."""

    @classmethod
    def against_compiling(cls, config: Config, backbone: BuiltModel) -> str | None:
        """Why the transformer blocks cannot be compiled, or None."""
        return None

    @abstractmethod
    def shard_block(self, block: nn.Module) -> None:
        """Shard one transformer block, just loaded and complete on this rank's device."""

    @abstractmethod
    def shard(self, model: nn.Module) -> None:
        """Shard the rest of the model, once, after every block."""

    @abstractmethod
    def unsharded(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context in which a block's parameters (for the model: all others) are unsharded."""

    @abstractmethod
    def local_bytes(self, model: nn.Module) -> int:
        """Bytes of the frozen backbone that this rank holds between steps."""

    def keep_unsharded(self, count: int) -> None:
        """Keep exactly the first `count` blocks unsharded between steps: the very first gather has
        no computation to overlap with. Only where `supports_unsharded_blocks`. Collective. Raises
        RunFailed where the memory does not suffice."""
        # Ranks cannot agree on a failure in the middle of a collective gather.
        no_agreement = self.collective_gather or count == 0
        with nullcontext() if no_agreement else self.world.all_or_none():
            try:
                self._keep_unsharded(count)
            except torch.OutOfMemoryError as error:
                raise RunFailed(
                    f"engine.unsharded_blocks: {self.config.engine.unsharded_blocks} given, but "
                    f"the GPU's memory does not suffice for {count}; accepted: fewer, or 0"
                ) from error
        self.unsharded_blocks = count

    def _keep_unsharded(self, count: int) -> None:
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's part of the mean loss."""
        loss.backward()

    def sharded_optimizer(self, model: nn.Module) -> ShardedOptimizer | None:
        """The optimizer of a backbone that trains and is sharded; None where it is whole, or does
        not train."""
        return None

    def reduce(self, optimizer: Optimizer, loss: Tensor) -> float:
        """Sum the gradients over all ranks. Returns the mean loss, summed from the ranks' parts."""
        if isinstance(optimizer, MaskedAdamW):
            self.world.sum_(optimizer.gradients)
        return float(self.world.sum_(loss.detach().to(torch.float64)))

    def step(self, optimizer: Optimizer, loss: float, max_norm: float | None) -> Update:
        """Clip the reduced gradients, update, zero them; the same on every rank."""
        if isinstance(optimizer, ShardedOptimizer):
            return Update(loss, *optimizer.update(loss, max_norm))
        norm = optimizer.clip(max_norm)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
        return Update(loss, norm, skipped)


def compiles(
    config: Config, engine: type[Engine], backbone: BuiltModel, device: torch.device
) -> bool:
    """Whether the transformer blocks are compiled (`engine.compile`). Raises UserError where they
    cannot be, though asked for."""
    asked, obstacle = config.engine.compile, engine.against_compiling(config, backbone)
    if asked == "auto" and config.method.trains == "modules":
        return False  # whether another library's modules compile, it says nowhere
    if asked is True and obstacle:
        raise UserError(
            f"engine.compile: true given with engine.kind={engine.kind} and {obstacle}; "
            f"accepted: auto or false, or engine.kind={AUTO['split']}"
        )
    return device.type == "cuda" and obstacle is None if asked == "auto" else asked


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A model's frozen parameters; tied ones once."""
    return (p for p in model.parameters() if not p.requires_grad)
