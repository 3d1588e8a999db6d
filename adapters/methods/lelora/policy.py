"""LeLoRA's policy p(a | ξ; Ω): which rank r and which slice s a unit trains next.

One network, shared by all units, maps a unit's layer index, its matrix type and its numbers (norm,
spectrum) to two softmax distributions, over ranks and over locations (paper, section 3.2 and
appendix B). Its backbone is one of the three of Tables 13 and 14.

Choice: LayerNorm stands wherever a backbone's paper has BatchNorm, so a unit's probabilities do
not depend on which other units share its batch.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NETWORKS = ("mlp", "resnet", "tabnet")
"""The backbones that `PolicyNetwork` knows."""

_EMBEDDING = 200  # dimensions, for the layer index and for the matrix type
_WIDTHS = (1024, 256, 64)  # hidden layers; the heads read the last
_HEAD_SCALE = 0.01  # of the Kaiming bound, see `PolicyNetwork`
_STEPS = 3  # TabNet's decision steps
_RELAXATION = 1.3  # TabNet's γ: at 1, a column fully used in one step is out of the later ones
_SHARPNESS = 0.1  # gain of the norm before each mask, at the start, see `_TabNet`
_ROUNDING = 10**6  # `sample` sees probabilities in these parts


class PolicyNetwork(nn.Module):
    """p(a | ξ; Ω) with backbone `network`, one of `NETWORKS`; float32, built on the CPU.

    Linear weights are Kaiming-uniform and biases 0; embeddings are N(0, 1), the variance that
    Kaiming's gain expects. All are drawn from a generator seeded by `seed`; the global random
    state is left alone. Choice: the two heads' weights are 0.01 of Kaiming's, so that the policy
    starts next to uniform (it would start at 50 to 90 % of the greatest entropy, by luck).

    Raises ValueError for an unknown `network`.
    """

    def __init__(
        self,
        network: str,
        *,
        layers: int,
        kinds: int,
        features: int,
        ranks: int,
        locations: int,
        seed: int,
    ):
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"policy network {network!r} is none of {', '.join(NETWORKS)}")
        # Constructors draw their own initial values: those, and the draws, are thrown away.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.layer = nn.Embedding(layers, _EMBEDDING)
            self.kind = nn.Embedding(kinds, _EMBEDDING)
            self.body = _body(network, 2 * _EMBEDDING + features)
            self.rank_head = nn.Linear(_WIDTHS[-1], ranks)
            self.location_head = nn.Linear(_WIDTHS[-1], locations)
        self._initialise(torch.Generator().manual_seed(seed))

    def forward(self, layer: Tensor, kind: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the ranks, (n, ranks), and of the locations, (n, locations), of n units.

        `layer` and `kind` are (n,) int64, `features` is (n, F) float32, scaled to order 1.
        """
        unit = torch.cat((self.layer(layer), self.kind(kind), features), dim=-1)
        hidden = self.body(unit)
        return self.rank_head(hidden), self.location_head(hidden)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        for head in (self.rank_head, self.location_head):
            head.weight.mul_(_HEAD_SCALE)


def log_probability(
    rank_logits: Tensor,
    location_logits: Tensor,
    rank: Tensor,
    location: Tensor,
    *,
    location_counts: Tensor,
) -> Tensor:
    """log p(a | ξ) of the drawn indices `rank` and `location`, (n,) int64 each: (n,), in nats.

    log p_r + log p_s where `location_counts`, (n,) bool, is True, and log p_r alone elsewhere:
    where r = 0 was drawn, s had no effect and deserves neither credit nor blame.
    """
    log_r = rank_logits.log_softmax(-1).gather(-1, rank[:, None]).squeeze(-1)
    log_s = location_logits.log_softmax(-1).gather(-1, location[:, None]).squeeze(-1)
    return log_r + log_s.where(location_counts, 0.0)


def sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF: one index per row of `probabilities` (n, m), on any device; (n,) int64, CPU.

    `draws` are n numbers in [0, 1), float64. Probabilities are rounded to 1e-6 and renormalised,
    in integers, so that two devices which differ in the last bits hardly ever draw differently.
    An index whose rounded probability is 0 is never drawn.

    Raises ValueError for other shapes, for draws outside [0, 1), and for rows that are negative,
    not finite or all zero.
    """
    # numpy's: for so few numbers torch's threads would take longer to wake than to count.
    p = probabilities.detach().to("cpu", torch.float64).numpy()
    u = draws.to("cpu", torch.float64).numpy()
    if p.ndim != 2 or u.shape != p.shape[:1]:
        raise ValueError(f"{u.shape} draws for {p.shape}")
    if not ((u >= 0) & (u < 1)).all():
        raise ValueError("draws must lie in [0, 1)")
    if not ((p >= 0) & np.isfinite(p)).all():
        raise ValueError("probabilities must be finite and not negative")
    cumulative = (p * _ROUNDING).round().astype(np.int64).cumsum(-1)
    total = cumulative[:, -1:]
    if not (total > 0).all():
        raise ValueError("a row of probabilities is zero")
    # draw < 1 keeps draw × total below total in float64 too, hence the index below m.
    threshold = (u[:, None] * total).astype(np.int64)
    return torch.from_numpy((cumulative <= threshold).sum(-1))  # for so few faster than a search


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex nearest to each row of `scores` (n, m): (n, m), mostly zeros.

    max(z − τ, 0) with the τ that makes it sum to 1 (Martins & Astudillo 2016), found by dropping
    what lies below the support's own τ until nothing does (Michelot 1986). This needs sums only,
    which are deterministic on CUDA where the usual cumulative sum of the sorted row is not.
    """
    scores = scores - scores.detach().amax(-1, keepdim=True)  # then τ < 0: the largest stays
    support = torch.ones_like(scores, dtype=torch.bool)
    while True:
        threshold = (scores.where(support, 0.0).sum(-1, True) - 1) / support.sum(-1, True)
        smaller = support & (scores > threshold)
        if torch.equal(smaller, support):
            return (scores - threshold).clamp(min=0)
        support = smaller


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p, in nats, of every row (n, m): (n,)."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _body(network: str, inputs: int) -> nn.Module:
    """(n, inputs) to (n, 64)."""
    if network == "tabnet":
        return _TabNet(inputs)
    stages: list[nn.Module] = []
    for before, width in zip((inputs, *_WIDTHS), _WIDTHS, strict=False):
        stages.append(nn.Linear(before, width))
        stages.append(nn.ReLU() if network == "mlp" else _ResidualBlock(width))
    if network == "resnet":
        stages += [nn.LayerNorm(_WIDTHS[-1]), nn.ReLU()]
    return nn.Sequential(*stages)


class _ResidualBlock(nn.Module):
    """x + Linear(ReLU(Linear(Norm(x)))): (n, width) to (n, width) (Gorishniy et al. 2021, 3.2).

    Choice: the paper's ResNet-32 convolves images; a unit's numbers form none, so `resnet` is
    the tabular one, a block after each of the MLP's hidden layers, and no dropout.
    """

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class _TabNet(nn.Module):
    """TabNet's encoder (Arik & Pfister 2021): (n, inputs) to (n, 64).

    Each step reads the columns that its sparse mask lets through,

        M[i] = sparsemax(P[i−1] · h_i(a[i−1]))      P[i] = Π_{j ≤ i} (γ − M[j])
        d[i], a[i] = f_i(M[i] · x)                  output = Σ_i ReLU(d[i])

    Choices: no norm on the input, whose columns come scaled; no sparsity loss; the norm inside
    h_i starts with a gain of 0.1. At 1, a mask picks about 4 of 700 columns before it has learned
    which, and often keeps to them; at 0.1 it starts with about 25.
    """

    def __init__(self, inputs: int):
        super().__init__()
        width = 2 * _WIDTHS[-1]  # d and a
        self.shared = nn.ModuleList([_gated(inputs, width), _gated(width, width)])
        self.own = nn.ModuleList(_gated(width, width) for _ in range(2 * (_STEPS + 1)))
        self.attention = nn.ModuleList(_attention(width // 2, inputs) for _ in range(_STEPS))

    def forward(self, x: Tensor) -> Tensor:
        output, prior = torch.zeros((), device=x.device), torch.ones_like(x)
        _, attended = self._transform(x, step=0)
        for step, attention in enumerate(self.attention, start=1):
            mask = sparsemax(prior * attention(attended))
            prior = prior * (_RELAXATION - mask)
            decision, attended = self._transform(mask * x, step)
            output = output + F.relu(decision)
        return output

    def _transform(self, x: Tensor, step: int) -> tuple[Tensor, ...]:
        """f_i: two gated layers that all steps share, two of its own; √½ keeps the variance."""
        first, *others = (*self.shared, *self.own[2 * step : 2 * step + 2])
        x = first(x)
        for layer in others:
            x = (x + layer(x)) * math.sqrt(0.5)
        return x.chunk(2, dim=-1)


def _gated(inputs: int, width: int) -> nn.Sequential:
    """(n, inputs) to (n, width). The bias keeps the norm from hiding a lone column's size."""
    return nn.Sequential(nn.Linear(inputs, 2 * width), nn.LayerNorm(2 * width), nn.GLU())


def _attention(width: int, inputs: int) -> nn.Sequential:
    """h_i: (n, width) to one score per column, (n, inputs)."""
    norm = nn.LayerNorm(inputs)
    nn.init.constant_(norm.weight, _SHARPNESS)
    return nn.Sequential(nn.Linear(width, inputs, bias=False), norm)
