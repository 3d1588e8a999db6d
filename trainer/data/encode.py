"""Encodes rows as examples, a chunk at a time.

Records that cannot be used are reported with file, line and reason.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.config.data_options import DataOptions, SourceNames
from trainer.data.dataset import Counts, schema
from trainer.data.fit import pieces, without_beginning
from trainer.data.formats import detect_format, to_records
from trainer.data.sources import Row, name_of
from trainer.errors import BadRecord, UserError, first_line
from trainer.tasks.base import Example, Record, Task, TooLong

if TYPE_CHECKING:
    import pyarrow as pa

_ANY = 2**31  # tokens: no limit


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What turns the rows of a source into examples: plain data and a tokenizer, which other
    processes can be sent."""

    source: SourceNames
    options: DataOptions
    task: Task

    def __call__(
        self, chunk: Sequence[tuple[str, Row]], tick: Callable[[], None] = lambda: None
    ) -> tuple["pa.RecordBatch", Counts]:
        """(examples, counts) of (place, row) pairs; records are numbered from 0. `tick` is called
        for every row. Raises UserError for a record that `options` say to stop at."""
        import pyarrow as pa

        counts, columns = Counts(), schema()
        kept = list(self._examples(chunk, counts, tick))
        values: dict[str, list] = {
            name: [getattr(example, name) for _, example in kept]
            for name in columns.names
            if name != "record"
        }
        values["record"] = [record for record, _ in kept]
        return pa.record_batch(values, schema=columns), counts

    def _examples(
        self, chunk: Sequence[tuple[str, Row]], counts: Counts, tick: Callable[[], None]
    ) -> Iterator[tuple[int, Example]]:
        """(number among the used records, example) of a chunk of rows; records that cannot be used
        are counted or raise UserError."""
        rows = []
        for _, row in chunk:
            rows.append(self._records(row))
            tick()
        usable = [record for _, found in rows if isinstance(found, list) for record in found]
        encoded = iter(self._encode(usable))
        for (place, _), (kind, found) in zip(chunk, rows, strict=True):
            counts.records += 1
            examples: list[Example | str] = (
                [str(found)]
                if isinstance(found, BadRecord)
                else [one for _ in found for one in _listed(next(encoded))]
            )
            if self.options.on_long_record == "split":
                examples = self._split(place, kind, examples, counts)
            kept = [example for example in examples if isinstance(example, Example)]
            lacks = self.task.options.whole_records and len(kept) < len(examples)
            is_long = any(isinstance(example, TooLong) for example in examples)
            is_left = is_long and self.options.on_long_record in ("drop", "stop")
            if (not kept or lacks) and not is_left:
                if self.options.on_bad_record == "stop":
                    raise stop(place, next(e for e in examples if isinstance(e, str)))
                counts.bad += 1
                continue
            # A turn whose conversation fills max_length is left out, as from a single example.
            is_cut = any(example.truncated for example in kept)
            if len(kept) < len(examples) or is_cut:
                if self.options.on_long_record == "stop":
                    limits = self.task.options.limits(self.options.max_length)
                    longer = " or ".join(f"{key} ({n} tokens)" for key, n in limits.items())
                    raise UserError(
                        f"{place}: longer than {longer}; accepted: shorter records, or "
                        "data.on_long_record=truncate or drop"
                    )
                if self.options.on_long_record == "drop":
                    counts.dropped += 1
                    continue
                counts.truncated += is_cut
                counts.turns_dropped += len(examples) - len(kept)
            for example in kept:
                yield counts.used, example
            counts.used += 1
            counts.formats[kind] = counts.formats.get(kind, 0) + 1
            counts.examples += len(kept)
            counts.tokens += sum(len(example.input_ids) for example in kept)

    def _records(self, row: Row) -> tuple[str, list[Record] | BadRecord]:
        """(format, records of a row or why it cannot be used)"""
        kind = ""
        try:
            if isinstance(row, BadRecord):
                raise row
            kind = detect_format(row, self.options, self.task)
            return kind, to_records(row, kind, self.options, self.task.tokenizer)
        except BadRecord as reason:
            return kind, reason

    def _encode(self, records: list[Record]) -> list[Example | list[Example] | str]:
        """`task.encode`; a panic inside the tokenizer, which is no Exception, is a UserError."""
        options, bos = self.options, self.task.tokenizer.bos_token_id
        is_whole = options.on_long_record == "split" or options.truncate == "prompt"
        try:
            examples = self.task.encode(records, _ANY if is_whole else options.max_length)
            if options.truncate != "prompt":
                return list(examples)
            return [
                found
                if not isinstance(found, Example)
                else without_beginning(found, options.max_length, bos)
                for found in examples
            ]
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise UserError(
                f"{name_of(self.source)}: the tokenizer failed ({first_line(error)}); accepted: a "
                "tokenizer and records that it can encode"
            ) from error

    def _split(
        self, place: str, kind: str, examples: list[Example | str], counts: Counts
    ) -> list[Example | str]:
        """The examples of a record, longer texts in pieces."""
        length, overlap = self.options.max_length, self.options.overlap
        fits = [isinstance(found, str) or len(found.input_ids) <= length for found in examples]
        if all(fits):
            return examples
        if kind != "text":
            raise UserError(
                f"{place}: longer than data.max_length ({length} tokens), and of format {kind}; "
                "accepted: plain text with data.on_long_record=split, or truncate, drop or stop"
            )
        counts.split += 1
        return [
            part
            for found in examples
            for part in ([found] if isinstance(found, str) else pieces(found, length, overlap))
        ]


def _listed(found: Example | list[Example] | str) -> Sequence[Example | str]:
    return found if isinstance(found, list) else [found]


def stop(place: str, reason: object) -> UserError:
    """The error of a bad record, where they end the run."""
    return UserError(f"{place}: {reason} (data.on_bad_record=skip leaves such records out)")
