"""The compute dtype of a run."""

import torch

from trainer.config.sections import ModelOptions


def compute_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """`model.dtype`, with `auto` resolved for the device."""
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, options.dtype)
