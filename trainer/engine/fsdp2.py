"""FSDP2: torch's `fully_shard`, one group per transformer block and one for the rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from adapters.layers.base import PackedLayer
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.engine import copy_engine_gather
from trainer.engine.base import Engine, backbone_parameters
from trainer.engine.copy_engine_gather import CopyEngines
from trainer.errors import UserError


class FSDP2Engine(Engine):
    """Each block is all-gathered just before it runs and resharded right after."""

    kind = "fsdp2"
    spread = "split"
    collective_gather = True

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        if config.engine.copy_engines is True and not copy_engine_gather.possible(world):
            raise UserError(
                "engine.copy_engines: true given, but that needs NCCL 2.28 and GPUs of one host "
                "that access each other's memory; accepted: auto or false"
            )
        self.policy = MixedPrecisionPolicy()
        self._gather: CopyEngines | None = None
        self._blocks: list[FSDPModule] = []

    def meet(self) -> None:
        wanted = self.config.engine.copy_engines
        if wanted and copy_engine_gather.possible(self.world):
            found = copy_engine_gather.gathering(self.world, self.config.engine.timeout)
            if not isinstance(found, str):
                group, self._gather = found
                self._mesh = DeviceMesh.from_group(group, self.world.device.type)
                self.gathers = "NCCL gathers by copy engines"
                return
            if wanted is True:
                with self.world.all_or_none():
                    raise UserError(
                        f"engine.copy_engines: true given, but they cannot gather ({found}); "
                        "accepted: auto or false"
                    )
            self.gathers = f"copy engines cannot gather: {found}"
        self._mesh = init_device_mesh(self.world.device.type, (self.world.size,))

    def shard_block(self, block: nn.Module) -> None:
        _make_own(block)
        for module in block.modules():
            if isinstance(module, PackedLayer) and module.weight_format != "none":
                # On a GPU the gather copies bfloat16 via float32, which canonicalises NaNs and
                # would corrupt packed bytes that look like one. float32 is copied unchanged, and
                # `unpack` reads bytes only.
                packed = module.weight.detach().view(torch.float32)
                module.weight = nn.Parameter(packed, requires_grad=False)
        nbytes = sum(p.numel() * p.element_size() for p in block.parameters())
        self.largest_block = max(self.largest_block, nbytes)
        sharded = self._split(block)
        if self._gather is not None:
            sharded.set_custom_all_gather(self._gather)
        self._blocks.append(sharded)

    def shard(self, model: nn.Module) -> None:
        # By default the root group stays unsharded from forward to backward, and after an
        # evaluation until the next step.
        self._split(model)
        for block, following in pairwise(self._blocks):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])

    def _split(self, module: nn.Module) -> FSDPModule:
        return fully_shard(
            module, mesh=self._mesh, reshard_after_forward=True, mp_policy=self.policy
        )

    def _keep_unsharded(self, count: int) -> None:
        for index, block in enumerate(self._blocks):
            block.set_reshard_after_forward(index >= count)
            block.set_reshard_after_backward(index >= count)
            if index < count:
                block.unshard()
            else:
                block.reshard()

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    def local_bytes(self, model: nn.Module) -> int:
        total = 0
        for parameter in backbone_parameters(model):
            nbytes = parameter.numel() * parameter.element_size()
            if isinstance(parameter, DTensor):
                local = parameter.to_local()
                total += local.numel() * local.element_size()
            else:  # kept unsharded, in addition to its shard
                total += nbytes - (-nbytes // self.world.size)
        return total


def _make_own(block: nn.Module) -> None:
    """Give a block parameters of its own with the same storage: `fully_shard` refuses one that a
    block shares with another (Zamba's), of which each block keeps a shard then."""
    own: dict[int, nn.Parameter] = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copy = nn.Parameter(parameter.detach(), parameter.requires_grad)
                module._parameters[name] = own.setdefault(id(parameter), copy)
