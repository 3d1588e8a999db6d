"""Texts as the rows of a micro-batch, padded or end to end, and a model's pass on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.tasks.base import Batch, Example, pad
from trainer.tasks.documents import Documents, kept_apart
from trainer.tasks.positions import handed, takes_positions

ENCODERS = {"bert", "camembert", "electra", "roberta", "xlm-roberta"}
"""Encoders, by transformers' model_type, whose texts may lie end to end (tests): they keep them
apart, and where a head reads one position, it is the first of what the encoder returns, directly or
by a pooler that is a module of its own."""


def text_rows(
    sequences: Sequence[Sequence[Example]], width: int, padding: int
) -> tuple[dict[str, Tensor], Documents | None]:
    """(inputs, documents): rows of one text each, or a single row of several, of at least `width`
    tokens; `padding`: the token behind the texts."""
    examples = [example for packed in sequences for example in packed]
    if len(examples) == len(sequences):
        return _padded(examples, width, padding), None
    inputs = _end_to_end(examples, width, padding)
    return inputs, Documents.of(inputs["position_ids"])


def _padded(examples: Sequence[Example], width: int, padding: int) -> dict[str, Tensor]:
    width = max(width, *(len(example.input_ids) for example in examples))
    ids = [pad(example.input_ids, width, padding) for example in examples]
    seen = [pad([1] * len(example.input_ids), width, 0) for example in examples]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
    if examples[0].token_type_ids:
        types = [pad(example.token_type_ids, width, 0) for example in examples]
        inputs["token_type_ids"] = torch.tensor(types)
    return inputs


def _end_to_end(examples: Sequence[Example], width: int, padding: int) -> dict[str, Tensor]:
    """A row, at its end padding in documents no longer than the longest."""
    lengths = [len(example.input_ids) for example in examples]
    width = max(width, sum(lengths))
    ids = [token for example in examples for token in example.input_ids]
    positions = [place for length in lengths for place in range(length)]
    positions += [place % max(lengths) for place in range(width - len(ids))]
    inputs = {
        "input_ids": torch.tensor([pad(ids, width, padding)]),
        "position_ids": torch.tensor([positions]),
    }
    if examples[0].token_type_ids:
        types = [kind for example in examples for kind in example.token_type_ids]
        inputs["token_type_ids"] = torch.tensor([pad(types, width, 0)])
    return inputs


def output_of(model: Any, batch: Batch, **others: Any) -> Any:
    """What the model returns of the batch's inputs and `others`; the documents of its rows are kept
    apart, padding among them."""
    if batch.documents is None:
        return model(**batch.inputs, **others)
    # Of a row of one text, marked as a document; with it the mask would be a dense one.
    inputs = {name: values for name, values in batch.inputs.items() if name != "attention_mask"}
    positions = inputs.pop("position_ids")
    if takes_positions(model):  # not ALiBi, which depends on distances only
        inputs["position_ids"] = handed(model, positions, inputs["input_ids"])
    with kept_apart(batch.documents):
        return model(**inputs, **others)
