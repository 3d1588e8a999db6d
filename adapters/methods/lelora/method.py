"""LeLoRA: a policy learns by reinforcement which singular components of W to train.

Before training, the r_max largest (primary), middle (medium) and smallest (minor) singular triplets
of every unit's W become the components of its adapter, A = Vᵀ, g = Σ, B = U:

    W = (W − Σ_banks U Σ Vᵀ) + Σ_banks U Σ Vᵀ,

of which the first term is frozen and, after the subtraction, quantised. At iteration t

    1. rank 0 draws (r, s) for every unit from p(· | ξ; Ω); r components of bank s train,
    2. θ ← one optimizer step, which changes only these components                         (6)
    3. L₁: loss of the updated model on validation records, L₂ = L₁ − L₁ of the last iteration,
       R = L₁ + α L₂                                                                       (7)–(9)
    4. Ω ← Ω − η₂ (R − b) (1/n) Σ_u ∇ log p(a_u | ξ_u; Ω)                                 (10)

The forward pass always uses all components. Beyond the paper, rewards can be per unit.
`credit: attributed`: R_u = ⟨∇_{θ_u} L, Δθ_u⟩, the first-order change of the loss due to the unit's
update. `credit: counterfactual`, the default: since backward computes the gradient of every
component, trained or not, every action of a unit gets a reward in every step
(`_counterfactual_rewards`). With `signal: next_batch` L is the loss of the next training batch,
whose gradient is computed anyway: the policy needs no extra pass.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.adapter_set import Gates
from adapters.banks import bank
from adapters.cuda.side_stream import SideStream
from adapters.decision import Decision
from adapters.figures import Curves
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Validate
from adapters.methods.lelora.features import Features
from adapters.methods.lelora.options import LeLoRAOptions
from adapters.methods.lelora.reinforce import Reinforce
from adapters.methods.lelora.rewards import (
    by_action,
    counterfactual,
    per_step,
    row_sizes,
    row_sums,
    step_squares,
)
from adapters.methods.lora import ROW_NORM
from adapters.methods.spectral import SpectralMethod, balanced
from adapters.optimizer import MaskedAdamW
from adapters.spectral import Triplets
from adapters.unit import Unit, by_kind_and_third, stem

_REWARD = "reward (change of loss, lower is better)"


class LeLoRA(SpectralMethod):
    """Up to three singular banks per unit, of which one slice trains."""

    Options = LeLoRAOptions
    decides = True
    decides_before = "update"
    figures = (
        Curves(
            "policy",
            "Policy",
            {
                _REWARD: {"reward": "reward", "baseline": "baseline"},
                "entropy (nats)": {
                    "rank head": "entropy_rank",
                    "location head": "entropy_location",
                },
                "distinct actions (r, s)": {"distinct actions": "distinct_actions"},
            },
            signed=frozenset({_REWARD}),
        ),
    )

    def __init__(self, options: Any, seed: int):
        super().__init__(options, seed)
        self._step_squares: Tensor | None = None  # (n, R): ‖δW_j‖² of unit steps at the draw
        self._before: Tensor | None = None  # θ, or its gradient, at the current draw
        self._saw_tokens: Tensor | None = None  # (n): whether experts saw tokens then
        self._spoiled = False  # a step since that draw was skipped
        self._reward: Tensor | None = None  # (1), (n) or (n, |R|, |S|), for `decide`
        self._last_loss = float("nan")  # L₁ of the previous draw
        self._touched = torch.zeros(0, 0, dtype=torch.bool)  # (n, R): ever trained
        self._policy: Reinforce | None = None  # rank 0
        self._features: Features | None = None  # rank 0
        self._drawn: dict[str, Any] = {}  # the current draw, for the log
        actions = list(product(options.dimensions, options.locations))
        self._row_of = {action: row for row, action in enumerate(actions)}
        self._masks = np.zeros((len(actions), options.components), dtype=bool)  # of each action
        for action, row in self._row_of.items():
            self._masks[row, self.trained(*action)] = True

    @classmethod
    def initial_gates(cls, options: Any) -> Gates:
        return "learned" if options.coordinates == "singular" else "constant"

    @property
    def no_bias_correction(self) -> bool:
        return self.options.wake == "gradual"

    def ranges(self, unit: Unit) -> list[range]:
        d = min(unit.out_features, unit.in_features)
        return [bank(location, self.options.rank, d) for location in self.options.locations]

    def extract(self, unit: Unit, triplets: Triplets) -> GatedAdapter:
        match self.options.coordinates:
            case "balanced":
                return balanced(triplets)
            case "delta":
                A, scale = triplets.V.T * ROW_NORM, self.options.alpha / self.options.rank
                B = torch.zeros(len(A), unit.out_features)
                return GatedAdapter(A, torch.full((len(A),), scale), B)
        return GatedAdapter(triplets.V.T, triplets.S, triplets.U.T)

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        super().attach(units, layers, device, initial_adapters)
        self._touched = torch.zeros(len(units), self.options.components, dtype=torch.bool)
        self._side_stream = SideStream(device)

    def trained(self, rank: int, location: str) -> slice:
        """Components that the action (r, s) trains: the first r of a bank, of `minor` the
        last r."""
        largest = self.options.rank
        start = self.options.locations.index(location) * largest
        first = start + largest - rank if location == "minor" else start
        return slice(first, first + rank)

    def _size(self, unit: Unit) -> int:
        """Trained parameters of one component."""
        return unit.in_features + unit.out_features + (self.options.coordinates == "singular")

    # --- rewards, on every rank ----------------------------------------------------------------

    def on_train_begin(self, optimizer: MaskedAdamW, validate: Validate) -> None:
        if self._learns and self.options.policy.credit == "global":
            self._last_loss = validate(False)

    def due(self, step: int) -> bool:
        return step % self.options.policy.every == 0

    def observe(self, step: int, optimizer: MaskedAdamW) -> None:
        if not (self._learns and self.due(step)):
            return
        policy = self.options.policy
        if not policy.validates and self._before is not None:
            self._reward = self._unit_rewards(optimizer)
        self._before, self._spoiled = None, False
        self._saw_tokens = optimizer.units_that_saw_tokens()
        if policy.credit == "attributed":
            self._before = optimizer.values.clone()
        elif policy.credit == "counterfactual":
            self._before = optimizer.trained_gradients.clone()
            if policy.score == "per_step":
                moves = row_sums(optimizer, self._before.abs()) > 0
                changes = torch.where(moves, row_sizes(self.units, moves.double()), 0.0)
                values = optimizer.values
                self._step_squares = self._squares_of(optimizer, values, changes)

    def after_step(
        self, step: int, optimizer: MaskedAdamW, *, skipped: bool, validate: Validate
    ) -> None:
        self._compute_reward(step, optimizer, skipped, validate)
        self._side_stream.record_event()

    def _compute_reward(
        self, step: int, optimizer: MaskedAdamW, skipped: bool, validate: Validate
    ) -> None:
        """The reward from validation records, at the end of a draw."""
        if not self._learns:
            return
        self._spoiled |= skipped
        policy = self.options.policy
        if not (policy.validates and self.due(step + 1)):
            return
        if policy.credit == "global":
            self._reward = self._global_reward(validate)
        else:
            validate(True)
            self._reward = self._unit_rewards(optimizer)
            optimizer.zero_grad()

    @property
    def _learns(self) -> bool:
        return self.options.policy.mode == "learned" and self.options.replay is None

    def _unit_rewards(self, optimizer: MaskedAdamW) -> Tensor:
        """Rewards by unit (n), or by unit and action (n, |R|, |S|), from the reduced, unclipped
        gradient of all components. NaN for experts that saw no tokens, and for all units after a
        skipped step."""
        assert self._before is not None
        gradient = optimizer.trained_gradients
        saw_tokens, known = optimizer.units_that_saw_tokens(), self._saw_tokens
        per_step_of = self.options.policy.score == "per_step"
        if self.options.policy.credit == "attributed":
            change = optimizer.values - self._before
            reward = row_sums(optimizer, gradient * change).sum((1, 2))
            if per_step_of:
                squares = row_sums(optimizer, change * change)
                moved = self._squares_of(optimizer, self._before, squares).sum(1)
                reward = per_step(reward, moved)
            if known is not None:  # it may have seen tokens in a later step of the same draw
                known = known | (row_sums(optimizer, change.abs()).sum((1, 2)) > 0)
        else:
            reward = self._counterfactual_rewards(optimizer, self._before, gradient)
        if self._spoiled:
            return reward * float("nan")
        if saw_tokens is None or known is None:
            return reward
        return reward.masked_fill(
            ~(known & saw_tokens).view(-1, *[1] * (reward.dim() - 1)), torch.nan
        )

    def _counterfactual_rewards(
        self, optimizer: MaskedAdamW, earlier: Tensor, later: Tensor
    ) -> Tensor:
        """R_u(r, s) = Σ_{j in slice} `counterfactual`_j, (n, |R|, |S|); per unit of the step's
        ‖δW‖ with `score: per_step`."""
        dots, squares = row_sums(optimizer, earlier * later), row_sums(optimizer, earlier * earlier)
        worth = counterfactual(dots, squares, row_sizes(self.units, dots))
        reward = self._by_action(worth)
        if self._step_squares is not None:
            reward = per_step(reward, self._by_action(self._step_squares))
        return reward

    def _by_action(self, components: Tensor) -> Tensor:
        return by_action(components, self.trained, self.options.dimensions, self.options.locations)

    def _squares_of(self, optimizer: MaskedAdamW, values: Tensor, changes: Tensor) -> Tensor:
        """‖δW_j‖² (n, R) of `changes` (n, roles, R), squared norms, to `values`."""
        gates = self.adapters.mask_table.gates.view(len(self.units), -1)
        return step_squares(row_sums(optimizer, values * values), changes, gates)

    def _global_reward(self, validate: Validate) -> Tensor:
        """R = L₁ + α L₂, (1,)."""
        l1 = validate(False)
        l2 = l1 - self._last_loss
        self._last_loss = l1
        reward = {"both": l1 + self.options.policy.alpha * l2, "l1": l1, "l2": l2}
        value = float("nan") if self._spoiled else reward[self.options.policy.loss]
        return torch.tensor([value], dtype=torch.float64)

    # --- decisions, on rank 0 ------------------------------------------------------------------

    def decide(self, step: int) -> Decision:
        with self._side_stream.run():  # the policy depends only on the last update
            policy = self._get_policy()
            if self._reward is not None:
                policy.learn(self._reward)
            ranks, locations = (drawn.tolist() for drawn in policy.draw(step, self.features()))
        dimensions, banks = self.options.dimensions, self.options.locations
        names = [unit.name for unit in self.units]
        return Decision(
            ranks={name: dimensions[i] for name, i in zip(names, ranks, strict=True)},
            locations={name: banks[i] for name, i in zip(names, locations, strict=True)},
        )

    def features(self) -> Tensor:
        """ξ (n, F) of the current gates; overwritten by the next call."""
        if self._features is None:
            spectra = [self.spectra[unit.name] for unit in self.units]
            held = [[i for r in self.ranges(unit) for i in r] for unit in self.units]
            self._features = Features(
                spectra, held, self.adapters.device,
                points=self.options.policy.spectrum_points, current=self.options.current_gates,
            )  # fmt: skip
        return self._features(self.adapters.mask_table.gates)

    def _get_policy(self) -> Reinforce:
        """The policy, built on first use on rank 0."""
        if self._policy is None:
            per_expert = self.options.policy.expert_embedding
            kind_of = [u.kind + u.name.removeprefix(stem(u.name)) if per_expert else u.kind
                       for u in self.units]  # fmt: skip
            kinds = sorted(set(kind_of))
            deepest = max((unit.layer for unit in self.units if unit.layer is not None), default=-1)
            layers = [deepest + 1 if u.layer is None else u.layer for u in self.units]
            options, components = self.options.policy, self.options.components
            current = components if self.options.current_gates else 0
            self._policy = Reinforce(
                options,
                layer=torch.tensor(layers),
                kind=torch.tensor([kinds.index(kind) for kind in kind_of]),
                features=1 + options.spectrum_points + current,
                ranks=self.options.dimensions,
                locations=len(self.options.locations),
                sizes=torch.tensor([self._size(unit) for unit in self.units]),
                seed=self.seed,
                device=self.adapters.device,
            )
        return self._policy

    def check_decision(self, decision: Decision) -> None:
        self.check_ranks(decision)
        for unit in self.units:
            rank, location = decision.ranks[unit.name], decision.locations.get(unit.name)
            if rank not in self.options.dimensions:
                raise ValueError(
                    f"rank {rank} for {unit.name}; accepted: {self.options.dimensions}"
                )
            if location not in self.options.locations:
                raise ValueError(
                    f"location {location} for {unit.name}; accepted: "
                    f"{', '.join(self.options.locations)}"
                )

    def apply(self, decision: Decision) -> bool:
        names = [unit.name for unit in self.units]
        ranks = list(map(decision.ranks.__getitem__, names))
        locations = list(map(decision.locations.__getitem__, names))
        rows = [self._row_of[action] for action in zip(ranks, locations, strict=True)]
        mask = torch.from_numpy(self._masks[rows])
        self._reward = None  # consumed by rank 0
        self._touched |= mask
        self._drawn = {"ranks": ranks, "locations": locations}
        self.adapters.mask_table.masks.copy_(mask.flatten())
        return False

    def scalars(self) -> dict[str, float]:
        """Fig. 3 and Table 4: mean rank and share of each location, by type and third."""
        if not self._drawn:
            return {}
        ranks, locations = self._drawn["ranks"], self._drawn["locations"]
        found: dict[str, float] = {
            "mean_rank": sum(ranks) / len(ranks),
            "distinct_actions": len({(r, r and s) for r, s in zip(ranks, locations, strict=True)}),
            "touched_parameters": sum(
                int(row.sum()) * self._size(unit)
                for row, unit in zip(self._touched, self.units, strict=True)
            ),
        } | (self._policy.scalars if self._policy is not None else {})
        for group, members in by_kind_and_third(self.units).items():
            found[f"mean_rank/{group}"] = sum(ranks[i] for i in members) / len(members)
            trained = [i for i in members if ranks[i] > 0]
            for location in self.options.locations if trained else ():
                share = sum(locations[i] == location for i in trained) / len(trained)
                found[f"share_{location}/{group}"] = share
        return found

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "touched": self._touched,
            "spoiled": torch.tensor(self._spoiled),
            "last_loss": torch.tensor(self._last_loss, dtype=torch.float64),
        }
        # "reached": the key in checkpoints since before the attribute had its name.
        held = {
            "before": self._before, "step_squares": self._step_squares,
            "reached": self._saw_tokens, "reward": self._reward,
        }  # fmt: skip
        return state | {name: tensor for name, tensor in held.items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._touched, self._spoiled = state["touched"].bool(), bool(state["spoiled"])
        self._last_loss = float(state["last_loss"])
        device = self.adapters.device
        self._before, self._step_squares, saw_tokens = (
            None if state.get(name) is None else state[name].to(device)
            for name in ("before", "step_squares", "reached")
        )
        self._saw_tokens = None if saw_tokens is None else saw_tokens.bool()
        self._reward = state.get("reward")

    def decider_state(self) -> dict[str, Tensor]:
        return {} if self._policy is None else self._policy.state_dict()

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._get_policy().load_state_dict(state)
