"""The adapted linear layer: a frozen matrix and a gated adapter in one forward and backward op.

    z = x Aᵀ          y = x Wᵀ + bias + (z ∘ g) B

W stays in its packed format (`formats.py`) and is dequantised inside the operator, once in forward
and again in backward. The operator is opaque to autograd and to torch.compile, which would keep the
dequantised W alive until backward, and finds W and the adapter by the layer's handle
(`handles.py`): only x is saved for backward, never a sharder's gathered copy. z is recomputed, at
R/out of the cost of the layer's product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS, LowRank
from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer, Dropout, PackedLayer
from adapters.layers.handles import add_gradients, layer_of
from adapters.layers.magnitude import inverse_norms, scaled_rows
from adapters.layers.sketch import Sketch


class AdaptedLinear(PackedLayer):
    """Frozen `y = x Wᵀ + bias` in any weight format, with at most one gated adapter.

    Replaces an `nn.Linear`, or a `Conv1D` of transformers (GPT-2), which computes the same with W
    transposed. `weight` holds the packed matrix (see `formats.py`).
    `adapter` is None or replicated on every rank; it is not a submodule, so sharders never find it.
    """

    adapter: GatedAdapter | None
    dropout: Dropout | None
    initial: GatedAdapter | None
    """The part of W that spectral initialisation moved into the adapter; dropout then applies only
    to the adapter's difference from it."""
    frozen: GatedAdapter | None
    """As in `AdaptedLayer`."""
    sketch: Sketch | None = None
    """As in `AdaptedLayer`."""
    fixed: "dict[torch.dtype, Fixed] | None"
    """What adapters add, by the dtype of x, while nothing changes (`fixed_adapters`)."""

    def __init__(self, linear: nn.Module, weight_format: str, *, transposed: bool = False):
        """`linear` has a weight of shape (out, in), (in, out) if `transposed`, and a bias or
        None."""
        super().__init__()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.transposed = transposed
        if transposed:
            weight = nn.Parameter(weight.detach().mT.contiguous(), weight.requires_grad)
        self.out_features, self.in_features = weight.shape
        self.weight_format = weight_format
        self.weight = weight
        self.bias = bias
        self.adapter = self.dropout = self.initial = self.frozen = self.fixed = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("adapter", "initial", "frozen"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def token_counter(self) -> None:
        """Every token reaches a linear layer."""

    @property
    def layer(self) -> PackedLayer:
        return self

    @property
    def adapted_layers(self) -> "dict[int | None, AdaptedLayer]":
        return {None: self}

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is not None:
            return self._forward_fixed(x, self.fixed)
        y = adapted_linear(x, self.handle, self.out_features)
        return scaled_rows(y, self.handle)[0] if self.scales_rows else y

    def _forward_fixed(self, x: Tensor, known: "dict[torch.dtype, Fixed]") -> Tensor:
        if x.dtype not in known:
            known[x.dtype] = self._fix(x.dtype)
        factors, scale = known[x.dtype]
        rows = x.reshape(-1, x.shape[-1])
        low_rank = None if factors is None else (rows @ factors[0].T, factors[1])
        y = FORMATS[self.weight_format].forward(
            rows, self.weight, self.matrix_shape, self.bias, low_rank
        )
        if scale is not None and self.bias is None:
            y = y * scale
        elif scale is not None:
            y = torch.addcmul(self.bias, y - self.bias, scale)
        return y.view(*x.shape[:-1], self.out_features)

    def _fix(self, dtype: torch.dtype) -> "Fixed":
        """For the present adapters; W must be whole."""
        parts = [part for part in (self.adapter, self.frozen) if part is not None and part.rank]
        if not parts:
            return Fixed(None, None)
        A = torch.cat([part.A.detach() for part in parts])
        gB = torch.cat([part.g.detach().unsqueeze(1) * part.B.detach() for part in parts])
        scale, adapter = None, self.adapter
        if adapter is not None and adapter.magnitude is not None:
            scale = adapter.magnitude.m.detach() * inverse_norms(self, adapter, dtype)
            scale = scale.to(dtype)
        return Fixed((A.to(dtype), gB.to(dtype)), scale)

    def low_rank(self, x: Tensor) -> LowRank | None:
        """The factors z ∘ g (T, R) and B (R, out) of the adapters' output for rows x (T, in);
        None without one."""
        parts = []
        factors = self._factors(x.dtype)
        if factors is not None:
            A, g, B = factors
            parts.append((self._dropped_hidden(self._dropped_input(x) @ A.T) * g, B))
        for A, g, B in self._fixed(x.dtype):
            parts.append(((x @ A.T) * g, B))
        return _joined(parts)

    def low_rank_backward(
        self, dy: Tensor, x: Tensor, need_x: bool
    ) -> tuple[LowRank | None, Tensor | None]:
        """Adds the adapter's gradients to `.grad`. Returns its contribution to dx, if needed: as
        two factors, or as a dense tensor where the input is dropped.

        With s = dropped z (or z): dB = (s ∘ g)ᵀ dy, ds = (dy Bᵀ) ∘ g, dg = Σ (dy Bᵀ) ∘ s,
        dz = dropped ds, dA = dzᵀ x, dx = dz A. Sums accumulate in float32.
        """
        parts = [((dy @ B.T) * g, A) for A, g, B in self._fixed(x.dtype)] if need_x else []
        factors = self._factors(x.dtype)
        if factors is None:
            return _joined(parts), None
        A, g, B = factors
        adapter = self.adapter
        assert adapter is not None
        rank = adapter.rank  # rows beyond it belong to the initial part of W
        x_kept = self._dropped_input(x)
        s = self._dropped_hidden(x_kept @ A.T)
        d_gated = dy @ B.T
        dz = self._dropped_hidden(d_gated * g)
        found = [
            (adapter.A, dz[:, :rank].T @ x_kept),
            (adapter.B, (s[:, :rank] * g[:rank]).T @ dy),
        ]
        if adapter.g.requires_grad:
            products = d_gated[:, :rank] * s[:, :rank]
            found.append((adapter.g, products.sum(0, dtype=torch.float32)))
        add_gradients(found)
        if not need_x:
            return None, None
        if self.dropout is not None and self.training and self.dropout.on_input:
            return _joined(parts), self.dropout(dz @ A)
        return _joined([(dz, A), *parts]), None

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """A, g, B of ΔW, or of ΔW − ΔW₀ where dropout applies only to this difference."""
        adapter = self.adapter
        if adapter is None or adapter.rank == 0:
            return None
        A, g, B = adapter.cast(dtype)
        if self._undropped is not None:
            A0, g0, B0 = self._undropped.cast(dtype)
            A, g, B = torch.cat([A, A0]), torch.cat([g, -g0]), torch.cat([B, B0])
        return A, g, B

    def _fixed(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A, g, B of what is neither trained nor dropped."""
        parts = (self._undropped, self.frozen)
        return [adapter.cast(dtype) for adapter in parts if adapter is not None]

    @property
    def _undropped(self) -> GatedAdapter | None:
        return self.initial if self.dropout is not None and self.training else None

    def _dropped_input(self, x: Tensor) -> Tensor:
        if self.dropout is None or not self.training or not self.dropout.on_input:
            return x
        return self.dropout(x)

    def _dropped_hidden(self, z: Tensor) -> Tensor:
        if self.dropout is None or not self.training or self.dropout.on_input:
            return z
        return self.dropout(z, paired=self._undropped is not None)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, format={self.weight_format}"


class Fixed(NamedTuple):
    """What is beside W while nothing changes, cast once: A (R, in) and g ∘ B (R, out) of all
    adapters, and what DoRA scales the rows of W + ΔW by (out); None without."""

    factors: LowRank | None
    scale: Tensor | None


@contextmanager
def fixed_adapters(model: nn.Module) -> Iterator[None]:
    """Context for passes of an evaluated model without gradients, in which no adapter, gate or
    weight changes: linear layers compute their product directly, with three kernels for W and its
    adapter. A token's pass is bound by launches, and the operator's dispatch, which only autograd
    and the compiler need, takes longer than these."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for layer in layers:
        layer.fixed = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.fixed = None


def _joined(parts: list[LowRank]) -> LowRank | None:
    """The sum of low-rank products as one."""
    if len(parts) > 1:
        left, right = zip(*parts, strict=True)
        return torch.cat(left, 1), torch.cat(right)
    return parts[0] if parts else None


@torch.library.custom_op("rankcast::adapted_linear", mutates_args=())
def adapted_linear(x: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Forward of `AdaptedLinear`: (…, in) → (…, out)."""
    layer: AdaptedLinear = layer_of(handle)
    rows = x.reshape(-1, x.shape[-1])
    y = FORMATS[layer.weight_format].forward(
        rows, layer.weight, layer.matrix_shape, layer.bias, layer.low_rank(rows)
    )
    # Not `view`: autograd refuses to let a model add in place to an operator's output that is one
    # (Falcon, Llama 4 and DeBERTa do). Nothing else holds `y`.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out_features])


@adapted_linear.register_fake
def _(x, handle, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("rankcast::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    dy: Tensor, x: Tensor, handle: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """dx (…, in), empty if not needed, and a zero gradient for the handle, which keeps the
    compiler from eliminating the call."""
    layer: AdaptedLinear = layer_of(handle)
    dy2, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if layer.sketch is not None:
        layer.sketch.add(rows, dy2)
    low_rank, dropped = layer.low_rank_backward(dy2, rows, need_x)
    if not need_x:
        return x.new_empty(0), torch.zeros_like(handle)
    dx = FORMATS[layer.weight_format].backward(dy2, layer.weight, layer.matrix_shape, low_rank)
    if dropped is not None:
        dx += dropped
    return dx.view(x.shape), torch.zeros_like(handle)


@adapted_linear_backward.register_fake
def _(dy, x, handle, need_x):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return dx, torch.empty_like(handle)


def _save(ctx, inputs, output):
    x, handle, _out = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, handle)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None
    need_x = ctx.needs_input_grad[0]
    dx, nothing = adapted_linear_backward(dy, *ctx.saved_tensors, need_x)
    return dx if need_x else None, nothing, None


adapted_linear.register_autograd(_backward, setup_context=_save)
