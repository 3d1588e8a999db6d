"""Base class of the methods: a policy over the masks and gates of gated adapters.

A method is one file. It initialises A, g and B (`init_adapter`). It may also decide on rank 0 how
masks, gates, ranks or survivors change (`decide`), from statistics reduced over all ranks
(`observe`, `after_step`). All ranks then apply the broadcast decision (`apply`) to the adapters
(`adapters/adapter_set.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adapters import seeds
from adapters.adapter_set import AdapterSet, Gates, Training
from adapters.decision import Decision
from adapters.figures import Figure
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.options import MethodOptions
from adapters.optimizer import MaskedAdamW
from adapters.starts import Start
from adapters.unit import Unit

Validate = Callable[[bool], float]
"""Mean loss on the validation records; with True also its gradient, summed over ranks, in the
optimizer's buffer (the caller zeroes it). Collective."""


@dataclass(frozen=True)
class InitialAdapter:
    """The part of a unit's W that becomes its initial adapter, and all singular values of W."""

    adapter: GatedAdapter
    spectrum: Tensor


class Method:
    """A method. Subclasses define `Options`, `init_adapter` and, if they decide, `decide` and
    `apply`."""

    Options: ClassVar[type[MethodOptions]]
    gates: ClassVar[Gates] = "constant"
    """How g is treated at the start: constant, trained, or with a gradient for the method only."""
    decides: ClassVar[bool] = False
    """Whether the method makes decisions."""
    decides_before: ClassVar[Literal["forward", "update"]] = "forward"
    """When a decision must be applied. `forward`: it changes the forward pass. `update`: it only
    selects the components that the update changes, and may be made during forward and backward."""
    rounds: int = 1
    """Selections of units that a run makes, of methods that select any."""
    changes_structure: bool = False
    """Whether units are removed or change their R after they were attached."""
    keeps_none: ClassVar[str] = "accepted: options by which one does"
    """How it comes that no unit keeps its adapter, and what to change."""
    splits_weight: ClassVar[bool] = False
    """Whether adapters are initialised from a part of W (`methods/spectral.py`), which may be
    zero: see `MethodOptions.takes_from_weight`."""
    figures: ClassVar[Sequence[Figure]] = ()
    """Figures of the report in addition to ranks, locations and survivors."""

    def __init__(self, options: Any, seed: int):
        self.options = options
        self.seed = seed
        self.adapters = AdapterSet(
            seed,
            Training(
                gates=self.initial_gates(options),
                dropout=options.dropout,
                dropout_on=options.dropout_on,
                learning_rate_ratios=self.learning_rate_ratios,
                scales=self.scales,
                starts_from_weight=options.takes_from_weight,
            ),
        )
        self.steps = 0
        self._rate: Callable[[int], float] = lambda step: 1.0

    @property
    def units(self) -> list[Unit]:
        """All units, including those whose adapter was removed."""
        return self.adapters.units

    # --- initialisation and training -------------------------------------------------------------

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        """The initial adapter of `unit`, on the CPU; draws only from `generator`."""
        raise NotImplementedError

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        """Attach the units' initial adapters, identical on every rank and for every world size.

        `initial_adapters`: those that spectral initialisation made while loading, if
        `splits_weight`.
        """
        self.adapters.attach(
            units, layers, device, lambda unit: self.init_adapter(unit, self.generator(unit))
        )

    def adopt(self, starts: Mapping[str, Start]) -> bool:
        """Replace the initial adapters by those that start from the data, by unit; called once,
        before training, where `options.start` asks for it. True if tensors were added, removed or
        resized. B stays 0, so that the model computes what it did."""
        raise NotImplementedError

    def check(self, units: Sequence[Unit]) -> None:
        """Raises ValueError, before any weight is loaded, where the method does not fit these."""

    def read_weights(self, names: Sequence[str], dtype: torch.dtype) -> None:
        """Called where `options.scales_rows`, once the adapters are attached, for the units of one
        block after the other, whose layers' weights are whole; `dtype`: that of the backbone."""

    @classmethod
    def trained_size(cls, model: nn.Module, options: Any, targets: Sequence[str]) -> int:
        """Number of scalars that `attach_modules` will train, of a model on the meta device."""
        return 0

    @property
    def reads_weights(self) -> bool:
        """Whether `attach_modules` reads the backbone's weights, which must be whole then."""
        return False

    def attach_modules(self, model: nn.Module) -> None:
        """Called once the model is loaded and sharded, where `options.trains` is not `adapters`:
        put modules of its own into it, the same on every rank. Raises ValueError where it
        cannot."""

    @property
    def trained_parameters(self) -> Mapping[str, nn.Parameter]:
        """Parameters other than A, g and B that the optimizer trains, by name; all ranks hold them
        whole."""
        return {}

    def generator(self, unit: Unit, purpose: int = 0) -> torch.Generator:
        """Generator for one unit and purpose, seeded identically on every rank."""
        return seeds.generator(self.seed, purpose, unit.index)

    @classmethod
    def initial_gates(cls, options: Any) -> Gates:
        """How g is treated at the start, given the options."""
        return cls.gates

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        """Factors of the learning rate by role (A, g, B), 1 if absent; depends on options only."""
        return {}

    @property
    def scales(self) -> Mapping[str, float]:
        """By role, 1 if absent: the tensor over the parameter that the method's equations train,
        which learns as if it were trained itself."""
        return {}

    @property
    def no_bias_correction(self) -> bool:
        """Whether Adam's first moment is used uncorrected, which shortens a component's first steps
        (`adapters/optimizer.py`)."""
        return False

    @property
    def micro_batch_size(self) -> int | None:
        """New micro-batch size after the method has freed memory; None: unchanged."""
        return None

    def largest_micro_batch(self, given: int) -> int:
        """The largest micro-batch size of a run that begins with `given`."""
        return given

    # --- decisions -----------------------------------------------------------------------------

    def decides_before_at(self, step: int) -> Literal["forward", "update"]:
        """`decides_before` of the decision of one step. One that adds, removes or resizes tensors
        must be applied before the forward pass."""
        return self.decides_before

    def set_horizon(self, steps: int, rate: Callable[[int], float]) -> None:
        """Set the number of steps and the schedule, learning rate of a step over its peak; called
        before training."""
        self.steps, self._rate = steps, rate

    def match_selection(self, step: int, decision: Decision) -> None:
        """Rank 0, where `options.selection_of`: the selection that the other run made before step
        `step`. Raises ValueError where it does not fit this run."""

    def on_train_begin(self, optimizer: MaskedAdamW, validate: Validate) -> None:
        """Called once before the first step of a new run, on every rank."""

    def due(self, step: int) -> bool:
        """Whether a decision is made in step `step`, before its update; equal on every rank."""
        return self.decides

    def decide(self, step: int) -> Decision | None:
        """Rank 0, if `due`: the decision that holds from the forward pass or the update of step
        `step` on (`decides_before`); None: no change."""
        raise NotImplementedError

    @property
    def decided(self) -> Sequence[str]:
        """The names for which decisions have ranks."""
        return [unit.name for unit in self.units]

    def check_decision(self, decision: Decision) -> None:
        """Raises ValueError if a recorded decision does not fit this run's units and options. The
        base class checks ranks, if present."""
        if decision.ranks:
            self.check_ranks(decision)

    def check_ranks(self, decision: Decision) -> None:
        """Raises ValueError unless every name has a rank <= R."""
        for name in self.decided:
            if name not in decision.ranks:
                raise ValueError(
                    f"no rank for {name}; accepted: decisions of a run with the same units"
                )
        for name, rank in decision.ranks.items():
            if rank > self.options.components:
                largest = self.options.components
                raise ValueError(f"rank {rank} for {name}; accepted: at most {largest}")

    def apply(self, decision: Decision) -> bool:
        """Apply the decision, on every rank; True if tensors were added, removed or resized."""
        raise NotImplementedError

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        """Called on every rank with reduced, unclipped gradients, before the update."""

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        """Called on every rank after the update, or after it was skipped."""

    # --- log, `watch` and `report` ---------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Rank 0: numbers for the log."""
        return {}

    def summary(self, decision: Decision) -> dict[str, str]:
        """Rank 0: the decision in words, by subject; recorded with it, shown by `watch`."""
        return decision.summary()

    # --- evaluation and export -------------------------------------------------------------------

    @contextmanager
    def without(self) -> Iterator[None]:
        """Context in which the model computes as if `attach_modules` had added nothing."""
        yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context in which the adapters have their inference gates."""
        yield

    @classmethod
    def inference_gates(cls, options: Any, gates: Tensor) -> Tensor:
        """The gates (R) with which a trained unit is exported."""
        return gates

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """State that is replicated on every rank, without adapters and masks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; called before the adapters are resized and loaded."""

    def decider_state(self) -> dict[str, Tensor]:
        """State of `decide`, held by rank 0 only."""
        return {}

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        """Rank 0: inverse of `decider_state`."""
