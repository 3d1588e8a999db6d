"""Several sources by weight: their examples as one data set, and the order in which they are drawn.

Source i has a share p of all draws. It gives its k-th example at time (k + 1/2) / p_i, and the
examples of all sources are drawn by time: evenly interleaved, so that after any number of draws no
source is more than a few examples away from its share. Each source goes through its own examples
again and again, every pass shuffled anew, also where an epoch of the mixture ends in the middle of
one. So the order depends on the seed only, and `until` only says where epochs end.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.config.data_options import DataOptions
from trainer.config.sections import Shown
from trainer.data.dataset import Counts, TokenDataset
from trainer.data.sources import name_of
from trainer.data.tokenise import prepare
from trainer.tasks.base import Example, Task


@dataclass(frozen=True)
class Source:
    """One source of a mixture."""

    name: str
    data: TokenDataset
    weight: float


class MixedDataset(TokenDataset):
    """The examples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source], until: Literal["first", "last"]):
        self.sources, self.until = list(sources), until
        parts = [source.data for source in sources]
        self.bounds = np.cumsum([0, *map(len, parts)])
        self.counts = Counts()
        for data in parts:
            self.counts.add(data.counts)
        self.lengths = np.concatenate([data.lengths for data in parts])
        self.weights = np.concatenate([data.weights for data in parts])
        self.labels = np.concatenate([data.labels for data in parts])
        shifts = np.cumsum([0, *(int(data.records[-1]) + 1 for data in parts)])
        self.records = np.concatenate(
            [data.records + shift for data, shift in zip(parts, shifts[:-1], strict=True)]
        )
        keys = [[source.data.key, source.weight] for source in sources]
        self.key = hashlib.sha256(json.dumps([keys, until]).encode()).hexdigest()[:32]

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all examples and of their shares."""
        parts = [[source.data.digest, source.weight] for source in self.sources]
        return hashlib.sha256(json.dumps([parts, self.until]).encode()).hexdigest()[:32]

    def __getitem__(self, index: int) -> Example:
        source = int(self.source_of(np.array(index)))
        return self.sources[source].data[index - int(self.bounds[source])]

    def reference(self, index: int) -> str:
        source = int(self.source_of(np.array(index)))
        return self.sources[source].data.reference(index - int(self.bounds[source]))

    def source_of(self, examples: np.ndarray) -> np.ndarray:
        """The index of the source of each example."""
        return np.searchsorted(self.bounds, examples, side="right") - 1

    def named_parts(self) -> dict[str, TokenDataset]:
        """The sources by their numbers, names and shares."""
        total = sum(source.weight for source in self.sources)
        return {
            f"source {number}: {source.name}, {source.weight / total:.1%}": source.data
            for number, source in enumerate(self.sources, 1)
        }


def prepare_training(
    options: DataOptions, task: Task, shown: Shown = "none",
    check: Callable[[], None] = lambda: None,
) -> TokenDataset:  # fmt: skip
    """The training records, tokenised, of one source or of a mixture's. As `tokenise.prepare`."""
    parts = [
        prepare(source, own.train_split, own.train_records, own, task, shown, check)
        for source, own in options.sources
    ]
    if options.mixture is None:
        return parts[0]
    names = [name_of(source) for source, _ in options.sources]
    weights = [entry.weight for entry in options.mixture]
    return MixedDataset(list(map(Source, names, parts, weights)), options.mixture_until)


class MixedOrder:
    """The order in which the examples of a mixture are drawn, epoch by epoch."""

    def __init__(self, data: MixedDataset, left_out: np.ndarray, seed: int, shuffle: bool):
        self.seed, self.shuffle = seed, shuffle
        self.examples = [
            np.setdiff1d(np.arange(start, end), left_out)
            for start, end in zip(data.bounds[:-1], data.bounds[1:], strict=True)
        ]
        self.weights = weights = np.array([source.weight for source in data.sources])
        passes = np.array([len(examples) for examples in self.examples]) / weights
        ending = int(passes.argmin() if data.until == "first" else passes.argmax())
        # Of an epoch; exactly one pass of the source that ends it.
        self.draws = len(self.examples[ending]) * (weights / weights[ending])

    def __call__(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, in order."""
        times, drawn = [], []
        for source, draws in enumerate(self.draws):
            first, end = (math.ceil(passed * draws - 0.5) for passed in (epoch, epoch + 1))
            times.append((np.arange(first, end) + 0.5) / self.weights[source])
            drawn.append(self._taken(source, first, end))
        return np.concatenate(drawn)[np.argsort(np.concatenate(times), kind="stable")]

    def _taken(self, source: int, first: int, end: int) -> np.ndarray:
        """What a source gives from its draw `first` to before its draw `end`."""
        size = len(self.examples[source])
        passes = range(first // size, -(-end // size))
        taken = np.concatenate([np.arange(0), *(self._pass(source, number) for number in passes)])
        return taken[first - passes.start * size :][: end - first]

    def _pass(self, source: int, number: int) -> np.ndarray:
        examples = self.examples[source]
        if not self.shuffle:
            return examples
        return np.random.default_rng([self.seed, number, source, _DRAWS]).permutation(examples)


_DRAWS = 0x5EED
"""Keeps the generators of passes apart from the loader's."""
