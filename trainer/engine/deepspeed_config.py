"""The user's DeepSpeed JSON under ours: `auto` filled in, contradictions refused by name.

Needs no DeepSpeed.
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
"""Sections of a DeepSpeed JSON whose work this project does itself."""


_CORRUPTING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""ZeRO++ options that take the bytes of a packed matrix for numbers."""

_CONTRADICTS = {
    "train_batch_size": "data.batch_size (and micro_batch_size times ranks)",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "zero_optimization.stage": "engine.kind=deepspeed",
}
"""Keys of a DeepSpeed JSON that our configuration settles, and by what."""


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
