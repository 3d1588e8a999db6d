"""Triton kernels that are bound by memory bandwidth, where library kernels are slower.

They dequantise 4-bit codes (bitsandbytes' kernel reaches 2.4 TB/s on an H200; same bits), quantise
rows to float8, and transpose codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 2048  # bytes of codes per program of `dequantise_lookup`
_TILE = 128  # side of the tile of codes per program of `transposed`


def dequantise_lookup(
    codes: Tensor, scales: Tensor, table: Tensor, block: int, dtype: torch.dtype
) -> Tensor:
    """Dequantise 4-bit codes to a flat tensor of `dtype`: two per byte of `codes` (uint8, high
    nibble first), each an index into the 16 float32 values of `table`, times its block's scale."""
    count = codes.numel()
    out = torch.empty(2 * count, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(count, _BYTES),)
    _look_up[grid](codes, scales, table, out, count, PER_SCALE=block // 2, BYTES=_BYTES)
    return out


@triton.jit
def _look_up(codes, scales, table, out, count, PER_SCALE: tl.constexpr, BYTES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BYTES
    at = start + tl.arange(0, BYTES)
    code = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
    scale = tl.load(scales + at // PER_SCALE, mask=at < count, other=0.0)
    first = tl.load(table + (code >> 4)) * scale
    second = tl.load(table + (code & 15)) * scale
    both = tl.interleave(first, second).to(out.dtype.element_ty)
    to = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + to, both, mask=to < 2 * count)


def encoded_rows(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (T, n), times `columns` (n) if given, as float8 codes with a float32 scale per row (T, 1).
    A row of zeros, or one too small to be scaled, becomes codes of 0."""
    x = x.contiguous()
    rows, n = x.shape
    codes = torch.empty(rows, n, dtype=dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n)
    _encode_rows[(rows,)](
        x, x if columns is None else columns, codes, scales, n, LARGEST=torch.finfo(dtype).max,
        SCALED=columns is not None, BLOCK=block, num_warps=16 if block > 8192 else 8,
    )  # fmt: skip
    return codes, scales


@triton.jit
def _encode_rows(
    x, columns, codes, scales, n, LARGEST: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + at, mask=at < n, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(columns + at, mask=at < n, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(values)) / LARGEST, 1e-30)
    # NaN is preserved, not clamped: the step is then skipped.
    values = tl.clamp(values / scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + row * n + at, values.to(codes.dtype.element_ty), mask=at < n)
    tl.store(scales + row, scale)


def transposed(codes: Tensor) -> Tensor:
    """One-byte codes (rows, columns) → (columns, rows)."""
    rows, columns = codes.shape
    out = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))
    _transpose[grid](codes.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE=_TILE)
    return out


@triton.jit
def _transpose(codes, out, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(codes + row[:, None] * columns + column[None, :], mask=inside)
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))
