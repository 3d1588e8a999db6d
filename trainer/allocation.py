"""allocation.jsonl: every decision of a run, one object a line; and decisions read back."""

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from adapters.method import Decision, Method
from adapters.options import Section
from trainer.errors import UserError
from trainer.metrics import cut_after
from trainer.strict import parse_json, validate

FILE = "allocation.jsonl"

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
    """Rank 0's record of decisions; a resumed run goes on in the same file."""

    def __init__(self, folder: Path, kind: str, start: int):
        self.kind = kind
        cut_after(folder / FILE, start - 1)  # decisions for steps that are done
        self._stream = (folder / FILE).open("a", encoding="utf-8")

    def write(self, step: int, decision: Decision) -> None:
        """One decision, made before optimizer step `step`."""
        line = {"step": step, "method": self.kind, "digest": decision_digest(decision), **decision}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


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
        self.path = path / FILE if path.is_dir() else path
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            decisions = [parse_json(line) for line in lines]
            for decision in decisions:
                validate("", decision, _Recorded)
            self._by_step: dict[int, Decision] = {d["step"]: d for d in decisions}
        except OSError as error:
            raise self._refused(f"{error.strerror}; accepted: a run folder") from error
        except ValueError as error:
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
        if any("survivors" in decision for decision in self._by_step.values()):
            return
        due = [step for step in range(first, steps) if method.due(step)]
        if due:
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
