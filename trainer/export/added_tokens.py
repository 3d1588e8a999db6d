"""Rows of `model.added_tokens` in exported folders."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from adapters.peft_export import TrainedTokens
from trainer.model.backbone import BuiltModel
from trainer.model.peft_names import modules_to_save

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def trained_tokens(
    built: BuiltModel, rows: Mapping[str, Tensor], tokenizer: "PreTrainedTokenizerBase"
) -> TrainedTokens | None:
    """What a PEFT folder holds of the rows (n, width) by path of their tables; None without any."""
    added = built.added
    if added is None:
        return None
    size = "len(tokenizer)" if len(tokenizer) == added.rows else str(added.rows)
    return TrainedTokens(
        ids=added.ids,
        rows=rows,
        names={path: modules_to_save(built.model, [path])[0] for path in rows},
        resize=size if added.grown else None,
    )
