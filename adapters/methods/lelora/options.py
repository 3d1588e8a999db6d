"""LeLoRA's keys under `method:` and `method.policy:`. Does not import torch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from adapters.banks import largest_rank
from adapters.methods.options import StartedOptions
from adapters.options import Section
from adapters.unit import Unit

_ONLY_WITH = {
    "alpha": ("global",),
    "loss": ("global",),
    "step": ("counterfactual",),
    "score": ("attributed", "counterfactual"),
    "baseline": ("attributed", "global"),
    "idle_location": ("attributed", "global"),
}
"""Keys of the policy that have an effect only with these values of `credit`."""


Step = Literal["adam", "gradient"]


class PolicyOptions(Section):
    """Keys under `method.policy`."""

    mode: Literal["learned", "uniform", "frozen"] = "learned"
    """Learn the policy, draw uniformly, or draw from the initial policy."""
    rank_weights: list[float] | None = None
    """mode=uniform: relative frequency of each of `method.ranks`; none: equal."""
    network: Literal["mlp", "resnet", "tabnet"] = "mlp"
    """Backbone of the policy network (LeLoRA, tables 13 and 14)."""
    learning_rate: float = Field(3e-3, gt=0)
    """η₂ (paper: 1e-3)."""
    head_scale: float = Field(0.01, gt=0)
    """Factor of the Kaiming-uniform initial weights of the two heads; 1: the paper's, whose first
    policy prefers some actions by chance."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer of the policy; `sgd` is eq. 10 as printed."""
    credit: Literal["counterfactual", "attributed", "global"] = "counterfactual"
    """Rewards: one per action of a unit, the first-order change of the loss by a step on its
    components, trained or not (counterfactual); one per unit, the change due to its update
    (attributed); or one for all units, R = L₁ + α L₂ (global; paper)."""
    signal: Literal["auto", "validation", "next_batch"] = "auto"
    """Loss of the reward: on records held out from the training data, or on the next training
    batch, whose gradient is computed anyway. auto: validation if credit=global, else next_batch."""
    step: Step = "adam"
    """The unit step that credit=counterfactual scores: every scalar by one against the sign of its
    gradient, as Adam's first step (adam), or along the gradient, of root mean square one
    (gradient), which few large entries dominate."""
    score: Literal["loss", "per_step"] = "loss"
    """Rewards of a unit: the change of the loss, or that divided by the Frobenius norm ‖δW‖ of the
    step that makes it, which does not favour directions for the length of their steps."""
    alpha: float = Field(0.8, ge=0)
    """α in R = L₁ + α L₂, with credit=global."""
    loss: Literal["both", "l1", "l2"] = "both"
    """Terms of R, with credit=global."""
    baseline: Literal["mean", "trend"] = "mean"
    """Baseline b: mean of the earlier rewards, or their linear trend, extrapolated. Not used with
    credit=counterfactual."""
    baseline_window: int = Field(20, gt=0)
    """Number of earlier rewards for b; with credit=counterfactual, of rewards to average."""
    advantage: Literal["normalised", "raw"] = "normalised"
    """raw: R − b; normalised: divided by the standard deviation of the earlier rewards. With
    credit=counterfactual: R, or R divided by the unit's largest |R|."""
    entropy: float = Field(0.1, ge=0)
    """Weight of an entropy bonus."""
    cost: float = Field(0.0, ge=0)
    """Price per trained parameter, added to a unit's reward."""
    budget: float | None = Field(None, gt=0)
    """Mean rank B that every draw meets: it trains at most the parameters of rank B in all
    matrices, distributed by a price per parameter that is solved for every draw. none: no limit."""
    within: Literal["model", "layer"] = "model"
    """With `budget`: all matrices meet it together, at one price, or those of each block meet it by
    themselves, at a price of its own (as does what is outside the blocks)."""
    validation_samples: int = Field(32, gt=0)
    """Number of training records held out for validation, with signal=validation."""
    every: int = Field(1, gt=0)
    """Steps between two draws."""
    freeze_after: int | None = Field(None, ge=0)
    """Number of draws after which the allocation is fixed: the next decision, the policy's most
    probable ranks (a draw, unless mode=learned), is the last. With coordinates=delta the idle
    components are removed with their optimizer state. none: never."""
    features: Literal["current", "initial"] | None = None
    """current: the current singular values of the banks are inputs of the policy too. none: current
    with coordinates=singular, whose gates they are, else initial."""
    spectrum_points: int = Field(256, gt=1)
    """Number of points to which a unit's spectrum is resampled."""
    expert_embedding: bool = False
    """One embedding per expert's matrix type, instead of one per stack."""
    idle_location: bool = False
    """Include log p of the location where rank 0 was drawn, although it had no effect (paper)."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyOptions":
        if self.credit == "global" and self.signal == "next_batch":
            raise ValueError(
                "method.policy.signal: next_batch given with policy.credit=global; accepted: "
                "validation, or another policy.credit"
            )
        for key, credits in _ONLY_WITH.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.credit not in credits:
                raise ValueError(
                    f"method.policy.{key}: {value!r} given with policy.credit={self.credit}, where "
                    f"it has no effect; accepted: with policy.credit={' or '.join(credits)}"
                )
        if self.budget is not None and self.cost:
            raise ValueError(
                f"method.policy.cost: {self.cost:g} given with policy.budget, which solves the "
                "price; accepted: one of them"
            )
        if self.within == "layer" and self.budget is None:
            raise ValueError(
                "method.policy.within: layer given without method.policy.budget; accepted: with it"
            )
        if self.rank_weights is not None:
            if self.mode != "uniform":
                raise ValueError(
                    f"method.policy.rank_weights: given with policy.mode={self.mode}; accepted: "
                    "with uniform"
                )
            if min(self.rank_weights) < 0 or sum(self.rank_weights) <= 0:
                raise ValueError(
                    f"method.policy.rank_weights: {self.rank_weights} given; accepted: numbers of "
                    "at least 0, not all of them 0"
                )
        return self

    @property
    def validates(self) -> bool:
        """Whether rewards are computed on validation records."""
        return self.mode == "learned" and (self.credit == "global" or self.signal == "validation")


Location = Literal["primary", "medium", "minor"]


class LeLoRAOptions(StartedOptions):
    """Options of `method.kind: lelora`; `rank` is r_max."""

    kind: Literal["lelora"] = "lelora"
    """Name of the method."""
    ranks: list[int] | None = Field(None, min_length=1)
    """Ranks to choose from, R; `rank` is then the largest of them. none: 0, 2, 4, 8, … up to
    `rank`."""
    locations: list[Location] = Field(["primary", "medium", "minor"], min_length=1)
    """Banks to choose from."""
    coordinates: Literal["singular", "balanced", "delta"] = "singular"
    """How a bank's triplets U Σ Vᵀ become components. singular: A = Vᵀ, g = Σ, B = U, all trained,
    taken out of W (paper); balanced: A = √Σ Vᵀ, B = U √Σ, taken out of W, as PiSSA; delta: A = Vᵀ
    with the norm of LoRA's A, B = 0, g = α/r, and W stays whole: the bank only gives directions."""
    wake: Literal["gradual", "at_once"] = "gradual"
    """First steps of a component. gradual: without Adam's bias correction of the momentum, hence
    small; at_once: with it, a full step along one batch's gradient (paper)."""
    policy: PolicyOptions = Field(default_factory=PolicyOptions)
    """The policy and how it learns."""

    @model_validator(mode="before")
    @classmethod
    def _largest(cls, given: Any) -> Any:
        """`rank` defaults to the largest of `ranks`."""
        ranks = given.get("ranks") if isinstance(given, Mapping) else None
        if isinstance(ranks, list) and all(type(r) is int for r in ranks) and max(ranks, default=0):
            return {"rank": max(ranks), **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> "LeLoRAOptions":
        ranks = self.dimensions
        if sorted(set(ranks)) != ranks or ranks[0] < 0 or ranks[-1] == 0:
            raise ValueError(
                f"method.ranks: {ranks} given; accepted: ascending whole numbers from 0 on, the "
                "last above 0"
            )
        if ranks[-1] != self.rank:
            raise ValueError(
                f"method.rank: {self.rank} given with method.ranks: {ranks}; accepted: their "
                f"largest, {ranks[-1]}"
            )
        if len(set(self.locations)) < len(self.locations):
            raise ValueError(
                f"method.locations: {self.locations} given; accepted: each location once"
            )
        if self.policy.freeze_after == 0 and self.policy.mode == "learned" and not self.replay:
            raise ValueError(
                "method.policy.freeze_after: 0 given with policy.mode=learned; accepted: 1 or "
                "more draws, from which the policy learns"
            )
        budget = self.policy.budget
        if budget is not None and not ranks[0] <= budget <= ranks[-1]:
            raise ValueError(
                f"method.policy.budget: {budget:g} given; accepted: {ranks[0]} to {ranks[-1]}, the "
                "smallest and the largest of method.ranks"
            )
        if self.coordinates != "singular" and self.policy.features == "current":
            raise ValueError(
                f"method.policy.features: current given with method.coordinates="
                f"{self.coordinates}; accepted: initial, or method.coordinates=singular"
            )
        self.start_options.check_fixed(self.kind)
        given = f"method.start: {self.start} given with method."
        if self.start != "lora" and self.coordinates != "delta":
            raise ValueError(
                f"{given}coordinates={self.coordinates}, which takes A from W; accepted: lora, or "
                "method.coordinates=delta"
            )
        if self.start != "lora" and self.locations != ["primary"]:
            raise ValueError(
                f"{given}locations={self.locations}; accepted: lora, or method.locations=[primary]"
            )
        weights = self.policy.rank_weights
        if weights is not None and len(weights) != len(ranks):
            raise ValueError(
                f"method.policy.rank_weights: {len(weights)} numbers given; accepted: one for each "
                f"of method.ranks ({len(ranks)})"
            )
        return self

    @property
    def dimensions(self) -> list[int]:
        """R, the ranks to choose from."""
        if self.ranks is not None:
            return self.ranks
        return [0, *(2**k for k in range(1, self.rank.bit_length()) if 2**k < self.rank), self.rank]

    @property
    def components(self) -> int:
        return self.rank * len(self.locations)

    @property
    def takes_from_weight(self) -> bool:
        return self.coordinates != "delta"

    @property
    def last_decision(self) -> int | None:
        """The step of the decision that fixes the allocation; None: never."""
        draws = self.policy.freeze_after
        return None if draws is None else draws * self.policy.every

    @property
    def removes_idle(self) -> bool:
        """Whether components are removed once the allocation is fixed."""
        return self.last_decision is not None and not self.takes_from_weight

    @property
    def current_gates(self) -> bool:
        """Whether the banks' current singular values are inputs of the policy."""
        return self.coordinates == "singular" and self.policy.features != "initial"

    @property
    def validation_samples(self) -> int:
        return self.policy.validation_samples if self.policy.validates else 0

    def check_units(self, units: Sequence[Unit]) -> None:
        for unit in units:
            largest = largest_rank(self.locations, min(unit.out_features, unit.in_features))
            if self.rank > largest:
                raise ValueError(
                    f"method.ranks: {self.rank} given; accepted: at most {largest}, for "
                    f"{', '.join(self.locations)} of {unit.name} ({unit.out_features} x "
                    f"{unit.in_features}) not to overlap"
                )
