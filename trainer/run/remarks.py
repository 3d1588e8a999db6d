"""What is said at the start of a run: settings that work, but perhaps not as meant."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.loader import Loader
from trainer.data.mixture import MixedDataset
from trainer.engine.base import Engine
from trainer.tasks.positions import rotary_length

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def on_batch(data: DataOptions, sequences: int) -> Iterator[str]:
    """`sequences`: those of an epoch."""
    if data.batch_size > sequences:
        yield (
            f"data.batch_size: {data.batch_size} sequences, but the data has {sequences}: each "
            f"step repeats records ({data.batch_size / sequences:.2f} epochs a step)"
        )


def on_sources(data: TokenDataset) -> list[str]:
    """The sources of a mixture."""
    parts = data.named_parts() if isinstance(data, MixedDataset) else {}
    return [f"{name}: {part.counts}" for name, part in parts.items()]


def on_evaluation(data: TokenDataset, examples: np.ndarray) -> str:
    """The records that are evaluated on; empty: none."""
    if len(examples) == len(data):
        return str(data.counts)
    records = len(np.unique(data.records[examples]))
    return f"{records} of the training records" if records else ""


def on_rows(loader: Loader) -> Iterator[str]:
    """How sequences are packed, cut into micro-batches and laid in rows."""
    data = loader.options
    if data.packing:
        yield (
            f"packed by best fit into {len(loader.sequences(loader.epoch))} rows of "
            f"{data.max_length} tokens an epoch, {loader.fill():.1%} filled"
        )
    size = f"{data.micro_batch_size} sequences"
    if data.micro_batch_size is None:
        size = f"at most {data.micro_batch_tokens} tokens"
    yield f"micro-batches of {size}, {loader.rows}"


def on_length(
    model: "PreTrainedModel", train_data: TokenDataset, eval_data: Mapping[str, TokenDataset]
) -> Iterator[str]:
    """On records longer than those the model was pretrained on."""
    length = rotary_length(model)
    longest = max(int(data.lengths.max()) for data in (train_data, *eval_data.values()))
    if length is not None and longest > length:
        yield (
            f"data.max_length: the longest record has {longest} tokens; the model's "
            f"max_position_embeddings is {length}"
        )


def describe_engine(engine: Engine) -> str:
    """An engine's kind, with why it was chosen and how it gathers."""
    remarks = "; ".join(remark for remark in (engine.reason, engine.gathers) if remark)
    return f"{engine.kind} ({remarks})" if remarks else engine.kind
