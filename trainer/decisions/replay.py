"""Decisions that another run recorded, applied in place of deciding anew."""

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
    """What is the same in a line of every method; `Decision.from_plain` looks at the rest."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    method: str
    digest: str
    ranks: dict[str, Annotated[int, Field(ge=0)]] = {}
    locations: dict[str, str] = {}
    survivors: list[str] | None = None
    scores: list[str] | None = None


def former_digest(line: Mapping[str, Any]) -> str:
    """The digest of a line that was written before decisions were digested whole: of these keys
    alone. Such lines are verified by the rule that they were written by, since a digest computed
    anew would find no damage in them."""
    parts = {k: line[k] for k in ("ranks", "locations", "survivors", "kept") if k in line}
    if isinstance(line.get("omega"), dict):
        parts["omega"] = {name: omega != 0 for name, omega in line["omega"].items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Replay:
    """Decisions that another run recorded, by step (rank 0)."""

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

    def _check_length(self, method: Method, first: int, steps: int) -> None:
        """There must be decisions up to the last step that wants one (none after a selection)."""
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
        """What was decided before `step`; None: nothing."""
        if step > max(self._by_step, default=-1):
            raise self._refused(f"holds no decision for step {step}; accepted: a longer run")
        return self._by_step.get(step)

    def _refused(self, reason: str) -> UserError:
        return UserError(f"method.replay: {self.path}: {reason}")
