"""Stacks of experts stored in MXFP4, as OpenAI publishes gpt-oss.

32 values along a row share a scale (OCP Microscaling Formats 1.0): `…_blocks` (E, out, in/32, 16)
uint8 holds two FP4 (e2m1) values a byte, the low four bits first; `…_scales` (E, out, in/32) uint8
holds exponents (E8M0) with a bias of 127. Every value is exact in bfloat16.
"""

import torch
from torch import Tensor

from trainer.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two tensors' keys."""

_BLOCK = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def packed_shapes(shape: tuple[int, ...], *, transposed: bool) -> dict[str, tuple[int, ...]]:
    """Shapes, by ending, of the tensors that hold a stack of `shape` (E, out, in), or (E, in, out)
    if `transposed`. Raises UserError where a row is no whole number of blocks."""
    experts, rows, columns = (shape[0], shape[2], shape[1]) if transposed else shape
    if columns % _BLOCK:
        raise UserError(
            f"model.id: experts of {rows} x {columns} in MXFP4; accepted: rows of a multiple of "
            f"{_BLOCK}"
        )
    blocks = experts, rows, columns // _BLOCK
    return {BLOCKS: (*blocks, _BLOCK // 2), SCALES: blocks}


def unpack(blocks: Tensor, scales: Tensor, *, transposed: bool = False) -> Tensor:
    """(…, out, in), or (…, in, out) if `transposed`, in bfloat16 from blocks (…, out, in/32, 16)
    and scales (…, out, in/32)."""
    numbers = torch.arange(256, device=blocks.device)
    magnitudes = torch.tensor(_E2M1, device=blocks.device)
    codes = torch.stack([numbers & 15, numbers >> 4], dim=1)
    pairs = torch.where(codes < 8, 1.0, -1.0) * magnitudes[codes & 7]  # (256, 2)
    values = pairs[blocks.int()].flatten(-2)  # (…, in/32, 32)
    # 2 ** (scale - 127) from float32's own exponent bits; the smallest one is subnormal.
    powers = (scales.int() << 23).clamp_(min=1 << 22).view(torch.float32)
    unpacked = (values * powers.unsqueeze(-1)).flatten(-2).bfloat16()
    return unpacked.mT if transposed else unpacked
