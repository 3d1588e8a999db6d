"""Documents that share a row: the attention masks that keep them apart.

A row may hold several records, its documents. Within `kept_apart` every mask that transformers
builds is restricted to pairs of positions of one document, and evaluated at positions counted from
the document's start (chunked attention depends on them), whether or not the model hands its
`position_ids` to the mask builder. transformers infers documents from these alone, so that in
gpt-oss, OPT, BLOOM and others, which do not, they would see each other.

No model code is changed. While a context is active, the mask functions that the builder looks up
by the name of the model's attention implementation are exchanged, and its own inference of
documents is off. Masks are made once per forward pass, outside the transformer blocks, and reach
them as arguments, so that a recomputed or compiled block gets the same ones.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface, find_packed_sequence_indices
from transformers.utils.generic import is_flash_attention_requested

from trainer.errors import UserError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) indices -> whether the query attends to the key."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch lie."""

    index: Tensor
    """(rows, length): number of each token's document within its row, from 0."""
    positions: Tensor
    """(rows, length): position of each token within its document, from 0."""
    boundaries: Tensor
    """int32: where each document begins if the rows are laid end to end, and the last one's end."""
    longest: int
    """Length of the longest document, rounded up to a power of two."""

    @staticmethod
    def of(positions: Tensor) -> "Documents":
        """From positions (rows, length) that restart at 0 in every document."""
        begins = positions == 0
        starts = begins.flatten().nonzero().flatten()
        boundaries = torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)
        longest = 2 ** int(positions.max()).bit_length()
        return Documents(begins.cumsum(-1) - 1, positions, boundaries, longest)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Documents":
        """With `function` applied to every tensor."""
        return Documents(
            function(self.index), function(self.positions), function(self.boundaries), self.longest
        )

    def to(self, device: torch.device) -> "Documents":
        return self.map(lambda tensor: tensor.to(device))

    def separate(self, attends: MaskFunction) -> MaskFunction:
        """`attends` within documents, as if each stood alone."""

        def separated(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = self.index[row, query] == self.index[row, key]
            return same & attends(row, head, self.positions[row, query], self.positions[row, key])

        return separated


@dataclass
class _Scope:
    """A context's documents, and whether any mask was built for them."""

    documents: Documents
    built: bool = False


_current: ContextVar[_Scope | None] = ContextVar("documents", default=None)


@contextmanager
def kept_apart(documents: Documents) -> Iterator[None]:
    """Within this context, in this thread, masks separate the documents of each row. Raises
    UserError at its end where the model ran in it without asking transformers for a mask."""
    scope = _Scope(documents)
    with _EXCHANGE:
        token = _current.set(scope)
        try:
            yield
        finally:
            _current.reset(token)
    if not scope.built:
        raise UserError(
            "data.packing: true given, but the model makes its attention masks by itself, in which "
            "the documents of a row see each other; accepted: false (data.padding_free likewise)"
        )


class _Exchange:
    """Context in which transformers builds masks by the functions here. Those leave threads
    without documents alone; after the last of nested or concurrent contexts its own are back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts = 0
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._contexts += 1
            if self._contexts == 1:
                self._originals = dict(AttentionMaskInterface._global_mapping)
                for name, original in self._originals.items():
                    AttentionMaskInterface.register(name, _separated(name, original))
                masking_utils.find_packed_sequence_indices = _infer_documents

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._contexts -= 1
            if self._contexts == 0:
                for name, original in self._originals.items():
                    AttentionMaskInterface.register(name, original)
                masking_utils.find_packed_sequence_indices = find_packed_sequence_indices


_EXCHANGE = _Exchange()

MASKS: dict[str, Callable[..., Any]] = {}
"""By the name of an attention: what builds a mask from `documents` and the builder's arguments, in
place of separating the pairs of positions that the builder asks for."""


def _infer_documents(position_ids: Tensor) -> Tensor | None:
    """In place of transformers' inference from positions: none where documents are known."""
    return find_packed_sequence_indices(position_ids) if _current.get() is None else None


def _separated(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, transformers' mask function of the attention `name`, for separate documents."""

    def build(*, mask_function: MaskFunction, **arguments: Any) -> Any:
        scope = _current.get()
        if scope is None:
            return original(mask_function=mask_function, **arguments)
        scope.built, documents = True, scope.documents
        rows, length = documents.index.shape
        if is_flash_attention_requested(requested_attention_implementation=name):
            # flash-attn takes no mask. transformers calls it by documents, which it infers from
            # the positions in every layer, in a single row only.
            if rows > 1:
                raise UserError(
                    f"model.attention: {name} given with data.packing=true and {rows} rows in a "
                    "micro-batch; accepted: another attention, or data.micro_batch_size=1"
                )
            return original(mask_function=mask_function, **arguments)
        shape = arguments["batch_size"], arguments["q_length"], arguments["kv_length"]
        if shape != (rows, length, length):
            raise UserError(
                f"data.packing: true given, but the model builds a mask of {shape} (rows, queries, "
                f"keys) for {rows} rows of {length} tokens, in which documents cannot be told "
                "apart; accepted: false (data.padding_free likewise)"
            )
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        if name in MASKS:
            return MASKS[name](documents, mask_function=mask_function, **arguments)
        return original(mask_function=documents.separate(mask_function), **arguments)

    return build
