"""LeLoRA's policy network p(a | ξ; Ω) over the rank r and the location s of a unit.

One network, shared by all units, maps a unit's layer index, matrix type and features (norm,
spectrum) to two softmax distributions, over ranks and over locations (paper, section 3.2 and
appendix B). Its backbone is one of the three of Tables 13 and 14.

Choice: LayerNorm replaces the BatchNorm of a backbone's paper, so that a unit's probabilities do
not depend on the other units of the batch.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NETWORKS = ("mlp", "resnet", "tabnet")
"""The backbones of `PolicyNetwork`."""

_EMBEDDING = 200  # dimensions, for the layer index and for the matrix type
_WIDTHS = (1024, 256, 64)  # hidden layers; the last is the heads' input
_STEPS = 3  # TabNet's decision steps
_RELAXATION = 1.3  # TabNet's γ; at 1, a column fully used in one step is unavailable in later ones
_SHARPNESS = 0.1  # initial gain of the norm before each mask, see `_TabNet`
_ROUNDING = 10**6  # `sample` rounds probabilities to multiples of its inverse


class PolicyNetwork(nn.Module):
    """p(a | ξ; Ω) with backbone `network`, one of `NETWORKS`; float32, built on the CPU.

    Linear weights are Kaiming-uniform and biases 0; embeddings are N(0, 1), the variance that
    Kaiming's gain assumes. All are drawn from a generator seeded by `seed`, without changing the
    global random state. Choice: the two heads' weights are scaled by `head_scale` (0.01), so that
    the initial policy is close to uniform (otherwise, as in the paper, its entropy is 50 to 90 % of
    the maximum, by chance).

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
        head_scale: float = 0.01,
    ):
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"policy network {network!r} is none of {', '.join(NETWORKS)}")
        # The constructors' initial values, and their change of the random state, are discarded.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.layer = nn.Embedding(layers, _EMBEDDING)
            self.kind = nn.Embedding(kinds, _EMBEDDING)
            self.body = _body(network, 2 * _EMBEDDING + features)
            self.rank_head = nn.Linear(_WIDTHS[-1], ranks)
            self.location_head = nn.Linear(_WIDTHS[-1], locations)
        self._initialise(torch.Generator().manual_seed(seed), head_scale)

    def forward(self, layer: Tensor, kind: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the ranks, (n, ranks), and of the locations, (n, locations), of n units.

        `layer` and `kind` are (n,) int64, `features` is (n, F) float32, scaled to order 1.
        """
        unit = torch.cat((self.layer(layer), self.kind(kind), features), dim=-1)
        hidden = self.body(unit)
        return self.rank_head(hidden), self.location_head(hidden)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator, head_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        for head in (self.rank_head, self.location_head):
            head.weight.mul_(head_scale)


def log_probability(
    rank_logits: Tensor,
    location_logits: Tensor,
    rank: Tensor,
    location: Tensor,
    *,
    location_counts: Tensor,
) -> Tensor:
    """log p(a | ξ) of the drawn indices `rank` and `location`, (n,) int64 each: (n,), in nats.

    log p_r + log p_s where `location_counts`, (n,) bool, is True, and log p_r elsewhere: if r = 0
    was drawn, s had no effect and gets no credit.
    """
    log_r = rank_logits.log_softmax(-1).gather(-1, rank[:, None]).squeeze(-1)
    log_s = location_logits.log_softmax(-1).gather(-1, location[:, None]).squeeze(-1)
    return log_r + log_s.where(location_counts, 0.0)


def sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF: one index per row of `probabilities` (n, m), on any device; (n,) int64, CPU.

    `draws` are n numbers in [0, 1), float64. Probabilities are rounded to 1e-6 and renormalised,
    in integers, so that devices that differ in the last bits almost always draw the same index.
    An index whose rounded probability is 0 is never drawn.

    Raises ValueError for other shapes, for draws outside [0, 1), and for rows that are negative,
    not finite or all zero.
    """
    # numpy: at this size the overhead of torch's threads exceeds the computation.
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
    return torch.from_numpy((cumulative <= threshold).sum(-1))  # at this size faster than a search


def rounded(probabilities: Tensor) -> Tensor:
    """Probabilities as multiples of 1e-6, float64, as `sample` compares them."""
    return (probabilities.detach().to("cpu", torch.float64) * _ROUNDING).round()


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of each row of `scores` (n, m) onto the simplex: (n, m), sparse.

    max(z − τ, 0) with τ such that it sums to 1 (Martins & Astudillo 2016), by removing entries
    below the support's τ until none are (Michelot 1986). This uses only sums, which are
    deterministic on CUDA, unlike the usual cumulative sum of the sorted row.
    """
    scores = scores - scores.detach().amax(-1, keepdim=True)  # so τ < 0: the largest remains
    support = torch.ones_like(scores, dtype=torch.bool)
    while True:
        threshold = (scores.where(support, 0.0).sum(-1, True) - 1) / support.sum(-1, True)
        smaller = support & (scores > threshold)
        if torch.equal(smaller, support):
            return (scores - threshold).clamp(min=0)
        support = smaller


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p in nats of each row of `logits` (n, m): (n,)."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _body(network: str, inputs: int) -> nn.Module:
    """The network's backbone, (n, inputs) → (n, 64)."""
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

    Choice: the paper's ResNet-32 is convolutional, for images; `resnet` is the tabular ResNet, one
    block after each of the MLP's hidden layers, without dropout.
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

    Each step selects columns by a sparse mask,

        M[i] = sparsemax(P[i−1] · h_i(a[i−1]))      P[i] = Π_{j ≤ i} (γ − M[j])
        d[i], a[i] = f_i(M[i] · x)                  output = Σ_i ReLU(d[i])

    Choices: no norm of the input, whose columns are scaled already; no sparsity loss; the norm in
    h_i has an initial gain of 0.1. At 1, an untrained mask selects about 4 of 700 columns and often
    stays with them; at 0.1 it selects about 25.
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
        """f_i: two gated layers shared by all steps, two of this step; √½ keeps the variance."""
        first, *others = (*self.shared, *self.own[2 * step : 2 * step + 2])
        x = first(x)
        for layer in others:
            x = (x + layer(x)) * math.sqrt(0.5)
        return x.chunk(2, dim=-1)


def _gated(inputs: int, width: int) -> nn.Sequential:
    """(n, inputs) to (n, width). Without the bias, the norm would cancel a lone column's scale."""
    return nn.Sequential(nn.Linear(inputs, 2 * width), nn.LayerNorm(2 * width), nn.GLU())


def _attention(width: int, inputs: int) -> nn.Sequential:
    """h_i: (n, width) to one score per column, (n, inputs)."""
    norm = nn.LayerNorm(inputs)
    nn.init.constant_(norm.weight, _SHARPNESS)
    return nn.Sequential(nn.Linear(width, inputs, bias=False), norm)
