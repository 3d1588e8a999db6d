"""Trained rows of a frozen table of tokens: of the embedding, of the output head, or of both.

The rows of a few tokens train while all others stay as they are, wherever a sharder keeps them. So
the rows are a small replicated matrix R (n, width), and take the place of the table's in the
products alone:

    embedding: R[slot(id)] for these ids        head: logits[id] = h Rᵀ for these columns
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows:
    """The rows of the tokens `ids` (ascending), initially `start` (n, width); float32 and trained.

    Not a module, so that sharders never find them. Tied tables share one.
    """

    def __init__(self, ids: Sequence[int], start: Tensor):
        self.ids = torch.tensor(ids, device=start.device)
        self.values = nn.Parameter(start.detach().float().clone())
        self.enabled = True

    def attach_to_embedding(self, table: nn.Embedding) -> None:
        """Give these tokens the trained rows in what `table` returns."""
        # A hook, after those of sharders: what the frozen table returns needs no gradient.
        table.register_forward_hook(self._embed)

    def attach_to_head(self, head: nn.Linear) -> None:
        """Give these tokens the trained rows in the logits of `head`, and the head `token_rows`."""
        head.token_rows = self  # type: ignore[assignment]
        head.forward = partial(self._logits, head)  # type: ignore[method-assign]

    def _embed(self, table: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.enabled:
            return None
        ids = inputs[0]
        slots = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        trained = (self.ids[slots] == ids).unsqueeze(-1)
        rows = F.embedding(slots, self.values.to(output.dtype))
        scale: Any = getattr(table, "embed_scale", None)
        if scale is not None:  # as Gemma's and BART's tables multiply
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(trained, rows, output)

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, head.weight, head.bias)
        if not self.enabled:
            return logits
        return logits.index_copy(-1, self.ids, F.linear(hidden, self.values.to(hidden.dtype)))


def rows_of(head: nn.Module) -> TokenRows | None:
    """The trained rows of an output head, where it has some that are in use."""
    rows = getattr(head, "token_rows", None)
    return rows if isinstance(rows, TokenRows) and rows.enabled else None


@contextmanager
def frozen_tables(rows: Mapping[str, TokenRows]) -> Iterator[None]:
    """Context in which the tables compute with their own rows."""
    for one in rows.values():
        one.enabled = False
    try:
        yield
    finally:
        for one in rows.values():
            one.enabled = True
