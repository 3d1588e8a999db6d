"""Learning-rate schedule: a function of the step, without state to checkpoint."""

import math

from trainer.config.sections import OptimOptions


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """η of optimizer step `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    warmup = warmup_steps(options, steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[options.schedule]
    return options.learning_rate * factor


def warmup_steps(options: OptimOptions, steps: int) -> int:
    """Warm-up steps, from `warmup_steps` or `warmup_ratio`."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    # Rounded first: 0.07 * 100 is a little more than 7 in floating point.
    return math.ceil(round((options.warmup_ratio or 0.0) * steps, 6))
