"""The keys of the methods under `method:`, one class a method. Free of torch, so that a mistake in
a configuration is told at once; `registry.py` says which class is whose."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from adapters.options import Section
from adapters.unit import Unit


class MethodOptions(Section):
    """The keys that every method takes."""

    kind: str
    """Name of the method."""
    targets: str | list[str] = "all-linear"
    """Which linear layers host adapters: `all-linear`, a regular expression, or suffixes."""
    rank: int = Field(8, gt=0)
    """Components per unit, r."""
    alpha: float = Field(16.0, gt=0)
    """Scale α; the update is multiplied by α/r (no effect on pissa, milora and lelora, whose gates
    follow from the backbone)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of z = x Aᵀ (or of x) in training."""
    dropout_on: Literal["hidden", "input"] = "hidden"
    """Drop on the R-dimensional z (WeightLoRA, appendix) or on x (PEFT)."""
    include_head: bool = False
    """Let `all-linear` (and suffixes) reach the output head too."""
    train_router: bool = False
    """Train the routers of a mixture of experts whole, beside the adapters."""
    replay: str | None = None
    """A run folder (or its allocation.jsonl) whose recorded decisions are applied instead of
    deciding anew."""

    @property
    def components(self) -> int:
        """R: components that a unit holds at the start."""
        return self.rank

    @property
    def validation_samples(self) -> int:
        """Training records that the method takes out of the data to judge its decisions by."""
        return 0

    def check_units(self, units: Sequence[Unit]) -> None:
        """Raises ValueError, naming key and unit, where the options do not fit the units."""
        check_fits("method.rank", self.rank, units)

    def check_steps(self, steps: int) -> None:
        """Raises ValueError, naming the key, where the options do not fit a run of `steps`."""


def check_fits(key: str, rank: int, units: Sequence[Unit]) -> None:
    """Raises ValueError, naming `key` and the unit, where a matrix has no room for `rank`."""
    for unit in units:
        largest = min(unit.out_features, unit.in_features)
        if rank > largest:
            raise ValueError(
                f"{key}: {rank} given; accepted: at most {largest}, the smaller side of "
                f"{unit.name} ({unit.out_features} x {unit.in_features})"
            )


class LoRAOptions(MethodOptions):
    """Options of `method.kind: lora`."""

    kind: Literal["lora"] = "lora"
    """Name of the method."""
    rank_stabilized: bool = False
    """Scale by α/√r instead of α/r (rsLoRA)."""
    b_learning_rate_ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A (LoRA+; its paper recommends 16)."""


class PiSSAOptions(MethodOptions):
    """Options of `method.kind: pissa`."""

    kind: Literal["pissa"] = "pissa"
    """Name of the method."""


class MiLoRAOptions(MethodOptions):
    """Options of `method.kind: milora`."""

    kind: Literal["milora"] = "milora"
    """Name of the method."""


class DyLoRAOptions(MethodOptions):
    """Options of `method.kind: dylora`."""

    kind: Literal["dylora"] = "dylora"
    """Name of the method."""
    only_bth: bool = False
    """Train only component b in a step (the paper's frozen variant)."""
    export_rank: int | None = Field(None, gt=0)
    """Components used in evaluation and export; none: all r."""

    @model_validator(mode="after")
    def _check(self) -> "DyLoRAOptions":
        if self.export_rank is not None and self.export_rank > self.rank:
            raise ValueError(
                f"method.export_rank: {self.export_rank} given; accepted: at most method.rank "
                f"({self.rank})"
            )
        return self


class AdaLoRAOptions(MethodOptions):
    """Options of `method.kind: adalora`; `rank` is the mean rank at the end."""

    kind: Literal["adalora"] = "adalora"
    """Name of the method."""
    initial_rank: int | None = Field(None, gt=0)
    """Components per unit at the start; none: 1.5 · rank."""
    tinit: int | None = Field(None, ge=0)
    """Steps before the first pruning; none: a tenth of the run."""
    tfinal: int | None = Field(None, ge=0)
    """Steps at the end with a fixed choice; none: three tenths of the run."""
    delta_t: int = Field(10, gt=0)
    """Steps between two prunings."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Decay of the sensitivity's average."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Decay of the uncertainty's average."""
    orthogonality: float = Field(0.1, ge=0)
    """Weight of the orthogonality penalty."""
    penalty: Literal["norm", "squared"] = "norm"
    """The mean over matrices of ‖A Aᵀ − I‖ (the authors' code, PEFT), or the sum of its squares
    (paper, eq. 4)."""

    @property
    def components(self) -> int:
        return self.initial_rank if self.initial_rank is not None else round(1.5 * self.rank)

    @model_validator(mode="after")
    def _check(self) -> "AdaLoRAOptions":
        if self.components < self.rank:
            raise ValueError(
                f"method.initial_rank: {self.initial_rank} given; accepted: at least method.rank "
                f"({self.rank})"
            )
        return self

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        key = "method.initial_rank" + (" (1.5 · method.rank)" if self.initial_rank is None else "")
        check_fits(key, self.components, units)

    def schedule(self, steps: int) -> tuple[int, int]:
        """(tinit, steps − tfinal): between them the budget falls."""
        first = self.tinit if self.tinit is not None else steps // 10
        final = self.tfinal if self.tfinal is not None else 3 * steps // 10
        return first, steps - final

    def check_steps(self, steps: int) -> None:
        first, last = self.schedule(steps)
        if first >= last:
            raise ValueError(
                f"method.tinit: {first} given with method.tfinal: {steps - last}; accepted: "
                f"together fewer than the run's {steps} steps"
            )


class LaLoRAOptions(MethodOptions):
    """Options of `method.kind: lalora`; `rank` is the largest that a layer can reach, r."""

    kind: Literal["lalora"] = "lalora"
    """Name of the method."""
    gamma: float = Field(1.0, ge=0)
    """Speed γ at which the budget follows the norms' growth."""
    every: int = Field(1, gt=0)
    """Steps between two decisions."""
    fidelity: Literal[
        "truncated_over_full", "previous_over_current", "truncated_over_initial", "none"
    ] = "truncated_over_full"
    """f in eq. 9: the text's ratio, the printed eq. 10, §5.2's wording, or 1 (Table 11)."""
    growth: Literal["same_rank", "printed"] = "same_rank"
    """Whether s^prev is taken at the rank that s has, or as printed."""
    budget: Literal["gradual", "full"] = "gradual"
    """`full`: D = r L from the start (Table 10, without CAR)."""
    contribution: Literal["norm", "fisher"] = "norm"
    """c by eq. 9, or by squared gradients (Table 14)."""
    contribution_scale: Literal["sum", "mean"] = "sum"
    """Whether c sums over a layer's units (printed), or averages."""

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        for unit in units:
            if unit.layer is None:
                raise ValueError(
                    f"method.targets: {unit.name} lies outside the transformer blocks, whose ranks "
                    "lalora allocates; accepted: matrices within blocks"
                )


class AfterSelection(Section):
    """What may change once adapters were removed."""

    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward pass from then on, since memory was freed; none: as before."""


class SelectionOptions(MethodOptions):
    """Keys of the methods that remove units."""

    keep: int | None = Field(None, gt=0)
    """Units that survive, K; none: half of them, rounded down."""
    after_selection: AfterSelection = Field(default_factory=AfterSelection)
    """What changes once adapters were removed."""

    def kept(self, units: int) -> int:
        """K of n units."""
        return self.keep if self.keep is not None else max(1, units // 2)

    def final_rank(self, units: int) -> int:
        """Rank of a survivor."""
        return self.rank

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        if self.kept(len(units)) > len(units):
            raise ValueError(
                f"method.keep: {self.keep} given; accepted: at most {len(units)}, the number of "
                "units"
            )
        rank = self.final_rank(len(units))
        for unit in units:
            if rank > min(unit.out_features, unit.in_features):
                raise ValueError(
                    f"method.keep: {self.kept(len(units))} of {len(units)} units would give each "
                    f"survivor rank {rank}, more than the smaller side of {unit.name} "
                    f"({unit.out_features} x {unit.in_features}); accepted: a larger method.keep "
                    "or a smaller method.rank"
                )


class RLoRAOptions(SelectionOptions):
    """Options of `method.kind: rlora`."""

    kind: Literal["rlora"] = "rlora"
    """Name of the method."""


class OmegaOptions(SelectionOptions):
    """Keys of the methods that learn ω."""

    warmup_steps: int | None = Field(None, gt=0)
    """Steps of phase 1, T; none: 0.5 % of all steps, rounded up. Only steps with a learning rate
    above 0 count, and phase 1 goes on until something was thresholded."""
    omega_learning_rate: float = Field(5.0, gt=0)
    """η of the step on ω."""
    omega_schedule: Literal["constant", "main"] = "constant"
    """Whether η stays or follows the main learning-rate schedule (the authors' code)."""
    score: Literal["magnitude", "signed"] = "magnitude"
    """What H_K keeps: the largest |ω| (paper, appendix B) or the largest ω (the authors' code)."""

    def warmup(self, steps: int) -> int:
        """T of a run of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(0.005 * steps)

    def check_steps(self, steps: int) -> None:
        if self.warmup(steps) >= steps:
            raise ValueError(
                f"method.warmup_steps: {self.warmup(steps)} given; accepted: fewer than the run's "
                f"{steps} steps"
            )


class WeightLoRAOptions(OmegaOptions):
    """Options of `method.kind: weightlora`."""

    kind: Literal["weightlora"] = "weightlora"
    """Name of the method."""


class WeightLoRAPlusOptions(OmegaOptions):
    """Options of `method.kind: weightlora_plus`."""

    kind: Literal["weightlora_plus"] = "weightlora_plus"
    """Name of the method."""
    expand: Literal["reinit", "qr"] = "reinit"
    """How survivors get their larger rank: drawn anew (paper), or (`qr`) what was learned kept,
    with new rows of A orthogonal to it and new columns of B zero."""
    rescale_alpha: bool = False
    """Scale survivors by α over their own rank instead of the base rank r."""

    def final_rank(self, units: int) -> int:
        return self.rank * (units // self.kept(units))
