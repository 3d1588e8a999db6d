"""Keys under `method:` of the methods that select units: rlora, weightlora, weightlora_plus.

Does not import torch."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from adapters.methods.options import MethodOptions
from adapters.options import Section
from adapters.unit import Unit


class AfterSelection(Section):
    """Changes after the removal of adapters."""

    micro_batch_size: int | None = Field(None, gt=0)
    """`data.micro_batch_size` after the removal of adapters has freed memory; none: unchanged."""


class SelectionOptions(MethodOptions):
    """Keys of the methods that remove units."""

    keep: int | None = Field(None, gt=0)
    """Number of units that survive, K; none: half of all units, rounded down."""
    keep_parameters: float | None = Field(None, gt=0, le=1)
    """Instead of K: largest share of all units' parameters that the survivors may have at equal
    rank. In the order of their scores, each unit that still fits survives."""
    within: Literal["model", "layer"] = "model"
    """Compare the scores of all units (paper), or only of those of the same transformer block, each
    of which keeps at most this share of its own. With `keep_parameters`."""
    expand: Literal["reinit", "qr", "kept", "authors"] = "kept"
    """Survivors' A and B: redrawn (`reinit`, paper); learned components kept, with further rows of
    A orthogonal to them and zero columns of B (`qr`), and with the optimizer's moments and step
    counts too (`kept`); or Q, R of the learned A, B multiplied by R, and further rows orthogonal to
    Q from uniform noise (`authors`). All but the first keep the function: ω is folded into B, and
    no longer multiplies."""
    after_selection: AfterSelection = Field(default_factory=AfterSelection)
    """Changes after the removal of adapters."""

    def kept(self, units: int) -> int:
        """K, given the number of units."""
        return self.keep if self.keep is not None else max(1, units // 2)

    def groups(self, order: Sequence[int], units: Sequence[Unit]) -> list[list[int]]:
        """The units in `order`, in the parts within which they are compared."""
        found: dict[int | None, list[int]] = {}
        for unit in order:
            layer = units[unit].layer if self.within == "layer" else None
            found.setdefault(layer, []).append(unit)
        return list(found.values())

    def survivors(self, order: Sequence[int], units: Sequence[Unit]) -> list[int]:
        """The units that survive, ascending, of those in `order`, best first."""
        sizes = [unit.size for unit in units]
        groups = self.groups(order, units)
        return sorted(unit for group in groups for unit in self.first_that_fit(group, sizes))

    def first_that_fit(self, order: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """The units of one group that survive, ascending; `sizes`: parameters per component by
        unit."""
        if self.keep_parameters is None:
            return sorted(order[: self.kept(len(order))])
        left = self._room([sizes[unit] for unit in order])
        survivors = []
        for unit in order:
            if sizes[unit] <= left:
                left -= sizes[unit]
                survivors.append(unit)
        return sorted(survivors)

    def _room(self, sizes: Sequence[int]) -> int:
        """Parameters per component that the survivors may have."""
        assert self.keep_parameters is not None
        return math.floor(self.keep_parameters * sum(sizes) + 1e-6)

    def growth(self, units: int) -> int:
        """Factor of a survivor's rank in a selection among so many units."""
        return 1

    def final_rank(self, units: int) -> int:
        """Largest rank of a survivor, given the number of units."""
        return self.rank

    @model_validator(mode="after")
    def _check_keep(self) -> "SelectionOptions":
        if self.keep is not None and self.keep_parameters is not None:
            raise ValueError(
                f"method.keep_parameters: {self.keep_parameters} given together with method.keep; "
                "accepted: one of them"
            )
        if self.within == "layer" and self.keep_parameters is None:
            raise ValueError(
                "method.within: layer given without method.keep_parameters; accepted: with it"
            )
        return self

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        if self.kept(len(units)) > len(units):
            raise ValueError(
                f"method.keep: {self.keep} given; accepted: at most {len(units)}, the number of "
                "units"
            )
        if self.keep_parameters is not None:
            self._check_share(units)
        rank = self.final_rank(len(units))
        for unit in units:
            if rank > min(unit.out_features, unit.in_features):
                given = f"{self.kept(len(units))} of {len(units)} units"
                if self.keep_parameters is not None:
                    given = f"method.keep_parameters={self.keep_parameters}"
                raise ValueError(
                    f"method.keep: {given} would give each "
                    f"survivor rank {rank}, more than the smaller side of {unit.name} "
                    f"({unit.out_features} x {unit.in_features}); accepted: a larger method.keep "
                    "or a smaller method.rank"
                )

    def _check_share(self, units: Sequence[Unit]) -> None:
        for group in self._sizes(units):
            if self._room(group) < min(group):
                raise ValueError(
                    f"method.keep_parameters: {self.keep_parameters} given, less than any unit "
                    f"has; accepted: at least {min(group) / sum(group):.3g}"
                )

    def _sizes(self, units: Sequence[Unit]) -> list[list[int]]:
        """Sizes of the units, in the parts within which they are compared."""
        groups = self.groups(range(len(units)), units)
        return [[units[index].size for index in group] for group in groups]


class RLoRAOptions(SelectionOptions):
    """Options of `method.kind: rlora`."""

    kind: Literal["rlora"] = "rlora"
    """Name of the method."""
    match: str | None = None
    """Run folder of weightlora or weightlora_plus, or a pattern for one, in which {seed} stands for
    `run.seed`: before the same step, as many random units of each type (matrix type and size)
    survive, with the same ranks. `keep` and `keep_parameters` then have no effect."""

    @property
    def selection_of(self) -> str | None:
        return self.match

    @model_validator(mode="after")
    def _check_match(self) -> "RLoRAOptions":
        if self.match is not None and self.within == "layer":
            raise ValueError(
                "method.within: layer given together with method.match, whose units are drawn from "
                "all of a type; accepted: model"
            )
        return self


class OmegaOptions(SelectionOptions):
    """Keys of the methods that learn ω."""

    warmup_steps: int | None = Field(None, gt=0)
    """Steps of phase 1, T; none: 0.5 % of all steps, rounded up. Only steps with a learning rate
    above 0 count, and phase 1 lasts at least until the first step of ω."""
    threshold: Literal["every", "last"] = "every"
    """Apply H_K after every step of ω (paper), or only once, after T steps (the authors' code for
    WeightLoRA+)."""
    rounds: int = Field(1, gt=0)
    """Selections in a row, each after T steps of its own (the authors' code for WeightLoRA+: 2)."""
    omega_learning_rate: float = Field(5.0, gt=0)
    """Learning rate η of ω."""
    omega_schedule: Literal["constant", "main"] = "constant"
    """Keep η constant, or apply the main learning-rate schedule (the authors' code)."""
    score: Literal["magnitude", "signed", "per_parameter"] = "magnitude"
    """H_K keeps the largest |ω| (paper, appendix B), the largest ω (the authors' code), or the
    largest (ω − 1) / √(in + out): change of ω over the root of the parameters per component."""

    def warmup(self, steps: int) -> int:
        """T, given the number of steps."""
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(0.005 * steps)

    def check_steps(self, steps: int) -> None:
        if self.warmup(steps) * self.rounds >= steps:
            of_rounds = f" with method.rounds={self.rounds}" if self.rounds > 1 else ""
            raise ValueError(
                f"method.warmup_steps: {self.warmup(steps)} given{of_rounds}; accepted: fewer than "
                f"the run's {steps} steps"
            )

    def _check_share(self, units: Sequence[Unit]) -> None:
        super()._check_share(units)
        for group in self._sizes(units):
            left = sum(group)
            for _ in range(self.rounds):
                left = self._room([left])
            if left < min(group):
                raise ValueError(
                    f"method.rounds: {self.rounds} given with method.keep_parameters="
                    f"{self.keep_parameters}, after which no unit would be left; accepted: fewer, "
                    "or a larger method.keep_parameters"
                )

    @model_validator(mode="after")
    def _check_rounds(self) -> "OmegaOptions":
        if self.rounds > 1 and self.keep is not None:
            raise ValueError(
                f"method.rounds: {self.rounds} given with method.keep; accepted: 1, or "
                "method.keep_parameters instead, which counts in every round"
            )
        return self


class WeightLoRAOptions(OmegaOptions):
    """Options of `method.kind: weightlora`."""

    kind: Literal["weightlora"] = "weightlora"
    """Name of the method."""


class WeightLoRAPlusOptions(OmegaOptions):
    """Options of `method.kind: weightlora_plus`."""

    kind: Literal["weightlora_plus"] = "weightlora_plus"
    """Name of the method."""
    rescale_alpha: bool = False
    """Scale survivors by α over their new rank instead of α/r."""

    def growth(self, units: int) -> int:
        if self.keep_parameters is not None:
            return math.floor(1 / self.keep_parameters)
        return units // self.kept(units)

    def final_rank(self, units: int) -> int:
        rank = self.rank
        for _ in range(self.rounds):
            rank *= self.growth(units)
            units = self.kept(units)
        return rank
