"""The model without its weights: found, built on the meta device, linear layers made hosts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.layers.experts import AdaptedExperts, ExpertLayer, StackedLinear
from adapters.layers.handles import RegisteredLayer
from adapters.layers.linear import AdaptedLinear
from adapters.methods.options import MethodOptions
from adapters.methods.registry import METHODS
from adapters.units import (
    AdaptedLayer,
    Unit,
    is_linear,
    layer_at,
    linear_names,
    make_units,
    select_targets,
    transformer_blocks,
)
from trainer.config.config import Config
from trainer.config.sections import ModelOptions, compute_dtype
from trainer.config.validation import local
from trainer.errors import UserError, first_line
from trainer.model.blocks import Blocks
from trainer.tasks.base import Task

_ROW_BYTES = 16
"""A row of an operand of torch's grouped product takes a multiple of so many."""


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
class Loading:
    """What it took to load a backbone."""

    seconds: float
    bytes_read: int
    """Of tensors in files, by all ranks."""
    shares: dict[str, float]
    """Seconds in which this rank waited for files, split, packed, and shared with its host."""
    peak_host_bytes: int
    """The most resident memory that any rank has had so far, loaded libraries included."""


@dataclass
class Backbone:
    """A model whose linear layers are hosts, before or after loading."""

    model: PreTrainedModel
    dtype: torch.dtype
    units: list[Unit]
    adapted_layers: dict[str, AdaptedLayer]
    """Hosts by name; those of `units` are to take adapters."""
    heads: dict[str, nn.Module]
    """The task's new modules, by path; their parameters train whole."""
    left_alone: Sequence[str] = ()
    """Stacks of experts of a form that hosts no adapters, by their path within a block."""
    blocks: Blocks | None = None
    """How the transformer blocks run; None before loading."""
    digest: str = ""
    quantization_error: float = 0.0
    """‖W − Ŵ‖ / ‖W‖ over all quantised matrices (Frobenius)."""
    loading: Loading | None = None


def resolve_folder(name: str, revision: str | None, *, with_weights: bool = True) -> Path:
    """The local folder of a model: as given, or downloaded from the hub (safetensors only)."""
    path = local(name)
    if path is not None and path.is_dir():
        return path
    if path is not None or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model.id: {name}: no such folder; accepted: a local folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns, *(["*.safetensors"] if with_weights else [])],
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except Exception as error:  # the hub client raises a score of types
        raise UserError(
            f"model.id: {name}: neither a local folder nor a model that the hub gives "
            f"({first_line(error)})"
        ) from error


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that `model.tokenizer` names."""
    key = "model.id" if options.tokenizer is None else "model.tokenizer"
    revision = options.revision if options.tokenizer is None else None
    folder = resolve_folder(options.tokenizer or options.id, revision, with_weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the files lead to
        raise UserError(f"{key}: {folder}: no usable tokenizer ({first_line(error)})") from error


def build(config: Config, task: Task, device: torch.device) -> Backbone:
    """The model on the meta device, its linear layers replaced by hosts: shapes, no bytes."""
    options = config.model
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    model_config = _model_config(folder, options)
    task.configure(model_config)
    dtype = compute_dtype(options, device)
    try:
        with torch.device("meta"):
            model = task.auto_class.from_config(
                model_config,
                dtype=dtype,
                # Given in any case: config.json may name code on the hub here, or in `auto_map`.
                attn_implementation=None if options.attention == "auto" else options.attention,
                trust_remote_code=False,
            )
    except Exception as error:  # a model's constructor raises whatever its shapes lead to
        raise UserError(
            f"model.id: {folder} with model.attention={options.attention}: {first_line(error)}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    for path, module in list(model.named_modules()):
        if AdaptedExperts.fits(module):
            set_module(model, path, AdaptedExperts(module))
    _check_experts(model, dtype)
    _check_vocabulary(task.tokenizer, model, options)
    trained = task.trained_modules(model)
    if config.method.train_router:
        trained += _routers(model)
    head = _output_head(model)
    gates = [path for path, _, _ in _gates(model)]
    targets = _targets(model, config.method, head, [*trained, *gates])
    adapted_layers = _install_adapted_layers(
        model, options.quantization, targets, [*head, *trained, *gates]
    )
    heads = {path: model.get_submodule(path) for path in trained}
    alone = _left_alone(model) if config.method.targets == "all-linear" else []
    return Backbone(model, dtype, make_units(model, targets), adapted_layers, heads, alone)


def _check_experts(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises UserError where a token's experts are more than there are, or the grouped product
    (torch's) cannot take their rows."""
    chosen = getattr(model.config, "num_experts_per_tok", None)
    for path, stack in model.named_modules():
        if not isinstance(stack, StackedLinear):
            continue
        experts, *widths = stack.shape
        if isinstance(chosen, int) and not 1 <= chosen <= experts:
            raise UserError(
                f"model.id, model.overrides: num_experts_per_tok: {chosen} given; accepted: at "
                f"least one, and no more than the {experts} of {path}"
            )
        if any(width * dtype.itemsize % _ROW_BYTES for width in widths):
            raise UserError(
                f"model.id: {path}: experts of {widths[0]} x {widths[1]}; accepted in {dtype}: "
                f"multiples of {_ROW_BYTES // dtype.itemsize}"
            )


def _model_config(folder: Path, options: ModelOptions) -> PretrainedConfig:
    """The model's configuration with `model.overrides` applied."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the tokenizer
        raise UserError(
            f"model.id: {folder}: no usable config.json ({first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.id: {folder}: its weights are quantised already (quantization_config); "
            "accepted: an unquantised model, with model.quantization for its format"
        )
    if not options.overrides:
        return config
    values = config.to_dict()
    for key in options.overrides:  # by the model's name for it, or by transformers' common one
        if key not in values and key not in config.attribute_map:
            raise UserError(f"model.overrides: {key}: not a key of {folder / 'config.json'}")
    values.pop("layer_types", None)  # derived from the number of layers
    try:
        return type(config).from_dict({**values, **options.overrides})
    except Exception as error:  # likewise
        raise UserError(f"model.overrides: {options.overrides}: {first_line(error)}") from error


def _targets(
    model: nn.Module, method: MethodOptions, head: list[str], trained: list[str]
) -> list[str]:
    """Paths of the linear layers that host adapters. Raises UserError naming what does not fit."""
    excluded = trained if method.include_head else [*head, *trained]
    try:
        targets = select_targets(linear_names(model, excluded), method.targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not targets:
        raise UserError(
            f"method.targets: {method.targets!r} picks no linear layer of {type(model).__name__}; "
            "accepted: a model whose projections are nn.Linear, and at least one of them"
        )
    try:
        method.check_units(make_units(model, targets))
    except ValueError as error:
        raise UserError(str(error)) from error
    if METHODS[method.kind].splits_weight:
        _refuse_tied(model, method, targets)
    return targets


def _left_alone(model: nn.Module) -> list[str]:
    """Stacked parameters of the blocks that belong to no host."""
    return sorted({
        name
        for _, block in transformer_blocks(model)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 3
        and not isinstance(block.get_submodule(name.rpartition(".")[0]), StackedLinear)
    })  # fmt: skip


def _gates(model: nn.Module) -> list[tuple[str, int, int]]:
    """(path, rows, experts) of what is beside a mixture's experts with a row of weights for each of
    them, or one for a shared expert: too few for an adapter, and too delicate to quantise."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedExperts):
            block, experts = path.rpartition(".")[0], module.gate_up_proj.experts
            for name, child in model.get_submodule(block).named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.shape[0] in (1, experts):
                    found.append((f"{block}.{name}", weight.shape[0], experts))
    return found


def _routers(model: nn.Module) -> list[str]:
    """Paths of what chooses the experts: the module beside them with one row of weights each."""
    routers = [path for path, rows, experts in _gates(model) if rows == experts]
    if not routers:
        raise UserError(
            f"method.train_router: true given, but {type(model).__name__} has no experts of a "
            "known form; accepted: false"
        )
    return routers


def _refuse_tied(model: nn.Module, method: MethodOptions, targets: list[str]) -> None:
    """A matrix with two users cannot give a part of itself to one of them."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path in targets:
        if owners[id(layer_at(model, path).weight)] > 1:
            raise UserError(
                f"method.targets: {path} shares its matrix with another module, and "
                f"method.kind={method.kind} takes a part of it out; accepted: matrices of their own"
            )


def _install_adapted_layers(
    model: nn.Module, quantization: str, targets: list[str], unquantized: list[str]
) -> dict[str, AdaptedLayer]:
    """Replace linear layers, those that take no adapter too: only a host keeps its matrix out of
    what a compiled block saves for backward."""
    adapted_layers: dict[str, AdaptedLayer] = {}
    quantizable = dict.fromkeys(linear_names(model, unquantized))
    if quantization != "none":
        _refuse_other_matrices(model, quantization, unquantized)
    for path in dict.fromkeys([*quantizable, *targets]):
        layer = layer_at(model, path)
        weight_format = quantization if path in quantizable else "none"
        if isinstance(layer, ExpertLayer):
            layer.stack.weight_format = weight_format
            adapted_layers[path] = layer
            continue
        assert isinstance(layer, nn.Linear)
        layer = AdaptedLinear(layer, weight_format)
        set_module(model, path, layer)
        adapted_layers[path] = layer
    return adapted_layers


def other_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Large matrices in the blocks that are neither linear layers nor experts of a known form."""
    for path, block in transformer_blocks(model):
        for name, module in block.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding | RegisteredLayer):
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and parameter.numel() > 1 << 20:
                    yield ".".join(part for part in (path, name, attribute) if part), parameter


def _refuse_other_matrices(model: nn.Module, quantization: str, unquantized: Sequence[str]) -> None:
    """Never skipped silently: half a quantised model is not what was asked for."""
    for where, parameter in other_matrices(model):
        if where.rpartition(".")[0] not in unquantized:
            raise UserError(
                f"model.quantization: {quantization!r} given, but {where} "
                f"{tuple(parameter.shape)} belongs to no linear layer and would stay "
                "unquantised; accepted for this model: none"
            )


def _output_head(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if head is not None and module is head]


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, options: ModelOptions
) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    size = embedding.num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"model.tokenizer: {options.tokenizer or options.id} has {len(tokenizer)} tokens; "
            f"accepted: at most {size}, the size of the model's embedding"
        )


def set_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
