"""REINFORCE over (rank, location) of every unit: LeLoRA's policy, how it draws and how it learns.

    a_u ~ p(· | ξ_u; Ω)        Ω ← Ω − η₂ (1/n) Σ_u (R_u − b_u) ∇_Ω log p(a_u | ξ_u; Ω)      (10)

R is a loss, lower is better. Eq. 9's R_i is one number for all units (`credit: global`) or the
unit's own (`attributed`); b averages earlier R only, so that the first sample, which has none,
teaches nothing. Where every action's reward is known and not only the drawn one's
(`counterfactual`), the sum over actions takes the place of the sample, without its variance:

    Ω ← Ω − η₂ (1/n) Σ_u ∇_Ω Σ_a p(a | ξ_u; Ω) R_u(a)

Everything here lives on rank 0.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from adapters import seeds
from adapters.cuda.graph_replay import GraphReplay
from adapters.methods.lelora.options import PolicyOptions
from adapters.methods.lelora.policy import PolicyNetwork, entropy, log_probability, sample
from adapters.methods.lelora.window import SlidingWindow

_PRECISION = 2.0**16
"""Rewards are rounded to so many parts of the next power of two."""


@dataclass(frozen=True)
class Draw:
    """A sample whose reward is still to come, with the Ω and the inputs that it was drawn from."""

    weights: Tensor  # end to end
    features: Tensor
    ranks: Tensor
    locations: Tensor


class Reinforce:
    """The policy of all units: n rows of layer, matrix type and features.

    `ranks` is the set R, `locations` the number of locations, `sizes` (n) the parameters that one
    component of a unit has.
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
        self._ranks, self._sizes = torch.tensor(ranks).to(device), sizes.double().to(device)
        self._locations = locations
        self.network = PolicyNetwork(
            options.network, layers=int(layer.max()) + 1, kinds=int(kind.max()) + 1,
            features=features, ranks=len(ranks), locations=locations, seed=seed,
        ).to(device)  # fmt: skip
        make = torch.optim.Adam if options.optimizer == "adam" else torch.optim.SGD
        fused = device.type == "cuda"
        self._optimizer = make(self.network.parameters(), lr=options.learning_rate, fused=fused)
        self._parameters = dict(self.network.named_parameters())
        # TabNet looks at values to know when it is done: its operations cannot be recorded.
        recorded = fused and options.network != "tabnet"
        descend = self._descend_table if options.credit == "counterfactual" else self._descend_drawn
        self._descend = GraphReplay(descend, recorded)
        self._look = GraphReplay(self._probabilities, recorded)
        self._earlier: SlidingWindow | None = None  # rewards
        self._draws: deque[Draw] = deque()
        self._figures: dict[str, Callable[[], Tensor]] = {}  # computed where the log asks

    @property
    def scalars(self) -> dict[str, float]:
        """What the log shows."""
        return {name: float(figure()) for name, figure in self._figures.items()}

    def draw(self, step: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into R and into the locations, (n) each on the CPU, for `step`.

        Depends on (seed, step), Ω and `features` (n, F) only.
        """
        n = len(self._layer)
        self._generator.manual_seed(seeds.mixed(self.seed, step))
        uniform = torch.rand(2, n, dtype=torch.float64, generator=self._generator)
        features = features.to(self._layer.device)
        weights = self._copied() if self.options.mode == "learned" else None
        probabilities = self.probabilities(features)
        ranks, locations = (sample(p, u) for p, u in zip(probabilities, uniform, strict=True))
        if weights is not None:
            self._draws.append(Draw(weights, features.clone(), ranks, locations))
        return ranks, locations

    def _copied(self) -> Tensor:
        """Ω end to end: what is differentiated later must not have moved meanwhile."""
        return torch.cat([p.detach().view(-1) for p in self._parameters.values()])

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """p of every rank (n, |R|) and of every location (n, |S|), by today's Ω; on the CPU."""
        n = len(self._layer)
        if self.options.mode == "uniform":
            weights = torch.tensor(self.options.rank_weights or [1.0] * len(self._ranks))
            ranks, locations = weights.repeat(n, 1), torch.ones(n, self._locations)
            return ranks / ranks.sum(1, keepdim=True), locations / self._locations
        both, rank_logits, location_logits = self._look(features)
        self._figures |= {
            "entropy_rank": lambda: entropy(rank_logits).mean(),
            "entropy_location": lambda: entropy(location_logits).mean(),
        }
        ranks, locations = both.cpu().split([len(self._ranks), self._locations], 1)
        return ranks, locations

    def _probabilities(self, features: Tensor) -> tuple[Tensor, ...]:
        """p of ranks and locations side by side, for one transfer; their logits."""
        logits = self._logits(self._parameters, features)
        return torch.cat([part.softmax(1) for part in logits], 1), *logits

    def learn(self, reward: Tensor) -> None:
        """One step on Ω with the reward of the oldest draw that still lacks its own.

        (1): one for all; (n): each unit's own; (n, |R|, |S|): each action's. A unit whose reward is
        not finite learns nothing from this draw, and its baseline stays.
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
            self._descend(draw.features, draw.weights, reward)
        else:
            reward = self._priced(_rounded(reward), draw.ranks)
            self._learn_drawn(draw, reward, self._earlier.all)
            self._earlier.push_(reward)
        self._earlier.counted()

    def _learn_drawn(self, draw: Draw, reward: Tensor, earlier: Tensor) -> None:
        """With b and spread of the earlier rewards only."""
        self._figures["reward"] = reward.nanmean
        if len(earlier) == 0:
            return
        baseline = self._baseline(earlier)
        self._figures["baseline"] = baseline.nanmean
        normalised = self.options.advantage == "normalised"
        spread = _spread(earlier) if normalised else torch.ones_like(reward)
        if spread is not None:
            advantage = (reward - baseline) / spread.clamp(min=1e-300)
            if normalised:  # where nothing varies yet nothing is learned, and no outlier rules
                advantage = advantage.where(spread > 0, 0.0).clamp(-3.0, 3.0)
            self._update(draw, advantage.nan_to_num())

    def _priced(self, reward: Tensor, drawn: Tensor | None = None) -> Tensor:
        """`drawn`: indices into R (n); none where the rewards are every action's."""
        if self.options.cost == 0:
            return reward
        if drawn is None:
            return reward + self.options.cost * self._sizes[:, None, None] * self._ranks[:, None]
        price = self.options.cost * self._ranks[drawn.to(reward.device)] * self._sizes
        return reward + (price if len(reward) > 1 else price.sum(0, keepdim=True))

    def _baseline(self, earlier: Tensor) -> Tensor:
        """b from the earlier rewards only."""
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
        """Eq. 10 at the Ω that drew; the optimizer moves today's Ω."""
        ranks, locations = (part.to(advantage.device) for part in (draw.ranks, draw.locations))
        counts = (self._ranks[ranks] > 0) | self.options.idle_location
        self._descend(draw.features, draw.weights, advantage, ranks, locations, counts)

    def _descend_drawn(
        self, features: Tensor, flat: Tensor, advantage: Tensor, ranks: Tensor, locations: Tensor,
        counts: Tensor,
    ) -> Sequence[Tensor]:  # fmt: skip
        """(1/n) Σ_u (R_u − b_u) log p(a_u)"""
        weights, rank_logits, location_logits = self._again(flat, features)
        log_p = log_probability(
            rank_logits, location_logits, ranks, locations, location_counts=counts
        )
        loss = (advantage.to(log_p) * log_p).mean()
        return self._move(weights, loss, rank_logits, location_logits)

    def _descend_table(self, features: Tensor, flat: Tensor, reward: Tensor) -> Sequence[Tensor]:
        """(1/n) Σ_u Σ_a p(a) R_u(a), with R averaged over the window, over its largest entry where
        `normalised`."""
        assert self._earlier is not None
        self._earlier.push_(self._priced(_rounded(reward)))
        mean = self._earlier.padded.nanmean(0).nan_to_num()
        if self.options.advantage == "normalised":
            mean = mean / mean.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
        weights, rank_logits, location_logits = self._again(flat, features)
        both = rank_logits.softmax(1).unsqueeze(2) * location_logits.softmax(1).unsqueeze(1)
        expected = (both * mean.to(both)).sum((1, 2)).where(_known(reward), 0.0)
        return self._move(weights, expected.mean(), rank_logits, location_logits)

    def _again(self, flat: Tensor, features: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The Ω that drew and its logits, differentiable."""
        weights = {name: w.requires_grad_() for name, w in self._parts(flat.detach()).items()}
        return weights, *self._logits(weights, features)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Ω's parameters, of their values end to end."""
        parts = flat.split([p.numel() for p in self._parameters.values()])
        named = zip(self._parameters.items(), parts, strict=True)
        return {name: part.view_as(parameter) for (name, parameter), part in named}

    def _logits(self, weights: Mapping[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self._layer, self._kind, features
        return functional_call(self.network, dict(weights), inputs)

    def _move(
        self, weights: dict[str, Tensor], loss: Tensor, rank_logits: Tensor, location_logits: Tensor
    ) -> Sequence[Tensor]:
        """One step of the optimizer on Ω along the gradient at `weights`."""
        if self.options.entropy:
            both = entropy(rank_logits) + entropy(location_logits)
            loss = loss - self.options.entropy * both.mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        if self.options.optimizer == "adam":  # refuses to be recorded without; warns if it is not
            capturing = loss.is_cuda and torch.cuda.is_current_stream_capturing()
            self._optimizer.param_groups[0]["capturable"] = capturing
        self._optimizer.step()
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        """Ω, its optimizer, earlier rewards, and the draws that still lack their reward."""
        state = {f"network.{name}": p.detach() for name, p in self._parameters.items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{part}": tensor for part, tensor in moments.items()}
        if self._earlier:
            state["earlier"] = self._earlier.all
        for index, draw in enumerate(self._draws):
            weights = self._parts(draw.weights).items()
            state |= {f"draw.{index}.weights.{name}": value for name, value in weights}
            for part in ("features", "ranks", "locations"):
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
        self._descend.forget()  # moments and rewards lie elsewhere now
        if "earlier" in state:
            self._earlier = SlidingWindow(self.options.baseline_window, state["earlier"].to(device))
        for _, parts in sorted(_nested(state, "draw.").items(), key=lambda item: int(item[0])):
            weights = torch.cat([parts[f"weights.{name}"].view(-1) for name in self._parameters])
            features = parts["features"].to(device)
            self._draws.append(
                Draw(weights.to(device), features, parts["ranks"], parts["locations"])
            )


def _known(reward: Tensor) -> Tensor:
    """Units (n) whose rewards are finite."""
    return reward.isfinite().view(len(reward), -1).all(1)


def _spread(earlier: Tensor) -> Tensor | None:
    """Standard deviation of the earlier rewards, 0 for a unit with fewer than two; None while
    nobody has them."""
    if len(earlier) < 2:
        return None
    squares = (earlier - earlier.nanmean(0)).square().nansum(0)
    return (squares / (earlier.isfinite().sum(0) - 1).clamp(min=1)).sqrt()


def _rounded(reward: Tensor) -> Tensor:
    """To 16 significant bits, so that the order of a reduction decides nothing; NaN where a unit's
    are not all finite."""
    known = _known(reward).view(-1, *[1] * (reward.dim() - 1))
    mantissa, exponent = torch.frexp(reward.where(known, torch.nan))
    return torch.ldexp(torch.round(mantissa * _PRECISION) / _PRECISION, exponent)


def _nested(state: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """`prefix` index `.` name → by index, by name."""
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            nested.setdefault(index, {})[rest] = tensor
    return nested
