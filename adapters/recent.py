"""The newest few tensors of one shape, in one tensor that stays where it is."""

import torch
from torch import Tensor


class Recent:
    """`earlier` (m, …) is what there is at first, the newest last; of more than `size` the newest
    stay. float64, where `earlier` lies."""

    def __init__(self, size: int, earlier: Tensor):
        earlier = earlier.double()[-size:]
        self.padded = earlier.new_full((size, *earlier.shape[1:]), torch.nan)
        """(size, …): NaN in front of what there is."""
        self.count = len(earlier)
        if self.count:
            self.padded[-self.count :] = earlier

    def __len__(self) -> int:
        return self.count

    @property
    def all(self) -> Tensor:
        """(m, …), the newest last."""
        return self.padded[len(self.padded) - self.count :]

    def push_(self, newest: Tensor) -> None:
        """Add this one (…); `count` is the caller's to raise, since a recording keeps no number."""
        self.padded.copy_(torch.cat([self.padded[1:], newest.unsqueeze(0)]))
