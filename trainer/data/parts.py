"""Tokenised data on its way into the cache: a file that grows by whole parts.

tokens.arrows   an Arrow stream, one record batch a part
parts.jsonl     for every part, where it ends in the stream, its SHA-256, and its counts

What a run leaves that is killed, the next one goes on with: it keeps the parts that are whole, and
cuts off the rest. No part is synced: after a power failure its digest tells.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trainer.config.yaml import parse_json
from trainer.data.dataset import COUNTS, TOKENS, Counts, schema
from trainer.files import sync

if TYPE_CHECKING:
    import pyarrow as pa

JOURNAL = "parts.jsonl"


class Parts:
    """The parts in `folder`, which is made if need be. Raises OSError."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.counts = Counts()
        """Of the parts so far; `records` is the number of rows that were read for them."""
        self._stream, self._journal = _opened(folder / TOKENS), _opened(folder / JOURNAL)
        header = schema().serialize().to_pybytes()
        if self._stream.read(len(header)) != header:
            self._cut(0, 0)
            self._stream.write(header)
        self._keep_whole()

    def _keep_whole(self) -> None:
        """Go on after the last of the parts that are as their lines in the journal say."""
        start = self._stream.tell()
        kept = 0
        for line in self._journal:
            try:
                entry: dict[str, Any] = parse_json(line.decode("utf-8"))
                part = self._stream.read(entry["bytes"])
                counts = Counts(**entry["counts"])
                is_whole = line.endswith(b"\n") and _digest(part) == entry["sha256"]
            except (ValueError, TypeError, KeyError):  # a torn line
                break
            if not is_whole:
                break
            self.counts.add(counts)
            start, kept = start + len(part), kept + len(line)
        self._cut(start, kept)

    def append(self, batch: "pa.RecordBatch", counts: Counts) -> None:
        """Add a part, whose records are numbered from 0."""
        import pyarrow as pa
        import pyarrow.compute as pc

        at = batch.schema.get_field_index("record")
        numbers = pc.add(batch.column(at), pa.scalar(self.counts.used, pa.int32()))
        part = batch.set_column(at, batch.schema.field(at), numbers).serialize().to_pybytes()
        entry = {"bytes": len(part), "sha256": _digest(part), "counts": vars(counts)}
        self._stream.write(part)
        self._stream.flush()
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        self.counts.add(counts)

    def finish(self) -> None:
        """Make the folder a whole entry of the cache, on disk."""
        (self.folder / COUNTS).write_text(json.dumps(dataclasses.asdict(self.counts)))
        self.close()
        (self.folder / JOURNAL).unlink()
        for path in (self.folder / TOKENS, self.folder / COUNTS, self.folder):
            sync(path)

    def close(self) -> None:
        self._stream.close()
        self._journal.close()

    def _cut(self, stream: int, journal: int) -> None:
        for file, size in ((self._stream, stream), (self._journal, journal)):
            file.seek(size)
            file.truncate()


def _opened(path: Path) -> IO[bytes]:
    """A file to read and write from its beginning, made if need be."""
    path.touch()
    return path.open("r+b")


def _digest(part: bytes) -> str:
    return hashlib.sha256(part).hexdigest()
