"""What adapted layers have in common, be they one matrix or a stack of experts' matrices.

A `PackedLayer` is the module that holds a frozen weight, of one matrix or of several, in its packed
format. An `AdaptedLayer` is the place of one adapter in it: a linear layer is its own, a stack has
one for every expert.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.gated import GatedAdapter
from adapters.layers.handles import RegisteredLayer


class Dropout:
    """Dropout of an adapted layer with a reproducible mask.

    The mask is drawn again in backward (and in a checkpointed recomputation) from
    (seed of the micro-batch, unit), so it is never stored. `base_seed` is one 0-d int64 CPU
    tensor that all units of a model share; the loop writes it before every micro-batch.
    """

    def __init__(self, probability: float, on_input: bool, base_seed: Tensor, unit_index: int):
        self.probability = probability
        self.on_input = on_input
        self.base_seed = base_seed
        self.unit_index = unit_index

    def __call__(self, x: Tensor, paired: bool = False) -> Tensor:
        """Inverted dropout. `paired`: the second half of the columns shares the first half's mask,
        so that a difference is dropped as one."""
        seed = int(self.base_seed) * 1_000_003 + self.unit_index
        generator = torch.Generator(device=x.device).manual_seed(seed & (2**63 - 1))
        drawn = x.chunk(2, dim=-1)[0] if paired else x
        keep = torch.empty_like(drawn, memory_format=torch.contiguous_format)
        kept = 1.0 - self.probability
        keep.bernoulli_(kept, generator=generator).div_(kept)
        return x * (torch.cat([keep, keep], dim=-1) if paired else keep)


class AdaptedLayer(Protocol):
    """The place of one gated adapter."""

    adapter: GatedAdapter | None
    dropout: Dropout | None
    initial: GatedAdapter | None
    """The part of W that a spectral method handed to the adapter; where it is given, only the
    adapter's difference from it is dropped."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def weight(self) -> Tensor:
        """The packed parameter that its matrix is in."""

    @property
    def token_counter(self) -> tuple[nn.Parameter, int] | None:
        """(a parameter whose gradient counts the tokens of every expert, this one's index); None
        where every token passes through."""

    @property
    def layer(self) -> "PackedLayer":
        """The module that holds its matrix."""


class PackedLayer(RegisteredLayer):
    """A module with a frozen weight W, packed in `weight_format`."""

    weight: Tensor
    """The packed parameter."""
    weight_format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W: (out, in), or (E, out, in)."""
        raise NotImplementedError

    @property
    def places(self) -> Mapping[int | None, AdaptedLayer]:
        """The places of adapters by the number of their expert; one matrix has None for it."""
        raise NotImplementedError

    @property
    def stacked(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return None not in self.places

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of what is packed: a stack as one matrix."""
        *rows, columns = self.shape
        return math.prod(rows), columns

    @property
    def adapts(self) -> bool:
        """Whether it holds an adapter."""
        return any(place.adapter is not None for place in self.places.values())

    def place_names(self, path: str) -> list[str]:
        """Names of its places where the module's path is `path`."""
        return [path if number is None else f"{path}.{number}" for number in self.places]

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed form of a full W; the caller sets it as the parameter."""
        return FORMATS[self.weight_format].pack(weight.reshape(self.matrix_shape), dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W as the products see it; under a sharder only while it is unsharded."""
        packed = self.weight.detach()
        fmt = FORMATS[self.weight_format]
        return fmt.unpack(packed, self.matrix_shape, dtype).view(self.shape)
