"""What a method must provide: a policy over the gates and masks of gated adapters.

A method is one file. It says how A, g and B start (`init_adapter`), and it may decide, on rank 0
only, how masks, gates, ranks or survivors change (`decide`), from statistics that were reduced over
all ranks (`observe`, `after_step`). Every rank then applies the same plain data (`apply`) to the
adapters (`adapters/adapter_set.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adapters import seeds
from adapters.adapter_set import AdapterSet, Gates, Training
from adapters.decision import Decision
from adapters.figures import Figure
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.options import MethodOptions
from adapters.optimizer import MaskedAdamW
from adapters.unit import Unit

Validate = Callable[[bool], float]
"""Mean loss on the validation records; with True also its gradient, summed over ranks, in the
optimizer's buffer (the caller zeroes it). All ranks call it together."""


@dataclass(frozen=True)
class InitialAdapter:
    """What was taken out of a unit's W to become its adapter, and W's singular values."""

    adapter: GatedAdapter
    spectrum: Tensor


class Method:
    """A policy; its file defines `Options` and `init_adapter`, and what it decides."""

    Options: ClassVar[type[MethodOptions]]
    gates: ClassVar[Gates] = "constant"
    """Whether g trains, or has a gradient that the method uses itself, at the start."""
    decides: ClassVar[bool] = False
    """Whether `decide` ever has anything to say."""
    decides_before: ClassVar[Literal["forward", "update"]] = "forward"
    """What a decision changes: the step's forward pass; or only which components its update moves,
    so that it may be made while the gradients are still being computed."""
    changes_structure: ClassVar[bool] = False
    """Whether units are removed or change their R while training."""
    splits_weight: ClassVar[bool] = False
    """Whether adapters start as a part of W (`methods/spectral.py`)."""
    figures: ClassVar[Sequence[Figure]] = ()
    """What the report draws beside ranks, locations and survivors."""

    def __init__(self, options: Any, seed: int):
        self.options = options
        self.seed = seed
        self.adapters = AdapterSet(
            seed,
            Training(
                gates=self.gates,
                dropout=options.dropout,
                dropout_on=options.dropout_on,
                learning_rate_ratios=self.learning_rate_ratios,
                decay_ratios=self.decay_ratios,
                drops_change_only=self.splits_weight,
            ),
        )
        self.steps = 0
        self._rate: Callable[[int], float] = lambda step: 1.0

    @property
    def units(self) -> list[Unit]:
        """All units, those without an adapter too."""
        return self.adapters.units

    # --- how a unit starts and trains ------------------------------------------------------------

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        """The adapter that `unit` starts with, on the CPU; draws only from `generator`."""
        raise NotImplementedError

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        """Give every unit its adapter, the same on every rank and for every world size.

        `initial_adapters`: what was taken out of the matrices while they were loaded, for a method
        that splits them.
        """
        self.adapters.attach(
            units, layers, device, lambda unit: self.init_adapter(unit, self.generator(unit))
        )

    def generator(self, unit: Unit, purpose: int = 0) -> torch.Generator:
        """Draws for one unit, the same on every rank; another purpose gives other draws."""
        return seeds.generator(self.seed, purpose, unit.index)

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        """By role (A, g, B): over the learning rate, where it is not 1, by the options alone."""
        return {}

    @property
    def decay_ratios(self) -> Mapping[str, float]:
        """By role: over the weight decay, where it is not 1."""
        return {}

    @property
    def no_bias_correction(self) -> bool:
        """Whether a component's first steps are short (`adapters/optimizer.py`)."""
        return False

    @property
    def micro_batch_size(self) -> int | None:
        """Sequences per forward pass from now on, where the method frees memory for more."""
        return None

    # --- decisions -----------------------------------------------------------------------------

    def set_horizon(self, steps: int, rate: Callable[[int], float]) -> None:
        """Before training: the run's length, and the learning rate of a step over its peak."""
        self.steps, self._rate = steps, rate

    def on_train_begin(self, optimizer: MaskedAdamW, validate: Validate) -> None:
        """Every rank, once, before the first step of a new run."""

    def due(self, step: int) -> bool:
        """Whether rank 0 is asked in step `step`, before its update; the same on every rank."""
        return self.decides

    def decide(self, step: int) -> Decision | None:
        """Rank 0, where `due`: what holds from the update of step `step` on, or already from its
        forward pass (`decides_before`); None: nothing changes."""
        raise NotImplementedError

    @property
    def decided(self) -> Sequence[str]:
        """The names that the ranks of a decision have."""
        return [unit.name for unit in self.units]

    def check_decision(self, decision: Decision) -> None:
        """Raises ValueError where a recorded decision does not fit this run's options, or could not
        be applied. Here: ranks, where there are any."""
        if decision.ranks:
            self.check_ranks(decision)

    def check_ranks(self, decision: Decision) -> None:
        """Raises ValueError unless every name has a rank of at most R."""
        for name in self.decided:
            if name not in decision.ranks:
                raise ValueError(f"nothing about {name}; accepted: a run of the same units")
        for name, rank in decision.ranks.items():
            if rank > self.options.components:
                largest = self.options.components
                raise ValueError(f"rank {rank} for {name}; accepted: at most {largest}")

    def apply(self, decision: Decision) -> bool:
        """Every rank: carry it out; True if tensors were added, removed or resized."""
        raise NotImplementedError

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        """Every rank, after the gradients were summed (unclipped) and before the update."""

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        """Every rank, after the update, or after it was skipped."""

    # --- what the log, `watch` and `report` show -------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Rank 0: what the log shows of the method's state."""
        return {}

    def summary(self, decision: Decision) -> dict[str, str]:
        """Rank 0: the decision in words, by subject; recorded with it and shown by `watch`."""
        return decision.summary()

    # --- what the trained adapter is used with ---------------------------------------------------

    @contextmanager
    def inference(self) -> Iterator[None]:
        """A context in which gates are those that the trained adapter is used with."""
        yield

    @classmethod
    def inference_gates(cls, options: Any, gates: Tensor) -> Tensor:
        """Gates (R) that a trained unit is exported with."""
        return gates

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What every rank holds alike besides adapters and masks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; called before adapters are resized and loaded."""

    def decider_state(self) -> dict[str, Tensor]:
        """What only rank 0 holds, for `decide`."""
        return {}

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        """Rank 0: inverse of `decider_state`."""
