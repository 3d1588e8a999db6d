"""The host of many adapters: stacked experts, every product over all of them at once.

With rows sorted by expert and e the expert of a row,

    z = x A_eᵀ          y = x W_eᵀ + (z ∘ g_e) B_e

in grouped products (cuBLAS or CUTLASS on a GPU); no ΔW is ever formed. As in `linear.py` the frozen
stack stays packed, is dequantised once in forward and once in backward, and the operator is opaque.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.gated import GatedAdapter
from adapters.linear import Dropout, dropped
from adapters.weights import FORMATS

_RANK_MULTIPLE = 8
"""Grouped products want rows of 16 bytes; what is padded is zero and never trains."""


class ExpertHost:
    """The place of one expert's adapter in a stack: what `AdaptedLinear` is to a single matrix.

    No module, so that a stack's adapters, replicated on every rank, are never seen by a sharder.
    """

    def __init__(self, stack: "StackedLinear", index: int):
        self.stack, self.index = stack, index
        self.adapter: GatedAdapter | None = None
        self.dropout: Dropout | None = None
        self.initial: GatedAdapter | None = None
        """As in `AdaptedLinear`."""

    @property
    def out_features(self) -> int:
        return self.stack.out_features

    @property
    def in_features(self) -> int:
        return self.stack.in_features

    @property
    def weight(self) -> nn.Parameter:
        """All experts' packed weight."""
        return self.stack.weight

    @property
    def tokens(self) -> nn.Parameter:
        """(E,), of no value; its gradient counts every expert's tokens that matter to the loss."""
        return self.stack.tokens


class StackedLinear(nn.Module):
    """One projection of E experts: frozen `y = x W_eᵀ` in any weight format, E adapters at most.

    `weight` holds the packed matrix of all experts' rows (E · out, in).
    """

    def __init__(self, weight: nn.Parameter, weight_format: str = "none"):
        super().__init__()
        self.experts, self.out_features, self.in_features = weight.shape
        self.weight_format = weight_format
        self.weight = weight
        self.hosts = tuple(ExpertHost(self, index) for index in range(self.experts))

    @property
    def tokens(self) -> nn.Parameter:
        """(E,), of no value; its gradient counts every expert's tokens that matter to the loss."""
        if "_tokens" not in self.__dict__:
            # Past nn.Module's registration: it belongs to the adapters, not to the backbone.
            zeros = torch.zeros(self.experts, device=self.weight.device)
            self.__dict__["_tokens"] = nn.Parameter(zeros)
        return self.__dict__["_tokens"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        return self.experts, self.out_features, self.in_features

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of what is packed."""
        return self.experts * self.out_features, self.in_features

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed form of a full stack (E, out, in)."""
        return FORMATS[self.weight_format].pack(weight.reshape(self.matrix_shape), dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W (E, out, in) as the products see it."""
        return _stack(self.weight.detach(), self.experts, *self.matrix_shape, self.weight_format,
                      dtype)  # fmt: skip

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """(rows, in) sorted by expert, rows of expert e end before `offsets[e]` → (rows, out)."""
        adapters = [host.adapter for host in self.hosts]
        rank = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
        if rank == 0:
            return frozen_experts(x, offsets, self.weight, self.out_features, self.weight_format)
        rank = -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
        A, B = self._stacked(adapters, rank)
        initial = [host.initial for host in self.hosts]
        dropout = next((host.dropout for host in self.hosts if host.dropout is not None), None)
        probability, on_input, seed, paired = 0.0, False, None, False
        if dropout is not None and self.training:
            probability, on_input, seed = dropout.probability, dropout.on_input, dropout.seed()
            paired = any(part is not None for part in initial)
        if paired:  # drop(ΔW − ΔW₀) + ΔW₀
            A0, B0 = self._stacked(initial, rank)
            A, B = torch.cat([A, A0], 1), torch.cat([B, -B0], 1)
        y, _ = adapted_experts(
            x, offsets, self.weight, A, B, self.tokens, self.out_features,
            self.weight_format, probability, on_input, paired, seed,
        )  # fmt: skip
        if paired:
            z = _grouped(x, A0.to(x.dtype).mT, offsets)
            y = y + _grouped(z, B0.to(x.dtype), offsets)
        return y

    def _stacked(self, adapters: Sequence[GatedAdapter | None], rank: int) -> tuple[Tensor, Tensor]:
        """A (E, R, in) and g ∘ B (E, R, out), zero where an expert has no such component."""

        def padded(role: str, width: tuple[int, ...]) -> Tensor:
            parts = []
            for adapter in adapters:
                if adapter is None:
                    parts.append(self._zeros(rank, *width))
                    continue
                part = getattr(adapter, role)
                missing = rank - adapter.rank
                parts.append(torch.cat([part, self._zeros(missing, *width)]) if missing else part)
            return torch.stack(parts)

        B = padded("B", (self.out_features,)) * padded("g", ()).unsqueeze(2)
        return padded("A", (self.in_features,)), B

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.weight.device)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in={self.in_features}, out={self.out_features}, "
            f"format={self.weight_format}"
        )


class AdaptedExperts(nn.Module):
    """The experts of a mixture: takes the place of transformers' module of stacked experts."""

    def __init__(self, experts: Any):
        super().__init__()
        self.gate_up_proj = StackedLinear(experts.gate_up_proj)
        self.down_proj = StackedLinear(experts.down_proj)
        self.act_fn = experts.act_fn

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether `module` computes down(act(gate) · up) on stacks (E, out, in) without biases."""
        gate = getattr(type(module), "_apply_gate", None)
        return (
            isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
            and isinstance(getattr(module, "down_proj", None), nn.Parameter)
            and hasattr(module, "act_fn")
            and getattr(module, "has_gate", False)
            and not getattr(module, "has_bias", True)
            and not getattr(module, "is_transposed", True)
            and getattr(module, "is_concatenated", True)
            and not getattr(module, "has_post_expert_norm", False)
            and getattr(gate, "__name__", "_default_apply_gate") == "_default_apply_gate"
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H)."""
        k = top_k_index.shape[1]
        sorted_experts, order = top_k_index.flatten().sort(stable=True)
        # Neither this nor anything below waits for the device: no shape depends on the routing.
        numbers = torch.arange(self.gate_up_proj.experts, device=order.device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True).int()
        inverse = order.argsort()
        x = _Dispatch.apply(hidden_states, order, inverse, k)
        gate, up = self.gate_up_proj(x, offsets).chunk(2, dim=-1)
        y = self.down_proj(self.act_fn(gate) * up, offsets)
        y = (y * top_k_weights.flatten()[order].unsqueeze(1)).to(hidden_states.dtype)
        return _Combine.apply(y, order, inverse, k)


class _Dispatch(torch.autograd.Function):
    """Each token once for every expert that it goes to, sorted by expert."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, dy):
        (inverse,) = ctx.saved_tensors
        return _summed(dy, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """The adjoint: the sum of what a token's experts made of it, in a fixed order."""

    @staticmethod
    def forward(ctx, y, order, inverse, k):
        ctx.save_for_backward(order)
        ctx.k = k
        return _summed(y, inverse, k)

    @staticmethod
    def backward(ctx, dx):
        (order,) = ctx.saved_tensors
        return dx[order // ctx.k], None, None, None


def _summed(rows: Tensor, inverse: Tensor, k: int) -> Tensor:
    return rows[inverse].view(-1, k, rows.shape[-1]).sum(1)


def _stack(
    packed: Tensor, experts: int, rows: int, columns: int, fmt: str, dtype: torch.dtype
) -> Tensor:
    matrix = FORMATS[fmt].unpack(packed, (rows, columns), dtype)
    return matrix.view(experts, rows // experts, columns)


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """(rows, n) by (E, n, m) → (rows, m), or (n, rows) by (rows, m) → (E, n, m)."""
    return F.grouped_mm(a, b, offs=offsets)


@torch.library.custom_op("rankcast::adapted_experts", mutates_args=())
def adapted_experts(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    tokens: Tensor,
    out_features: int,
    weight_format: str,
    dropout: float,
    drop_input: bool,
    paired: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (rows, out) and z = x A_eᵀ (rows, R), z after dropout on the input but before any on
    itself. `A` (E, R, in), `B` (E, R, out) with the gates in it."""
    experts = offsets.shape[0]
    W = _stack(weight, experts, experts * out_features, x.shape[1], weight_format, x.dtype)
    y = _grouped(x, W.mT, offsets)
    del W
    z = _grouped(dropped(x, dropout, seed) if drop_input else x, A.to(x.dtype).mT, offsets)
    kept = z if drop_input else dropped(z, dropout, seed, paired)
    return y.add_(_grouped(kept, B.to(x.dtype), offsets)), z


@adapted_experts.register_fake
def _(x, offsets, weight, A, B, tokens, out_features, weight_format, dropout, drop_input, paired,
      seed):  # fmt: skip
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], A.shape[1])


@torch.library.custom_op("rankcast::adapted_experts_backward", mutates_args=())
def adapted_experts_backward(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    weight_format: str,
    dropout: float,
    drop_input: bool,
    paired: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (rows, in), A (E, R, in) and B (E, R, out), the last two in float32."""
    dy = dy.contiguous()
    kept = z if drop_input else dropped(z, dropout, seed, paired)
    dB = _grouped(kept.T, dy, offsets).float()
    dz = _grouped(dy, B.to(x.dtype).mT, offsets)
    if not drop_input:
        dz = dropped(dz, dropout, seed, paired)
    x_kept = dropped(x, dropout, seed) if drop_input else x
    dA = _grouped(dz.T, x_kept, offsets).float()
    experts, out_features = offsets.shape[0], dy.shape[1]
    W = _stack(weight, experts, experts * out_features, x.shape[1], weight_format, x.dtype)
    dx = _grouped(dy, W, offsets)
    del W
    through_adapter = _grouped(dz, A.to(x.dtype), offsets)
    dx += dropped(through_adapter, dropout, seed) if drop_input else through_adapter
    return dx, dA, dB


@adapted_experts_backward.register_fake
def _(dy, x, offsets, weight, A, B, z, weight_format, dropout, drop_input, paired, seed):
    return torch.empty_like(x), torch.empty_like(A), torch.empty_like(B)


def _save_adapted(ctx, inputs, output):
    x, offsets, weight, A, B, _tokens, _out, *options, seed = inputs
    _y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, offsets, weight, A, B, z, seed)
    ctx.options = options


def _adapted_backward(ctx, dy, _dz):
    if dy is None:
        return (None,) * 12
    x, offsets, weight, A, B, z, seed = ctx.saved_tensors
    dx, dA, dB = adapted_experts_backward(dy, x, offsets, weight, A, B, z, *ctx.options, seed)
    # Tokens that have no loss, padding among them, are not counted: their gradient is zero.
    numbers = torch.arange(dy.shape[0], device=dy.device)
    expert = torch.searchsorted(offsets, numbers, right=True)
    counts = torch.zeros(offsets.shape[0], device=dy.device).index_add_(
        0, expert, (dy != 0).any(1).float()
    )
    return dx, None, None, dA, dB, counts, *(None,) * 6


adapted_experts.register_autograd(_adapted_backward, setup_context=_save_adapted)


@torch.library.custom_op("rankcast::frozen_experts", mutates_args=())
def frozen_experts(
    x: Tensor, offsets: Tensor, weight: Tensor, out_features: int, weight_format: str
) -> Tensor:
    """y = x W_eᵀ without an adapter; (rows, in) → (rows, out)."""
    experts = offsets.shape[0]
    W = _stack(weight, experts, experts * out_features, x.shape[1], weight_format, x.dtype)
    return _grouped(x, W.mT, offsets)


@frozen_experts.register_fake
def _(x, offsets, weight, out_features, weight_format):
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("rankcast::frozen_experts_backward", mutates_args=())
def frozen_experts_backward(
    dy: Tensor, offsets: Tensor, weight: Tensor, in_features: int, weight_format: str
) -> Tensor:
    """dx = dy W_e."""
    experts = offsets.shape[0]
    W = _stack(weight, experts, experts * dy.shape[1], in_features, weight_format, dy.dtype)
    return _grouped(dy.contiguous(), W, offsets)


@frozen_experts_backward.register_fake
def _(dy, offsets, weight, in_features, weight_format):
    return dy.new_empty(dy.shape[0], in_features)


def _save_frozen(ctx, inputs, output):
    x, offsets, weight, _out, weight_format = inputs
    ctx.save_for_backward(offsets, weight)
    ctx.options = (x.shape[1], weight_format)


def _frozen_backward(ctx, dy):
    offsets, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    dx = frozen_experts_backward(dy, offsets, weight, *ctx.options) if needed else None
    return dx, None, None, None, None


frozen_experts.register_autograd(_frozen_backward, setup_context=_save_frozen)
