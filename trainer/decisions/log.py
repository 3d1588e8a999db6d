"""allocation.jsonl: every decision of a run, one object per line."""

import gzip
import json
from pathlib import Path
from typing import Any

from adapters.decision import Decision
from adapters.methods.base import Method
from trainer.files import DECISION_PARTS, DECISIONS, replacing
from trainer.records.jsonl import keep_lines, read_objects
from trainer.records.recorder import Record

_KEPT_PARTS = 32
"""Rotated parts to keep; of 64 MiB each, 2 GiB before compression."""


def record(step: int, method: Method, decision: Decision) -> dict[str, Any]:
    """A line of the file: step, method and digest, the decision's own keys (flat), and the method's
    summary of it."""
    return {
        "step": step,
        "method": method.options.kind,
        "digest": decision.digest(),
        **decision.to_plain(),
        "summary": method.summary(decision),
    }


class AllocationLog(Record):
    """Rank 0's log of decisions; a resumed run appends to the same file.

    At `limit` bytes the file is rotated: compressed into a part
    `allocation-<first step>-<last step>.jsonl.gz`. The newest `_KEPT_PARTS` parts are kept.
    """

    def __init__(self, folder: Path, method: Method, start: int, limit: int = 64 * 2**20):
        self.folder, self.method, self._limit = folder, method, limit
        self.remark = self._cut(start)
        self._stream = (folder / DECISIONS).open("a", encoding="utf-8")
        self._size = self._stream.tell()

    def on_decision(self, step: int, decision: Decision) -> None:
        """Append a decision, made before optimizer step `step`."""
        text = json.dumps(record(step, self.method, decision)) + "\n"
        if self._size and self._size + len(text) > self._limit:
            self._close_part()
        self._stream.write(text)
        self._stream.flush()
        self._size += len(text)

    def close(self) -> None:
        self._stream.close()

    def _close_part(self) -> None:
        """Rotate: compress the current file into a part and open an empty one."""
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

    def _cut(self, start: int) -> str:
        """Drop decisions from step `start` on: a resumed run repeats these steps. Returns
        `keep_lines`' remark."""
        current, last = self.folder / DECISIONS, -1
        for part in sorted(self.folder.glob(DECISION_PARTS), reverse=True):
            first, last = (int(step) for step in part.name.split(".")[0].split("-")[1:])
            if last < start:
                break
            if first < start:  # `start` lies inside this part
                lines = "".join(json.dumps(line) + "\n" for line in read_objects(part))
                current.write_text(lines, encoding="utf-8")
            part.unlink()
            last = -1
        # A crash during rotation may have left lines here that the newest part holds too.
        return keep_lines(current, lambda line: last < line["step"] < start)
