"""How long a text may be: the position tables of a model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def longest_text(model: "PreTrainedModel") -> int | None:
    """Tokens of the longest text that the model's position tables cover; None without a table
    (rotary or relative positions, ALiBi, tables that grow).

    A table is an embedding or a buffer named after positions, of a length that the configuration of
    the text model holds; so towers of images and audio do not count.
    """
    config = model.config.get_text_config()
    known = {value for value in vars(config).values() if type(value) is int}
    limits = [length for rows, length in _tables(model) if rows in known or length in known]
    return min(limits, default=None)


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(rows, positions that texts can use) of every table."""
    for path, module in model.named_modules():
        if _embeds_positions(path, module):
            rows = module.weight.shape[0]
            # Numbers start behind that of padding (RoBERTa) or at a fixed offset (BART, OPT).
            padding = getattr(module, "padding_idx", None)
            yield rows, rows - (getattr(module, "offset", 0) if padding is None else padding + 1)
        embeds = any(_embeds_positions(name, child) for name, child in module.named_children())
        grows = hasattr(module, "make_weights")  # as transformers' sinusoidal tables do
        for name, buffer in module.named_buffers(recurse=False):
            if not _of_positions(f"{path}.{name}") or buffer.dim() != 2 or grows:
                continue
            if buffer.shape[0] > 1:
                yield buffer.shape[0], buffer.shape[0]
            elif embeds:  # (1, positions): the numbers to look up; unused by rotary models
                yield buffer.shape[1], buffer.shape[1]
        if isinstance(length := getattr(module, "max_seq_length", None), int):
            yield length, length  # what MPT's attention builds its biases for


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
