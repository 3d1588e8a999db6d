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


def with_rows(built: BuiltModel, name: str, table: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """A table by its parameter's `name`, as the files hold it: with all rows of the run's model,
    trained ones where `rows` has some. Another tensor as it is."""
    path = name.removesuffix(".weight")
    if built.added is None or path not in built.tables:
        return table
    full = built.added.filled(table)
    if path in rows:
        full[list(built.added.ids)] = rows[path].to(full)
    return full
