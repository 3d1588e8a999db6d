"""RLoRA: keeps random units and removes the others (WeightLoRA's ablation, its Table 7).

With `match` it is the control of a run that learned its survivors: until the step of that run's
selection all units train, then as many random units of each type survive, with its ranks. So both
have the same parameters, in the same types of matrices, and the same steps.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adapters import seeds
from adapters.decision import Decision
from adapters.gated import GatedAdapter
from adapters.methods.base import Method
from adapters.methods.expansion import keep_learned, orthonormalise
from adapters.methods.lora import fresh
from adapters.methods.options import MethodOptions
from adapters.methods.selection_options import RLoRAOptions
from adapters.trainable import Kept
from adapters.unit import Unit


class Selection(Method):
    """Base of the methods that remove units: survivors have constant gates and may grow."""

    decides = True
    changes_structure = True
    rounds = 1
    """Number of selections in a run."""
    selections = 0
    """Number of selections so far."""

    def init_adapter(self, unit: Unit, generator: torch.Generator) -> GatedAdapter:
        return fresh(unit, self.options.rank, self.scale, generator)

    @property
    def scale(self) -> float:
        """α/r of the base rank."""
        return self.options.alpha / self.options.rank

    @property
    def selected(self) -> bool:
        """Whether the last selection was made."""
        return self.selections >= self.rounds

    @property
    def micro_batch_size(self) -> int | None:
        return self.options.after_selection.micro_batch_size if self.selected else None

    def largest_micro_batch(self, given: int) -> int:
        return max(given, self.options.after_selection.micro_batch_size or 0)

    def due(self, step: int) -> bool:
        return not self.selected

    def check_decision(self, decision: Decision) -> None:
        ranks, units = decision.ranks, {unit.name: unit for unit in self.units}
        if set(decision.survivors or ()) != ranks.keys():
            raise ValueError("survivors and ranks name different units; accepted: the same")
        for name, rank in ranks.items():
            largest = self._largest_rank(units.get(name))
            if not 0 < rank <= largest:
                raise ValueError(f"rank {rank} for {name}; accepted: 1 to {largest}")
            if self.options.expand != "reinit" and rank < self.options.rank:
                raise ValueError(
                    f"rank {rank} for {name}; accepted with method.expand={self.options.expand}: "
                    f"at least {self.options.rank}, method.rank"
                )

    def _largest_rank(self, unit: Unit | None) -> int:
        return self.options.final_rank(len(self.units))

    def apply(self, decision: Decision) -> bool:
        """Remove and redraw adapters."""
        self.selections += 1
        self._enter_phase()
        for unit in self.units:
            if unit.name in decision.ranks:
                self._replace(unit, decision.ranks[unit.name], decision)
            elif unit.name in self.adapters:
                self.adapters.remove(unit.name)
        return True

    def _enter_phase(self) -> None:
        """Once the last selection is made, gates are constant."""
        if self.selected:
            self.adapters.gates = "constant"

    def _replace(self, unit: Unit, rank: int, decision: Decision) -> None:
        """Give a survivor its adapter of this rank, by `expand`."""
        expand = self.options.expand
        generator = self.generator(unit, purpose=self.selections)
        adapter, kept = fresh(unit, rank, self._gate(rank), generator), None
        if expand != "reinit":
            learned = self.adapters[unit.name].copy().to("cpu")
            factor = self._factor(unit, learned.rank, rank, decision)
            if expand == "authors":
                adapter = orthonormalise(learned, adapter, factor, generator)
            else:
                adapter = keep_learned(learned, adapter, factor)
            if expand == "kept":
                rows, added = torch.arange(learned.rank), rank - learned.rank
                rows = rows.to(self.adapters.device)
                kept = {"A": Kept(rows, added=added), "B": Kept(rows, factor, added)}
        self.adapters.set_adapter(unit, adapter, kept)

    def _gate(self, rank: int) -> float:
        """The constant gates of an adapter of this rank."""
        return self.scale

    def _factor(self, unit: Unit, held: int, rank: int, decision: Decision) -> float:
        """What B is multiplied by so that BᵀgA stays: gates at rank `held` over those at `rank`."""
        return self._gate(held) / self._gate(rank)

    def scalars(self) -> dict[str, float]:
        held = {name: adapter.rank for name, adapter in self.adapters.items()}
        rank, sizes = self.options.rank, {unit.name: unit.size for unit in self.units}
        parameters = sum(sizes[name] * held[name] for name in held)
        return {
            "survivors": len(held),
            "rank_left_over": len(sizes) * rank - sum(held.values()),
            "parameters_left_over": rank * sum(sizes.values()) - parameters,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {"selected": torch.tensor(self.selections)}  # a bool in older checkpoints

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.selections = int(state["selected"])
        self._enter_phase()


class RLoRA(Selection):
    """Draws the survivors."""

    Options: ClassVar[type[MethodOptions]] = RLoRAOptions
    recorded: tuple[int, Decision] | None = None
    """Rank 0, with `match`: (step, decision) of the selection to match."""

    def match_selection(self, step: int, decision: Decision) -> None:
        """Match the selection that another run made before `step`. Raises ValueError where it does
        not fit this run's units and steps."""
        names = {unit.name for unit in self.units}
        for name in decision.ranks:
            if name not in names:
                raise ValueError(f"names {name}, which is no unit of this run")
        if step >= self.steps:
            raise ValueError(f"was made before step {step}; accepted: in a run of more steps")
        self.recorded = step, decision

    def decide(self, step: int) -> Decision | None:
        generator = seeds.generator(self.seed, step)
        if self.options.match is not None:
            return self._matched(step, generator)
        order = torch.randperm(len(self.units), generator=generator).tolist()
        survivors = self.options.survivors(order, self.units)
        names = [self.units[index].name for index in survivors]
        return Decision(survivors=names, ranks=dict.fromkeys(names, self.options.rank))

    def _matched(self, step: int, generator: torch.Generator) -> Decision | None:
        assert self.recorded is not None, "the run to match was not read"
        when, learned = self.recorded
        if step < when:
            return None
        types: dict[tuple[str, int, int], list[Unit]] = {}
        for unit in self.units:
            types.setdefault((unit.kind, unit.out_features, unit.in_features), []).append(unit)
        ranks: dict[str, int] = {}
        for units in types.values():
            recorded = [learned.ranks[u.name] for u in units if u.name in learned.ranks]
            order = torch.randperm(len(units), generator=generator).tolist()
            drawn = sorted(order[: len(recorded)])
            ranks |= {units[i].name: rank for i, rank in zip(drawn, recorded, strict=True)}
        survivors = [unit.name for unit in self.units if unit.name in ranks]
        return Decision(survivors=survivors, ranks={name: ranks[name] for name in survivors})

    def check_decision(self, decision: Decision) -> None:
        super().check_decision(decision)
        if not decision.survivors:
            raise ValueError("no survivors; accepted: decisions recorded by rlora")

    def _largest_rank(self, unit: Unit | None) -> int:
        if self.options.match is None or unit is None:
            return super()._largest_rank(unit)
        return min(unit.out_features, unit.in_features)
