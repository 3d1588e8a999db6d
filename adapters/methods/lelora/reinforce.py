"""REINFORCE over the actions (rank, location) of all units: drawing from the policy and learning.

    a_u ~ p(· | ξ_u; Ω)        Ω ← Ω − η₂ (1/n) Σ_u (R_u − b_u) ∇_Ω log p(a_u | ξ_u; Ω)      (10)

R is a loss: lower is better. R is one number for all units (`credit: global`, eq. 9) or one per
unit (`attributed`); b averages only earlier rewards, so the first sample is not learned from. If
the rewards of all actions are known (`counterfactual`), the expectation over actions replaces the
sample and its variance:

    Ω ← Ω − η₂ (1/n) Σ_u ∇_Ω Σ_a p(a | ξ_u; Ω) R_u(a)

With a budget of B parameters per unit of size, draws are those of the policy tilted by a price,

    p_λ(r | ξ_u) ∝ p(r | ξ_u; Ω) exp(−λ r size_u),        Σ_u r_u size_u ≤ B Σ_u size_u,

where the sums are over all units, or, each with a λ of its own, over those of one block.

r_u = argmax_r log p(r | ξ_u) + e_u(r) − λ r size_u with Gumbel noise e is a sample of p_λ for any λ
(Maddison et al. 2014); the noise is drawn once, then λ is solved such that the sample meets the
budget (`budget.py`). What is learned from is p_λ, with λ as a constant, in the place of p above.
Where all rewards are known they are priced too, R_u(r, s) + μ r size_u, with μ ≥ 0 such that the
units' best ranks, argmin_r min_s, meet the budget: the policy learns which units are worth their
parameters. With a budget logits have no slope along the rank in common (`Budget.centred`): it
would be learned first, since a small budget has nothing for most units, and p(r > 0) vanish for all
before they differ; a price makes up for it only in proportion to size.

All of this runs on rank 0.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from adapters import seeds
from adapters.cuda.graph_replay import GraphReplay
from adapters.methods.lelora.budget import Budget
from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.policy import (
    PolicyNetwork,
    entropy,
    log_probability,
    rounded,
    sample,
)
from adapters.methods.lelora.window import SlidingWindow, spread_of

_LOG_STEP = 1e-4
_LEAST = -1e4
"""Of log p: a rank of probability 0 has a finite price."""
_PRECISION = 2.0**16
"""Rewards are rounded to multiples of the next power of two divided by this."""


@dataclass(frozen=True)
class Draw:
    """A sample without its reward yet, with the Ω and the features it was drawn from."""

    weights: Tensor  # concatenated
    features: Tensor
    ranks: Tensor
    locations: Tensor
    tilt: Tensor  # (n, |R|): λ r size_u, subtracted from the ranks' logits; 0 without a budget


class Reinforce:
    """The policy of n units and its learning rule.

    `layer` and `kind`: (n,) indices; `features`: number of features F; `ranks`: the set R;
    `locations`: number of locations; `sizes` (n,): parameters of one component of each unit.
    """

    def __init__(
        self,
        options: PolicyOptions,
        *,
        layer: Tensor,
        kind: Tensor,
        features: int,
        ranks: Sequence[int],
        locations: int,
        sizes: Tensor,
        seed: int,
        device: torch.device,
    ):
        self.options, self.seed, self._generator = options, seed, torch.Generator()
        self._layer, self._kind = layer.to(device), kind.to(device)
        self._ranks, self._locations = torch.tensor(ranks).to(device), locations
        costs = sizes.double().unsqueeze(1) * torch.tensor(ranks).double()
        self._sizes, self._costs = sizes.double().to(device), costs.to(device)
        self._budget: Budget | None = None  # on the CPU
        if options.budget is not None:
            part = layer if options.within == "layer" else torch.zeros_like(layer)
            fill = options.within == "layer"
            self._budget = Budget.of_rank(options.budget, costs, sizes, part, fill=fill)
            self._device_budget = self._budget.to(device)
        self.network = PolicyNetwork(
            options.network, layers=int(layer.max()) + 1, kinds=int(kind.max()) + 1,
            features=features, ranks=len(ranks), locations=locations, seed=seed,
            head_scale=options.head_scale,
        ).to(device)  # fmt: skip
        make = torch.optim.Adam if options.optimizer == "adam" else torch.optim.SGD
        fused = device.type == "cuda"
        self._optimizer = make(self.network.parameters(), lr=options.learning_rate, fused=fused)
        self._parameters = dict(self.network.named_parameters())
        # TabNet's control flow depends on values: it cannot be captured in a CUDA graph.
        captured = fused and options.network != "tabnet"
        counterfactual = options.credit == "counterfactual"
        descend = self._descend_expected if counterfactual else self._descend_sampled
        self._descend = GraphReplay(descend, captured)
        self._evaluate = GraphReplay(self._distributions, captured)
        self._earlier: SlidingWindow | None = None  # rewards
        self._draws: deque[Draw] = deque()
        self._figures: dict[str, Callable[[], Tensor]] = {}  # evaluated on access only

    @property
    def scalars(self) -> dict[str, float]:
        """Numbers for the log."""
        return {name: float(figure()) for name, figure in self._figures.items()}

    def draw(self, step: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the actions of `step`: indices into R and into the locations, (n,) each on the CPU.

        Depends only on (seed, step), Ω and `features` (n, F).
        """
        n = len(self._layer)
        self._generator.manual_seed(seeds.mixed(self.seed, step))
        uniform = torch.rand(2, n, dtype=torch.float64, generator=self._generator)
        features = features.to(self._layer.device)
        weights = self._copied() if self.options.mode == "learned" else None
        of_ranks, of_locations, logs = self.probabilities(features)
        locations, tilt = sample(of_locations, uniform[1]), torch.zeros_like(self._costs)
        if self._budget is None:
            ranks = sample(of_ranks, uniform[0])
        else:
            noise = torch.rand(logs.shape, dtype=torch.float64, generator=self._generator)
            gumbel = -(-noise.clamp(min=1e-300).log()).log()
            ranks, price = self._within_budget(logs, gumbel)
            tilt = self._device_budget.charge(price.to(tilt.device, non_blocking=True))
        if weights is not None:
            self._draws.append(Draw(weights, features.clone(), ranks, locations, tilt))
        return ranks, locations

    def most_probable(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable actions, within the budget if there is one; as `draw`."""
        of_ranks, of_locations, logs = self.probabilities(features.to(self._layer.device))
        locations = rounded(of_locations).argmax(1)
        if self._budget is None:
            return rounded(of_ranks).argmax(1), locations
        return self._within_budget(logs, torch.zeros_like(logs))[0], locations

    def _within_budget(self, logs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(indices of the ranks (n,) that meet the budget, λ of each of its parts), given log p and
        e (n, |R|)."""
        assert self._budget is not None
        ranks, price = self._budget.allocate(-(logs + noise))
        self._figures["price"] = price.mean
        return ranks, price

    def _copied(self) -> Tensor:
        """A copy of Ω, concatenated: `learn` differentiates at the Ω of the draw."""
        return torch.cat([p.detach().view(-1) for p in self._parameters.values()])

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p of every rank (n, |R|) and location (n, |S|), and log p of ranks in steps of 1e-4, so
        that devices that differ in the last bits decide alike; under the current Ω, on the CPU."""
        n, ranks, locations = len(self._layer), len(self._ranks), self._locations
        if self.options.mode == "uniform":
            weights = torch.tensor(self.options.rank_weights or [1.0] * ranks).repeat(n, 1)
            of_ranks = weights / weights.sum(1, keepdim=True)
            of_locations = torch.ones(n, locations) / locations
            logs = of_ranks.log()
        else:
            all_three, rank_logits, location_logits = self._evaluate(features)
            self._figures |= {
                "entropy_rank": lambda: entropy(rank_logits).mean(),
                "entropy_location": lambda: entropy(location_logits).mean(),
            }
            of_ranks, of_locations, logs = all_three.cpu().split([ranks, locations, ranks], 1)
        logs = logs.double().clamp(min=_LEAST).div(_LOG_STEP).round() * _LOG_STEP
        return of_ranks, of_locations, logs

    def _distributions(self, features: Tensor) -> tuple[Tensor, ...]:
        """p of ranks and locations and log p of ranks, concatenated for one transfer; logits."""
        ranks, locations = self._logits(self._parameters, features)
        parts = [ranks.softmax(1), locations.softmax(1), ranks.log_softmax(1)]
        return torch.cat(parts, 1), ranks, locations

    def learn(self, reward: Tensor) -> None:
        """One step on Ω with the reward of the oldest pending draw.

        Shape (1,): one reward for all units; (n,): per unit; (n, |R|, |S|): per unit and action.
        Units with a non-finite reward have no term in the loss, and their baseline stays unchanged.
        """
        draw = self._draws.popleft()
        reward = reward.double().to(self._layer.device)
        if not bool(_known(reward).any()):
            return
        if self._earlier is None:
            self._earlier = SlidingWindow(
                self.options.baseline_window, reward.new_empty(0, *reward.shape)
            )
        if reward.dim() == 3:
            unit, newest = range(len(reward)), self._earlier
            self._figures["reward"] = lambda: (
                newest.padded[-1].cpu()[unit, draw.ranks, draw.locations].nanmean()
            )
            self._descend(draw.features, draw.weights, reward, draw.tilt)
        else:
            reward = self._priced(_rounded(reward), draw.ranks)
            self._learn_sampled(draw, reward, self._earlier.all)
            self._earlier.push_(reward)
        self._earlier.counted()

    def _learn_sampled(self, draw: Draw, reward: Tensor, earlier: Tensor) -> None:
        """Learn from the drawn actions; b and the spread are those of the earlier rewards."""
        self._figures["reward"] = reward.nanmean
        if len(earlier) == 0:
            return
        baseline = self._baseline(earlier)
        self._figures["baseline"] = baseline.nanmean
        normalised = self.options.advantage == "normalised"
        spread = spread_of(earlier) if normalised else torch.ones_like(reward)
        if spread is not None:
            advantage = (reward - baseline) / spread.clamp(min=1e-300)
            if normalised:  # 0 while the earlier rewards are constant; outliers are clipped
                advantage = advantage.where(spread > 0, 0.0).clamp(-3.0, 3.0)
            self._update(draw, advantage.nan_to_num())

    def _priced(self, reward: Tensor, drawn: Tensor | None = None) -> Tensor:
        """Rewards plus the price of the trained parameters. `drawn`: indices into R (n,); None if
        the rewards are those of all actions. The order of products is that of earlier versions,
        whose runs go on to the last bit."""
        if self.options.cost == 0:
            return reward
        if drawn is None:
            return reward + self.options.cost * self._sizes[:, None, None] * self._ranks[:, None]
        price = self.options.cost * self._ranks[drawn.to(reward.device)] * self._sizes
        return reward + (price if len(reward) > 1 else price.sum(0, keepdim=True))

    def _baseline(self, earlier: Tensor) -> Tensor:
        """b, the mean or the extrapolated trend of the earlier rewards."""
        mean = earlier.nanmean(0)
        if self.options.baseline == "mean":
            return mean
        known = earlier.isfinite()
        time = torch.arange(len(earlier), dtype=torch.float64, device=earlier.device)
        time = time.unsqueeze(1).where(known, torch.nan)
        middle = time.nanmean(0)
        slope = ((time - middle) * earlier).nansum(0) / (time - middle).square().nansum(0)
        return torch.where(known.sum(0) < 3, mean, mean + slope * (len(earlier) - middle))

    def _update(self, draw: Draw, advantage: Tensor) -> None:
        """Eq. 10: the gradient at the Ω of the draw, the step on the current Ω."""
        ranks, locations = (part.to(advantage.device) for part in (draw.ranks, draw.locations))
        counts = (self._ranks[ranks] > 0) | self.options.idle_location
        self._descend(draw.features, draw.weights, advantage, ranks, locations, counts, draw.tilt)

    def _descend_sampled(
        self, features: Tensor, flat: Tensor, advantage: Tensor, ranks: Tensor, locations: Tensor,
        counts: Tensor, tilt: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        """One step on (1/n) Σ_u (R_u − b_u) log p_λ(a_u)."""
        weights, rank_logits, location_logits = self._recompute(flat, features)
        rank_logits = rank_logits - tilt.to(rank_logits)
        log_p = log_probability(
            rank_logits, location_logits, ranks, locations, location_counts=counts
        )
        loss = (advantage.to(log_p) * log_p).mean()
        return self._optimizer_step(weights, loss, rank_logits, location_logits)

    def _descend_expected(
        self, features: Tensor, flat: Tensor, reward: Tensor, tilt: Tensor
    ) -> Sequence[Tensor]:
        """One step on (1/n) Σ_u Σ_a p_λ(a) R_u(a), with R averaged over the window and, if
        `normalised`, divided by its largest entry."""
        assert self._earlier is not None
        self._earlier.push_(self._priced(_rounded(reward)))
        mean = self._earlier.padded.nanmean(0).nan_to_num()
        if self._budget is not None:
            _, price = self._device_budget.solve(mean.amin(2))
            mean = mean + self._device_budget.charge(price.clamp(min=0)).unsqueeze(2)
        if self.options.advantage == "normalised":
            mean = mean / mean.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
        weights, rank_logits, location_logits = self._recompute(flat, features)
        rank_logits = rank_logits - tilt.to(rank_logits)
        both = rank_logits.softmax(1).unsqueeze(2) * location_logits.softmax(1).unsqueeze(1)
        expected = (both * mean.to(both)).sum((1, 2)).where(_known(reward), 0.0)
        return self._optimizer_step(weights, expected.mean(), rank_logits, location_logits)

    def _recompute(
        self, flat: Tensor, features: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The Ω of a draw and its logits, differentiable."""
        weights = {name: w.requires_grad_() for name, w in self._parts(flat.detach()).items()}
        return weights, *self._logits(weights, features)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Ω's parameters as views of their concatenated values."""
        parts = flat.split([p.numel() for p in self._parameters.values()])
        named = zip(self._parameters.items(), parts, strict=True)
        return {name: part.view_as(parameter) for (name, parameter), part in named}

    def _logits(self, weights: Mapping[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self._layer, self._kind, features
        ranks, locations = functional_call(self.network, dict(weights), inputs)
        if self._budget is not None:
            ranks = self._device_budget.centred(ranks)
        return ranks, locations

    def _optimizer_step(
        self, weights: dict[str, Tensor], loss: Tensor, rank_logits: Tensor, location_logits: Tensor
    ) -> Sequence[Tensor]:
        """One optimizer step on Ω with the gradient of `loss` (minus the entropy bonus) at
        `weights`."""
        if self.options.entropy:
            both = entropy(rank_logits) + entropy(location_logits)
            loss = loss - self.options.entropy * both.mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        if self.options.optimizer == "adam":  # required under capture; warns otherwise
            capturing = loss.is_cuda and torch.cuda.is_current_stream_capturing()
            self._optimizer.param_groups[0]["capturable"] = capturing
        self._optimizer.step()
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        """Ω, its optimizer, the earlier rewards and the pending draws."""
        state = {f"network.{name}": p.detach() for name, p in self._parameters.items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{part}": tensor for part, tensor in moments.items()}
        if self._earlier:
            state["earlier"] = self._earlier.all
        for index, draw in enumerate(self._draws):
            weights = self._parts(draw.weights).items()
            state |= {f"draw.{index}.weights.{name}": value for name, value in weights}
            for part in ("features", "ranks", "locations", "tilt"):
                state[f"draw.{index}.{part}"] = getattr(draw, part)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        device = self._layer.device
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"network.{name}"])
        optimizer = self._optimizer.state_dict()
        optimizer["state"] = {
            int(index): dict(parts) for index, parts in _nested(state, "optimizer.").items()
        }
        self._optimizer.load_state_dict(optimizer)
        self._descend.forget()  # moments and rewards were reallocated
        if "earlier" in state:
            self._earlier = SlidingWindow(self.options.baseline_window, state["earlier"].to(device))
        for _, parts in sorted(_nested(state, "draw.").items(), key=lambda item: int(item[0])):
            weights = torch.cat([parts[f"weights.{name}"].view(-1) for name in self._parameters])
            features = parts["features"].to(device)
            tilt = parts.get("tilt", torch.zeros_like(self._costs)).to(device)
            self._draws.append(
                Draw(weights.to(device), features, parts["ranks"], parts["locations"], tilt)
            )


def _known(reward: Tensor) -> Tensor:
    """(n,) bool: the units whose rewards are all finite."""
    return reward.isfinite().view(len(reward), -1).all(1)


def _rounded(reward: Tensor) -> Tensor:
    """Round to 16 significant bits, so that results do not depend on the order of reductions; NaN
    for units whose rewards are not all finite."""
    known = _known(reward).view(-1, *[1] * (reward.dim() - 1))
    mantissa, exponent = torch.frexp(reward.where(known, torch.nan))
    return torch.ldexp(torch.round(mantissa * _PRECISION) / _PRECISION, exponent)


def _nested(state: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Entries named `<prefix><index>.<name>`, nested as {index: {name: tensor}}."""
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            nested.setdefault(index, {})[rest] = tensor
    return nested
