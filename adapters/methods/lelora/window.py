"""A sliding window over tensors of one shape, in one fixed buffer, and how far they differ."""

import torch
from torch import Tensor


class SlidingWindow:
    """The newest `size` tensors, float64, on the device of the initial content `earlier` (m, …),
    newest last."""

    def __init__(self, size: int, earlier: Tensor):
        earlier = earlier.double()[-size:]
        self.padded = earlier.new_full((size, *earlier.shape[1:]), torch.nan)
        """(size, …), newest last; leading rows are NaN until the window is full."""
        self.count = len(earlier)
        if self.count:
            self.padded[-self.count :] = earlier

    def __len__(self) -> int:
        return self.count

    @property
    def all(self) -> Tensor:
        """(m, …), newest last."""
        return self.padded[len(self.padded) - self.count :]

    def push_(self, newest: Tensor) -> None:
        """Append `newest` (…) to `padded` in place. `counted` updates the count separately, so that
        this call can be captured in a CUDA graph."""
        self.padded.copy_(torch.cat([self.padded[1:], newest.unsqueeze(0)]))

    def counted(self) -> None:
        """Account for one `push_`."""
        self.count = min(self.count + 1, len(self.padded))


def spread_of(earlier: Tensor) -> Tensor | None:
    """Standard deviation of the earlier rewards, 0 for a unit with fewer than two; None if no unit
    has two."""
    if len(earlier) < 2:
        return None
    squares = (earlier - earlier.nanmean(0)).square().nansum(0)
    return (squares / (earlier.isfinite().sum(0) - 1).clamp(min=1)).sqrt()
