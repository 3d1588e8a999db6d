"""DoRA's magnitudes: the rows of W + ΔW, scaled to trained norms m (Liu et al. 2024, eq. 5).

    y = c ∘ x (W + ΔW)ᵀ + bias        c = m / n,  n = ‖W + ΔW‖ by row, without a gradient (§4.3)
    n² = ‖W‖² + 2 Σ_j (W a_j) g_j b_j + Σ_jk (a_j · a_k) g_j b_j g_k b_k

with a_j and b_j the rows of A and B: ΔW is never formed, and of W only W Aᵀ is computed. The
operator follows that of `linear.py`, finds W and adapter by the layer's handle like it, and adds
the gradient of m itself.
"""

from typing import Any

import torch
from torch import Tensor

from adapters.formats.formats import FORMATS
from adapters.gated import GatedAdapter, Magnitude
from adapters.layers.base import PackedLayer
from adapters.layers.handles import add_gradients, layer_of


@torch.no_grad()
def inverse_norms(layer: PackedLayer, adapter: GatedAdapter, dtype: torch.dtype) -> Tensor:
    """1 / n (out) in float32, of an adapter with a magnitude; the layer's weight must be whole."""
    assert adapter.magnitude is not None
    A, scaled = adapter.A.detach(), adapter.B.detach() * adapter.g.detach().unsqueeze(1)
    product = FORMATS[layer.weight_format].forward(
        A.to(dtype), layer.weight, layer.matrix_shape, None, None
    )
    squares = adapter.magnitude.squares + 2 * (product.float() * scaled).sum(0)
    squares += (((A @ A.T) @ scaled) * scaled).sum(0)
    return squares.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()


def _magnitude(handle: Tensor) -> tuple[Any, Magnitude | None]:
    """(the layer, its adapter's m)"""
    layer = layer_of(handle)
    return layer, None if layer.adapter is None else layer.adapter.magnitude


@torch.library.custom_op("rankcast::scaled_rows", mutates_args=())
def scaled_rows(y: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    """(c ∘ (y − bias) + bias, 1 / n) for the layer's output y (…, out); y itself without m."""
    layer, magnitude = _magnitude(handle)
    if magnitude is None:
        return y.clone(), torch.ones(y.shape[-1], dtype=torch.float32, device=y.device)
    inverse = inverse_norms(layer, layer.adapter, y.dtype)
    c = (magnitude.m.detach() * inverse).to(y.dtype)
    if layer.bias is None:
        return y * c, inverse
    return torch.addcmul(layer.bias, y - layer.bias, c), inverse


@scaled_rows.register_fake
def _(y, handle):
    return torch.empty_like(y), y.new_empty(y.shape[-1], dtype=torch.float32)


@torch.library.custom_op("rankcast::scaled_rows_backward", mutates_args=())
def scaled_rows_backward(
    dy: Tensor, y: Tensor, inverse: Tensor, handle: Tensor
) -> tuple[Tensor, Tensor]:
    """c ∘ dy, and a zero gradient for the handle. dm = Σ dy ∘ (y − bias) / n, over all rows."""
    layer, magnitude = _magnitude(handle)
    if magnitude is None:
        return dy.clone(), torch.zeros_like(handle)
    plain = y if layer.bias is None else y - layer.bias
    products = (dy * plain).reshape(-1, y.shape[-1])
    add_gradients([(magnitude.m, products.sum(0, dtype=torch.float32) * inverse)])
    return dy * (magnitude.m.detach() * inverse).to(dy.dtype), torch.zeros_like(handle)


@scaled_rows_backward.register_fake
def _(dy, y, inverse, handle):
    return torch.empty_like(dy), torch.empty_like(handle)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    y, handle = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, output[1], handle)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if dy is None else scaled_rows_backward(dy, *ctx.saved_tensors)


scaled_rows.register_autograd(_backward, setup_context=_save)
