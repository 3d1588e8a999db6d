"""DeepSpeed ZeRO-3 as the sharder of the frozen backbone.

DeepSpeed's engine is built without an optimizer and never called: its hooks on the modules
gather and release the partitioned parameters, a whole transformer block at a time, and adapters,
attached later, stay outside it.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.config.sections import compute_dtype
from trainer.config.validation import parse_json
from trainer.distributed.world import World
from trainer.engine.base import Engine, backbone_parameters
from trainer.errors import UserError
from trainer.model.backbone import BuiltModel
from trainer.model.matrices import other_matrices

_OURS = {
    "optimizer": "optim (masked AdamW over the adapters)",
    "scheduler": "optim.schedule",
    "fp16": "model.dtype (bfloat16 or float32)",
    "amp": "model.dtype (bfloat16 or float32)",
    "torch_autocast": "model.dtype (bfloat16 or float32)",
    "activation_checkpointing": "engine.activation_checkpointing",
    "data_efficiency": "data",
    "curriculum_learning": "data",
    "compression_training": "model.quantization",
    "tensorboard": "log.tensorboard",
    "csv_monitor": "log",
    "wandb": "log",
    "comet": "log",
}
"""Sections of a DeepSpeed JSON whose work this project does itself."""


_CORRUPTING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""ZeRO++ options that take the bytes of a packed matrix for numbers."""


class DeepSpeedEngine(Engine):
    """Every parameter of the backbone is partitioned over all ranks by ZeRO stage 3."""

    kind = "deepspeed"
    spread = "split"
    collective_gather = True

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
        if config.method.train_router:  # blocks are then gathered piece by piece
            return "method.train_router=true"
        # A compiled program keeps its inputs for backward, and with them what was gathered.
        other = next(other_matrices(backbone.model), None)
        return None if other is None else f"{other[0]}, which is no linear layer's"

    def shard(self, model: nn.Module) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        pace = _Pace()
        for _, block in transformer_blocks(model):
            # A router that trains inside a block is none of DeepSpeed's parameters.
            set_z3_leaf_module(block, not self.config.method.train_router)
            if self.world.device.type == "cuda":
                block.register_forward_pre_hook(pace.keep)
                block.register_full_backward_pre_hook(pace.keep)
        self._engine, *_ = deepspeed.initialize(model=model, config=self._sized())

    def _sized(self) -> dict[str, Any]:
        return merge(self._json, {"zero_optimization": self._sizes})

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        import deepspeed

        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        with deepspeed.zero.GatheredParameters(frozen):
            yield

    def local_bytes(self, model: nn.Module) -> int:
        total = 0
        for parameter in backbone_parameters(model):
            local = getattr(parameter, "ds_tensor", parameter)
            held = parameter.numel() * parameter.element_size()  # 0 while partitioned
            total += max(held, local.numel() * local.element_size())
        return total


class _Pace:
    """Keeps the CPU at most one block ahead of the GPU. DeepSpeed gathers as the CPU runs, and what
    it gathered is free again only when the GPU has come past it: far ahead, the model is whole."""

    def __init__(self) -> None:
        self._begun: torch.cuda.Event | None = None

    def keep(self, *_: Any) -> None:
        """Where a block begins: wait until the GPU has begun the one before."""
        if self._begun is not None:
            self._begun.synchronize()
        self._begun = torch.cuda.Event()
        self._begun.record()


def settings(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What our configuration says in DeepSpeed's terms."""
    data = config.data
    per_round = data.micro_batch_size * world_size
    return {
        # For DeepSpeed's own arithmetic only (it wants a product); our loader cuts the batches.
        "train_batch_size": per_round * -(-data.batch_size // per_round),
        "train_micro_batch_size_per_gpu": data.micro_batch_size,
        "gradient_accumulation_steps": -(-data.batch_size // per_round),
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            # Blocks are leaves, set by `shard`, and nothing within them.
            "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def sizes(block: nn.Module) -> dict[str, int]:
    """Of `zero_optimization`, in elements of the model's dtype, for a model of such blocks."""
    elements = sum(parameter.numel() for parameter in block.parameters())
    norms = [p.numel() for name, p in block.named_parameters() if "norm" in name.lower()]
    return {
        # Only norms stay whole on every rank: gathering them costs more than it saves.
        "stage3_param_persistence_threshold": max(norms, default=0),
        # One block in use and one on its way; more would keep the model whole.
        "stage3_prefetch_bucket_size": elements,
        "stage3_max_live_parameters": 2 * elements,
        "stage3_max_reuse_distance": 0,
    }


def read_user_json(config: Config) -> dict[str, Any]:
    """The user's own DeepSpeed JSON ({} without one), refused where it claims what is ours."""
    if config.engine.config is None:
        return {}
    path = Path(config.engine.config)
    try:
        user = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.config: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"engine.config: {path}: broken JSON ({error})") from error
    if not isinstance(user, dict):
        raise UserError(f"engine.config: {path}: {type(user).__name__}; accepted: a JSON object")
    for key, ours in _OURS.items():
        value = user.get(key)
        enabled = value.get("enabled", True) if isinstance(value, dict) else value
        if value is not None and enabled not in (False, "auto"):
            raise UserError(
                f"engine.config: {path}: {key} given; accepted: leave it out, it is set by {ours}"
            )
    zero = user.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    for key in _CORRUPTING:
        if zero.get(key) not in (None, False, "auto"):
            raise UserError(
                f"engine.config: {path}: zero_optimization.{key}: {zero[key]!r} given; accepted: "
                "false (it would quantise the packed bytes of the backbone a second time)"
            )
    return user


def merge(user: dict[str, Any], ours: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`ours` under `user`, with `auto` filled in and contradictions refused by name."""
    merged = {**ours, **{key: value for key, value in user.items() if key not in _OURS}}
    for key, own in ours.items():
        value = user.get(key, "auto")
        name = f"{path}.{key}" if path else key
        if isinstance(own, dict):
            if value != "auto" and not isinstance(value, dict):
                raise UserError(f"engine.config: {name}: {value!r} given; accepted: an object")
            merged[key] = merge({} if value == "auto" else value, own, name)
        elif value == "auto":
            merged[key] = own
        elif value != own and (name in _CONTRADICTS):
            raise UserError(
                f"engine.config: {name}: {value!r} given, but {_CONTRADICTS[name]} makes it "
                f"{own!r}; accepted: {own!r} or 'auto'"
            )
    return _without_auto(merged)


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    """Leave out every `auto` on which we have no opinion: DeepSpeed's own default holds."""
    return {
        key: _without_auto(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner != "auto"
    }


_CONTRADICTS = {
    "train_batch_size": "data.batch_size (and micro_batch_size times ranks)",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "zero_optimization.stage": "engine.kind=deepspeed",
}
"""Keys of a DeepSpeed JSON that our configuration settles, and by what."""


def _import_deepspeed(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls torch by names that torch is about to rename; nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # A shared-memory transport that would be compiled, for half a minute, at first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
