"""Frozen weight formats: how a backbone matrix is held as bytes, and how it is read back.

A quantised matrix is one flat tensor of bytes, codes followed by scales, *viewed as the model's
dtype*. To a sharder it is an ordinary frozen parameter, so ZeRO-3 and FSDP2 (which cannot shard
integer tensors on torch 2.11) split it without knowing about quantisation, and a cast to the dtype
that it already has preserves its bits. Never call `.float()` on it. `unpack` accepts the bytes
viewed as any dtype (FSDP2 views them as float32).
"""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.formats import float8
from adapters.rounding import round_up

_ALIGNMENT = 64  # bytes; the scales start on such a boundary, so that they can be viewed as float32
_MAX_WEIGHTS = 2**30  # per kernel call: bitsandbytes' kernels index with 32 bits
_BLOCK = 64  # weights that share one scale in the 4-bit formats, as in QLoRA


LowRank = tuple[Tensor, Tensor]
"""Factors (T, R) and (R, n) of an adapter's output."""


class WeightFormat(ABC):
    """A storage format of a frozen matrix of shape (out, in)."""

    name: str

    @abstractmethod
    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of a packed matrix of `shape` whose products are computed in `dtype`."""

    @abstractmethod
    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantise `weight` (out, in) into a flat tensor of `dtype`, the input of `unpack`."""

    @abstractmethod
    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Dequantise to (out, in) in `dtype`."""

    def product_error(self, device: torch.device) -> float:
        """Relative error of a product on `device` beyond rounding it to its dtype, about."""
        return 0.0

    def unpacked_bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of the dequantised copy of W that exists during a product."""
        return shape[0] * shape[1] * dtype.itemsize

    def product_bytes(
        self, shape: tuple[int, int], rows: int, dtype: torch.dtype, *, backward: bool
    ) -> int:
        """Temporary bytes of `forward` (or `backward`) of `rows` rows on a Hopper GPU, without
        arguments and result."""
        return self.unpacked_bytes(shape, dtype)

    def forward(
        self,
        x: Tensor,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
        low_rank: LowRank | None,
    ) -> Tensor:
        """x Wᵀ + bias + the product of `low_rank` (T, out), for rows x (T, in)."""
        W = self.unpack(packed, shape, x.dtype)
        if low_rank is None:
            return F.linear(x, W, bias)
        # The small product first: the large one then accumulates into it in its epilogue.
        y = _product(low_rank) if bias is None else torch.addmm(bias, *low_rank)
        return y.addmm_(x, W.T)

    def backward(
        self, dy: Tensor, packed: Tensor, shape: tuple[int, int], low_rank: LowRank | None
    ) -> Tensor:
        """dy W + the product of `low_rank` (T, in), for rows dy (T, out)."""
        W = self.unpack(packed, shape, dy.dtype)
        return dy @ W if low_rank is None else _product(low_rank).addmm_(dy, W)


def _product(low_rank: LowRank) -> Tensor:
    return low_rank[0] @ low_rank[1]


class Plain(WeightFormat):
    """The matrix itself, in the model's dtype."""

    name = "none"

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] * shape[1] * dtype.itemsize

    def unpacked_bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return 0  # it is held in the dtype of the products

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return packed.to(dtype)


class _CodesAndScales(WeightFormat):
    """Codes (uint8) followed by float32 scales in one flat byte buffer."""

    @abstractmethod
    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Number of code bytes and number of float32 scales."""

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and float32 scales of `weight`."""

    @abstractmethod
    def decode(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Inverse of `encode`, in `dtype`."""

    def _layout(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Bytes of codes, offset of the scales, bytes in all."""
        codes, scales = self.sizes(shape)
        offset = round_up(codes, _ALIGNMENT)
        return codes, offset, round_up(offset + 4 * scales, _ALIGNMENT)

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return self._layout(shape)[2]

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (weight.shape[0], weight.shape[1])
        _, offset, total = self._layout(shape)
        codes, scales = self.encode(weight.contiguous())
        data = torch.zeros(total, dtype=torch.uint8, device=weight.device)
        data[: codes.numel()] = codes.reshape(-1).view(torch.uint8)
        scale_bytes = scales.float().reshape(-1).view(torch.uint8)
        data[offset : offset + scale_bytes.numel()] = scale_bytes
        return data.view(dtype)

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.decode(*self.split(packed, shape), shape, dtype)

    def split(self, packed: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and scales (float32), as views of `packed`."""
        codes, offset, _ = self._layout(shape)
        scales = self.sizes(shape)[1]
        data = packed.view(torch.uint8)
        return data[:codes], data[offset : offset + 4 * scales].view(torch.float32)


class FourBit(_CodesAndScales):
    """bitsandbytes' nf4 or fp4: blocks of 64 weights along the flattened matrix share a scale."""

    def __init__(self, name: str):
        self.name = name

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        numel = shape[0] * shape[1]
        return math.ceil(numel / 2), math.ceil(numel / _BLOCK)

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            _bitsandbytes().quantize_4bit(part, _BLOCK, self.name, torch.uint8)
            for part in weight.flatten().split(_MAX_WEIGHTS)
        ]
        return torch.cat([codes.flatten() for codes, _ in parts]), torch.cat([s for _, s in parts])

    def decode(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        numel = shape[0] * shape[1]
        if codes.is_cuda and numel % _BLOCK == 0:
            # Only GPU builds of torch come with Triton.
            from adapters.formats.kernels import dequantise_lookup

            table = _table(self.name, codes.device)
            return dequantise_lookup(codes, scales, table, _BLOCK, dtype).view(shape)
        parts = [
            _bitsandbytes().dequantize_4bit(
                some_codes.unsqueeze(1),
                some_scales,
                _BLOCK,
                self.name,
                [min(_MAX_WEIGHTS, numel - index * _MAX_WEIGHTS)],
                dtype,
            )
            for index, (some_codes, some_scales) in enumerate(
                zip(
                    codes.split(_MAX_WEIGHTS // 2),
                    scales.split(_MAX_WEIGHTS // _BLOCK),
                    strict=True,
                )
            )
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


@functools.cache
def _bitsandbytes() -> Any:
    """Its operators, for CPU and GPU, imported where a format first needs one."""
    # It warns of products of its own that are missing, which no format asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401 (registers them)

    return torch.ops.bitsandbytes


@functools.cache
def _table(name: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format (float32)."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(name, device=device)


class Int8(_CodesAndScales):
    """bitsandbytes' row-wise absmax int8.

    Choice: the products run in the model's dtype on the dequantised matrix, not in int8 with
    outlier columns (LLM.int8()). Activations then stay exact, the trained adapter belongs to one
    well-defined dequantised backbone, and the result does not depend on how a batch is cut up.
    """

    name = "int8"

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * shape[1], shape[0]

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # The CUDA kernel takes float16 only; a weight beyond its range (65504) would not survive.
        source = weight.half() if weight.is_cuda else weight
        codes, scales, _ = _bitsandbytes().int8_vectorwise_quant(source, 0.0)
        return codes, scales

    def decode(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        function = _by_row_compiled() if codes.is_cuda else _by_row
        return function(codes.view(torch.int8).view(shape), scales * (1 / 127), dtype)


class Float8(_CodesAndScales):
    """float8 e4m3 (4 bits of exponent, 3 of mantissa, no infinities), one scale a row.

    Scales are numbers that bfloat16 holds, so that they are the same in every compute dtype.
    Products run in float8 where the GPU has them, and on the dequantised matrix elsewhere.
    """

    name = "fp8"

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] * shape[1], shape[0]

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = float8.LARGEST
        scales = (weight.float().abs().amax(1) / largest).bfloat16().float()
        scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
        # What a scale rounded down leaves above the largest number would become NaN.
        codes = (weight / scales.unsqueeze(1)).clamp(-largest, largest)
        return codes.to(float8.E4M3), scales

    def decode(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        function = _by_row_compiled() if codes.is_cuda else _by_row
        return function(codes.view(float8.E4M3).view(shape), scales, dtype)

    def product_error(self, device: torch.device) -> float:
        # Activations are rounded to 3 bits of mantissa: 2⁻⁴/√3.
        return 0.036 if float8.capable(device) else 0.0

    def product_bytes(
        self, shape: tuple[int, int], rows: int, dtype: torch.dtype, *, backward: bool
    ) -> int:
        if not float8.fits(dtype, shape):
            return super().product_bytes(shape, rows, dtype, backward=backward)
        # Codes of the rows, and in backward the transposed codes of W.
        return rows * shape[0] + shape[0] * shape[1] if backward else rows * shape[1]

    def forward(
        self,
        x: Tensor,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
        low_rank: LowRank | None,
    ) -> Tensor:
        if not float8.has_products(x, shape):
            return super().forward(x, packed, shape, bias, low_rank)
        y = float8.forward_product(x, *self.codes_and_scales(packed, shape))
        if bias is not None:
            y += bias
        return y if low_rank is None else y.addmm_(*low_rank)

    def backward(
        self, dy: Tensor, packed: Tensor, shape: tuple[int, int], low_rank: LowRank | None
    ) -> Tensor:
        if not float8.has_products(dy, shape):
            return super().backward(dy, packed, shape, low_rank)
        dx = float8.backward_product(dy, *self.codes_and_scales(packed, shape))
        return dx if low_rank is None else dx.addmm_(*low_rank)

    def codes_and_scales(self, packed: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        codes, scales = self.split(packed, shape)
        return codes.view(float8.E4M3).view(shape), scales


def _by_row(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (out, in) times one scale a row."""
    return (codes.float() * scales.unsqueeze(1)).to(dtype)


@functools.cache
def _by_row_compiled() -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    return torch.compile(_by_row, dynamic=True)


FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt for fmt in (Plain(), FourBit("nf4"), FourBit("fp4"), Int8(), Float8())
}
