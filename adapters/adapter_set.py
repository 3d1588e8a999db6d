"""The adapters of a model: attach, remove, resize, and list their trainable tensors. No policy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from adapters import seeds
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer, Dropout
from adapters.mask_table import MaskTable
from adapters.trainable import Kept, Trainable
from adapters.unit import Unit, stem

Gates = Literal["constant", "learned", "observed"]
"""g has no gradient (`constant`), is trained by the optimizer (`learned`), or has a gradient that
only the method uses (`observed`)."""


@dataclass(frozen=True)
class Training:
    """How the adapters of a method train."""

    gates: Gates = "constant"
    dropout: float = 0.0
    """Probability."""
    dropout_on: Literal["hidden", "input"] = "hidden"
    learning_rate_ratios: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate by role (A, g, B); 1 where none is given."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """By role: the tensor over the parameter that the method's equations train."""
    starts_from_weight: bool = False
    """Whether initial adapters are parts of W: dropout then applies only to the adapter's
    difference from its initial value, and weight decay pulls it there instead of to 0."""


class AdapterSet(Mapping[str, GatedAdapter]):
    """The adapters by unit name, replicated on every rank."""

    def __init__(self, seed: int, training: Training):
        self.seed = seed
        self.gates: Gates = training.gates
        """May change when the method enters another phase; `set_adapter` and `resize` apply it."""
        self.units: list[Unit] = []
        self.layers: Mapping[str, AdaptedLayer] = {}
        """The adapted layer of every unit."""
        self.device = torch.device("cpu")
        self._training = training
        self._by_name: dict[str, GatedAdapter] = {}
        self._kept: dict[str, Mapping[str, Kept]] = {}  # by role, of adapters that replaced others
        self._dropout_seed = torch.zeros((), dtype=torch.int64)
        self._mask_table: MaskTable | None = None

    def __getitem__(self, name: str) -> GatedAdapter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    # --- attach, remove, resize ------------------------------------------------------------------

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial: Callable[[Unit], GatedAdapter],
    ) -> None:
        """Attach each unit's initial adapter to its layer."""
        self.units, self.layers, self.device = list(units), layers, device
        for unit in units:
            self.set_adapter(unit, initial(unit))

    def set_adapter(
        self, unit: Unit, adapter: GatedAdapter, kept: Mapping[str, Kept] | None = None
    ) -> None:
        """Attach an adapter to its unit's layer, replacing the present one; `kept`: by role, what
        of the present one's optimizer state it takes over."""
        layer, training = self.layers[unit.name], self._training
        needs_initial = training.starts_from_weight and training.dropout > 0
        initial = adapter.copy().to(self.device) if needs_initial else None
        adapter = adapter.to(self.device).requires_grad_(True)
        adapter.g.requires_grad_(self.gates != "constant")
        layer.adapter = self._by_name[unit.name] = adapter
        self._kept[unit.name] = kept or {}
        self._mask_table = None
        if training.dropout > 0:
            on_input = training.dropout_on == "input"
            layer.dropout = Dropout(training.dropout, on_input, self._dropout_seed, unit.index)
            layer.initial = initial

    def remove(self, name: str) -> None:
        """Remove a unit's adapter permanently."""
        self.layers[name].adapter = None
        del self._by_name[name]
        self._mask_table = None

    def narrow(self, unit: Unit, kept: Tensor) -> None:
        """Keep only some components, `kept` (R, bool), with their values, moments and counts;
        without any, remove the adapter."""
        adapter = self[unit.name]
        rows = torch.nonzero(kept.to(adapter.A.device)).flatten()
        if len(rows) == 0:
            self.remove(unit.name)
            return
        parts = (getattr(adapter, role).detach()[rows] for role in ("A", "g", "B"))
        self.set_adapter(unit, GatedAdapter(*parts), dict.fromkeys(("A", "g", "B"), Kept(rows)))

    def resize(self, ranks: Mapping[str, int]) -> bool:
        """Allocate adapters of a checkpoint's shapes, given R by unit; True if tensors changed."""
        changed = False
        for unit in self.units:
            rank = ranks.get(unit.name)
            held = self.get(unit.name)
            if (None if held is None else held.rank) == rank:
                continue
            changed = True
            if rank is None:
                self.remove(unit.name)
            else:
                adapter = GatedAdapter.zeros(rank, unit.in_features, unit.out_features)
                self.set_adapter(unit, adapter)
        for adapter in self.values():  # the checkpoint may be of another phase
            adapter.g.requires_grad_(self.gates != "constant")
        return changed

    # --- trainable tensors -----------------------------------------------------------------------

    @property
    def mask_table(self) -> MaskTable:
        """Masks and gates of all adapters, one tensor each."""
        if self._mask_table is None:
            self._mask_table = MaskTable(self.values())
        return self._mask_table

    def trainables(self) -> list[Trainable]:
        """The tensors that the optimizer holds, with their masks."""
        found: list[Trainable] = []
        if not self:
            return found
        for (name, adapter), mask in zip(self.items(), self.mask_table.by_adapter, strict=True):
            for role in ("A", "g", "B") if adapter.rank else ():
                parameter = getattr(adapter, role)
                if parameter.requires_grad:
                    found.append(self._trainable(name, role, parameter, mask))
        return found + self._token_counters()

    def _trainable(self, name: str, role: str, parameter: nn.Parameter, mask: Tensor) -> Trainable:
        training = self._training
        return Trainable(
            f"{name}.{role}",
            parameter,
            mask,
            role=role,
            learning_rate_ratio=training.learning_rate_ratios.get(role, 1.0),
            scale=training.scales.get(role, 1.0),
            decays_to_start=training.starts_from_weight,
            observed=role == "g" and self.gates == "observed",
            kept=self._kept[name].get(role),
            token_counter=self.layers[name].token_counter,
        )

    def _token_counters(self) -> list[Trainable]:
        """The observed parameters that count each expert's tokens; none for dense layers."""
        stacks = {
            stem(name): layer.token_counter[0]
            for name, layer in self.layers.items()
            if name in self and layer.token_counter is not None
        }
        return [Trainable(f"{name}.tokens", p, observed=True) for name, p in stacks.items()]

    def active_parameters(self) -> int:
        """Number of trained scalars whose component is active in this step."""
        if not self:
            return 0
        masks = self.mask_table.masks.cpu()
        ranks = [adapter.rank for adapter in self.values()]
        gates = int(self.gates == "learned")
        return sum(
            int(mask.sum()) * (adapter.A.shape[1] + adapter.B.shape[1] + gates)
            for adapter, mask in zip(self.values(), masks.split(ranks), strict=True)
        )

    def set_dropout_seed(self, step: int, micro_batch: int) -> None:
        """Seed this micro-batch's dropout masks; `micro_batch` is its index over all ranks."""
        self._dropout_seed.fill_(seeds.mixed(self.seed, step, micro_batch))
