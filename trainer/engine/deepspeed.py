"""DeepSpeed ZeRO-3 as the sharder of the frozen backbone.

DeepSpeed's engine is built without an optimizer and never called: its module hooks gather and
release the partitioned parameters, one transformer block at a time. Adapters are attached later and
stay outside it.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.distributed.world import World
from trainer.engine.base import Engine
from trainer.engine.deepspeed_config import merge, read_user_json, settings, sizes
from trainer.model.backbone import BuiltModel
from trainer.model.matrices import other_matrices


class DeepSpeedEngine(Engine):
    """Every parameter of the backbone is partitioned over all ranks by ZeRO stage 3."""

    kind = "deepspeed"
    spread = "split"
    collective_gather = True

    @classmethod
    def check(cls, config: Config) -> None:
        read_user_json(config)

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        _import_deepspeed(world.device)
        dtype = compute_dtype(config.model, world.device)
        self._json = merge(read_user_json(config), settings(config, world.size, dtype))
        self._sizes: dict[str, int] = {}

    def shard_block(self, block: nn.Module) -> None:
        import deepspeed

        dtype = next(block.parameters()).dtype
        for key, size in sizes(block).items():  # blocks may differ: dense ones, then mixtures
            self._sizes[key] = max(size, self._sizes.get(key, 0))
        deepspeed.zero.Init(module=block, config_dict_or_path=self._sized(), dtype=dtype)

    @classmethod
    def against_compiling(cls, config: Config, backbone: BuiltModel) -> str | None:
        if config.method.train_router:  # blocks are then gathered module by module
            return "method.train_router=true"
        # A compiled program saves its inputs for backward, gathered parameters among them.
        other = next(other_matrices(backbone.model), None)
        return None if other is None else f"{other[0]}, which is no adapted layer's"

    def shard(self, model: nn.Module) -> None:
        from deepspeed.utils import set_z3_leaf_module

        pace = _Pace()
        for _, block in transformer_blocks(model):
            # A leaf module must not contain a trained router, which DeepSpeed does not manage.
            set_z3_leaf_module(block, not self.config.method.train_router)
            if self.world.device.type == "cuda":
                block.register_forward_pre_hook(pace.keep)
                block.register_full_backward_pre_hook(pace.keep)
        blocks = (block for _, block in transformer_blocks(model))
        self._in_blocks = {id(p) for block in blocks for p in block.parameters()}
        self._engine = self._initialise(model)

    def _initialise(self, model: nn.Module) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, config=self._sized())
        return engine

    def _sized(self) -> dict[str, Any]:
        return merge(self._json, {"zero_optimization": self._sizes})

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        import deepspeed

        # Of the model only what lies outside the blocks: all of them together need not fit.
        apart = self._in_blocks if module is self._engine.module else set()
        own = (p for p in module.parameters() if hasattr(p, "ds_status"))
        with deepspeed.zero.GatheredParameters([p for p in own if id(p) not in apart]):
            yield

    def local_bytes(self, model: nn.Module) -> int:
        total = 0
        for parameter in filter(lambda p: hasattr(p, "ds_status"), model.parameters()):
            local = getattr(parameter, "ds_tensor", parameter)
            held = parameter.numel() * parameter.element_size()  # 0 while partitioned
            total += max(held, local.numel() * local.element_size())
        return total


class _Pace:
    """Keeps the CPU at most one block ahead of the GPU. DeepSpeed gathers when the CPU launches a
    block, and that memory is free only once the GPU has run it: a CPU far ahead would gather the
    whole model."""

    def __init__(self) -> None:
        self._begun: torch.cuda.Event | None = None

    def keep(self, *_: Any) -> None:
        """Hook before a block: wait until the GPU has begun the previous one."""
        if self._begun is not None:
            self._begun.synchronize()
        self._begun = torch.cuda.Event()
        self._begun.record()


def _import_deepspeed(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls deprecated torch functions, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # A shared-memory transport whose compilation at the first start takes half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
