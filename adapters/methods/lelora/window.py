"""The newest few tensors of one shape, in one tensor that stays where it is."""

import torch
from torch import Tensor


class SlidingWindow:
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
        """Put this one (…) at the end of `padded`. It is counted by `counted`, apart, so that this
        can be recorded."""
        self.padded.copy_(torch.cat([self.padded[1:], newest.unsqueeze(0)]))

    def counted(self) -> None:
        """One more was pushed."""
        self.count = min(self.count + 1, len(self.padded))
