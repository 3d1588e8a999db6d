"""What a method must provide: a policy over the gates and masks of gated adapters.

A method is one file. It says how A, g and B start (`start`), and it may decide, on rank 0 only,
how masks, gates, ranks or survivors change (`decide`), from statistics that were reduced over all
ranks (`observe`, `after_step`). Every rank then applies the same plain data (`apply`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapters import seeds
from adapters.gated import GatedAdapter
from adapters.layers.experts import ExpertLayer
from adapters.layers.linear import Dropout
from adapters.mask_table import MaskTable
from adapters.optimizer import MaskedAdamW, Trainable
from adapters.options import Section
from adapters.spectral import Triplets
from adapters.units import AdaptedLayer, Unit, stem

Decision = dict[str, Any]
"""Plain data (numbers, strings, lists, dicts): what rank 0 decided, the same for every rank."""

Validate = Callable[[bool], float]
"""Mean loss on the validation records; with True also its gradient, summed over ranks, in the
optimizer's buffer (the caller zeroes it). All ranks call it together."""


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


@dataclass(frozen=True)
class InitialAdapter:
    """What was taken out of a unit's W to become its adapter, and W's singular values."""

    adapter: GatedAdapter
    spectrum: Tensor


class Method:
    """A method over `units`; its file defines `Options` and `start`, and what it decides."""

    Options: ClassVar[type[MethodOptions]]
    decides: ClassVar[bool] = False
    """Whether `decide` ever has anything to say."""
    decides_before: ClassVar[Literal["forward", "update"]] = "forward"
    """What a decision changes: the step's forward pass; or only which components its update moves,
    so that it may be made while the gradients are still being computed."""
    splits_weight: ClassVar[bool] = False
    """Whether the adapter starts as a part of W that the frozen matrix then lacks
    (`ranges`, `extract`)."""
    changes_structure: ClassVar[bool] = False
    """Whether units are removed or change their R while training."""
    observes_gates: ClassVar[bool] = False
    """Whether gates have gradients that the method uses itself; the optimizer leaves them alone."""
    learns_gates: ClassVar[bool] = False
    """Whether the optimizer trains g."""
    no_bias_correction: ClassVar[bool] = False
    """Whether a component's first steps are short (`adapters/optimizer.py`)."""

    def __init__(self, options: Any, seed: int):
        self.options = options
        self.seed = seed
        self.units: list[Unit] = []
        self.adapted_layers: Mapping[str, AdaptedLayer] = {}
        self.adapters: dict[str, GatedAdapter] = {}
        self.spectra: dict[str, Tensor] = {}
        self.device = torch.device("cpu")
        self.steps = 0
        self._rate: Callable[[int], float] = lambda step: 1.0
        self._dropout_seed = torch.zeros((), dtype=torch.int64)
        self._mask_table: MaskTable | None = None

    # --- how a unit starts -------------------------------------------------------------------

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        """The adapter that `unit` starts with, on the CPU; draws only from `generator`."""
        raise NotImplementedError

    def ranges(self, unit: Unit) -> list[range]:
        """Indices of the singular triplets of W that `extract` takes (0: the largest)."""
        return []

    def extract(self, unit: Unit, triplets: Triplets) -> GatedAdapter:
        """The adapter made of these triplets; the frozen matrix becomes W − its ΔW."""
        raise NotImplementedError

    def attach(
        self,
        units: Sequence[Unit],
        adapted_layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        """Give every host its adapter, the same on every rank and for every world size.

        `starts`: what was taken out of the matrices while they were loaded, where the method
        splits them.
        """
        self.units, self.adapted_layers, self.device = list(units), adapted_layers, device
        for unit in units:
            if self.splits_weight:
                assert initial_adapters is not None
                adapter = initial_adapters[unit.name].adapter.copy()
                self.spectra[unit.name] = initial_adapters[unit.name].spectrum
            else:
                adapter = self.init_adapter(unit, self.generator(unit))
            self._place(unit, adapter)

    def generator(self, unit: Unit, purpose: int = 0) -> torch.Generator:
        """Draws for one unit, the same on every rank; another purpose gives other draws."""
        return seeds.generator(self.seed, purpose, unit.index)

    def _place(self, unit: Unit, adapter: GatedAdapter) -> None:
        """Hand an adapter to its host, in place of the one that is there."""
        layer = self.adapted_layers[unit.name]
        taken_out = adapter.copy() if self.splits_weight and self.options.dropout > 0 else None
        adapter = adapter.to(self.device).requires_grad_(True)
        adapter.g.requires_grad_(self.learns_gates or self.observes_gates)
        layer.adapter = self.adapters[unit.name] = adapter
        self._mask_table = None
        if self.options.dropout > 0:
            on_input = self.options.dropout_on == "input"
            layer.dropout = Dropout(self.options.dropout, on_input, self._dropout_seed, unit.index)
            # The initial bank is a part of W; only what was learned on top of it may be dropped.
            layer.initial = None if taken_out is None else taken_out.to(self.device)

    def _remove(self, name: str) -> None:
        """Take a unit's adapter away for good."""
        self.adapted_layers[name].adapter = None
        del self.adapters[name]
        self._mask_table = None

    def resize(self, ranks: Mapping[str, int]) -> bool:
        """Make room for a checkpoint's adapters, given each one's R; True if tensors changed."""
        changed = False
        for unit in self.units:
            rank = ranks.get(unit.name)
            held = self.adapters.get(unit.name)
            if (None if held is None else held.rank) == rank:
                continue
            changed = True
            if rank is None:
                self._remove(unit.name)
            else:
                self._place(unit, GatedAdapter.zeros(rank, unit.in_features, unit.out_features))
        for adapter in self.adapters.values():  # as the phase that was loaded wants it
            adapter.g.requires_grad_(self.learns_gates or self.observes_gates)
        return changed

    @property
    def mask_table(self) -> MaskTable:
        """Masks and gates of all adapters, one tensor each."""
        if self._mask_table is None:
            self._mask_table = MaskTable(self.adapters.values())
        return self._mask_table

    # --- what trains ---------------------------------------------------------------------------

    def trainables(self) -> list[Trainable]:
        """The tensors that the optimizer holds, with their masks."""
        found = []
        for (name, adapter), mask in zip(
            self.adapters.items(), self.mask_table.by_adapter, strict=True
        ):
            if adapter.rank == 0:
                continue
            for role in ("A", "g", "B"):
                parameter = getattr(adapter, role)
                if parameter.requires_grad:
                    found.append(self.trainable(f"{name}.{role}", role, parameter, mask))
        return found + self._token_counters()

    def _token_counters(self) -> list[Trainable]:
        """What counts the tokens of every expert; none for a matrix that sees all of them."""
        stacks = {
            stem(name): layer.tokens
            for name, layer in self.adapted_layers.items()
            if name in self.adapters and isinstance(layer, ExpertLayer)
        }
        return [Trainable(f"{name}.tokens", p, observed=True) for name, p in stacks.items()]

    def trainable(self, name: str, role: str, parameter: Any, mask: Tensor) -> Trainable:
        """How one tensor trains."""
        layer = self.adapted_layers[name.rpartition(".")[0]]
        return Trainable(
            name, parameter, mask, observed=role == "g" and self.observes_gates,
            token_counter=(layer.tokens, layer.index) if isinstance(layer, ExpertLayer) else None,
        )  # fmt: skip

    def active_parameters(self) -> int:
        """Trained scalars whose component is active in this step."""
        if not self.adapters:
            return 0
        masks = self.mask_table.masks.cpu()
        ranks = [adapter.rank for adapter in self.adapters.values()]
        gates = int(self.learns_gates)
        return sum(
            int(mask.sum()) * (adapter.A.shape[1] + adapter.B.shape[1] + gates)
            for adapter, mask in zip(self.adapters.values(), masks.split(ranks), strict=True)
        )

    def set_dropout_seed(self, step: int, micro_batch: int) -> None:
        """Fix this micro-batch's dropout masks; `micro_batch` counts over all ranks."""
        self._dropout_seed.fill_(seeds.mixed(self.seed, step, micro_batch))

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
        forward pass (`steers`); None: nothing changes."""
        raise NotImplementedError

    @property
    def decided(self) -> Sequence[str]:
        """The names under which every decision has ranks."""
        return [unit.name for unit in self.units]

    def check_decision(self, decision: Decision) -> None:
        """Raises ValueError where another run's decision does not fit this run's options."""
        ranks, largest = decision.get("ranks", {}), self.options.components
        for name in self.decided:
            if name not in ranks:
                raise ValueError(f"nothing about {name}; accepted: a run of the same units")
        for name, rank in ranks.items():
            if rank > largest:
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

    def scalars(self) -> dict[str, float]:
        """Rank 0: what the log shows of the method's state."""
        return {}

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
