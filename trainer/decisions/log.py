"""allocation.jsonl: every decision of a run, one object a line; and decisions read back."""

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from adapters.methods.base import Decision, Method
from adapters.options import Section
from trainer.config.validation import parse_json, validate
from trainer.errors import UserError
from trainer.files import DECISION_PARTS, DECISIONS, replacing
from trainer.records.jsonl import decision_files, keep_lines, open_decisions, read_objects

_KEPT_PARTS = 32
"""With 64 MiB a part, 2 GiB of decisions before compression."""

_INTEGERS = ("ranks", "locations", "survivors")


def decision_digest(decision: Decision) -> str:
    """Digest of what was decided in whole numbers and names; comparable between runs."""
    parts = {key: decision[key] for key in _INTEGERS if key in decision}
    if "omega" in decision:  # which of them are zero is a decision, their digits are not
        parts["omega"] = {name: omega != 0 for name, omega in decision["omega"].items()}
    if "kept" in decision:
        parts["kept"] = decision["kept"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class AllocationLog:
    """Rank 0's record of decisions; a resumed run goes on in the same file.

    When the file reaches `limit` bytes it is closed and compressed, as
    `allocation-<first step>-<last step>.jsonl.gz`, and only the newest `_KEPT_PARTS` of those stay.
    """

    def __init__(self, folder: Path, kind: str, start: int, limit: int = 64 * 2**20):
        self.folder, self.kind, self._limit = folder, kind, limit
        self._cut(start)
        self._stream = (folder / DECISIONS).open("a", encoding="utf-8")
        self._size = self._stream.tell()

    def write(self, step: int, decision: Decision) -> None:
        """One decision, made before optimizer step `step`."""
        line = {"step": step, "method": self.kind, "digest": decision_digest(decision), **decision}
        text = json.dumps(line) + "\n"
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


class _Recorded(Section):
    """A line of the file: what all methods mean by these keys."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    method: str
    digest: str
    ranks: dict[str, Annotated[int, Field(ge=0)]] = {}
    locations: dict[str, str] = {}
    survivors: list[str] = []
    omega: dict[str, float] = {}
    kept: dict[str, list[Annotated[int, Field(ge=0)]]] = {}
    budget: float = 0.0
    final: bool = False


class Replay:
    """Decisions that another run recorded, by step (rank 0)."""

    def __init__(self, path: Path, method: Method, first: int, steps: int):
        self.path = path / DECISIONS if path.is_dir() else path
        whole_run = self.path.name == DECISIONS
        files = decision_files(self.path.parent) if whole_run else [path]
        self._in_parts = len(files) > 1
        try:
            decisions = []
            for file in files or [self.path]:
                with open_decisions(file) as stream:
                    decisions += [parse_json(line) for line in stream]
            for decision in decisions:
                validate("", decision, _Recorded)
            self._by_step: dict[int, Decision] = {d["step"]: d for d in decisions}
        except OSError as error:
            reason = error.strerror or error
            raise self._refused(f"{reason}; accepted: a run folder") from error
        except (ValueError, EOFError, zlib.error) as error:
            raise self._refused(f"no record of decisions ({error})") from error
        self._check(method)
        self._check_length(method, first, steps)

    def _check(self, method: Method) -> None:
        kind, units = method.options.kind, {unit.name for unit in method.units}
        for decision in self._by_step.values():
            if decision.get("method") != kind:
                raise self._refused(f"was made by {decision.get('method')}; accepted: {kind}")
            if decision.get("digest") != decision_digest(decision):
                raise self._refused(f"step {decision['step']}: damaged, its digest differs")
            try:
                method.check_decision(decision)
            except ValueError as error:
                raise self._refused(f"step {decision['step']}: {error}") from error
        named = {name for d in self._by_step.values() for name in d.get("ranks", {})}
        strange = {name for name in named if not (name in units or name.isdigit() or name == "all")}
        if strange:
            raise self._refused(f"names {min(strange)}, which is no unit of this run")

    def _check_length(self, method: Method, first: int, steps: int) -> None:
        """There must be decisions up to the last step that wants one (none after a selection)."""
        due = [step for step in range(first, steps) if method.due(step)]
        oldest = min(self._by_step, default=0)
        if self._in_parts and due and oldest > due[0]:
            raise self._refused(
                f"decisions before step {oldest} were not kept; accepted: a run with a larger "
                "log.decisions_mib"
            )
        if due and not any("survivors" in decision for decision in self._by_step.values()):
            self.decide(due[-1])

    def decide(self, step: int) -> Decision | None:
        """What was decided before `step`; None: nothing."""
        if step > max(self._by_step, default=-1):
            raise self._refused(f"holds no decision for step {step}; accepted: a longer run")
        recorded = self._by_step.get(step)
        if recorded is None:
            return None
        return {k: v for k, v in recorded.items() if k not in ("step", "method", "digest")}

    def _refused(self, reason: str) -> UserError:
        return UserError(f"method.replay: {self.path}: {reason}")
