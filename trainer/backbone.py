"""Load the frozen backbone: meta device → stream → quantise → place or shard.

Block by block every tensor is read, quantised and handed to the engine, so that a rank holds at
most one whole unquantised matrix and one whole (quantised) block at any time.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapters.linear import AdaptedLinear
from adapters.method import MethodOptions
from adapters.units import Unit, linear_names, make_units, select_targets, transformer_blocks
from trainer.config import Config, ModelOptions
from trainer.distributed import World
from trainer.engine.base import Engine
from trainer.errors import UserError
from trainer.pretrained import PretrainedFiles
from trainer.tasks.base import Task


class TrainedModule(nn.Module):
    """A module that trains whole beside the adapters (a new head): float32, never sharded."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner.float().requires_grad_(True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x.float(), *args, **kwargs)


@dataclass
class Backbone:
    """A model whose linear layers are hosts, before or after loading."""

    model: PreTrainedModel
    dtype: torch.dtype
    units: list[Unit]
    hosts: dict[str, AdaptedLinear]
    """Host modules by path; those of `units` are to take adapters."""
    heads: dict[str, nn.Module]
    """The task's new modules, by path; their parameters train whole."""
    digest: str = ""
    quantization_error: float = 0.0
    """‖W − Ŵ‖ / ‖W‖ over all quantised matrices (Frobenius)."""


def resolve_folder(name: str, revision: str | None, *, with_weights: bool = True) -> Path:
    """The local folder of a model: as given, or downloaded from the hub (safetensors only)."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model.id: {name}: no such folder; accepted: a local folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns, *(["*.safetensors"] if with_weights else [])],
            )
        )
    except Exception as error:  # the hub client raises a score of types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"model.id: {name}: neither a local folder nor a model that the hub gives ({reason})"
        ) from error


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that `model.tokenizer` names."""
    key = "model.id" if options.tokenizer is None else "model.tokenizer"
    revision = options.revision if options.tokenizer is None else None
    folder = resolve_folder(options.tokenizer or options.id, revision)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the files lead to
        raise UserError(f"{key}: {folder}: no usable tokenizer ({_first_line(error)})") from error


def compute_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """`model.dtype`, with `auto` resolved for the device."""
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, options.dtype)


def build(config: Config, task: Task, device: torch.device) -> Backbone:
    """The model on the meta device, its linear layers replaced by hosts: shapes, no bytes."""
    options = config.model
    folder = resolve_folder(options.id, options.revision)
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the tokenizer
        raise UserError(
            f"model.id: {folder}: no usable config.json ({_first_line(error)})"
        ) from error
    for key, value in options.overrides.items():
        if not hasattr(model_config, key):
            raise UserError(f"model.overrides: {key}: not a key of {folder / 'config.json'}")
        setattr(model_config, key, value)
    task.configure(model_config)
    dtype = compute_dtype(options, device)
    try:
        with torch.device("meta"):
            model = task.auto_class.from_config(
                model_config,
                dtype=dtype,
                attn_implementation=None if options.attention == "auto" else options.attention,
            )
    except (ImportError, ValueError, KeyError) as error:
        raise UserError(
            f"model.id: {folder} with model.attention={options.attention}: {_first_line(error)}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    _check_vocabulary(task.tokenizer, model, options)
    trained = task.trained_modules(model)
    head = _output_head(model)
    targets = _targets(model, config.method, head, trained)
    hosts = _install_hosts(model, options.quantization, targets, [*head, *trained])
    if config.engine.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"engine.activation_checkpointing: true given, but {type(model).__name__} does not "
                "support it; accepted: false"
            )
        # transformers renamed it in 5.2x; both names must do.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    heads = {path: model.get_submodule(path) for path in trained}
    return Backbone(model, dtype, make_units(model, targets), hosts, heads)


def load(config: Config, task: Task, engine: Engine, world: World) -> Backbone:
    """Build, then fill every block with its tensors and hand it to the engine."""
    backbone = build(config, task, world.device)
    model = backbone.model
    filler = _Filler(backbone, config, world.device)
    for path, head in backbone.heads.items():
        filler.fill_head(path, head)
        _set_module(model, path, None)  # no sharder sees it
    for path, block in transformer_blocks(model):
        filler.fill(block, path)
        engine.shard_block(block)
    filler.fill(model, "")
    engine.shard(model)
    for path, head in backbone.heads.items():
        backbone.heads[path] = TrainedModule(head)
        _set_module(model, path, backbone.heads[path])
    backbone.digest = filler.digest()
    backbone.quantization_error = filler.quantization_error()
    model.train()
    return backbone


class _Filler:
    """Gives meta parameters their values."""

    def __init__(self, backbone: Backbone, config: Config, device: torch.device):
        self.backbone, self.config, self.device = backbone, config, device
        self.model = backbone.model
        self._paths = _paths_of_parameters(self.model)
        self._error = torch.zeros(2, dtype=torch.float64)
        self.files: PretrainedFiles | None = None
        if config.model.weights == "pretrained":
            self.files = PretrainedFiles(resolve_folder(config.model.id, config.model.revision))

    def fill(self, module: nn.Module, path: str) -> None:
        """Give every parameter and buffer below `module` that is still on meta its value."""
        prefix = f"{path}." if path else ""
        for local_name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                self._fill_parameter(prefix + local_name, parameter)
        for name, child in module.named_modules():
            self._fill_buffers(child, prefix + name)

    def fill_head(self, path: str, module: nn.Module) -> None:
        """A head: from the files where they have it in this shape, else freshly drawn."""
        module.to_empty(device=self.device)
        module.to(torch.float32)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.run.seed)
            for part in module.modules():
                _initialise(self.model, part, self.device)
        if self.files is None:
            return
        stored = {
            name: self.files.find(f"{path}.{name}", self.model.base_model_prefix)
            for name, _ in module.named_parameters()
        }
        tensors = {name: self.files.read(key) for name, key in stored.items() if key is not None}
        parameters = dict(module.named_parameters())
        if tensors.keys() == parameters.keys() and all(
            tensors[name].shape == parameters[name].shape for name in tensors
        ):
            for name, tensor in tensors.items():
                parameters[name].data.copy_(tensor)

    def _fill_parameter(self, name: str, parameter: nn.Parameter) -> None:
        full = self._read(name, parameter)
        paths = self._paths[id(parameter)]
        host = self._host_of_weight(name)
        if host is not None and host.weight_format != "none":
            packed = host.pack(full.to(self.device, self.backbone.dtype), self.backbone.dtype)
            host.weight = _frozen(packed)
            self._note_error(host, full)
            return
        value = _frozen(full.to(self.device, parameter.dtype))
        for owner, attribute in paths:
            setattr(owner, attribute, value)

    def _read(self, name: str, parameter: nn.Parameter) -> Tensor:
        if self.files is None:
            return self._random(name, parameter)
        for owner_name in self._names_of(parameter):
            key = self.files.find(owner_name, self.model.base_model_prefix)
            if key is not None:
                tensor = self.files.read(key)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"model.id: {self.files.folder}: {key} is {tuple(tensor.shape)}, "
                        f"config.json makes it {tuple(parameter.shape)}"
                    )
                return tensor
        raise self.files.missing(name)

    def _random(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Matrices normal with the model's own spread, vectors as a fresh model has them."""
        seed = zlib.crc32(name.encode()) + (self.config.run.seed << 32)
        generator = torch.Generator(self.device).manual_seed(seed)
        if parameter.dim() == 1:
            filler = 0.0 if name.endswith("bias") else 1.0
            return torch.full(parameter.shape, filler, device=self.device)
        spread = getattr(self.model.config, "initializer_range", 0.02)
        values = torch.empty(parameter.shape, dtype=self.backbone.dtype, device=self.device)
        return values.normal_(0.0, spread, generator=generator)

    def _fill_buffers(self, module: nn.Module, path: str) -> None:
        missing = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        if not missing:
            return
        for name in missing:
            value = torch.empty_like(getattr(module, name), device=self.device)
            key = None
            if name not in module._non_persistent_buffers_set and self.files is not None:
                full = f"{path}.{name}" if path else name
                key = self.files.find(full, self.model.base_model_prefix)
            if key is not None and self.files is not None:
                value.copy_(self.files.read(key))
            setattr(module, name, value)
        # As transformers itself does after loading onto meta: computed buffers (rotary
        # frequencies, position ids) come from the model's own initialisation.
        _initialise(self.model, module, self.device)

    def _host_of_weight(self, name: str) -> AdaptedLinear | None:
        path, _, attribute = name.rpartition(".")
        return self.backbone.hosts.get(path) if attribute == "weight" else None

    def _names_of(self, parameter: nn.Parameter) -> Iterator[str]:
        modules = {id(module): path for path, module in self.model.named_modules()}
        for owner, attribute in self._paths[id(parameter)]:
            path = modules[id(owner)]
            yield f"{path}.{attribute}" if path else attribute

    def _note_error(self, host: AdaptedLinear, full: Tensor) -> None:
        exact = full.to(self.device, torch.float32)
        error = host.dequantised(self.backbone.dtype).float() - exact
        squares = torch.stack([error.square().sum(), exact.square().sum()])
        self._error += squares.double().cpu()

    def quantization_error(self) -> float:
        error, norm = self._error.tolist()
        return (error / norm) ** 0.5 if norm else 0.0

    def digest(self) -> str:
        if self.files is not None:
            return self.files.digest()
        return f"random {self.config.run.seed} {self.model.config.to_json_string(use_diff=False)}"


def _frozen(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # `_init_weights` passes it by
    return parameter


def _initialise(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    with torch.no_grad(), device:
        model._init_weights(module)


def _targets(
    model: nn.Module, method: MethodOptions, head: list[str], trained: list[str]
) -> list[str]:
    """Paths of the linear layers that host adapters. Raises UserError naming what does not fit."""
    excluded = trained if method.include_head else [*head, *trained]
    try:
        targets = select_targets(linear_names(model, excluded), method.targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    for unit in make_units(model, targets):
        largest = min(unit.out_features, unit.in_features)
        if method.rank > largest:
            raise UserError(
                f"method.rank: {method.rank} given; accepted: at most {largest}, the smaller side "
                f"of {unit.name} ({unit.out_features} x {unit.in_features})"
            )
    return targets


def _install_hosts(
    model: nn.Module, quantization: str, targets: list[str], unquantized: list[str]
) -> dict[str, AdaptedLinear]:
    """Replace linear layers: those to be quantised, and those to be adapted."""
    hosts = {}
    quantizable = linear_names(model, unquantized) if quantization != "none" else []
    if quantization != "none":
        _refuse_other_matrices(model, quantization)
    for path in dict.fromkeys([*quantizable, *targets]):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        host = AdaptedLinear(linear, quantization if path in quantizable else "none")
        _set_module(model, path, host)
        hosts[path] = host
    return hosts


def _refuse_other_matrices(model: nn.Module, quantization: str) -> None:
    """Large matrices in the blocks that are no nn.Linear (stacked experts) are never skipped
    silently: half a quantised model is not what was asked for."""
    for path, block in transformer_blocks(model):
        for name, module in block.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and not isinstance(module, nn.Linear | nn.Embedding):
                    if parameter.numel() <= 1 << 20:
                        continue  # a router, say
                    where = ".".join(part for part in (path, name, attribute) if part)
                    raise UserError(
                        f"model.quantization: {quantization!r} given, but {where} "
                        f"{tuple(parameter.shape)} belongs to no linear layer and would stay "
                        "unquantised; accepted for this model: none"
                    )


def _output_head(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if head is not None and module is head]


def _paths_of_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """(module, attribute) pairs of every parameter; several for a tied one."""
    paths: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            paths.setdefault(id(parameter), []).append((module, name))
    return paths


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


def _set_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
