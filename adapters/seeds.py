"""Seeds from keys such as (run seed, step, unit).

torch's CPU generator looks at 32 bits of its seed only, so a key is mixed, never shifted together.
"""

import numpy as np
import torch


def mixed(*key: int) -> int:
    """A seed of 63 well-mixed bits for this key of numbers from 0 on."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for this key."""
    return torch.Generator(device).manual_seed(mixed(*key))
