"""What rank 0 decided: plain data, the same for every rank, broadcast and recorded as it is.

A decision is told apart from another by its digest. Two engines that decide alike must have equal
digests, although they sum gradients in another order, and any two decisions that differ must have
different ones. So every figure is one of two kinds, which the method chooses by where it puts it:

- *decisions*: `ranks`, `locations`, `survivors` and everything in `extra`. The digest covers them
  to the last digit, whatever keys a method uses.
- *figures of record*: `scores`, numbers that rest on sums of floats, whose last digits differ
  between engines. The digest covers which ones there are, of which units, and which are 0: a score
  of 0 takes a unit out, its digits do not decide.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVED = frozenset({"step", "method", "digest", "scores", "summary"})
"""Keys that a line of allocation.jsonl has beside those of the decision."""

_TYPED = ("ranks", "locations", "survivors")


@dataclass(frozen=True)
class Decision:
    """Everything is optional. Names are those of units, or what a method calls its groups
    (`Method.decided`)."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Components that train from now on, by name."""
    locations: Mapping[str, str] = field(default_factory=dict)
    """Which of `adapters.banks.LOCATIONS` they lie in, by name."""
    survivors: list[str] | None = None
    """The units that are kept, where the others are removed."""
    scores: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    """Figures of record by name: one number, or one for each unit."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else was decided, by the method's own keys: numbers, strings, lists, dictionaries
    with strings as keys. All of it counts, so floats in it must be the same on every engine."""

    def __post_init__(self) -> None:
        for key in (*self.scores, *self.extra):
            if key in RESERVED or key in _TYPED or (key in self.scores and key in self.extra):
                raise ValueError(f"a decision's key {key!r}; accepted: a name of its own")

    def digest(self) -> str:
        """Digest of what was decided (see the module's docstring); comparable between runs."""
        parts: dict[str, Any] = self._parts() | {
            "scores": {name: _nonzero(score) for name, score in self.scores.items()},
            "extra": self.extra,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_plain(self) -> dict[str, Any]:
        """As one flat dictionary: the keys of `scores` and `extra` beside the others, and under
        `scores` the names of the former."""
        return self._parts() | {"scores": list(self.scores), **self.scores, **self.extra}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Decision":
        """Inverse of `to_plain`; other keys of a record's line are left out. Raises ValueError for
        anything else.

        Lines written before there was a list of scores have none: there, numbers by unit and
        floats are the scores.
        """
        rest = {k: v for k, v in plain.items() if k not in RESERVED and k not in _TYPED}
        names = plain.get("scores")
        if names is None:
            names = [k for k, v in rest.items() if isinstance(v, float) or (v and _by_name(v))]
        if not isinstance(names, list) or not all(isinstance(n, str) and n in rest for n in names):
            raise ValueError(f"scores {names!r}; accepted: a list of keys of the same decision")
        scores = {name: _floats(name, rest.pop(name)) for name in dict.fromkeys(names)}
        return cls(
            ranks=plain.get("ranks", {}), locations=plain.get("locations", {}),
            survivors=plain.get("survivors"), scores=scores, extra=rest,
        )  # fmt: skip

    def summary(self) -> dict[str, str]:
        """In words, by subject: how often each value was decided."""
        told: dict[str, str] = {}
        if self.survivors is not None:
            told["survivors"] = f"{len(self.survivors)} units"
        for name, score in self.scores.items():
            if isinstance(score, Mapping):
                held = sum(value != 0 for value in score.values())
                told[name] = f"{held} of {len(score)} are not zero"
            else:
                told[name] = f"{score:.6g}"
        for key, values in {"ranks": self.ranks, "locations": self.locations, **self.extra}.items():
            if isinstance(values, Mapping):
                if values and all(isinstance(value, int | str) for value in values.values()):
                    counts = Counter(values.values()).items()
                    ordered = sorted(counts, key=lambda item: (isinstance(item[0], str), item[0]))
                    told[key] = ", ".join(f"{value}: {count}" for value, count in ordered)
            elif isinstance(values, int | float | str):
                told[key] = str(values)
        return told

    def _parts(self) -> dict[str, Any]:
        """Ranks, locations and survivors, where there are any."""
        parts: dict[str, Any] = {}
        if self.survivors is not None:
            parts["survivors"] = self.survivors
        if self.ranks:
            parts["ranks"] = self.ranks
        if self.locations:
            parts["locations"] = self.locations
        return parts


def _nonzero(score: float | Mapping[str, float]) -> Any:
    if isinstance(score, Mapping):
        return {name: value != 0 for name, value in score.items()}
    return score != 0


def _floats(name: str, score: Any) -> float | dict[str, float]:
    if _number(score):
        return float(score)
    if _by_name(score):
        return {unit: float(value) for unit, value in score.items()}
    raise ValueError(f"{name} is no number; accepted: one, or one for each unit")


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and type(value) is not bool
    return number and abs(value) <= sys.float_info.max  # False for NaN too


def _by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_number, value.values()))
