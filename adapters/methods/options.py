"""Keys of the methods under `method:`, one class per method; `registry.py` maps names to classes.

Does not import torch, so that mistakes in a configuration are reported at once."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from adapters.methods.start_options import StartKind, StartOptions
from adapters.options import Section
from adapters.unit import Unit

Trains = Literal["adapters", "modules", "backbone"]
"""What a method trains: `adapters` of the project's own; `modules` that another library puts among
the frozen backbone's own layers, whole on every rank; the `backbone`, sharded by the engine."""


class MethodOptions(Section):
    """Keys of all methods."""

    trains: ClassVar[Trains] = "adapters"
    scales_rows: ClassVar[bool] = False
    """Whether rows of W + ΔW are scaled, which is more than a LoRA."""

    kind: str
    """Name of the method."""
    targets: str | list[str] = "all-linear"
    """Linear layers that get adapters: `all-linear`, a regular expression, or suffixes."""
    rank: int = Field(8, gt=0)
    """Components per unit, r."""
    alpha: float = Field(16.0, gt=0)
    """Scale α; the update is multiplied by α/r (no effect for pissa, milora and, unless
    coordinates=delta, lelora, whose gates come from the backbone)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of z = x Aᵀ (or of x) in training."""
    dropout_on: Literal["hidden", "input"] = "hidden"
    """Apply dropout to the R-dimensional z (WeightLoRA, appendix) or to x (PEFT)."""
    include_head: bool = False
    """Whether `all-linear` and suffixes include the output head."""
    train_router: bool = False
    """Also train all parameters of the routers of a mixture of experts."""
    replay: str | None = None
    """A run folder (or its allocation.jsonl) whose recorded decisions are applied instead of new
    ones."""

    @property
    def components(self) -> int:
        """R: initial number of components of a unit."""
        return self.rank

    @property
    def selection_of(self) -> str | None:
        """A run folder whose selection of units this run needs, or a pattern for one."""
        return None

    @property
    def takes_from_weight(self) -> bool:
        """Whether the adapters start as parts of W other than zero, which the frozen matrix
        loses."""
        return False

    @property
    def data_start(self) -> Literal["activation", "gradient"] | None:
        """From what A starts, if from the data."""
        return None

    @property
    def validation_samples(self) -> int:
        """Number of training records that the method holds out to evaluate its decisions."""
        return 0

    def described(self, units: int) -> str:
        """The method on so many units, for the log."""
        return f"{self.kind}, rank {self.rank}, {units} units"

    def check_units(self, units: Sequence[Unit]) -> None:
        """Raises ValueError, naming key and unit, if the options do not fit the units."""
        check_fits("method.rank", self.rank, units)

    def check_steps(self, steps: int) -> None:
        """Raises ValueError, naming the key, if the options do not fit a run of `steps` steps."""


def check_fits(key: str, rank: int, units: Sequence[Unit]) -> None:
    """Raises ValueError, naming `key` and the unit, if `rank` exceeds a side of a matrix."""
    for unit in units:
        largest = min(unit.out_features, unit.in_features)
        if rank > largest:
            raise ValueError(
                f"{key}: {rank} given; accepted: at most {largest}, the smaller side of "
                f"{unit.name} ({unit.out_features} x {unit.in_features})"
            )


class StartedOptions(MethodOptions):
    """Keys of methods whose A may start from the data."""

    start: StartKind = "lora"
    """A starts Kaiming-uniform, or as singular vectors of the matrices' inputs (activation: EVA) or
    gradients (gradient: LoRA-GA, GoRA) in some batches. B starts at 0."""
    start_options: StartOptions = Field(default_factory=StartOptions)
    """How A starts from the data."""

    @property
    def data_start(self) -> Literal["activation", "gradient"] | None:
        return None if self.start == "lora" else self.start

    @property
    def start_components(self) -> int:
        """Components of a unit that are looked for in the data."""
        options, most = self.start_options, self.components
        return most if options.ranks == "fixed" else max(most, round(options.rho * self.rank))

    @model_validator(mode="after")
    def _check_start(self) -> "StartedOptions":
        self.start_options.check(self.start)
        return self

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        if self.start != "lora" and self.start_options.ranks != "fixed":
            check_fits("method.start_options.rho (times method.rank)", self.start_components, units)


class LoRAOptions(StartedOptions):
    """Options of `method.kind: lora`."""

    kind: Literal["lora"] = "lora"
    """Name of the method."""
    rank_stabilized: bool = False
    """Scale by α/√r instead of α/r (rsLoRA)."""
    b_learning_rate_ratio: float = Field(1.0, gt=0)
    """Ratio of the learning rates of B and A (LoRA+; the paper recommends 16)."""


class DoRAOptions(LoRAOptions):
    """Options of `method.kind: dora`."""

    scales_rows: ClassVar[bool] = True

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]
    """Name of the method."""

    @model_validator(mode="after")
    def _check_ranks(self) -> "DoRAOptions":
        self.start_options.check_fixed(self.kind)
        return self


class PiSSAOptions(MethodOptions):
    """Options of `method.kind: pissa`."""

    kind: Literal["pissa"] = "pissa"
    """Name of the method."""

    @property
    def takes_from_weight(self) -> bool:
        return True


class MiLoRAOptions(MethodOptions):
    """Options of `method.kind: milora`."""

    kind: Literal["milora"] = "milora"
    """Name of the method."""

    @property
    def takes_from_weight(self) -> bool:
        return True


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
    """Steps before the first pruning; none: a tenth of all steps."""
    tfinal: int | None = Field(None, ge=0)
    """Steps after the last pruning; none: three tenths of all steps."""
    delta_t: int = Field(10, gt=0)
    """Steps between two prunings."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Decay β₁ of the moving average of the sensitivity."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Decay β₂ of the moving average of the uncertainty."""
    orthogonality: float = Field(0.1, ge=0)
    """Weight of the orthogonality penalty."""
    penalty: Literal["norm", "squared"] = "norm"
    """Mean over matrices of ‖A Aᵀ − I‖ (the authors' code, PEFT), or sum of its squares (paper,
    eq. 4)."""

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
        """(tinit, steps − tfinal), the steps between which the budget falls."""
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


class LaLoRAOptions(StartedOptions):
    """Options of `method.kind: lalora`; `rank` is the largest rank of a layer, r."""

    kind: Literal["lalora"] = "lalora"
    """Name of the method."""
    gamma: float = Field(10.0, ge=0)
    """Factor γ of the norms' growth in the growth of the budget (eq. 5)."""
    every: int = Field(10, gt=0)
    """Steps between two decisions (paper: 1)."""
    fidelity: Literal[
        "truncated_over_full", "previous_over_current", "truncated_over_initial", "none"
    ] = "previous_over_current"
    """f in eq. 9: the ratio in the text, eq. 10 as printed, the wording of §5.2, or 1 (Table
    11)."""
    growth: Literal["same_rank", "printed"] = "same_rank"
    """Take s^prev at the rank of s, or as printed."""
    budget: Literal["gradual", "full"] = "gradual"
    """`full`: D = r L from the start (Table 10, without CAR)."""
    contribution: Literal["norm", "fisher"] = "norm"
    """c by eq. 9, or by squared gradients (Table 14)."""
    contribution_scale: Literal["sum", "mean"] = "mean"
    """Sum (as printed) or average c over a layer's units."""
    allocation: Literal["contribution", "uniform"] = "contribution"
    """Ranks by eq. 8, or (`uniform`, a control) equal in all layers under the same budget, up to
    the remainder, which goes to the lower layers."""

    @model_validator(mode="after")
    def _check_ranks(self) -> "LaLoRAOptions":
        self.start_options.check_fixed(self.kind)
        return self

    def check_units(self, units: Sequence[Unit]) -> None:
        super().check_units(units)
        for unit in units:
            if unit.layer is None:
                raise ValueError(
                    f"method.targets: {unit.name} lies outside the transformer blocks, whose ranks "
                    "lalora allocates; accepted: matrices within blocks"
                )
