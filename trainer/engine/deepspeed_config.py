"""Merge the user's DeepSpeed JSON with our settings, without importing DeepSpeed.

`auto` is filled in; a value that contradicts ours is refused by name.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config.config import Config
from trainer.config.yaml import parse_json
from trainer.errors import UserError

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
"""Sections of a DeepSpeed JSON that our configuration replaces, and by which key."""

_CORRUPTING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""ZeRO++ options that would quantise the bytes of a packed matrix as if they were numbers."""

_CONTRADICTS = {
    "train_batch_size": "data.batch_size (and micro_batch_size times ranks)",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "zero_optimization.stage": "engine.kind=deepspeed",
}
"""Keys of a DeepSpeed JSON that our configuration determines, and by which key."""


def settings(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Our configuration as a DeepSpeed JSON."""
    data = config.data
    size = data.micro_batch_size or 1
    per_round = size * world_size
    return {
        # Only to pass DeepSpeed's check (it must be a product); our loader makes the batches.
        "train_batch_size": per_round * -(-data.batch_size // per_round),
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": -(-data.batch_size // per_round),
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            # `shard` makes the blocks leaf modules; no others.
            "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def sizes(block: nn.Module) -> dict[str, int]:
    """Keys of `zero_optimization` for a model of such blocks, in elements of the model's dtype."""
    elements = sum(parameter.numel() for parameter in block.parameters())
    norms = [p.numel() for name, p in block.named_parameters() if "norm" in name.lower()]
    return {
        # Only norms persist on every rank: gathering them costs more than it saves.
        "stage3_param_persistence_threshold": max(norms, default=0),
        # One block in use and one prefetched; more would hold the whole model.
        "stage3_prefetch_bucket_size": elements,
        "stage3_max_live_parameters": 2 * elements,
        "stage3_max_reuse_distance": 0,
    }


def read_user_json(config: Config) -> dict[str, Any]:
    """The user's DeepSpeed JSON ({} without one). Raises UserError where it is unreadable or sets
    what our configuration determines."""
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
    """`user` over `ours`, with `auto` filled in. Raises UserError where they contradict."""
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
    """Without keys that are `auto` and not ours: DeepSpeed's default then applies."""
    return {
        key: _without_auto(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner != "auto"
    }
