"""AdamW over masked components, on one flat buffer.

All trainable tensors live in one flat float32 buffer per quantity (values, gradients, moments).
Averaging over ranks is then one collective, clipping one norm, and a step a few kernels, whatever
the number of adapters. A component whose mask is 0 keeps its values, moments and step count to the
last bit: zero gradients would not be enough, since momentum and weight decay would still move it.

    m ← β₁ m + (1 − β₁) ∇        v ← β₂ v + (1 − β₂) ∇²
    θ ← θ − η (λ θ + m̂ / (√v̂ + ε))        m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)

(Loshchilov & Hutter 2019, algorithm 2; t counts the steps in which the component was active.)
Tensors that are a part of W decay towards their initial value θ₀, λ (θ − θ₀) in place of λ θ.
A tensor θ = s φ (`Trainable.scale`) learns as φ would: its step is s times as long, its decay is
not, and ‖∂L/∂φ‖ = s ‖∂L/∂θ‖ counts in the norm.
`no_bias_correction` uses m for m̂: a component's first steps, whose gradients come from one or two
batches, are scaled by 1 − β₁ᵗ.

The update may be sharded (`Share`): every rank holds the moments of one shard of the buffer and
updates it, and an all-gather distributes the new values. A shard is a contiguous range rather than
a set of units: shards have equal sizes, one in-place collective gathers them, and nothing is
reassigned when units change size. Each scalar goes through the same operations as without
sharding, so the values are identical to the last bit. Values, gradients and step counts (one per
row) are replicated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.active_rows import ActiveRows
from adapters.rounding import round_up
from adapters.trainable import Trainable

_ALIGNMENT = 16  # elements; every tensor starts on a 64-byte boundary of the flat buffer


def _no_gather(flat: Tensor) -> None:
    raise AssertionError("a single shard has nothing to gather")


@dataclass(frozen=True)
class Share:
    """This rank's shard of the update: number `index` of `count` equal shards.

    `gather`: in-place all-gather of a flat tensor of `count` equal shards, of which each rank has
    filled in its own. Collective.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], None] = _no_gather


@dataclass(frozen=True)
class _Slot:
    """A trainable's offset in the flat buffers, and its rows in the per-row buffers."""

    trainable: Trainable
    start: int
    rows: slice

    def view(self, flat: Tensor) -> Tensor:
        shape = self.trainable.parameter.shape
        return flat[self.start : self.start + shape.numel()].view(shape)


class MaskedAdamW:
    """AdamW that does not change inactive components (see the module's docstring).

    The parameters' storage and `.grad` become views of the flat buffers: other code may use them,
    but must not rebind them. With a sharded update `step`, `rebind_parameters` and `state_dict` are
    collective; before the first step there is nothing to gather, and a single rank may call the
    last two.
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
        self._start: Tensor | None = None  # θ₀ in the layout of `values`, 0 for most tensors
        self._observed: list[nn.Parameter] = []
        self._uniform_count: float | None = 0.0  # t if all components share it, else None
        self.rebind_parameters(trainables)

    def rebind_parameters(self, trainables: Sequence[Trainable]) -> None:
        """Replace the set of trained tensors. A parameter keeps moments and counts if the same
        object was trained before; a new object under an old name starts from zero, or from what is
        `kept`."""
        observed = [t.parameter for t in trainables if t.observed]
        for parameter in self._observed:  # their gradients would keep the old buffer alive
            parameter.grad = None
        self._observed = observed
        trainables = [t for t in trainables if not t.observed]
        if not trainables:
            raise ValueError("nothing to train: no adapter and no head")
        earlier = self._carried_over(trainables)
        starts = {} if self._start is None else {
            id(slot.trainable.parameter): slot.view(self._start) for slot in self._slots
        }  # fmt: skip
        sizes = [round_up(t.parameter.numel(), _ALIGNMENT) for t in trainables]
        self._allocate(
            sum(sizes),
            sum(t.parameter.shape[0] for t in trainables),
            sum(p.numel() for p in observed),
            trainables[0].parameter.device,
        )
        self._place(trainables, sizes)
        offsets = self._place_observed(sum(sizes))
        self._find_components()
        self.active_rows = ActiveRows(
            [(slot.trainable, slot.rows) for slot in self._slots], self.gradients, offsets
        )
        ends = self._row_sizes.cumsum(0)  # of all rows; those of other shards get size 0
        begins = (ends - self._row_sizes).clamp(min=self._shard.start)
        self._shard_row_sizes = (ends.clamp(max=self._shard.stop) - begins).clamp(min=0)
        self._ratios = self._per_tensor([t.learning_rate_ratio * t.scale for t in trainables])
        self._decays = self._per_tensor([t.decay_ratio / t.scale for t in trainables])
        self._scales = self._per_row([t.scale for t in trainables])
        self._start = self._new_start(starts)
        self._load(earlier)

    def _carried_over(self, trainables: Sequence[Trainable]) -> dict[str, dict[str, Tensor]]:
        """The state with which tensors begin that do not begin at zero: of those trained before
        their own, of new ones what is `kept` of the state under their name. Collective if there
        are any."""
        held = {id(slot.trainable.parameter) for slot in self._slots}
        retained = {
            t.name: None if id(t.parameter) in held else t.kept
            for t in trainables
            if id(t.parameter) in held or t.kept is not None
        }
        return {
            name: state if (kept := retained[name]) is None else kept.state(state)
            for name, state in (self.state_dict() if retained else {}).items()
            if name in retained
        }

    def _allocate(self, total: int, rows: int, observed: int, device: torch.device) -> None:
        """Flat buffers of `total` trained scalars in `rows` rows, and this rank's shard of them."""
        shard = round_up(-(-total // self.share.count), _ALIGNMENT)
        # The all-gather's output; longer than the values, since shards have equal sizes.
        self._gathered = torch.zeros(shard * self.share.count, dtype=torch.float32, device=device)
        self.values = self._gathered[:total]
        start = min(self.share.index * shard, total)
        self._shard = slice(start, min(start + shard, total))
        # All gradients, observed ones last: one collective averages them.
        self.gradients = torch.zeros(total + observed, dtype=torch.float32, device=device)
        self._trained = self.gradients[:total]
        self.counts = torch.zeros(rows, dtype=torch.float32, device=device)  # t, per component

    def _place(self, trainables: Sequence[Trainable], sizes: Sequence[int]) -> None:
        """Move the trained tensors into the flat buffers, `sizes` scalars each."""
        self._slots, row_sizes = [], torch.empty(len(self.counts), dtype=torch.int64)
        start = row = 0
        for trainable, size in zip(trainables, sizes, strict=True):
            parameter = trainable.parameter
            count = parameter.shape[0]
            slot = _Slot(trainable, start, slice(row, row + count))
            row_sizes[slot.rows] = parameter.numel() // count
            row_sizes[row + count - 1] += size - parameter.numel()  # padding stays zero
            slot.view(self.values).copy_(parameter.detach())
            parameter.data = slot.view(self.values)
            parameter.grad = slot.view(self.gradients)
            self._slots.append(slot)
            start, row = start + size, row + count
        self._row_sizes = row_sizes.to(self.values.device)

    def _place_observed(self, start: int) -> dict[int, int]:
        """Put the observed gradients behind the trained ones, which end at `start`; returns each
        one's offset by the parameter's id."""
        offsets: dict[int, int] = {}
        for parameter in self._observed:
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            offsets[id(parameter)] = start
            start += parameter.numel()
        return offsets

    def _new_start(self, earlier: dict[int, Tensor]) -> Tensor | None:
        """θ₀: `earlier` by the parameter's id, or the current value of a new parameter; None where
        everything decays to 0, or nothing decays."""
        slots = [slot for slot in self._slots if slot.trainable.decays_to_start]
        if not slots or not self.weight_decay:
            return None
        start = torch.zeros_like(self.values)
        for slot in slots:
            value = earlier.get(id(slot.trainable.parameter), slot.view(self.values))
            slot.view(start).copy_(value)
        return start

    @property
    def numel(self) -> int:
        """Number of trained scalars, without padding."""
        return sum(slot.trainable.parameter.numel() for slot in self._slots)

    @property
    def trained_gradients(self) -> Tensor:
        """Gradients of `values`, in the same layout."""
        return self._trained

    def row_sums(self, flat: Tensor) -> Tensor:
        """Σ over every row of every trained tensor, in the order of the trainables: (rows,)
        float32. `flat` has the layout of `values`."""
        return torch.segment_reduce(flat, "sum", lengths=self._row_sizes, unsafe=True)

    def by_component(self, flat: Tensor) -> Tensor:
        """Row sums of A, g and B of every adapter, in the order of the trainables: (units, roles,
        R) float32, with the roles that are trained. `flat` has the layout of `values`; all adapters
        must have the same R."""
        assert self._component_shape is not None, "adapters of different R have no common shape"
        return self.row_sums(flat)[self._component_rows].view(-1, *self._component_shape)

    def units_that_saw_tokens(self) -> Tensor | None:
        """Whether each adapter saw a token since the gradients were zeroed: (units,) bool. None if
        every adapter sees every token."""
        saw_tokens = self.active_rows.saw_tokens()
        if saw_tokens is None:
            return None
        assert self._component_shape is not None, "adapters of different R have no common shape"
        roles, R = self._component_shape
        return saw_tokens[self._component_rows].view(-1, roles * R)[:, 0]

    def _find_components(self) -> None:
        """Set the range of the adapters' rows, which precede those of heads, and their (roles, R);
        None if R differs."""
        adapters = [slot for slot in self._slots if slot.trainable.role is not None]
        sizes = {slot.rows.stop - slot.rows.start for slot in adapters}
        self._component_rows = slice(0, adapters[-1].rows.stop if adapters else 0)
        roles = len({slot.trainable.role for slot in adapters})
        self._component_shape = (roles, sizes.pop()) if len(sizes) == 1 else None

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def clip(self, max_norm: float | None) -> float:
        """Zero inactive components' gradients and clip the others to `max_norm`; returns the norm
        before clipping."""
        active = self.active_rows.active()
        if active is not None:
            flat = torch.repeat_interleave(active, self._row_sizes, output_size=len(self.values))
            self._trained.masked_fill_(~flat, 0.0)
        if self._scales is None:
            norm = float(torch.linalg.vector_norm(self._trained))
        else:
            norm = float((self.row_sums(self._trained**2) * self._scales**2).sum().sqrt())
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            self._trained.mul_(max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW update of the active components with the current gradients. Collective if the
        update is sharded."""
        active = self.active_rows.active()
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
        values, g = self.values[self._shard], self._trained[self._shard]
        m = torch.lerp(self.exp_avg, g, 1 - beta1)
        v = torch.addcmul(self.exp_avg_sq * beta2, g, g, value=1 - beta2)
        direction = (m / correction1).div_((v / correction2).sqrt_().add_(self.eps))
        if self.weight_decay:
            decayed = values if self._start is None else values - self._start[self._shard]
            decayed = decayed if self._decays is None else decayed * self._decays
            direction.add_(decayed, alpha=self.weight_decay)
        if self._ratios is not None:
            direction.mul_(self._ratios)
        new = direction.mul_(-self.learning_rate).add_(values)
        for state, value in ((values, new), (self.exp_avg, m), (self.exp_avg_sq, v)):
            state.copy_(value if keep is None else torch.where(keep, value, state))
        if self.share.count > 1:
            self.share.gather(self._gathered)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Moments (of the tensor's shape) and step counts (one per row) of every trained tensor.

        Moments are unsharded: while the result is held, sharding saves no memory. Collective.
        """
        exp_avg, exp_avg_sq = self._unsharded(self.exp_avg), self._unsharded(self.exp_avg_sq)
        return {
            slot.trainable.name: {
                "exp_avg": slot.view(exp_avg),
                "exp_avg_sq": slot.view(exp_avg_sq),
                "step": self.counts[slot.rows],
            }
            for slot in self._slots
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `state_dict`. Raises ValueError if a trained tensor is missing in `state`."""
        missing = [slot.trainable.name for slot in self._slots if slot.trainable.name not in state]
        if missing:
            raise ValueError(f"no optimizer state for {missing[0]}")
        self._load(state)

    def _load(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.exp_avg = self._load_shard(state, "exp_avg")
        self.exp_avg_sq = self._load_shard(state, "exp_avg_sq")
        for slot in self._slots:
            if slot.trainable.name in state:
                self.counts[slot.rows] = state[slot.trainable.name]["step"].to(self.counts)
        first = float(self.counts[0])
        self._uniform_count = first if bool((self.counts == first).all()) else None

    def _unsharded(self, moment: Tensor) -> Tensor:
        """A moment gathered from all shards, in the layout of `values`."""
        if self.share.count == 1:
            return moment
        full = torch.zeros_like(self._gathered)
        full[self._shard] = moment
        if self._uniform_count != 0.0:  # before the first step all moments are zero
            self.share.gather(full)
        return full

    def _load_shard(self, state: dict[str, dict[str, Tensor]], moment: str) -> Tensor:
        """This rank's shard of a moment; zeros for tensors that `state` lacks."""
        full = torch.zeros_like(self.values)
        for slot in self._slots:
            if slot.trainable.name in state:
                slot.view(full).copy_(state[slot.trainable.name][moment])
        return full if self.share.count == 1 else full[self._shard].clone()

    def _spread(self, per_row: Tensor) -> Tensor:
        """Per-row values repeated for every scalar of the row in this rank's shard."""
        length = self._shard.stop - self._shard.start
        return torch.repeat_interleave(per_row, self._shard_row_sizes, output_size=length)

    def _per_tensor(self, ratios: Sequence[float]) -> Tensor | None:
        """One number per tensor, repeated for its scalars; None if all are 1."""
        rows = self._per_row(ratios)
        return None if rows is None else self._spread(rows)

    def _per_row(self, ratios: Sequence[float]) -> Tensor | None:
        """One number per tensor, repeated for its rows; None if all are 1."""
        if all(ratio == 1.0 for ratio in ratios):
            return None
        sizes = [slot.rows.stop - slot.rows.start for slot in self._slots]
        return torch.repeat_interleave(torch.tensor(ratios), torch.tensor(sizes)).to(self.values)
