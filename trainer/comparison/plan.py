"""A comparison's file.

base: configs/gsm8k_lora.yaml          # a run's configuration
places: {data: ../shared/data}         # `{data}` in an override stands for this path,
                                           # `{runs}` for the folder of the comparison's runs
overrides: ["data.train={data}/gsm8k/train.jsonl", run.steps=200]      # for every run
score: eval_loss                       # what is compared
learning_rates: [1e-3, 2e-3, 4e-3]     # where every arm's search begins
selection: [data.eval=left_out]        # further overrides of the search's runs
selection_seeds: [100, 101]
seeds: [0, 1, 2, 3, 4]
methods:
  lora: []                             # overrides of this arm
  lelora: [method.kind=lelora]
  uniform: {like: lelora, overrides: [method.policy.mode=uniform], rate_of: lelora,
            against: lelora}
  replayed: {like: lelora, replays: lelora}      # its last allocation, seed by seed, from step 0
variants:                              # chosen at the command line
  nf4: [model.quantization=nf4]
  few: {overrides: [data.train_records=800], learning_rates: [2.5e-4, 5e-4, 1e-3]}
extends: common.yaml                   # a file whose keys these complete; null removes one, and
                                           # "*": null all
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from adapters.options import Section
from trainer.comparison.statistics import MEASURES
from trainer.config.validation import shown, validate
from trainer.config.yaml import parse_yaml
from trainer.errors import UserError

LORA = "lora"
"""The arm whose other ranks are the curve to beat."""


class Arm(Section):
    """A method, or a variant of one."""

    overrides: list[str] = []
    """Of the configuration."""
    like: str | None = None
    """Another arm whose overrides come before these."""
    rate_of: str | None = None
    """Another arm whose selected learning rate it takes, in place of a search of its own."""
    against: str | None = None
    """The arm that it is compared with; none: the LoRA of equal or more parameters."""
    after: str | None = None
    """An arm whose seeds end before those of this one begin, which reads their folders."""
    replays: str | None = None
    """An arm whose last allocation, seed by seed, it trains from its first step, at its learning
    rate. It is compared with this arm unless `against` names another."""
    permuted: bool | Literal["any"] = False
    """Permute that allocation, with the run's seed: among matrices of equal shape, or (any) among
    all, with as many parameters within 1 %."""
    learning_rates: list[float] | None = None
    """Where its search begins, in place of the comparison's."""

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: object) -> object:
        """What replays another arm takes its rate, runs after it, and is compared with it."""
        if not isinstance(given, Mapping) or (other := given.get("replays")) is None:
            return given
        return {"rate_of": other, "after": other, "against": other, **given}

    @model_validator(mode="after")
    def _check(self) -> "Arm":
        if self.replays is None and self.permuted:
            raise ValueError(f"permuted: {shown(self.permuted)} given; accepted: with replays")
        if self.replays is not None and not self.rate_of == self.after == self.replays:
            raise ValueError(
                f"replays: {self.replays} given with another rate_of or after; accepted: without"
            )
        return self


class Variant(Section):
    """A change of all runs."""

    overrides: list[str] = []
    learning_rates: list[float] | None = None
    """Where every arm's search begins, in place of what the file says; none: no change."""


class Comparison(Section):
    """Keys of a comparison's file (see the module's docstring)."""

    base: str
    places: dict[str, str] = {}
    overrides: list[str] = []
    variants: dict[str, Variant] = {}
    score: str = "eval_loss"
    learning_rates: list[float] = Field(min_length=1)
    """A single one is not searched for."""
    learning_rate_bounds: list[float] = Field([1e-5, 0.26], min_length=2, max_length=2)
    """The search leaves them to no side; a best rate beside one is marked as an edge."""
    selection: list[str] = []
    selection_seeds: list[int] = Field([100, 101], min_length=1)
    seeds: list[int] = Field(min_length=1)
    methods: dict[str, Arm] = Field(min_length=1)
    lora_ranks: list[int] = [1, 2, 4, 8, 16]
    """Ranks of the curve; of an arm named `lora`."""
    match_parameters: bool = True
    """Add the LoRA of the least rank with as many parameters as each method."""

    @field_validator("methods", "variants", mode="before")
    @classmethod
    def _lists(cls, given: object) -> object:
        """A list stands for the overrides of an arm or a variant."""
        if not isinstance(given, Mapping):
            return given
        return {n: {"overrides": a} if isinstance(a, list) else a for n, a in given.items()}

    @model_validator(mode="after")
    def _check(self) -> "Comparison":
        if self.score not in MEASURES:
            accepted = ", ".join(MEASURES)
            raise ValueError(f"score: {self.score} given; accepted: {accepted}")
        for name, arm in self.methods.items():
            for key in ("like", "rate_of", "against", "after"):
                other = getattr(arm, key)
                if other is not None and (other == name or other not in self.methods):
                    raise ValueError(
                        f"methods.{name}.{key}: {other} given; accepted: another of methods"
                    )
            self._refuse_circle(name, "like")
            self._refuse_circle(name, "rate_of")
        for key, rates in (
            ("learning_rates", self.learning_rates),
            *((f"methods.{n}.learning_rates", a.learning_rates) for n, a in self.methods.items()),
            *((f"variants.{n}.learning_rates", v.learning_rates) for n, v in self.variants.items()),
        ):
            for rate in rates or []:
                if not rate > 0:
                    raise ValueError(f"{key}: {rate} given; accepted: more than 0")
            _refuse_other_factors(key, rates or [])
        low, high = self.learning_rate_bounds
        if not 0 < low < high:
            raise ValueError(
                f"learning_rate_bounds: [{low}, {high}] given; accepted: 0 < low < high"
            )
        return self

    def _refuse_circle(self, name: str, key: str) -> None:
        seen = [name]
        while (other := getattr(self.methods[seen[-1]], key)) is not None:
            if other in seen:
                raise ValueError(f"methods.{name}.{key}: {other} given, which leads back to {name}")
            seen.append(other)

    def overrides_of(self, name: str) -> list[str]:
        """An arm's overrides, those of the arms that it is like first."""
        arm = self.methods[name]
        return [*(self.overrides_of(arm.like) if arm.like is not None else []), *arm.overrides]

    def located(self, overrides: Sequence[str]) -> list[str]:
        """Overrides with the paths that `places` names."""
        found = list(overrides)
        for place, path in self.places.items():
            found = [one.replace(f"{{{place}}}", path) for one in found]
        return found


def _refuse_other_factors(key: str, rates: Sequence[float]) -> None:
    for lower, higher in zip(sorted(rates), sorted(rates)[1:], strict=False):
        if higher != lower * 2:  # exactly: the search finds its rates again by this factor
            raise ValueError(f"{key}: {list(rates)} given; accepted: each twice the one before")


def read_comparison(
    path: Path,
    *,
    variants: Sequence[str] = (),
    places: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] | None = None,
) -> Comparison:
    """Read and validate a comparison's file. `variants`: those of it that apply; `places`, further
    `overrides`: as given at the command line; `methods`: the arms to keep, with those that they
    refer to. Raises UserError."""
    comparison = validate("", _read(path, []), Comparison)
    added = list(overrides)
    for name in reversed(variants):
        if name not in comparison.variants:
            accepted = ", ".join(comparison.variants) or "none"
            raise UserError(f"--variant: {name} given; accepted in {path}: {accepted}")
        added = [*comparison.variants[name].overrides, *added]
    for name in variants:
        comparison = _begun_at(comparison, comparison.variants[name].learning_rates)
    for name in places or {}:
        if name not in comparison.places:
            accepted = ", ".join(comparison.places) or "none"
            raise UserError(f"--place: {name} given; accepted in {path}: {accepted}")
    return comparison.model_copy(
        update={
            "overrides": [*comparison.overrides, *added],
            "places": {**comparison.places, **(places or {})},
            "methods": _kept(comparison, methods),
        }
    )


def _begun_at(comparison: Comparison, rates: list[float] | None) -> Comparison:
    """The comparison whose searches all begin at the rates, unless these are none."""
    if rates is None:
        return comparison
    arms = {
        name: arm.model_copy(update={"learning_rates": None})
        for name, arm in comparison.methods.items()
    }
    return comparison.model_copy(update={"learning_rates": rates, "methods": arms})


def _kept(comparison: Comparison, names: Sequence[str] | None) -> dict[str, Arm]:
    arms = comparison.methods
    todo, kept = list(arms if names is None else names), set()
    while todo:
        name = todo.pop()
        if name not in arms:
            raise UserError(f"--methods: {name} given; accepted: {', '.join(arms)}")
        if name not in kept:
            kept.add(name)
            arm = arms[name]
            others = (arm.rate_of, arm.against, arm.after)
            todo += [other for other in others if other is not None]
    return {  # what they are like need not run
        name: arm.model_copy(update={"overrides": comparison.overrides_of(name), "like": None})
        for name, arm in arms.items()
        if name in kept
    }


def _read(path: Path, below: Sequence[Path]) -> dict[str, Any]:
    """The keys of a file, and of those that it extends: lists of overrides are joined, mappings
    merged, without what is null ("*": all that it extends), and other keys replaced."""
    if path in below:
        raise UserError(f"{below[-1]}: extends {path}, which extends it; accepted: no circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; accepted: a comparison's YAML file") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: no mapping; accepted: the keys of a comparison")
    own = dict(raw)
    extended = own.pop("extends", None)
    if extended is None:
        return own
    if not isinstance(extended, str):
        raise UserError(f"{path}: extends: {extended} given; accepted: the name of a file")
    found = _read(path.parent / extended, [*below, path])
    for key, value in own.items():
        if key == "overrides" and isinstance(value, list):
            found[key] = [*found.get(key, []), *value]
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            both = {**({} if "*" in value else found[key]), **value}
            found[key] = {name: inner for name, inner in both.items() if inner is not None}
        else:
            found[key] = value
    return found
