"""Stacked experts with one adapter each, computed by grouped products.

With rows sorted by expert and e the expert of a row,

    z = x A_eᵀ          y = x W_eᵀ + (z ∘ g_e) B_e

in grouped GEMMs (cuBLAS or CUTLASS on a GPU); ΔW is never materialised. As in `linear.py` the
frozen stack stays packed, is dequantised once in forward and once in backward, and the operator is
opaque to autograd and torch.compile. `expert_modules.py` makes stacks of a model's experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.gated import GatedAdapter
from adapters.layers.base import AdaptedLayer, Dropout, PackedLayer
from adapters.layers.handles import add_gradients, layer_of
from adapters.layers.sketch import Sketch
from adapters.rounding import round_up

_RANK_MULTIPLE = 8
"""Grouped GEMMs need rows of a multiple of 16 bytes; padding is zero and does not train."""


class ExpertLayer:
    """The adapted layer of one expert in a stack.

    Not an nn.Module: sharders must not find the adapters, which are replicated on every rank.
    """

    def __init__(self, stack: "StackedLinear", index: int):
        self.stack, self.index = stack, index
        self.adapter: GatedAdapter | None = None
        self.dropout: Dropout | None = None
        self.initial: GatedAdapter | None = None
        self.frozen: GatedAdapter | None = None
        """As in `AdaptedLayer`."""
        self.sketch: Sketch | None = None
        """As in `AdaptedLayer`."""

    @property
    def out_features(self) -> int:
        return self.stack.out_features

    @property
    def in_features(self) -> int:
        return self.stack.in_features

    @property
    def weight(self) -> Tensor:
        return self.stack.weight

    @property
    def token_counter(self) -> tuple[nn.Parameter, int]:
        return self.stack.tokens, self.index

    @property
    def layer(self) -> PackedLayer:
        return self.stack


class StackedLinear(PackedLayer):
    """One projection of E experts: frozen `y = x W_eᵀ` in any weight format, at most E adapters.

    `weight` is the packed matrix (E · out, in) of all experts.
    """

    def __init__(
        self, weight: nn.Parameter, weight_format: str = "none", *, transposed: bool = False
    ):
        """`weight` (E, out, in), or (E, in, out) if `transposed`."""
        super().__init__()
        self.transposed = transposed
        if transposed:
            weight = nn.Parameter(weight.detach().mT.contiguous(), weight.requires_grad)
        self.experts, self.out_features, self.in_features = weight.shape
        self.weight_format = weight_format
        self.weight = weight
        self.layers = tuple(ExpertLayer(self, index) for index in range(self.experts))

    @property
    def tokens(self) -> nn.Parameter:
        """(E,); the values are unused, the gradient counts each expert's tokens that contribute to
        the loss."""
        if "_tokens" not in self.__dict__:
            # Not registered with nn.Module: it is no part of the backbone.
            zeros = torch.zeros(self.experts, device=self.weight.device)
            self.__dict__["_tokens"] = nn.Parameter(zeros)
        return self.__dict__["_tokens"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        return self.experts, self.out_features, self.in_features

    @property
    def adapted_layers(self) -> dict[int | None, AdaptedLayer]:
        return {layer.index: layer for layer in self.layers}

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """(rows, in) → (rows, out). Rows are sorted by expert; `offsets[e]` is the end of expert
        e's rows."""
        return adapted_experts(x, offsets, self.handle, self.out_features)

    def low_rank(self, x: Tensor, offsets: Tensor) -> Tensor | None:
        """(z ∘ g_e) B_e (rows, out) for rows x (rows, in); None without adapters."""
        parts = []
        factors = self._factors(x.dtype)
        if factors is not None:
            A, g, B = factors
            z = grouped(self._dropped_input(x), A.mT, offsets)
            parts.append(grouped(self._dropped_hidden(z), gated(g, B), offsets))
        for A, g, B in self._fixed(x.dtype):
            parts.append(grouped(grouped(x, A.mT, offsets), gated(g, B), offsets))
        return _summed(parts)

    def low_rank_backward(self, dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor | None:
        """Adds the adapters' gradients and the experts' token counts to `.grad`. Returns the
        adapters' contribution to dx, None without adapters.

        As in `linear.py` for every expert's rows; with C = sᵀ dy (R, out), dB = g ∘ C and
        dg = Σ C ∘ B.
        """
        parts = [
            grouped(grouped(dy, gated(g, B).mT, offsets), A, offsets)
            for A, g, B in self._fixed(x.dtype)
        ]
        factors = self._factors(x.dtype)
        if factors is None:
            return _summed(parts)
        A, g, B = factors
        gB = gated(g, B)
        x_kept = self._dropped_input(x)
        s = self._dropped_hidden(grouped(x_kept, A.mT, offsets))
        C = grouped(s.T, dy, offsets)
        dz = self._dropped_hidden(grouped(dy, gB.mT, offsets))
        dA = grouped(dz.T, x_kept, offsets)
        C32 = C.float()
        found = {"A": dA.float(), "B": gated(g.float(), C32)}
        if any(
            layer.adapter is not None and layer.adapter.g.requires_grad for layer in self.layers
        ):
            found["g"] = (C32 * B.float()).sum(2)
        add_gradients(
            (getattr(layer.adapter, role), gradients[expert, : layer.adapter.rank])
            for role, gradients in found.items()
            for expert, layer in enumerate(self.layers)
            if layer.adapter is not None
        )
        # Tokens without a loss, such as padding, have a zero gradient and are not counted.
        counted = torch.linalg.vector_norm(dy, ord=torch.inf, dim=1) != 0
        numbers = torch.arange(dy.shape[0], device=dy.device)
        expert_of = torch.searchsorted(offsets, numbers, right=True)
        counts = torch.zeros(self.experts, device=dy.device)
        counts.index_add_(0, expert_of, counted.float())
        add_gradients([(self.tokens, counts)])
        return _summed([self._dropped_input(grouped(dz, A, offsets)), *parts])

    def sketch(self, dy: Tensor, x: Tensor, offsets: Tensor) -> None:
        """Add each expert's rows to its sketch, if there are sketches."""
        if all(layer.sketch is None for layer in self.layers):
            return
        start = 0
        for layer, stop in zip(self.layers, offsets.tolist(), strict=True):
            if layer.sketch is not None and stop > start:
                layer.sketch.add(x[start:stop], dy[start:stop])
            start = stop

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """A (E, R, in), g (E, R) and B (E, R, out) of ΔW, or of ΔW − ΔW₀ where dropout applies only
        to this difference; None without adapters."""
        factors = self._stacked([layer.adapter for layer in self.layers], dtype)
        undropped = self._undropped(dtype) if factors is not None else None
        if factors is None or undropped is None:
            return factors
        A, g, B = factors
        A0, g0, B0 = undropped
        return torch.cat([A, A0], 1), torch.cat([g, -g0], 1), torch.cat([B, B0], 1)

    def _fixed(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Stacked factors of what is neither trained nor dropped."""
        frozen = self._stacked([layer.frozen for layer in self.layers], dtype)
        return [part for part in (self._undropped(dtype), frozen) if part is not None]

    def _undropped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """The stacked factors of ΔW₀, the initial part of W; None without it or without dropout."""
        if self._dropout is None:
            return None
        ranks = [0 if layer.adapter is None else layer.adapter.rank for layer in self.layers]
        return self._stacked([layer.initial for layer in self.layers], dtype, max(ranks))

    @property
    def _dropout(self) -> Dropout | None:
        if not self.training:
            return None
        return next((layer.dropout for layer in self.layers if layer.dropout is not None), None)

    def _dropped_input(self, x: Tensor) -> Tensor:
        dropout = self._dropout
        return x if dropout is None or not dropout.on_input else dropout(x)

    def _dropped_hidden(self, z: Tensor) -> Tensor:
        dropout = self._dropout
        if dropout is None or dropout.on_input:
            return z
        return dropout(z, paired=any(layer.initial is not None for layer in self.layers))

    def _stacked(
        self, adapters: Sequence[GatedAdapter | None], dtype: torch.dtype, least: int = 0
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A (E, R, in), g (E, R) and B (E, R, out), padded with zeros to R >= `least`; None without
        components."""
        rank = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
        if rank == 0:
            return None
        rank = round_up(max(rank, least), _RANK_MULTIPLE)
        device = self.weight.device
        A = torch.zeros(self.experts, rank, self.in_features, dtype=dtype, device=device)
        g = torch.zeros(self.experts, rank, dtype=dtype, device=device)
        B = torch.zeros(self.experts, rank, self.out_features, dtype=dtype, device=device)
        held = [(e, adapter) for e, adapter in enumerate(adapters) if adapter is not None]
        torch._foreach_copy_(
            [stack[e, : adapter.rank] for e, adapter in held for stack in (A, g, B)],
            [t.detach() for _, adapter in held for t in (adapter.A, adapter.g, adapter.B)],
        )
        return A, g, B

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in={self.in_features}, out={self.out_features}, "
            f"format={self.weight_format}"
        )


def _summed(parts: Sequence[Tensor]) -> Tensor | None:
    """Their sum, in the first one's place."""
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0] if parts else None


def gated(g: Tensor, B: Tensor) -> Tensor:
    """g ∘ B of stacks g (E, R) and B (E, R, out)."""
    return B * g.unsqueeze(2)


def grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Grouped GEMM: (rows, n) · (E, n, m) → (rows, m), or (n, rows) · (rows, m) → (E, n, m)."""
    return F.grouped_mm(a, b, offs=offsets)


@torch.library.custom_op("rankcast::adapted_experts", mutates_args=())
def adapted_experts(x: Tensor, offsets: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Forward of `StackedLinear`: (rows, in) → (rows, out)."""
    stack: StackedLinear = layer_of(handle)
    y = grouped(x, stack.dequantised(x.dtype).mT, offsets)
    added = stack.low_rank(x, offsets)
    return y if added is None else y.add_(added)


@adapted_experts.register_fake
def _(x, offsets, handle, out_features):
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("rankcast::adapted_experts_backward", mutates_args=())
def adapted_experts_backward(
    dy: Tensor, x: Tensor, offsets: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    """dx (rows, in) and a zero gradient for the handle."""
    stack: StackedLinear = layer_of(handle)
    dy = dy.contiguous()
    stack.sketch(dy, x, offsets)
    dx = grouped(dy, stack.dequantised(x.dtype), offsets)
    added = stack.low_rank_backward(dy, x, offsets)
    return dx if added is None else dx.add_(added), torch.zeros_like(handle)


@adapted_experts_backward.register_fake
def _(dy, x, offsets, handle):
    return torch.empty_like(x), torch.empty_like(handle)


def _save(ctx, inputs, output):
    x, offsets, handle, _out = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, offsets, handle)


def _backward(ctx, dy):
    if dy is None:
        return (None,) * 4
    dx, nothing = adapted_experts_backward(dy, *ctx.saved_tensors)
    return dx, None, nothing, None


adapted_experts.register_autograd(_backward, setup_context=_save)
