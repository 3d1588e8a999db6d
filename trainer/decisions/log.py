"""allocation.jsonl: every decision of a run, one object a line."""

import gzip
import json
from pathlib import Path
from typing import Any

from adapters.decision import Decision
from adapters.methods.base import Method
from trainer.files import DECISION_PARTS, DECISIONS, replacing
from trainer.records.jsonl import keep_lines, read_objects

_KEPT_PARTS = 32
"""With 64 MiB a part, 2 GiB of decisions before compression."""


def record(step: int, method: Method, decision: Decision) -> dict[str, Any]:
    """A line of the file: the decision's own keys, flat, between what tells it from others and, in
    the words of its method, what it says."""
    return {
        "step": step,
        "method": method.options.kind,
        "digest": decision.digest(),
        **decision.to_plain(),
        "summary": method.summary(decision),
    }


class AllocationLog:
    """Rank 0's record of decisions; a resumed run goes on in the same file.

    When the file reaches `limit` bytes it is closed and compressed, as
    `allocation-<first step>-<last step>.jsonl.gz`, and only the newest `_KEPT_PARTS` of those stay.
    """

    def __init__(self, folder: Path, method: Method, start: int, limit: int = 64 * 2**20):
        self.folder, self.method, self._limit = folder, method, limit
        self._cut(start)
        self._stream = (folder / DECISIONS).open("a", encoding="utf-8")
        self._size = self._stream.tell()

    def write(self, step: int, decision: Decision) -> None:
        """One decision, made before optimizer step `step`."""
        text = json.dumps(record(step, self.method, decision)) + "\n"
        if self._size and self._size + len(text) > self._limit:
            self._close_part()
        self._stream.write(text)
        self._stream.flush()
        self._size += len(text)

    def close(self) -> None:
        self._stream.close()

    def _close_part(self) -> None:
        """Compress what was written so far, and begin anew."""
        self._stream.close()
        current = self.folder / DECISIONS
        lines = current.read_text(encoding="utf-8").splitlines(keepends=True)
        first, last = (json.loads(lines[index])["step"] for index in (0, -1))
        part = self.folder / f"allocation-{first:08d}-{last:08d}.jsonl.gz"
        with (
            replacing(part) as unfinished,
            gzip.open(unfinished, "wt", encoding="utf-8", compresslevel=6) as stream,
        ):
            stream.writelines(lines)
        current.unlink()
        for old in sorted(self.folder.glob(DECISION_PARTS))[:-_KEPT_PARTS]:
            old.unlink()
        self._stream, self._size = current.open("a", encoding="utf-8"), 0

    def _cut(self, start: int) -> None:
        """Drop decisions from step `start` on: they belong to steps that will be done again."""
        current, last = self.folder / DECISIONS, -1
        for part in sorted(self.folder.glob(DECISION_PARTS), reverse=True):
            first, last = (int(step) for step in part.name.split(".")[0].split("-")[1:])
            if last < start:
                break
            if first < start:  # goes on in the middle of this one
                lines = "".join(json.dumps(line) + "\n" for line in read_objects(part))
                current.write_text(lines, encoding="utf-8")
            part.unlink()
            last = -1
        # Up to `last` a crash may have left here what a part holds.
        keep_lines(current, lambda line: last < line["step"] < start)
