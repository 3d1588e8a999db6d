"""A model with adapted layers, before and after its weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.layers.base import AdaptedLayer
from adapters.token_rows import TokenRows
from adapters.unit import Unit
from trainer.data.rows import Rows
from trainer.model.blocks import Blocks

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

    from trainer.model.added_tokens import AddedTokens


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
class LeftAlone:
    """Matrices without adapters, by their paths (`*`: any block) or those within a block, and the
    reason."""

    paths: Sequence[str]
    reason: str

    def __str__(self) -> str:
        return f"no adapters on {', '.join(self.paths)}: {self.reason}"


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
    rows: Rows
    """How it takes the sequences of a micro-batch."""
    left_alone: Sequence[LeftAlone] = ()
    """Matrices that get no adapter although `all-linear` names them, or that keep their own layer
    and stay unquantised."""
    left_out: str | None = None
    """On what the files hold and the model lacks, for the log."""
    unreached: Sequence[str] = ()
    """Linear layers whose output does not reach the loss; they get no adapters."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters and persistent buffers as transformers names them, before layers were replaced;
    parameters on meta."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """Initial values of the small parameters that are neither weights nor biases."""
    added: "AddedTokens | None" = None
    """`model.added_tokens`."""
    tables: Sequence[str] = ()
    """Paths of the modules of which rows of these tokens train: the embedding, and the output head
    where it is not tied to it; none without any."""

    @property
    def row_parameters(self) -> int:
        """Number of trained scalars in rows of tokens."""
        if self.added is None:
            return 0
        tables = (self.model.get_submodule(path) for path in self.tables)
        widths = (getattr(table, "embedding_dim", None) or table.in_features for table in tables)
        return len(self.added.ids) * sum(map(int, widths))  # type: ignore[arg-type]


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
    mxfp4: bool = False
    """Whether files hold experts in MXFP4."""


@dataclass(frozen=True, kw_only=True)
class LoadedBackbone(BuiltModel):
    """The model with its weights, sharded by the engine; `heads` are `TrainedModule`s."""

    token_rows: Mapping[str, TokenRows]
    """Trained rows of `tables`, by path."""
    blocks: Blocks
    """Controls how the transformer blocks run."""
    digest: str
    """Digest of config.json and a sample of the weights."""
    weights: Mapping[str, str]
    """Digests of all tensors that were read from files, by key; of a layer's experts together."""
    quantization_error: float
    """‖W − Ŵ‖ / ‖W‖ over all quantised matrices (Frobenius)."""
    probes: Mapping[str, tuple[list[list[float]], float]]
    """By parameter, what `trainer/loading/probes.py` noted of its value; empty with `run.verify:
    off`."""
    loading: Loading


def class_name(module: nn.Module) -> str:
    """The name of a module's class, without the subclass that a sharder has put over it."""
    kinds = type(module).__mro__
    own = (
        kind for kind in kinds if not kind.__module__.startswith(("torch.distributed", "deepspeed"))
    )
    return next(own).__name__


def set_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
