"""A model with adapted layers, before and after its weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.layers.base import AdaptedLayer
from adapters.unit import Unit
from trainer.model.blocks import Blocks

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class TrainedModule(nn.Module):
    """A fully trained module (a new head, a router): float32, never sharded."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner.float()
        for name, parameter in inner.named_parameters():  # not a router's balancing bias
            parameter.requires_grad_(name.rpartition(".")[2] in ("weight", "bias"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x.float(), *args, **kwargs)


@dataclass(frozen=True)
class BuiltModel:
    """A model on the meta device whose linear layers are replaced by adapted layers."""

    model: "PreTrainedModel"
    dtype: torch.dtype
    units: Sequence[Unit]
    adapted_layers: Mapping[str, AdaptedLayer]
    """Adapted layers by name; those of `units` take adapters."""
    heads: Mapping[str, nn.Module]
    """The task's new modules and trained routers, by path; fully trained."""
    attention: str
    """How it attends, for the log."""
    left_alone: Sequence[str] = ()
    """Stacks of experts whose form does not support adapters, by their path within a block."""


@dataclass(frozen=True)
class Loading:
    """Time and memory of loading a backbone."""

    seconds: float
    bytes_read: int
    """Of tensors in files, over all ranks."""
    stages: dict[str, float]
    """This rank's seconds of waiting for files, decomposing, packing, and exchanging tensors within
    its host."""
    peak_host_bytes: int
    """The largest peak of resident memory of any rank so far, libraries included."""


@dataclass(frozen=True, kw_only=True)
class LoadedBackbone(BuiltModel):
    """The model with its weights, sharded by the engine; `heads` are `TrainedModule`s."""

    blocks: Blocks
    """Controls how the transformer blocks run."""
    digest: str
    """Digest of config.json and weights."""
    quantization_error: float
    """‖W − Ŵ‖ / ‖W‖ over all quantised matrices (Frobenius)."""
    loading: Loading


def set_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
