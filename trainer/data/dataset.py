"""Tokenised records as a memory-mapped Arrow stream that the ranks of a node share."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from trainer.config.yaml import parse_json
from trainer.errors import UserError, first_line
from trainer.tasks.base import Example

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS, COUNTS = "tokens.arrows", "counts.json"
"""The files of an entry in the cache."""

_LISTS = ("input_ids", "loss_mask", "token_type_ids")


@functools.cache
def schema() -> "pa.Schema":
    """The columns of the cached file."""
    import pyarrow as pa

    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.int8()),
            "token_type_ids": pa.list_(pa.int8()),
            "label": pa.float64(),
            "weight": pa.int32(),
            "record": pa.int32(),
            "reference": pa.string(),
            "image": pa.large_binary(),
        }
    )


@dataclasses.dataclass
class Counts:
    """Numbers of records (rows) of one source, by outcome, and of the examples and tokens made of
    them."""

    records: int = 0
    used: int = 0
    examples: int = 0
    truncated: int = 0
    split: int = 0
    """Texts cut into several examples."""
    turns_dropped: int = 0
    """Examples of used records that do not fit."""
    dropped: int = 0
    bad: int = 0
    tokens: int = 0
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    """Used records of each format."""

    def add(self, other: "Counts") -> None:
        """Count what `other` counts too."""
        for name, value in vars(other).items():
            if name != "formats":
                setattr(self, name, getattr(self, name) + value)
        for kind, number in other.formats.items():
            self.formats[kind] = self.formats.get(kind, 0) + number

    def __str__(self) -> str:
        examples = f"{self.examples} examples, " if self.examples != self.used else ""
        turns = f"{self.turns_dropped} turns dropped, " if self.turns_dropped else ""
        split = f"{self.split} split, " if self.split else ""
        return (
            f"{self.used} of {self.records} records, {examples}{self.tokens} tokens "
            f"({self.truncated} truncated, {split}{turns}{self.dropped} dropped, {self.bad} bad)"
        )


class TokenDataset:
    """Tokenised records, memory-mapped: examples, of which a record gives one or several."""

    def __init__(self, table: "pa.Table", counts: Counts, key: str = ""):
        self.counts = counts
        self.key = key  # of the cache: digest of the records and of how they were tokenised
        # By chunk, as in the file: joining the chunks would copy them into memory.
        chunks = [chunk for chunk in table.to_batches() if len(chunk)]
        self._first = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._chunks = [
            {
                name: (chunk.column(name).offsets.to_numpy(), chunk.column(name).values.to_numpy())
                for name in _LISTS
            }
            for chunk in chunks
        ]
        self.lengths = np.concatenate([np.diff(lists["input_ids"][0]) for lists in self._chunks])
        self.weights = table.column("weight").to_numpy()
        self.labels = table.column("label").to_numpy()
        self.records = table.column("record").to_numpy()  # of each example; ascending, from 0
        self._references, self._images = _column(table, "reference"), _column(table, "image")

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all examples, whatever they were made of, and however they are cached."""
        digests = [xxhash.xxh3_128(values) for values in (self.weights, self.labels, self.records)]
        for name in _LISTS:
            lengths, values = xxhash.xxh3_128(), xxhash.xxh3_128()
            for offsets, found in (chunk[name] for chunk in self._chunks):
                lengths.update(np.diff(offsets))
                values.update(found[offsets[0] : offsets[-1]])
            digests += [lengths, values]
        if self.reference(0):  # few tasks have them
            texts = xxhash.xxh3_128()
            for chunk in self._references.chunks:
                texts.update("\0".join(chunk.to_pylist()).encode())
            digests.append(texts)
        if len(self._images[0].as_py()):
            images = xxhash.xxh3_128()
            for index in range(len(self)):
                images.update(xxhash.xxh3_128_digest(self._images[index].as_py()))
            digests.append(images)
        return xxhash.xxh3_128_hexdigest(b"".join(digest.digest() for digest in digests))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return Example(
            input_ids=self._list("input_ids", index),
            loss_mask=self._list("loss_mask", index),
            token_type_ids=self._list("token_type_ids", index),
            label=float(self.labels[index]),
            weight=int(self.weights[index]),
            reference=self.reference(index),
            image=self._images[index].as_py(),
        )

    def labels_of(self, examples: np.ndarray | Sequence[int]) -> list:
        """What predictions are compared with: references, or labels where there are none."""
        if self.reference(int(examples[0])):
            return [self.reference(int(index)) for index in examples]
        return self.labels[examples].tolist()

    def reference(self, index: int) -> str:
        """An example's `reference`, alone."""
        return self._references[index].as_py()

    def whole_records(self, examples: np.ndarray) -> list[np.ndarray]:
        """All examples of each record that one of `examples` belongs to, in their order."""
        numbers = np.fromiter(dict.fromkeys(self.records[examples].tolist()), np.int64)
        first = np.searchsorted(self.records, numbers)
        last = np.searchsorted(self.records, numbers, side="right")
        return [np.arange(a, b) for a, b in zip(first, last, strict=True)]

    def first_records(self, examples: np.ndarray, count: int) -> np.ndarray:
        """Those of `examples`, given record by record, that belong to the first `count` records."""
        is_next = np.diff(self.records[examples], prepend=-1) != 0
        return examples[np.cumsum(is_next) <= count]

    def _list(self, name: str, index: int) -> list[int]:
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        offsets, values = self._chunks[chunk][name]
        start, stop = offsets[index - self._first[chunk] :][:2]
        return values[start:stop].tolist()


def _column(table: "pa.Table", name: str) -> "pa.ChunkedArray":
    """A column; of empty values in files of earlier versions, which do not have it."""
    import pyarrow as pa

    if name in table.column_names:
        return table.column(name)
    empty = pa.scalar("", schema().field(name).type)
    return pa.chunked_array([pa.repeat(empty, table.num_rows)])


def open_dataset(folder: Path, key: str) -> TokenDataset:
    """The data set of an entry in the cache. Raises UserError."""
    import pyarrow as pa

    try:
        counts = Counts(**parse_json((folder / COUNTS).read_text()))
        with pa.memory_map(str(folder / TOKENS)) as file:
            table = pa.ipc.open_stream(file).read_all()
        if table.schema != schema():
            raise ValueError(f"columns {', '.join(table.schema.names)}")
        if len(table) != counts.examples:
            raise ValueError(f"{len(table)} examples, not {counts.examples}")
        return TokenDataset(table, counts, key)
    except Exception as error:  # a damaged file, or another program's
        raise UserError(
            f"data.cache: {folder}: damaged ({first_line(error)}); accepted: delete that folder"
        ) from error
