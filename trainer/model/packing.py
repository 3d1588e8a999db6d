"""Whether a model can keep the documents of a packed row apart, by its structure.

Masks separate documents in attention. Layers that carry a state along the row, or mix neighbouring
positions by a convolution, know no documents. `trainer/verification/forward.py` measures the rest.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_recurrent_attention_mask,
)

from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.data.rows import Rows
from trainer.errors import UserError
from trainer.model.attention import Attention, choose_attention
from trainer.tasks.positions import counts_by_itself, longest_row
from trainer.tasks.registry import TASKS

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


_LENGTHS = 8
"""Number of row lengths on a GPU."""


def check_packing(model: "PreTrainedModel", given: str = "data.packing: true") -> None:
    """Raises UserError where a kind of layer carries something across documents, or where their
    positions cannot restart. `given`: key and value that ask for rows of documents. Reads no
    weights."""
    kinds = carrying_layers(model)
    if kinds:
        raise UserError(
            f"{given} given, but {type(model).__name__} has layers that carry state across the "
            f"documents of a row ({', '.join(kinds)}); accepted: false"
        )
    table = counts_by_itself(model)
    if table is not None:
        raise UserError(
            f"{given} given, but {type(model).__name__} counts the positions of {table} by itself, "
            "from the start of the row, and takes no position_ids; accepted: false"
        )


def choose_rows(
    model: "PreTrainedModel", config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Rows, Attention]:
    """The form of rows (`data.padding_free`), and the attention for it. Raises UserError where the
    model cannot lay sequences end to end though asked for."""
    data, asked = config.data, config.model.attention
    few = data.row_lengths
    apart = config.task.source_apart
    rows = Rows(few=0 if few == "auto" else few, limit=longest_row(model), source_apart=apart)
    attention = choose_attention(model, asked, packing=True, device=device, dtype=dtype)
    obstacle = _against_end_to_end(model, config, rows)
    if data.padding_free is True and obstacle is not None:
        raise UserError(f"data.padding_free: true given, but {obstacle}; accepted: auto or false")
    if data.padding_free is False:
        obstacle = "data.padding_free=false"
    elif data.padding_free == "auto" and obstacle is None and not attention.by_document:
        because = f": {attention.obstacle}" if attention.obstacle else ""
        obstacle = f"attention would need a mask of documents{because}"
    # One record alone is padded in some models' rows at the cost of other results.
    padded = obstacle is None or config.packs_rows or data.micro_batch_size != 1
    if few == "auto" and device.type == "cuda" and padded and not apart:
        rows = replace(rows, few=_LENGTHS)
    if obstacle is None:
        return replace(rows, end_to_end=True), attention
    if not config.packs_rows:
        attention = choose_attention(model, asked, packing=False, device=device, dtype=dtype)
    return replace(rows, reason=obstacle), attention


def _against_end_to_end(model: "PreTrainedModel", config: Config, rows: Rows) -> str | None:
    """Why sequences cannot lie end to end in a row, if so."""
    name = type(model).__name__
    if config.task.source_apart:
        return f"task.kind={config.task.kind} has a row for the source and one for the target"
    if not config.task.lies_end_to_end or not TASKS[config.task.kind].reads_documents(model):
        return f"task.kind={config.task.kind} has a row for each record of {name}"
    if kinds := carrying_layers(model):
        return f"{name} has layers that carry state along a row ({', '.join(kinds)})"
    if table := counts_by_itself(model):
        return f"{name} counts the positions of {table} by itself, from the start of a row"
    if rows.limit is not None:
        return f"{name} has positions for {rows.limit} tokens of a row"
    return None


def carrying_layers(model: "PreTrainedModel") -> list[str]:
    """Kinds of layers that carry state from one position to the next, other than by attention:
    transformers' names of them where the configuration lists its layers, else classes."""
    listed = getattr(model.config.get_text_config(), "layer_types", None) or ()
    kinds = sorted({kind for kind in listed if _is_recurrent(kind)})
    if kinds:
        return kinds
    inside = [module for _, block in transformer_blocks(model) for module in block.modules()]
    mixing = (nn.Conv1d, nn.RNNBase, nn.RNNCellBase)
    kinds = sorted({type(module).__name__ for module in inside if isinstance(module, mixing)})
    return kinds or (["a recurrent state"] if model._is_stateful else [])


def _is_recurrent(kind: str) -> bool:
    """Whether transformers masks layers of this kind as recurrent ones or convolutions."""
    masks = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)
    made = masks.values() if isinstance(masks, dict) else (masks,)
    return create_recurrent_attention_mask in made
