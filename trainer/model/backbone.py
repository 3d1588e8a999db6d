"""A model with adapted layers, before its weights are there and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.units import AdaptedLayer, Unit
from trainer.model.blocks import Blocks

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class TrainedModule(nn.Module):
    """A module that trains whole beside the adapters (a new head): float32, never sharded."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner.float()
        for name, parameter in inner.named_parameters():  # a router's balancing terms do not train
            parameter.requires_grad_(name.rpartition(".")[2] in ("weight", "bias"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x.float(), *args, **kwargs)


@dataclass(frozen=True)
class BuiltModel:
    """A model on the meta device whose linear layers are adapted layers: shapes, no bytes."""

    model: "PreTrainedModel"
    dtype: torch.dtype
    units: Sequence[Unit]
    adapted_layers: Mapping[str, AdaptedLayer]
    """Adapted layers by name; those of `units` are to take adapters."""
    heads: Mapping[str, nn.Module]
    """The task's new modules and trained routers, by path; their parameters train whole."""
    left_alone: Sequence[str] = ()
    """Stacks of experts of a form that takes no adapters, by their path within a block."""


@dataclass(frozen=True)
class Loading:
    """What it took to load a backbone."""

    seconds: float
    bytes_read: int
    """Of tensors in files, by all ranks."""
    shares: dict[str, float]
    """Seconds in which this rank waited for files, split, packed, and shared with its host."""
    peak_host_bytes: int
    """The most resident memory that any rank has had so far, loaded libraries included."""


@dataclass(frozen=True, kw_only=True)
class LoadedBackbone(BuiltModel):
    """The same model with its weights, in the engine's hands; `heads` are `TrainedModule`s."""

    blocks: Blocks
    """How the transformer blocks run."""
    digest: str
    """Identity of config.json and weights."""
    quantization_error: float
    """‖W − Ŵ‖ / ‖W‖ over all quantised matrices (Frobenius)."""
    loading: Loading


def set_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
