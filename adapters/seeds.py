"""Seeds from keys such as (run seed, step, unit).

torch's CPU generator uses only 32 bits of its seed, so keys are hashed rather than packed.
"""

import numpy as np
import torch


def mixed(*key: int) -> int:
    """A well-mixed 63-bit seed for a key of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator seeded by this key."""
    return torch.Generator(device).manual_seed(mixed(*key))
