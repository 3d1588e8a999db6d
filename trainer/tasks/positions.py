"""The position tables of a model: how long a text may be, and what looks them up."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class _Table:
    """A table of what depends on absolute positions."""

    path: str
    rows: int | None
    """None: it grows."""
    length: int
    """Positions that texts can use."""
    width: int | None
    """Values of a position; None where the whole row of tokens is looked up at once."""
    padding: int | None = None
    """Row of padding tokens, behind which positions begin, where the model's `position_ids` count
    them too (RoBERTa)."""


def longest_text(model: "PreTrainedModel") -> int | None:
    """Tokens of the longest text that the model's position tables cover; None without a table
    (rotary or relative positions, ALiBi, tables that grow)."""
    return min((table.length for table in _of_texts(model)), default=None)


def longest_row(model: "PreTrainedModel") -> int | None:
    """The same for a row of packed texts: of the tables by which positions that are handed over,
    and restart in each text, are not looked up."""
    looked_up = takes_positions(model)
    tables = [table for table in _of_texts(model) if table.width is None or not looked_up]
    return min((table.length for table in tables), default=None)


def counts_by_itself(model: "PreTrainedModel") -> str | None:
    """Path of a table whose rows are added to the hidden states by positions that nobody can hand
    over, so that the second text of a row would not begin at 0; or None."""
    if takes_positions(model):
        return None
    # Tables as wide as a head rotate queries and keys, in which only distances count (RoFormer).
    embeddings: Any = model.get_input_embeddings()
    width = embeddings.weight.shape[1]
    widths = {width, getattr(model.config.get_text_config(), "hidden_size", width)}
    growing = [_Table(path, None, 0, table.embedding_dim) for path, table in _growing(model)]
    return next((t.path for t in (*_of_texts(model), *growing) if t.width in widths), None)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward pass takes `position_ids`."""
    return _has_positions(type(model).forward)


@cache
def _has_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in signature(forward).parameters


def handed(model: "PreTrainedModel", positions: Tensor, ids: Tensor) -> Tensor:
    """`position_ids` (rows, length) for positions that restart at 0 in every text, as the model
    numbers them itself in a single text of token `ids`: as they are, or behind the row of padding
    tokens, which do not count."""
    if model not in _PADDING:
        tables = (table.padding for table in _of_texts(model))
        _PADDING[model] = next((row for row in tables if row is not None), None)
    padding = _PADDING[model]
    if padding is None:
        return positions
    real = (ids != padding).long()
    count = real.cumsum(-1)
    row = torch.arange(ids.shape[1], device=ids.device) - positions  # where the text begins
    before = (count - real).gather(-1, row)
    return (count - before) * real + padding


_PADDING: "weakref.WeakKeyDictionary[nn.Module, int | None]" = weakref.WeakKeyDictionary()


def _of_texts(model: "PreTrainedModel") -> list[_Table]:
    """An embedding or a buffer named after positions, of a length that the configuration of the
    text model holds; so towers of images and audio do not count."""
    config = model.config.get_text_config()
    known = {value for value in vars(config).values() if type(value) is int}
    return [table for table in _tables(model) if table.rows in known or table.length in known]


def _tables(model: nn.Module) -> Iterator[_Table]:
    for path, module in model.named_modules():
        if _embeds_positions(path, module):
            rows, width = module.weight.shape
            # Numbers start behind that of padding (RoBERTa) or at a fixed offset (BART, OPT).
            padding = getattr(module, "padding_idx", None)
            length = rows - (getattr(module, "offset", 0) if padding is None else padding + 1)
            plain = type(module).forward is nn.Embedding.forward
            yield _Table(path, rows, length, width, padding if plain else None)
        embeds = any(_embeds_positions(name, child) for name, child in module.named_children())
        for name, buffer in module.named_buffers(recurse=False):
            where, shape = f"{path}.{name}", tuple(buffer.shape)
            if shape[:-2] == (1, 1) and shape[-2] == shape[-1]:  # a mask, as GPT-Neo's
                yield _Table(where, shape[-1], shape[-1], None)
            if not _of_positions(where) or buffer.dim() != 2 or _grows(module):
                continue
            if buffer.shape[0] > 1:
                yield _Table(where, buffer.shape[0], buffer.shape[0], buffer.shape[1])
            elif embeds:  # (1, positions): the numbers to look up; unused by rotary models
                yield _Table(where, buffer.shape[1], buffer.shape[1], 1)
        if isinstance(length := getattr(module, "max_seq_length", None), int):
            yield _Table(path, length, length, None)  # what MPT's attention builds its biases for


def _grows(module: nn.Module) -> bool:
    return hasattr(module, "make_weights")  # as transformers' sinusoidal tables do


def _growing(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if _grows(module))


def _embeds_positions(path: str, module: nn.Module) -> bool:
    embeds = isinstance(module, nn.Embedding) or hasattr(module, "padding_idx")
    has_rows = isinstance(getattr(module, "weight", None), nn.Parameter)
    return embeds and has_rows and _of_positions(path)


def _of_positions(path: str) -> bool:
    """Whether a path names absolute positions; relative ones have no end."""
    names = path.split(".")[-2:]
    named = any("pos" in name or name == "wpe" for name in names)
    return named and not any("rel" in name.split("_")[0] for name in names)


def rotary_length(model: "PreTrainedModel") -> int | None:
    """`max_position_embeddings`, the longest text of pretraining, of a model without a table."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if longest_text(model) is None and isinstance(length, int) else None
