"""Interfaces of adapted layers, for single matrices and for stacks of experts' matrices.

A `PackedLayer` is the module that holds a frozen weight of one or several matrices in its packed
format. An `AdaptedLayer` is one matrix of it and its adapter: a linear layer is both, a stack has
one adapted layer per expert.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.formats.formats import FORMATS
from adapters.gated import GatedAdapter
from adapters.layers.handles import RegisteredLayer
from adapters.layers.sketch import Sketch


class Dropout:
    """Dropout of an adapted layer with a deterministic mask.

    The mask is recomputed in backward (and under activation checkpointing) from the seed of the
    micro-batch and the unit, and never stored. `base_seed` is a 0-d int64 CPU tensor shared by all
    units of a model; the training loop writes it before every micro-batch.
    """

    def __init__(self, probability: float, on_input: bool, base_seed: Tensor, unit_index: int):
        self.probability = probability
        self.on_input = on_input
        self.base_seed = base_seed
        self.unit_index = unit_index

    def __call__(self, x: Tensor, paired: bool = False) -> Tensor:
        """Inverted dropout. `paired`: both halves of the columns get the same mask, so that a
        difference is dropped jointly."""
        seed = int(self.base_seed) * 1_000_003 + self.unit_index
        generator = torch.Generator(device=x.device).manual_seed(seed & (2**63 - 1))
        drawn = x.chunk(2, dim=-1)[0] if paired else x
        mask = torch.empty_like(drawn, memory_format=torch.contiguous_format)
        keep = 1.0 - self.probability
        mask.bernoulli_(keep, generator=generator).div_(keep)
        return x * (torch.cat([mask, mask], dim=-1) if paired else mask)


class AdaptedLayer(Protocol):
    """A matrix with at most one gated adapter."""

    adapter: GatedAdapter | None
    dropout: Dropout | None
    initial: GatedAdapter | None
    """The part of W that spectral initialisation moved into the adapter; dropout then applies only
    to the adapter's difference from it."""
    frozen: GatedAdapter | None
    """What an earlier stage learned, if it is kept beside the adapter: added to the output, neither
    trained nor dropped."""
    sketch: Sketch | None
    """Sums its tokens in the backward pass, while a data-driven start is looked for."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def weight(self) -> Tensor:
        """The packed parameter that contains the matrix."""

    @property
    def token_counter(self) -> tuple[nn.Parameter, int] | None:
        """(parameter whose gradient counts the tokens of each expert, this expert's index); None if
        the layer sees every token."""

    @property
    def layer(self) -> "PackedLayer":
        """The module that holds the matrix."""


class PackedLayer(RegisteredLayer):
    """A module with a frozen weight W, packed in `weight_format`."""

    weight: Tensor
    """The packed parameter."""
    weight_format: str
    transposed: bool = False
    """Whether the pretrained files hold its matrices as (in, out), as GPT-2's `Conv1D` does. The
    layer itself holds (out, in)."""

    scales_rows: bool = False
    """Whether its adapter may have a magnitude (DoRA)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W: (out, in), or (E, out, in)."""
        raise NotImplementedError

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of W in the pretrained files."""
        *experts, rows, columns = self.shape
        return (*experts, columns, rows) if self.transposed else self.shape

    def reoriented(self, weight: Tensor) -> Tensor:
        """W (…, out, in) from the files' orientation, or the files' from W's (contiguous)."""
        return weight.mT.contiguous() if self.transposed else weight

    @property
    def adapted_layers(self) -> Mapping[int | None, AdaptedLayer]:
        """The adapted layers by expert index; {None: layer} for a single matrix."""
        raise NotImplementedError

    @property
    def stacked(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return None not in self.adapted_layers

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the packed matrix; a stack is one matrix of (E · out, in)."""
        *rows, columns = self.shape
        return math.prod(rows), columns

    @property
    def adapts(self) -> bool:
        """Whether any of its adapted layers has an adapter."""
        return any(layer.adapter is not None for layer in self.adapted_layers.values())

    def layer_names(self, path: str) -> list[str]:
        """Names of its adapted layers, given the module's path."""
        return [path if index is None else f"{path}.{index}" for index in self.adapted_layers]

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Pack the full W; the caller assigns the result to the parameter."""
        return FORMATS[self.weight_format].pack(weight.reshape(self.matrix_shape), dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The dequantised W; requires the parameter to be unsharded."""
        packed = self.weight.detach()
        fmt = FORMATS[self.weight_format]
        return fmt.unpack(packed, self.matrix_shape, dtype).view(self.shape)
