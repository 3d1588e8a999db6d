"""What LeLoRA's policy is told: keys under `method.policy`."""

from typing import Literal

from pydantic import Field, model_validator

from adapters.options import Section

_ONLY_WITH = {
    "alpha": ("global",),
    "loss": ("global",),
    "baseline": ("attributed", "global"),
    "idle_location": ("attributed", "global"),
}
"""Keys of the policy that mean something with some credits only."""


class PolicyOptions(Section):
    """Keys under `method.policy`."""

    mode: Literal["learned", "uniform", "frozen"] = "learned"
    """Learn; or draw uniformly; or draw from the policy as it was initialised."""
    rank_weights: list[float] | None = None
    """mode=uniform: relative frequency of each of `method.ranks`; none: all alike."""
    network: Literal["mlp", "resnet", "tabnet"] = "mlp"
    """Backbone of the policy network (LeLoRA, tables 13 and 14)."""
    learning_rate: float = Field(3e-3, gt=0)
    """η₂ (paper: 1e-3)."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """`sgd` is eq. 10 to the letter."""
    credit: Literal["counterfactual", "attributed", "global"] = "counterfactual"
    """A reward for every action of a unit, the first-order change of the loss that its components
    promise, trained or not; or one a unit, the change that its own update caused; or one for all,
    R = L₁ + α L₂ (paper)."""
    signal: Literal["auto", "validation", "next_batch"] = "auto"
    """Loss that the reward is about: on records taken out of the training data, or on the next
    training batch, whose gradient is computed anyway. auto: validation where credit=global."""
    alpha: float = Field(0.8, ge=0)
    """α in R = L₁ + α L₂, with credit=global."""
    loss: Literal["both", "l1", "l2"] = "both"
    """Terms of R, with credit=global."""
    baseline: Literal["mean", "trend"] = "mean"
    """b: mean of the earlier rewards, or their linear trend carried on. Rewards of every action
    need none."""
    baseline_window: int = Field(20, gt=0)
    """Earlier rewards that b looks at; with credit=counterfactual, rewards that are averaged."""
    advantage: Literal["normalised", "raw"] = "normalised"
    """R − b, or that over the spread of the earlier rewards (with credit=counterfactual: R, or
    that over the unit's largest)."""
    entropy: float = Field(0.1, ge=0)
    """Weight of an entropy bonus."""
    cost: float = Field(0.0, ge=0)
    """Price added to a unit's reward for every parameter that it trains."""
    validation_samples: int = Field(32, gt=0)
    """Training records taken out to validate on, with signal=validation."""
    every: int = Field(1, gt=0)
    """Steps for which a draw holds."""
    features: Literal["current", "initial"] = "current"
    """Whether the network also sees the banks' singular values as they are by now."""
    spectrum_points: int = Field(256, gt=1)
    """Points to which a unit's singular values are resampled."""
    expert_embedding: bool = False
    """Give every expert's matrix type an embedding of its own; else those of a stack share one."""
    idle_location: bool = False
    """Keep log p of the location where rank 0 was drawn, though it had no effect (paper)."""

    @model_validator(mode="after")
    def _check(self):
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
        """Whether rewards come from validation records."""
        return self.mode == "learned" and (self.credit == "global" or self.signal == "validation")
