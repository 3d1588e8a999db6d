"""A decision of rank 0: plain data, broadcast to all ranks and recorded unchanged.

Decisions are compared by digest. Equal decisions of two engines must have equal digests, although
the engines sum gradients in different orders, and different decisions must have different digests.
So a method puts each value into one of two kinds of fields:

- *decisions*: `ranks`, `locations`, `survivors` and everything in `extra`, with any keys. The
  digest covers them to the last digit.
- *scores*: numbers computed from sums of floats, whose last digits differ between engines. The
  digest covers their names and units, and which of them are 0: a score of 0 removes a unit, the
  digits decide nothing.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVED = frozenset({"step", "method", "digest", "scores", "summary"})
"""Keys of a line of allocation.jsonl that are not the decision's."""

_TYPED = ("ranks", "locations", "survivors")


@dataclass(frozen=True)
class Decision:
    """All fields are optional. Names are those of units, or of a method's groups
    (`Method.decided`: block numbers, or `all`)."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Number of components that train from now on, by name."""
    locations: Mapping[str, str] = field(default_factory=dict)
    """Their location, one of `adapters.banks.LOCATIONS`, by name."""
    survivors: list[str] | None = None
    """The units that keep their adapter; the others lose theirs. None: no removal."""
    scores: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    """Scores by name: one number, or one per unit."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other decisions under keys of the method's choice: numbers, strings, lists, dictionaries
    with strings as keys. The digest covers all of it: floats must be equal on every engine."""

    def __post_init__(self) -> None:
        for key in (*self.scores, *self.extra):
            if key in RESERVED or key in _TYPED or (key in self.scores and key in self.extra):
                raise ValueError(f"a decision's key {key!r}; accepted: keys that are not in use")

    def digest(self) -> str:
        """Digest of the decision (see the module's docstring), comparable between runs."""
        parts: dict[str, Any] = self._parts() | {
            "scores": {name: _nonzero(score) for name, score in self.scores.items()},
            "extra": self.extra,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_plain(self) -> dict[str, Any]:
        """One flat dictionary: scores and extra under their own keys, the scores' names under
        `scores`."""
        return self._parts() | {"scores": list(self.scores), **self.scores, **self.extra}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Decision":
        """Inverse of `to_plain`; ignores the other keys of a recorded line. Raises ValueError for
        anything else.

        Lines of older versions have no list of scores: numbers by unit and floats are the scores.
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
        """In words, by subject: the number of times each value was decided."""
        texts: dict[str, str] = {}
        if self.survivors is not None:
            texts["survivors"] = f"{len(self.survivors)} units"
        for name, score in self.scores.items():
            if isinstance(score, Mapping):
                held = sum(value != 0 for value in score.values())
                texts[name] = f"{held} of {len(score)} are not zero"
            else:
                texts[name] = f"{score:.6g}"
        for key, values in {"ranks": self.ranks, "locations": self.locations, **self.extra}.items():
            if isinstance(values, Mapping):
                if values and all(isinstance(value, int | str) for value in values.values()):
                    counts = Counter(values.values()).items()
                    ordered = sorted(counts, key=lambda item: (isinstance(item[0], str), item[0]))
                    texts[key] = ", ".join(f"{value}: {count}" for value, count in ordered)
            elif isinstance(values, int | float | str) and type(values) is not bool:
                texts[key] = str(values)
        return texts

    def _parts(self) -> dict[str, Any]:
        """Ranks, locations and survivors, where present."""
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
    raise ValueError(f"{name} is not a number; accepted: one number, or one per unit")


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and type(value) is not bool
    return number and abs(value) <= sys.float_info.max  # False for NaN too


def _by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_number, value.values()))
