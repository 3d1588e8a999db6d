"""AdamW over masked components, on one flat buffer.

All trainable tensors live in one flat float32 buffer per quantity (values, gradients, moments),
so averaging over ranks is one collective, clipping one norm, and a step a few kernels, however
many adapters there are. A component whose mask is 0 keeps its values, its moments and its own
step count to the last bit: zero gradients would not be enough, since momentum and weight decay
would still move it.

    m ← β₁ m + (1 − β₁) ∇        v ← β₂ v + (1 − β₂) ∇²
    θ ← θ − η (λ θ + m̂ / (√v̂ + ε))        m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)

(Loshchilov & Hutter 2019, algorithm 2; t counts the steps in which the component was active.)
`gradual` takes m for m̂: a component's first steps, which rest on one or two batches, are 1 − β₁ᵗ
times as long.

The update may be split (`Share`): every rank holds the moments of one part of the buffer, updates
that part, and the new values are gathered. A part is a contiguous range rather than a set of
units: parts are then equal, one collective in place gathers them, and nothing is dealt anew when
units change size. Every scalar is computed as it would be in one piece, so the values are the same
to the last bit. Values, gradients and step counts (one a row) stay whole everywhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.rounding import round_up

_ALIGNMENT = 16  # elements; every tensor starts on a 64-byte boundary of the flat buffer


@dataclass(frozen=True)
class Trainable:
    """A tensor to train. `mask`, where given, has one bool per row (dimension 0).

    `learning_rate_ratio` multiplies the learning rate (LoRA+), decay included; `decay_ratio` the
    decay alone. The gradient of an `observed` tensor is averaged with the others, but neither
    clipped nor used: its owner changes it in its own way. `token_counter`: an observed parameter
    and an index; where its gradient there is 0 the tensor saw no token in the whole step, which
    makes all of its rows inactive. `role`: A, g or B of an adapter, whose rows are its components.
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor | None = None
    role: str | None = None
    learning_rate_ratio: float = 1.0
    decay_ratio: float = 1.0
    observed: bool = False
    token_counter: tuple[nn.Parameter, int] | None = None


def _alone(flat: Tensor) -> None:
    raise AssertionError("a single part has nothing to gather")


@dataclass(frozen=True)
class Share:
    """Which part of the update is one's own: the `index`-th of `count` equal ones.

    `gather` takes a flat tensor of `count` equal parts, of which each rank's own is filled in, and
    fills in the others, in place. All ranks call it together.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], None] = _alone


@dataclass(frozen=True)
class _Slot:
    """Where a trainable lives in the flat buffers, and its rows in the per-row ones."""

    trainable: Trainable
    start: int
    rows: slice

    def view(self, flat: Tensor) -> Tensor:
        shape = self.trainable.parameter.shape
        return flat[self.start : self.start + shape.numel()].view(shape)


class MaskedAdamW:
    """AdamW that leaves inactive components alone (see the module's docstring).

    The parameters' storage and `.grad` become views of the flat buffers, so other code may go on
    using them, but must not rebind them. Where the update is split, all ranks call `step`, `follow`
    and `state_dict` together; before the first step there is nothing to gather, and the last two
    may be called by one rank alone.
    """

    def __init__(
        self,
        trainables: Sequence[Trainable],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_bias_correction: bool = False,
        share: Share = Share(),
    ):
        self.learning_rate, self.betas, self.no_bias_correction = (
            learning_rate,
            betas,
            no_bias_correction,
        )
        self.eps, self.weight_decay, self.share = eps, weight_decay, share
        self._slots: list[_Slot] = []
        self._observed: list[nn.Parameter] = []
        self._uniform_count: float | None = 0.0  # t where all components share it, else None
        self.rebind_parameters(trainables)

    def rebind_parameters(self, trainables: Sequence[Trainable]) -> None:
        """Take on a new set of tensors. A parameter that stays, the object itself, keeps moments
        and counts; one made anew under an old name starts afresh."""
        observed = [t.parameter for t in trainables if t.observed]
        for parameter in self._observed:  # whose gradients would keep the old buffer
            parameter.grad = None
        self._observed = observed
        trainables = [t for t in trainables if not t.observed]
        if not trainables:
            raise ValueError("nothing to train: no adapter and no head")
        held = {id(slot.trainable.parameter) for slot in self._slots}
        kept = {t.name for t in trainables if id(t.parameter) in held}
        earlier = {n: state for n, state in self.state_dict().items() if n in kept} if kept else {}
        device = trainables[0].parameter.device
        sizes = [round_up(t.parameter.numel(), _ALIGNMENT) for t in trainables]
        total, rows = sum(sizes), sum(t.parameter.shape[0] for t in trainables)
        part = round_up(-(-total // self.share.count), _ALIGNMENT)
        # What parts are gathered into: longer than the values, since parts are equal.
        self._gathered = torch.zeros(part * self.share.count, dtype=torch.float32, device=device)
        self.values = self._gathered[:total]
        start = min(self.share.index * part, total)
        self._own = slice(start, min(start + part, total))
        # All gradients, observed ones last, so that one collective averages them.
        self.gradients = torch.zeros(
            total + sum(p.numel() for p in observed), dtype=torch.float32, device=device
        )
        self._trained = self.gradients[:total]
        self.counts = torch.zeros(rows, dtype=torch.float32, device=device)  # t, per component
        self._slots, self._row_sizes = [], torch.empty(rows, dtype=torch.int64)
        start = row = 0
        for trainable, size in zip(trainables, sizes, strict=True):
            parameter = trainable.parameter
            count = parameter.shape[0]
            slot = _Slot(trainable, start, slice(row, row + count))
            self._row_sizes[slot.rows] = parameter.numel() // count
            self._row_sizes[row + count - 1] += size - parameter.numel()  # padding stays zero
            slot.view(self.values).copy_(parameter.detach())
            parameter.data = slot.view(self.values)
            parameter.grad = slot.view(self.gradients)
            self._slots.append(slot)
            start, row = start + size, row + count
        self._find_components()
        places: dict[int, int] = {}
        for parameter in observed:
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            places[id(parameter)] = start
            start += parameter.numel()
        self._masks, self._mask_of = self._unique_masks()
        self._token_counts = self._token_counters(places)
        self._row_sizes = self._row_sizes.to(device)
        ends = self._row_sizes.cumsum(0)  # of every row; those of other parts have no scalar here
        begins = (ends - self._row_sizes).clamp(min=self._own.start)
        self._own_sizes = (ends.clamp(max=self._own.stop) - begins).clamp(min=0)
        self._ratios = self._per_tensor([t.learning_rate_ratio for t in trainables])
        self._decays = self._per_tensor([t.decay_ratio for t in trainables])
        self._load(earlier)

    @property
    def numel(self) -> int:
        """Number of trained scalars, padding left out."""
        return sum(slot.trainable.parameter.numel() for slot in self._slots)

    @property
    def trained_gradients(self) -> Tensor:
        """Gradients of `values`, in the same places."""
        return self._trained

    def row_sums(self, flat: Tensor) -> Tensor:
        """Σ over each component's row of each trained tensor, in the order of the trainables;
        `flat` is laid out as `values`. One entry per row: (rows,) float32."""
        return torch.segment_reduce(flat, "sum", lengths=self._row_sizes, unsafe=True)

    def by_component(self, flat: Tensor) -> Tensor:
        """Σ over each component's row of A, g and B of every adapter, in the order of the
        trainables: (units, roles, R) float32, with the roles that train. `flat` is laid out as
        `values`; all adapters have the same R."""
        assert self._component_shape is not None, "adapters of different R have no common shape"
        return self.row_sums(flat)[self._component_rows].view(-1, *self._component_shape)

    def units_that_saw_tokens(self) -> Tensor | None:
        """One bool per adapter (units,): whether it saw a token since the gradients were zeroed.
        None where every adapter sees every token."""
        saw_tokens = self.saw_tokens()
        if saw_tokens is None:
            return None
        assert self._component_shape is not None, "adapters of different R have no common shape"
        roles, R = self._component_shape
        return saw_tokens[self._component_rows].view(-1, roles * R)[:, 0]

    def _find_components(self) -> None:
        """Where the adapters' rows are, before those of heads, and their (roles, R); None where R
        differs."""
        adapters = [slot for slot in self._slots if slot.trainable.role is not None]
        sizes = {slot.rows.stop - slot.rows.start for slot in adapters}
        self._component_rows = slice(0, adapters[-1].rows.stop if adapters else 0)
        roles = len({slot.trainable.role for slot in adapters})
        self._component_shape = (roles, sizes.pop()) if len(sizes) == 1 else None

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def clip(self, max_norm: float | None) -> float:
        """Drop inactive components' gradients, scale the rest to `max_norm`; the norm before."""
        active = self._active()
        if active is not None:
            whole = torch.repeat_interleave(active, self._row_sizes, output_size=len(self.values))
            self._trained.masked_fill_(~whole, 0.0)
        norm = float(torch.linalg.vector_norm(self._trained))
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            self._trained.mul_(max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW update of the active components with the gradients as they are."""
        active = self._active()
        if active is None and self._uniform_count is not None:
            self._uniform_count += 1
            self.counts.fill_(self._uniform_count)
            correction1, correction2 = (1 - beta**self._uniform_count for beta in self.betas)
            self._update(correction1, correction2, None)
            return
        self._uniform_count = None
        if active is None:
            active = torch.ones_like(self.counts, dtype=torch.bool)
        self.counts += active
        t = self.counts.double().clamp(min=1)
        corrections = [self._spread((1 - beta**t).float()) for beta in self.betas]
        self._update(corrections[0], corrections[1], self._spread(active))

    def _update(self, correction1: Tensor | float, correction2: Tensor | float, keep) -> None:
        beta1, beta2 = self.betas
        if self.no_bias_correction:
            correction1 = 1.0
        values, g = self.values[self._own], self._trained[self._own]
        m = torch.lerp(self.exp_avg, g, 1 - beta1)
        v = torch.addcmul(self.exp_avg_sq * beta2, g, g, value=1 - beta2)
        direction = (m / correction1).div_((v / correction2).sqrt_().add_(self.eps))
        if self.weight_decay:
            decayed = values if self._decays is None else values * self._decays
            direction.add_(decayed, alpha=self.weight_decay)
        if self._ratios is not None:
            direction.mul_(self._ratios)
        new = direction.mul_(-self.learning_rate).add_(values)
        for state, value in ((values, new), (self.exp_avg, m), (self.exp_avg_sq, v)):
            state.copy_(value if keep is None else torch.where(keep, value, state))
        if self.share.count > 1:
            self.share.gather(self._gathered)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Per trained tensor: its moments (its own shape) and step counts (one per row).

        Whole, whatever the share: for as long as they are held, the memory that it saves is used.
        """
        exp_avg, exp_avg_sq = self._whole(self.exp_avg), self._whole(self.exp_avg_sq)
        return {
            slot.trainable.name: {
                "exp_avg": slot.view(exp_avg),
                "exp_avg_sq": slot.view(exp_avg_sq),
                "step": self.counts[slot.rows],
            }
            for slot in self._slots
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `state_dict`; every trained tensor must be in `state`."""
        missing = [slot.trainable.name for slot in self._slots if slot.trainable.name not in state]
        if missing:
            raise ValueError(f"no optimizer state for {missing[0]}")
        self._load(state)

    def _load(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.exp_avg = self._part(state, "exp_avg")
        self.exp_avg_sq = self._part(state, "exp_avg_sq")
        for slot in self._slots:
            if slot.trainable.name in state:
                self.counts[slot.rows] = state[slot.trainable.name]["step"].to(self.counts)
        first = float(self.counts[0])
        self._uniform_count = first if bool((self.counts == first).all()) else None

    def _whole(self, moment: Tensor) -> Tensor:
        """All parts of a moment, laid out as `values`."""
        if self.share.count == 1:
            return moment
        whole = torch.zeros_like(self._gathered)
        whole[self._own] = moment
        if self._uniform_count != 0.0:  # before the first step all moments are zero
            self.share.gather(whole)
        return whole

    def _part(self, state: dict[str, dict[str, Tensor]], moment: str) -> Tensor:
        """One's own part of a moment; zeros where `state` lacks a tensor."""
        whole = torch.zeros_like(self.values)
        for slot in self._slots:
            if slot.trainable.name in state:
                slot.view(whole).copy_(state[slot.trainable.name][moment])
        return whole if self.share.count == 1 else whole[self._own].clone()

    def _token_counters(self, places: dict[int, int]) -> tuple[Tensor, Tensor] | None:
        """Rows that have a counter, and where each one's is in `gradients`; None without any."""
        rows: list[int] = []
        found: list[int] = []
        for slot in self._slots:
            if slot.trainable.token_counter is not None:
                parameter, index = slot.trainable.token_counter
                members = range(slot.rows.start, slot.rows.stop)
                rows += members
                found += [places[id(parameter)] + index] * len(members)
        if not rows:
            return None
        device = self.values.device
        return torch.tensor(rows, device=device), torch.tensor(found, device=device)

    def saw_tokens(self) -> Tensor | None:
        """One bool per row: False where its tensor's counter says that no token was seen since the
        gradients were zeroed. None where nothing is counted: every row sees every token."""
        if self._token_counts is None:
            return None
        rows, places = self._token_counts
        seen = torch.ones_like(self.counts, dtype=torch.bool)
        seen[rows] = self.gradients[places] > 0
        return seen

    def _unique_masks(self) -> tuple[list[Tensor], Tensor]:
        """Every mask once (A, g and B of a unit share theirs), and each row's place in all of them;
        the last place is of rows without a mask."""
        masks = {
            id(mask): mask for slot in self._slots if (mask := slot.trainable.mask) is not None
        }
        starts, total = {}, 0
        for key, mask in masks.items():
            starts[key], total = total, total + len(mask)
        places = torch.full((len(self.counts),), total, dtype=torch.int64)
        for slot in self._slots:
            if slot.trainable.mask is not None:
                start = starts[id(slot.trainable.mask)]
                places[slot.rows] = torch.arange(start, start + len(slot.trainable.mask))
        return list(masks.values()), places.to(self.values.device)

    def _active(self) -> Tensor | None:
        """One bool per row, or None where everything is active."""
        saw_tokens = self.saw_tokens()
        active = saw_tokens
        if self._masks:
            every = torch.ones(1, dtype=torch.bool, device=self.values.device)
            active = torch.cat([*self._masks, every])[self._mask_of]
            if saw_tokens is not None:
                active &= saw_tokens
        return None if active is None or bool(active.all()) else active

    def _spread(self, per_row: Tensor) -> Tensor:
        """Per-row values repeated for every scalar of the row in one's own part."""
        length = self._own.stop - self._own.start
        return torch.repeat_interleave(per_row, self._own_sizes, output_size=length)

    def _per_tensor(self, ratios: Sequence[float]) -> Tensor | None:
        """One number a tensor, repeated for its scalars; None where all are 1."""
        if all(ratio == 1.0 for ratio in ratios):
            return None
        sizes = [slot.rows.stop - slot.rows.start for slot in self._slots]
        rows = torch.repeat_interleave(torch.tensor(ratios), torch.tensor(sizes))
        return self._spread(rows.to(self.values))
