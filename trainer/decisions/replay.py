"""Replay of another run's recorded decisions, in place of the method's own."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from adapters.decision import Decision
from adapters.methods.base import Method
from adapters.options import Section
from trainer.config.validation import validate
from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.files import DECISIONS
from trainer.records.jsonl import decision_files, open_decisions


class _Recorded(Section):
    """Keys common to the lines of all methods; `Decision.from_plain` validates the rest."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    method: str
    digest: str
    ranks: dict[str, Annotated[int, Field(ge=0)]] = {}
    locations: dict[str, str] = {}
    survivors: list[str] | None = None
    scores: list[str] | None = None


def former_digest(line: Mapping[str, Any]) -> str:
    """Digest of a line by the former rule, over these keys only. Lines of older runs are verified
    by it: replacing the digest in them would hide damage."""
    parts = {k: line[k] for k in ("ranks", "locations", "survivors", "kept") if k in line}
    if isinstance(line.get("omega"), dict):
        parts["omega"] = {name: omega != 0 for name, omega in line["omega"].items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Replay:
    """Rank 0: recorded decisions of another run by step. Raises UserError where they do not fit."""

    def __init__(self, path: Path, method: Method, first: int, steps: int):
        self.path = path / DECISIONS if path.is_dir() else path
        whole_run = self.path.name == DECISIONS
        files = decision_files(self.path.parent) if whole_run else [path]
        self._in_parts = len(files) > 1
        lines: dict[int, dict[str, Any]] = {}
        try:
            for file in files or [self.path]:
                with open_decisions(file) as stream:
                    for line in map(parse_json, stream):
                        lines[validate("", line, _Recorded).step] = line
            self._by_step = {step: Decision.from_plain(line) for step, line in lines.items()}
        except OSError as error:
            reason = error.strerror or error
            raise self._refused(f"{reason}; accepted: a run folder") from error
        except (ValueError, EOFError, zlib.error) as error:
            raise self._refused(f"no record of decisions ({error})") from error
        self._check(method, lines)
        self._check_length(method, first, steps)

    def _check(self, method: Method, lines: Mapping[int, Mapping[str, Any]]) -> None:
        kind = method.options.kind
        for step, line in lines.items():
            decision = self._by_step[step]
            if line["method"] != kind:
                raise self._refused(f"was made by {line['method']}; accepted: {kind}")
            digest = decision.digest() if "scores" in line else former_digest(line)
            if line["digest"] != digest:
                raise self._refused(f"step {step}: damaged, its digest differs")
            try:
                method.check_decision(decision)
            except ValueError as error:
                raise self._refused(f"step {step}: {error}") from error
            strange = decision.ranks.keys() - set(method.decided)
            if strange:
                raise self._refused(f"names {min(strange)}, which is no unit of this run")
        selections = sum(decision.survivors is not None for decision in self._by_step.values())
        if selections > method.rounds:
            raise self._refused(
                f"holds {selections} selections; accepted: {method.rounds}, by method.rounds"
            )

    def _check_length(self, method: Method, first: int, steps: int) -> None:
        """Refuse a record that ends before the last due step; after a selection none is needed."""
        due = [step for step in range(first, steps) if method.due(step)]
        oldest = min(self._by_step, default=0)
        if self._in_parts and due and oldest > due[0]:
            raise self._refused(
                f"decisions before step {oldest} were not kept; accepted: a run with a larger "
                "log.decisions_mib"
            )
        if due and all(decision.survivors is None for decision in self._by_step.values()):
            self.decide(due[-1])

    def decide(self, step: int) -> Decision | None:
        """The decision recorded before `step`, or None."""
        if step > max(self._by_step, default=-1):
            raise self._refused(f"holds no decision for step {step}; accepted: a longer run")
        return self._by_step.get(step)

    def _refused(self, reason: str) -> UserError:
        return UserError(f"method.replay: {self.path}: {reason}")
