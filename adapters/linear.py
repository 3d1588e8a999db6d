"""The host of an adapter: a frozen linear layer with one fused forward and backward.

    z = x Aᵀ          y = x Wᵀ + bias + (z ∘ g) B

W stays in its packed format (`weights.py`) and is dequantised inside the operator, once in
forward and once more in backward. The operator is opaque to autograd and to torch.compile:
otherwise either would keep the dequantised W alive until backward. Backward keeps x, A, g, B, z
and the packed parameter *itself*: a view of it would hold ZeRO-3's gathered copy through the
whole step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.gated import GatedAdapter
from adapters.weights import FORMATS


class Dropout:
    """Where and how much a host drops, and the seed that makes its mask reproducible.

    The mask is drawn again in backward (and in a checkpointed recomputation) from
    (seed of the micro-batch, unit), so it is never stored. `base_seed` is one 0-d int64 CPU
    tensor that all units of a model share; the loop writes it before every micro-batch.
    """

    def __init__(self, probability: float, on_input: bool, base_seed: Tensor, unit_index: int):
        self.probability = probability
        self.on_input = on_input
        self.base_seed = base_seed
        self.unit_index = unit_index

    def seed(self) -> Tensor:
        return self.base_seed * 1_000_003 + self.unit_index


class AdaptedLinear(nn.Module):
    """Frozen `y = x Wᵀ + bias` in any weight format, with room for one gated adapter.

    Takes the place of an `nn.Linear`. `weight` holds the packed matrix (see `weights.py`).
    `adapter` stays None until the backbone is placed or sharded: an adapter is replicated on
    every rank, and no sharder ever sees it.
    """

    def __init__(self, linear: nn.Linear, weight_format: str):
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weight_format = weight_format
        self.weight = linear.weight
        self.bias = linear.bias
        self.adapter: GatedAdapter | None = None
        self.dropout: Dropout | None = None
        self.initial: GatedAdapter | None = None
        """The part of W that a splitting method handed to the adapter; where it is given, only
        the adapter's difference from it is dropped."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of what is packed."""
        return self.out_features, self.in_features

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed form of a full matrix (out, in); the caller sets it as the parameter."""
        return FORMATS[self.weight_format].pack(weight, dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) as the products see it; under a sharder only while it is unsharded."""
        packed = self.weight.detach()
        return FORMATS[self.weight_format].unpack(packed, self.matrix_shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        if adapter is None or adapter.rank == 0:
            return frozen_linear(x, self.weight, self.bias, self.out_features, self.weight_format)
        A: Tensor = adapter.A
        g: Tensor = adapter.g
        B: Tensor = adapter.B
        probability, on_input, seed, initial = 0.0, False, None, None
        if self.dropout is not None and self.training:
            probability, on_input = self.dropout.probability, self.dropout.on_input
            seed, initial = self.dropout.seed(), self.initial
        if initial is not None:  # drop(ΔW − ΔW₀) + ΔW₀
            A, B = torch.cat([A, initial.A]), torch.cat([B, initial.B])
            g = torch.cat([g, -initial.g])
        y, _ = adapted_linear(
            x, self.weight, self.bias, A, g, B, self.out_features, self.weight_format,
            probability, on_input, initial is not None, seed,
        )  # fmt: skip
        if initial is not None:
            y = y + ((x @ initial.A.to(x.dtype).T) * initial.g.to(x.dtype)) @ initial.B.to(x.dtype)
        return y

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, format={self.weight_format}"


def dropped(x: Tensor, probability: float, seed: Tensor | None, paired: bool = False) -> Tensor:
    """Inverted dropout whose mask depends on `seed` only. `paired`: the second half of the columns
    shares the first half's mask, so that a difference is dropped whole."""
    if probability == 0.0 or seed is None:
        return x
    generator = torch.Generator(device=x.device).manual_seed(int(seed.item()) & (2**63 - 1))
    drawn = x.chunk(2, dim=-1)[0] if paired else x
    keep = torch.empty_like(drawn, memory_format=torch.contiguous_format)
    keep.bernoulli_(1.0 - probability, generator=generator).div_(1.0 - probability)
    return x * (torch.cat([keep, keep], dim=-1) if paired else keep)


def _matrix(packed: Tensor, fmt: str, out: int, inp: int, dtype: torch.dtype) -> Tensor:
    return FORMATS[fmt].unpack(packed, (out, inp), dtype)


@torch.library.custom_op("rankcast::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    g: Tensor,
    B: Tensor,
    out_features: int,
    weight_format: str,
    dropout: float,
    drop_input: bool,
    paired: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (…, out) and z = x Aᵀ (…, R), z after dropout on the input but before any on itself."""
    W = _matrix(weight, weight_format, out_features, x.shape[-1], x.dtype)
    y = F.linear(x, W, bias)
    del W
    z = (dropped(x, dropout, seed) if drop_input else x) @ A.to(x.dtype).T
    z_kept = z if drop_input else dropped(z, dropout, seed, paired)
    rows = (z_kept * g.to(x.dtype)).view(-1, A.shape[0])
    y.view(-1, out_features).addmm_(rows, B.to(x.dtype))
    return y, z


@adapted_linear.register_fake
def _(x, weight, bias, A, g, B, out_features, weight_format, dropout, drop_input, paired, seed):
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(*x.shape[:-1], A.shape[0])


@torch.library.custom_op("rankcast::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    g: Tensor,
    B: Tensor,
    z: Tensor,
    weight_format: str,
    dropout: float,
    drop_input: bool,
    paired: bool,
    seed: Tensor | None,
    need_x: bool,
    need_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (…, in), A (R, in), g (R), B (R, out); empty where not needed.

    With s = dropped z (or z): dB = (s ∘ g)ᵀ dy, ds = (dy Bᵀ) ∘ g, dg = Σ (dy Bᵀ) ∘ s,
    dz = dropped ds, dA = dzᵀ x, dx = dy W + dz A. The sums for A, g and B are handed on in
    float32, the dtype of the parameters.
    """
    out_features, in_features, rank = dy.shape[-1], x.shape[-1], A.shape[0]
    dy2 = dy.reshape(-1, out_features)
    x2 = x.reshape(-1, in_features)
    gates = g.to(x.dtype)
    kept = (z if drop_input else dropped(z, dropout, seed, paired)).reshape(-1, rank)
    d_gated = dy2 @ B.to(x.dtype).T
    dB = ((kept * gates).T @ dy2).float()
    dg = (d_gated * kept).sum(0, dtype=torch.float32) if need_g else g.new_empty(0)
    dz = d_gated * gates
    if not drop_input:
        dz = dropped(dz.view_as(z), dropout, seed, paired).view(-1, rank)
    x_kept = dropped(x, dropout, seed).reshape(-1, in_features) if drop_input else x2
    dA = (dz.T @ x_kept).float()
    if not need_x:
        return x.new_empty(0), dA, dg, dB
    dx = dy2 @ _matrix(weight, weight_format, out_features, in_features, x.dtype)
    through_adapter = dz @ A.to(x.dtype)
    if drop_input:
        dx += dropped(through_adapter.view_as(x), dropout, seed).view_as(dx)
    else:
        dx += through_adapter
    return dx.view_as(x), dA, dg, dB


@adapted_linear_backward.register_fake
def _(dy, x, weight, A, g, B, z, weight_format, dropout, drop_input, paired, seed, need_x, need_g):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dg = torch.empty_like(g) if need_g else g.new_empty(0)
    return dx, torch.empty_like(A), dg, torch.empty_like(B)


def _save_adapted(ctx, inputs, output):
    x, weight, _bias, A, g, B, _out, weight_format, dropout, drop_input, paired, seed = inputs
    _y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, g, B, z, seed)
    ctx.options = (weight_format, dropout, drop_input, paired)


def _adapted_backward(ctx, dy, _dz):
    nothing = (None,) * 12
    if dy is None:
        return nothing
    x, weight, A, g, B, z, seed = ctx.saved_tensors
    need_x, _, _, _, need_g, *_ = ctx.needs_input_grad
    dx, dA, dg, dB = adapted_linear_backward(
        dy, x, weight, A, g, B, z, *ctx.options, seed, need_x, need_g
    )
    gradients = (dx if need_x else None, None, None, dA, dg if need_g else None, dB)
    return gradients + nothing[len(gradients) :]


adapted_linear.register_autograd(_adapted_backward, setup_context=_save_adapted)


@torch.library.custom_op("rankcast::frozen_linear", mutates_args=())
def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, weight_format: str
) -> Tensor:
    """y = x Wᵀ + bias without an adapter; (…, in) → (…, out)."""
    W = _matrix(weight, weight_format, out_features, x.shape[-1], x.dtype)
    return F.linear(x, W, bias)


@frozen_linear.register_fake
def _(x, weight, bias, out_features, weight_format):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("rankcast::frozen_linear_backward", mutates_args=())
def frozen_linear_backward(
    dy: Tensor, weight: Tensor, in_features: int, weight_format: str
) -> Tensor:
    """dx = dy W."""
    return dy @ _matrix(weight, weight_format, dy.shape[-1], in_features, dy.dtype)


@frozen_linear_backward.register_fake
def _(dy, weight, in_features, weight_format):
    return dy.new_empty(*dy.shape[:-1], in_features)


def _save_frozen(ctx, inputs, output):
    x, weight, _bias, _out, weight_format = inputs
    ctx.save_for_backward(weight)
    ctx.options = (x.shape[-1], weight_format)


def _frozen_backward(ctx, dy):
    (weight,) = ctx.saved_tensors
    dx = frozen_linear_backward(dy, weight, *ctx.options) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None


frozen_linear.register_autograd(_frozen_backward, setup_context=_save_frozen)
