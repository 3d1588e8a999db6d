"""Which rows of the optimizer's tensors are active: those whose mask is 1 and that saw a token."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.trainable import Trainable


class ActiveRows:
    """Of trained tensors, each with its rows among all."""

    def __init__(
        self,
        tensors: Sequence[tuple[Trainable, slice]],
        gradients: Tensor,
        offsets: Mapping[int, int],
    ):
        """`gradients`: all of them, flat, where `offsets` has the place of the observed
        parameters (token counters) by id."""
        self._count = max(rows.stop for _, rows in tensors)
        self._gradients = gradients
        self._masks, self._mask_of = self._unique_masks(tensors)
        self._counters = self._token_counters(tensors, offsets)

    def active(self) -> Tensor | None:
        """(rows,) bool; None if all rows are active."""
        saw_tokens = self.saw_tokens()
        active = saw_tokens
        if self._masks:
            every = torch.ones(1, dtype=torch.bool, device=self._gradients.device)
            active = torch.cat([*self._masks, every])[self._mask_of]
            if saw_tokens is not None:
                active &= saw_tokens
        return None if active is None or bool(active.all()) else active

    def saw_tokens(self) -> Tensor | None:
        """(rows,) bool: False if the tensor's counter shows no token since the gradients were
        zeroed. None without counters: every row then sees every token."""
        if self._counters is None:
            return None
        rows, counters = self._counters
        seen = torch.ones(self._count, dtype=torch.bool, device=self._gradients.device)
        seen[rows] = self._gradients[counters] > 0
        return seen

    def _unique_masks(
        self, tensors: Sequence[tuple[Trainable, slice]]
    ) -> tuple[list[Tensor], Tensor]:
        """The distinct masks (A, g and B of a unit share one), and each row's index into their
        concatenation; the index past its end stands for rows without a mask."""
        masks = {id(mask): mask for one, _ in tensors if (mask := one.mask) is not None}
        starts, total = {}, 0
        for key, mask in masks.items():
            starts[key], total = total, total + len(mask)
        indices = torch.full((self._count,), total, dtype=torch.int64)
        for one, rows in tensors:
            if one.mask is not None:
                start = starts[id(one.mask)]
                indices[rows] = torch.arange(start, start + len(one.mask))
        return list(masks.values()), indices.to(self._gradients.device)

    def _token_counters(
        self, tensors: Sequence[tuple[Trainable, slice]], offsets: Mapping[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """Rows that have a token counter, and each counter's index in the gradients; None without
        counters."""
        found: list[int] = []
        counters: list[int] = []
        for one, rows in tensors:
            if one.token_counter is not None:
                parameter, index = one.token_counter
                members = range(rows.start, rows.stop)
                found += members
                counters += [offsets[id(parameter)] + index] * len(members)
        if not found:
            return None
        device = self._gradients.device
        return torch.tensor(found, device=device), torch.tensor(counters, device=device)
