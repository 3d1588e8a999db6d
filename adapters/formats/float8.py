"""Products in float8 e4m3 on GPUs that have them (Hopper and later).

Activations are quantised on the fly with one scale per row, weights once with one scale per row:

    y = (x̂ Ŵᵀ) ∘ (s_x s_Wᵀ)          dx = (d̂ Ŵ) ∘ s_d,  d = dy ∘ s_W

The second product sums over the rows of W, so their scales are multiplied into dy before dy is
quantised. cuBLAS requires a column-major second factor, so backward transposes the codes.
"""

import functools

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_MULTIPLE = 16  # cuBLAS: rows and columns of W must be multiples of 16


def has_products(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether x Wᵀ with W of `shape` runs in float8; elsewhere W is dequantised."""
    return capable(x.device) and fits(x.dtype, shape)


def fits(dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """Whether products in `dtype` with W of `shape` can run in float8 on a GPU that has them."""
    return dtype == torch.bfloat16 and all(size % _MULTIPLE == 0 for size in shape)


@functools.cache
def capable(device: torch.device) -> bool:
    """Whether a device has float8 products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def forward_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x Wᵀ (T, out) for x (T, in), codes (out, in) and scales (out)."""
    from adapters.formats.kernels import encoded_rows  # only GPU builds of torch come with Triton

    x8, scale = encoded_rows(x, None, E4M3)
    return torch._scaled_mm(
        x8, codes.t(), scale_a=scale, scale_b=scales.unsqueeze(0), out_dtype=x.dtype,
        use_fast_accum=True,
    )  # fmt: skip


def backward_product(dy: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """dy W (T, in) for dy (T, out)."""
    from adapters.formats.kernels import encoded_rows, transposed

    d8, scale = encoded_rows(dy, scales, E4M3)
    ones = torch.ones(1, codes.shape[1], device=dy.device)
    return torch._scaled_mm(
        d8, transposed(codes).t(), scale_a=scale, scale_b=ones, out_dtype=dy.dtype,
        use_fast_accum=True,
    )  # fmt: skip
