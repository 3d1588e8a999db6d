"""What a method must provide: a policy over the gates and masks of gated adapters.

A method is one file. It says how A, g and B start (`start`), and it may decide, on rank 0 only,
how masks, gates, ranks or survivors change (`decide`), from statistics that were reduced over all
ranks (`observe`). Every rank then applies the same plain data (`apply`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.linear import AdaptedLinear, Dropout
from adapters.optimizer import Trainable
from adapters.options import Section
from adapters.units import Unit

Decision = dict[str, Any]
"""Plain data (numbers, strings, lists, dicts): what rank 0 decided, the same for every rank."""


class MethodOptions(Section):
    """The keys that every method takes."""

    kind: str
    """Name of the method."""
    targets: str | list[str] = "all-linear"
    """Which linear layers host adapters: `all-linear`, a regular expression, or suffixes."""
    rank: int = Field(8, gt=0)
    """Components per unit, r."""
    alpha: float = Field(16.0, gt=0)
    """Scale α; the update is multiplied by α/r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of z = x Aᵀ (or of x) in training."""
    dropout_on: Literal["hidden", "input"] = "hidden"
    """Drop on the R-dimensional z (WeightLoRA, appendix) or on x (PEFT)."""
    include_head: bool = False
    """Let `all-linear` (and suffixes) reach the output head too."""


class Method(ABC):
    """A method over `units`; its file defines `Options` and `start`, and what it decides."""

    Options: ClassVar[type[MethodOptions]]
    decides: ClassVar[bool] = False
    """Whether `decide` ever has anything to say."""

    def __init__(self, options: MethodOptions, seed: int):
        self.options = options
        self.seed = seed
        self.units: list[Unit] = []
        self.adapters: dict[str, GatedAdapter] = {}
        self._dropout_seed = torch.zeros((), dtype=torch.int64)

    @abstractmethod
    def start(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        """The adapter that `unit` starts with, on the CPU; draws only from `generator`."""

    def attach(
        self, units: Sequence[Unit], hosts: Mapping[str, AdaptedLinear], device: torch.device
    ) -> None:
        """Give every host its adapter, the same on every rank and for every world size."""
        self.units = list(units)
        for unit in units:
            generator = torch.Generator().manual_seed((self.seed << 20) + unit.index)
            host = hosts[unit.name]
            adapter = self.start(unit, generator).to(device)
            host.adapter = self.adapters[unit.name] = adapter
            if self.options.dropout > 0:
                on_input = self.options.dropout_on == "input"
                host.dropout = Dropout(
                    self.options.dropout, on_input, self._dropout_seed, unit.index
                )

    def trainables(self) -> list[Trainable]:
        """The tensors that the optimizer holds, with their masks."""
        found = []
        for name, adapter in self.adapters.items():
            for role in ("A", "g", "B"):
                parameter = getattr(adapter, role)
                if parameter.requires_grad:
                    found.append(Trainable(f"{name}.{role}", parameter, adapter.mask))
        return found

    def set_dropout_seed(self, step: int, micro_batch: int) -> None:
        """Fix this micro-batch's dropout masks; `micro_batch` counts over all ranks."""
        self._dropout_seed.fill_((self.seed << 40) + (step << 16) + micro_batch)

    def active_parameters(self) -> int:
        """Trained scalars whose component is active in this step."""
        total = 0
        for trainable in self.trainables():
            per_row = trainable.parameter.numel() // trainable.parameter.shape[0]
            assert trainable.mask is not None
            total += per_row * int(trainable.mask.sum())
        return total

    def decide(self, step: int) -> Decision | None:
        """Rank 0: what changes before optimizer step `step`, or None for nothing."""
        return None

    def apply(self, decision: Decision) -> bool:
        """Every rank: carry it out; True if tensors were added, removed or resized."""
        return False

    def observe(self, step: int) -> None:  # noqa: B027
        """Every rank, after the gradients were reduced and before the optimizer's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `decide` needs to go on after a resume, besides adapters and masks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Inverse of `state_dict`."""
