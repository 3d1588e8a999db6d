"""The interface between the loop and a way of spreading the backbone over processes.

Adapters (and a task's head) are small, so every rank holds them whole, outside any sharder:
they are attached after `shard`, their gradients are summed by one flat all-reduce, and their
update is the same on every rank, or split by the optimizer (`optim.shard_state`) in every engine
alike. What differs between engines is only where the frozen backbone's bytes live; each engine is
one file that says that.
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
from trainer.errors import RunFailed, UserError
from trainer.model.backbone import BuiltModel
from trainer.model.footprint import Spread


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    loss: float
    """Mean loss of the step's global batch, before the update."""
    grad_norm: float
    """Norm of the summed gradient before clipping."""
    skipped: bool
    """Nothing was updated, since the loss or the gradient is not finite."""


class Engine(ABC):
    """One way to place the frozen backbone on the ranks."""

    kind: ClassVar[str]
    spread: ClassVar[Spread]
    """Where the frozen backbone's bytes live."""
    collective_gather: ClassVar[bool]
    """Whether ranks gather the backbone together: one that breaks off in the middle of a block then
    leaves the others waiting there."""

    holds_gather_buffers: ClassVar[bool] = False
    """Whether what gathered blocks take stays allocated between passes."""

    largest_block: int = 0
    """Bytes of the largest one, where they may."""
    unsharded_blocks: int = 0
    """How many do."""

    reason: str = ""
    """Why `engine.kind: auto` chose it; empty where it was asked for."""
    gathers: str = ""
    """How it gathers blocks, where there is more than one way."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world

    @property
    def supports_unsharded_blocks(self) -> bool:
        """Whether blocks may stay whole from step to step (`keep_unsharded`)."""
        return takes(self.kind, "unsharded_blocks")

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raises UserError where the engine cannot be what the configuration asks for, as far as
        that shows without processes or GPUs."""

    @classmethod
    def obstacle(cls, world: World) -> str | None:
        """Why these ranks cannot use it, found by trying, for `engine.kind: auto`. All ranks call
        it together and get the same answer."""
        return None

    def meet(self) -> None:  # noqa: B027
        """What all ranks do together before the first block is taken over."""

    @classmethod
    def against_compiling(cls, config: Config, backbone: BuiltModel) -> str | None:
        """What keeps the transformer blocks from being compiled, where something does."""
        return None

    @abstractmethod
    def shard_block(self, block: nn.Module) -> None:
        """Take over one transformer block, whole on this rank's device, as it was just loaded."""

    @abstractmethod
    def shard(self, model: nn.Module) -> None:
        """Take over the rest of the model, once, after every block."""

    @abstractmethod
    def unsharded(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which a block's (or, for the model, the other) parameters are whole."""

    @abstractmethod
    def local_bytes(self, model: nn.Module) -> int:
        """Bytes of the frozen backbone that this rank holds between steps."""

    def keep_unsharded(self, count: int) -> None:
        """Let the first `count` blocks stay whole from step to step, and only them: the first of
        all has nothing to hide its gathering behind. Only where `supports_unsharded_blocks`; all
        ranks call it together. RunFailed where the memory does not suffice."""
        # Ranks that gather in step cannot agree on a failure in the middle of it.
        alone = self.collective_gather or count == 0
        with nullcontext() if alone else self.world.all_or_none():
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
        """Gradients of this rank's part of the mean loss, added to those already there."""
        loss.backward()

    def reduce(self, optimizer: MaskedAdamW, loss: Tensor) -> float:
        """Sum the gradients over all ranks, and each rank's part of the mean loss."""
        self.world.sum_(optimizer.gradients)
        return float(self.world.sum_(loss.detach().to(torch.float64)))

    def step(self, optimizer: MaskedAdamW, loss: float, max_norm: float | None) -> Update:
        """Clip the reduced gradients, update, zero; the same on every rank."""
        norm = optimizer.clip(max_norm)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
        return Update(loss, norm, skipped)


def compiles(
    config: Config, engine: type[Engine], backbone: BuiltModel, device: torch.device
) -> bool:
    """Whether the transformer blocks are compiled (`engine.compile`)."""
    asked, obstacle = config.engine.compile, engine.against_compiling(config, backbone)
    if asked is True and obstacle:
        raise UserError(
            f"engine.compile: true given with engine.kind={engine.kind} and {obstacle}; "
            f"accepted: auto or false, or engine.kind={AUTO['split']}"
        )
    return device.type == "cuda" and obstacle is None if asked == "auto" else asked


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A model's frozen parameters, tied ones once."""
    return (p for p in model.parameters() if not p.requires_grad)
