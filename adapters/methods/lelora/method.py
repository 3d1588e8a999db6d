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
component, trained or not, every action of a unit gets a reward in every step (`rewards.py`). With
`signal: next_batch` L is the loss of the next training batch, whose gradient is computed anyway.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
from adapters.methods.lelora.actions import Actions
from adapters.methods.lelora.allocation import allocation_figures, idle_change
from adapters.methods.lelora.features import Features, embedding_indices
from adapters.methods.lelora.options import LeLoRAOptions
from adapters.methods.lelora.reinforce import Reinforce
from adapters.methods.lelora.rewards import (
    attributed,
    by_action,
    counterfactual,
    per_step,
    unit_steps,
)
from adapters.methods.lora import started_rows
from adapters.methods.spectral import SpectralMethod, balanced, directions
from adapters.optimizer import MaskedAdamW
from adapters.spectral import Triplets
from adapters.starts import Start
from adapters.unit import Unit

_REWARD = "reward (change of loss, lower is better)"


class LeLoRA(SpectralMethod):
    """Up to three singular banks per unit, of which one slice trains."""

    Options = LeLoRAOptions
    decides = True
    decides_before = "update"
    keeps_none = (
        "method.policy.freeze_after fixed rank 0 for all of them; accepted: method.ranks without "
        "0, or method.policy.budget"
    )
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
        self._drawn: list[int] | None = None  # each unit's action
        self._applied = 0  # decisions so far
        self._fixed = False  # that was the last one
        self._removed = 0.0  # ‖ΔW‖ of the components that were then removed, over that of all
        self.changes_structure = options.removes_idle
        self._actions = Actions(options)

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
                return directions(triplets, self.options.alpha / self.options.rank)
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

    def adopt(self, starts: Mapping[str, Start]) -> bool:
        for name, start in starts.items():
            A, _ = started_rows(start, self.options.rank, self.options.start_options.scale)
            self.adapters[name].A.data.copy_(A)
        return False

    def _size(self, unit: Unit) -> int:
        """Trained parameters of one component."""
        return unit.in_features + unit.out_features + (self.options.coordinates == "singular")

    # --- rewards, on every rank ----------------------------------------------------------------

    def on_train_begin(self, optimizer: MaskedAdamW, validate: Validate) -> None:
        if self._learns and self.options.policy.credit == "global":
            self._last_loss = validate(False)

    def due(self, step: int) -> bool:
        last = self.options.last_decision
        return step % self.options.policy.every == 0 and (last is None or step <= last)

    def decides_before_at(self, step: int) -> Literal["forward", "update"]:
        removes = self.options.removes_idle and step == self.options.last_decision
        return "forward" if removes else "update"

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
                self._step_squares = unit_steps(
                    optimizer, self._before, self.units, self._gates, policy.step
                )

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
        learned = self.options.policy.mode == "learned"
        return learned and self.options.replay is None and not self._fixed

    def _unit_rewards(self, optimizer: MaskedAdamW) -> Tensor:
        """Rewards by unit (n), or by unit and action (n, |R|, |S|), from the reduced, unclipped
        gradient of all components. NaN for experts that saw no tokens, and for all units after a
        skipped step."""
        assert self._before is not None
        saw_tokens, known = optimizer.units_that_saw_tokens(), self._saw_tokens
        if self.options.policy.credit == "attributed":
            by_length = self.options.policy.score == "per_step"
            reward, changed = attributed(optimizer, self._before, self._gates, by_length=by_length)
            if known is not None:  # it may have seen tokens in a later step of the same draw
                known = known | changed
        else:
            reward = self._counterfactual_rewards(optimizer, self._before)
        if self._spoiled:
            return reward * float("nan")
        if saw_tokens is None or known is None:
            return reward
        return reward.masked_fill(
            ~(known & saw_tokens).view(-1, *[1] * (reward.dim() - 1)), torch.nan
        )

    def _counterfactual_rewards(self, optimizer: MaskedAdamW, earlier: Tensor) -> Tensor:
        """R_u(r, s) = Σ_{j in slice} `counterfactual`_j, (n, |R|, |S|); with `score: per_step` over
        the slice's ‖δW‖."""
        components = counterfactual(optimizer, earlier, self.units, self.options.policy.step)
        reward = self._by_action(components)
        if self._step_squares is not None:
            reward = per_step(reward, self._by_action(self._step_squares))
        return reward

    def _by_action(self, components: Tensor) -> Tensor:
        options, trained = self.options, self._actions.trained
        return by_action(components, trained, options.dimensions, options.locations)

    @property
    def _gates(self) -> Tensor:
        """(n, R)."""
        return self.adapters.mask_table.gates.view(len(self.units), -1)

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
            if step == self.options.last_decision and self._learns:
                drawn = policy.most_probable(self.features())
            else:
                drawn = policy.draw(step, self.features())
            ranks, locations = (indices.tolist() for indices in drawn)
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
            layers, kinds = embedding_indices(
                self.units, per_expert=self.options.policy.expert_embedding
            )
            options, components = self.options.policy, self.options.components
            current = components if self.options.current_gates else 0
            self._policy = Reinforce(
                options,
                layer=torch.tensor(layers),
                kind=torch.tensor(kinds),
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
        self._drawn = self._actions.numbers(names, decision.ranks, decision.locations)
        mask = self._actions.masks(self._drawn)
        self._reward = None  # consumed by rank 0
        self._touched |= mask
        self.adapters.mask_table.masks.copy_(mask.flatten())
        self._fixed = self._applied == self.options.policy.freeze_after
        self._applied += 1
        return self._fix(mask) if self._fixed else False

    def _fix(self, mask: Tensor) -> bool:
        """Fix the allocation, whose components are `mask` (n, R). Idle ones of `delta` are removed,
        with what they had learned; other idle ones stay, as they are a part of W. True if tensors
        were removed."""
        self._before = self._step_squares = self._saw_tokens = None
        self._policy = self._features = None
        if not self.options.removes_idle:
            return False
        self._removed = idle_change([self.adapters[unit.name] for unit in self.units], mask)
        for unit, kept in zip(self.units, mask, strict=True):
            self.adapters.narrow(unit, kept)
        self._touched = mask
        return True

    def scalars(self) -> dict[str, float]:
        if self._drawn is None:
            return {}
        ranks, locations = self._actions.pairs(self._drawn)
        found = allocation_figures(self.units, ranks, locations, self.options.locations)
        found["touched_parameters"] = sum(
            int(row.sum()) * self._size(unit)
            for row, unit in zip(self._touched, self.units, strict=True)
        )
        if self._fixed and self.options.removes_idle:
            found["removed_change"] = self._removed
        return found | (self._policy.scalars if self._policy is not None else {})

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "touched": self._touched,
            "spoiled": torch.tensor(self._spoiled),
            "last_loss": torch.tensor(self._last_loss, dtype=torch.float64),
            "applied": torch.tensor(self._applied),
            "fixed": torch.tensor(self._fixed),
            "removed": torch.tensor(self._removed, dtype=torch.float64),
        }
        if self._drawn is not None:
            state["drawn"] = torch.tensor(self._drawn)
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
        self._applied, self._fixed = int(state.get("applied", 0)), bool(state.get("fixed", False))
        self._removed = float(state.get("removed", 0.0))
        self._drawn = state["drawn"].tolist() if "drawn" in state else None

    def decider_state(self) -> dict[str, Tensor]:
        return {} if self._policy is None else self._policy.state_dict()

    def load_decider_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._get_policy().load_state_dict(state)
