"""Load the frozen backbone: meta device → stream → quantise → place or shard.

Block by block every tensor is read, quantised and handed to the engine, so that at any time a rank
holds, beside its share, one unquantised matrix and one quantised block (at the end: the embedding
and the head) whole.
"""

import hashlib
import zlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters import seeds
from adapters.experts import StackedLinear
from adapters.linear import AdaptedLinear
from adapters.units import Unit, stem, transformer_blocks
from trainer.architecture import Backbone, TrainedModule, build, resolve_folder, set_module
from trainer.blocks import Blocks
from trainer.config import Config
from trainer.distributed import World
from trainer.engine.base import Engine
from trainer.errors import UserError
from trainer.layout import Layout
from trainer.memory import trim
from trainer.pretrained import PretrainedFiles
from trainer.splitting import Splitter
from trainer.tasks.base import Task


def load(
    config: Config, task: Task, engine: Engine, world: World, splitter: Splitter | None = None
) -> Backbone:
    """Build, then fill every block with its tensors and hand it to the engine.

    `splitter` takes a method's part out of the units' matrices before they are packed.
    """
    backbone = build(config, task, world.device)
    model = backbone.model
    backbone.blocks = Blocks(model, compiled=_compiled(config, engine, world))
    if config.engine.activation_checkpointing is True:
        backbone.blocks.keep(0)
    filler = _Filler(backbone, config, world.device, splitter)
    for path, head in backbone.heads.items():
        filler.fill_head(path, head)
        set_module(model, path, None)  # no sharder sees it
    for path, block in transformer_blocks(model):
        filler.fill(block, path)
        engine.shard_block(block)
        # Between the packed matrices, which stay, the freed copies of unquantised ones would
        # otherwise add up to the whole unquantised model.
        trim()
    filler.fill(model, "")
    engine.shard(model)
    for path, head in backbone.heads.items():
        backbone.heads[path] = TrainedModule(head)
        set_module(model, path, backbone.heads[path])
    backbone.digest = filler.digest()
    backbone.quantization_error = filler.quantization_error()
    model.train()
    return backbone


def _compiled(config: Config, engine: Engine, world: World) -> bool:
    asked = config.engine.compile
    if asked is True and not engine.gathers_blocks_whole:
        raise UserError(
            f"engine.compile: true given with engine.kind={engine.kind} and "
            "method.train_router=true; accepted: auto or false, or engine.kind=fsdp2"
        )
    if asked == "auto":
        return world.device.type == "cuda" and engine.gathers_blocks_whole
    return asked


def check(config: Config, task: Task, device: torch.device) -> None:
    """Everything that can be wrong with a model and shows without reading its weights."""
    backbone = build(config, task, device)
    if config.model.weights == "random":
        return
    files = _files(config, backbone)
    heads = tuple(f"{path}." for path in task.trained_modules(backbone.model))
    names = _names_of_parameters(backbone.model)
    prefix = backbone.model.base_model_prefix
    for name, parameter in backbone.model.named_parameters():
        if heads and name.startswith(heads):
            continue
        stack = _stack_of(backbone.model, name)
        if stack is None:
            files.check(names[id(parameter)], prefix, tuple(parameter.shape))
            continue
        for expert in range(stack.experts):
            files.check_expert(name.removesuffix(".weight"), expert, prefix, stack.shape)


class _Filler:
    """Gives meta parameters their values."""

    def __init__(
        self, backbone: Backbone, config: Config, device: torch.device, splitter: Splitter | None
    ):
        self.backbone, self.config, self.device = backbone, config, device
        self._splitter = splitter
        self._units = {unit.name: unit for unit in backbone.units}
        self.model = backbone.model
        self._names = _names_of_parameters(self.model)
        self._error = torch.zeros(2, dtype=torch.float64)
        self.files: PretrainedFiles | None = None
        if config.model.weights == "pretrained":
            self.files = _files(config, backbone)

    def fill(self, module: nn.Module, path: str) -> None:
        """Give every parameter and buffer below `module` that is still on meta its value."""
        prefix = f"{path}." if path else ""
        missing = [(prefix + n, p) for n, p in module.named_parameters() if p.is_meta]
        if self._splitter is not None:
            absent = {name for name, _ in missing}
            self._splitter.prepare(
                [u for u in self.backbone.units if f"{stem(u.name)}.weight" in absent],
                lambda unit: self._read_unit(unit).to(self.device),
            )
        for name, parameter in missing:
            self._fill_parameter(name, parameter)
        for name, child in module.named_modules():
            self._fill_buffers(child, prefix + name, _meta_buffers(child))

    def fill_head(self, path: str, module: nn.Module) -> None:
        """A head: from the files where they have it in this shape, else freshly drawn."""
        waiting = {name: _meta_buffers(part) for name, part in module.named_modules()}
        module.to_empty(device=self.device)
        module.to(torch.float32)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.run.seed)
            for part in module.modules():
                _initialise(self.model, part, self.device)
            for name, part in module.named_modules():
                self._fill_buffers(part, f"{path}.{name}" if name else path, waiting[name])
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
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, StackedLinear):
            # On the device at once: on the host there is never more than one expert's matrix.
            full = torch.empty(owner.shape, dtype=self.backbone.dtype, device=self.device)
            for expert in range(owner.experts):
                full[expert] = self._kept(f"{name.removesuffix('.weight')}.{expert}", name, expert)
        else:
            full = self._kept(name.removesuffix(".weight"), name)
        if isinstance(owner, AdaptedLinear | StackedLinear) and parameter is owner.weight:
            self._set_matrix(owner, parameter, full)
        else:
            self._set(parameter, full)

    def _set_matrix(
        self, owner: AdaptedLinear | StackedLinear, parameter: nn.Parameter, full: Tensor
    ) -> None:
        if owner.weight_format == "none":
            # A stack as one matrix: sharders split the first dimension, and experts may be few.
            self._set(parameter, full.view(owner.matrix_shape))
            return
        packed = owner.pack(full.to(self.device, self.backbone.dtype), self.backbone.dtype)
        owner.weight = _frozen(packed)
        self._note_error(owner, full)

    def _set(self, parameter: nn.Parameter, full: Tensor) -> None:
        value = _frozen(full.to(self.device, parameter.dtype))
        for known_as in self._names[id(parameter)]:
            path, _, attribute = known_as.rpartition(".")
            setattr(self.model.get_submodule(path), attribute, value)

    def _kept(self, unit: str, name: str, expert: int | None = None) -> Tensor:
        """What the backbone keeps of a tensor, or of one expert's part of it: all, unless the
        method takes a part of `unit`."""
        full = self._read(name, expert)
        if self._splitter is None or unit not in self._units:
            return full
        return self._splitter.residual(unit, full.to(self.device))

    def _read_unit(self, unit: Unit) -> Tensor:
        stack = stem(unit.name)
        expert = int(unit.name.removeprefix(f"{stack}.")) if stack != unit.name else None
        return self._read(f"{stack}.weight", expert)

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor, or one expert's matrix (out, in) of it."""
        parameter = self.model.get_parameter(name)
        prefix, shape = self.model.base_model_prefix, tuple(parameter.shape)
        if self.files is None:
            if expert is None:
                return self._random(name, shape)
            return self._random(f"{name}.{expert}", shape[1:])
        if expert is None:
            return self.files.read(self.files.check(self._names[id(parameter)], prefix, shape))
        experts, rows, columns = shape
        stack = name.removesuffix(".weight")
        return self.files.read_expert(stack, expert, prefix, (experts, rows, columns))

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Matrices normal with the model's own spread, vectors as a fresh model has them."""
        key = self.config.run.seed, zlib.crc32(name.encode())
        generator = seeds.generator(*key, device=self.device)
        if len(shape) == 1:
            filler = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, filler, device=self.device)
        spread = getattr(self.model.config, "initializer_range", 0.02)
        values = torch.empty(shape, dtype=self.backbone.dtype, device=self.device)
        return values.normal_(0.0, spread, generator=generator)

    def _fill_buffers(self, module: nn.Module, path: str, missing: list[str]) -> None:
        if not missing:
            return
        for name in missing:
            setattr(module, name, torch.empty_like(getattr(module, name), device=self.device))
        # As transformers itself does after loading onto meta: computed buffers (rotary
        # frequencies, position ids) come from the model's own initialisation.
        _initialise(self.model, module, self.device)
        for name in missing:
            # A router's balancing bias, whose rounding would change which experts are chosen.
            if name in (self.model._keep_in_fp32_modules_strict or ()):
                setattr(module, name, getattr(module, name).float())
            if name not in module._non_persistent_buffers_set and self.files is not None:
                full = f"{path}.{name}" if path else name
                key = self.files.find(full, self.model.base_model_prefix)
                if key is not None:
                    getattr(module, name).copy_(self.files.read(key))

    def _note_error(self, host: AdaptedLinear | StackedLinear, full: Tensor) -> None:
        restored = host.dequantised(self.backbone.dtype).view(host.matrix_shape)
        full = full.view(host.matrix_shape)
        for exact, approximate in zip(full.split(1024), restored.split(1024), strict=True):
            exact = exact.to(self.device, torch.float32)
            squares = [(approximate - exact).square().sum(), exact.square().sum()]
            self._error += torch.stack(squares).double().cpu()

    def quantization_error(self) -> float:
        error, norm = self._error.tolist()
        return (error / norm) ** 0.5 if norm else 0.0

    def digest(self) -> str:
        """Identity of the backbone: config.json and weights, or what these were drawn from."""
        options = self.config.model
        folder = resolve_folder(options.id, options.revision, with_weights=False)
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        if self.files is not None:
            digest.update(self.files.digest().encode())
        else:
            digest.update(f"random {self.config.run.seed} {options.overrides}".encode())
        return digest.hexdigest()


def _files(config: Config, backbone: Backbone) -> PretrainedFiles:
    folder = resolve_folder(config.model.id, config.model.revision)
    return PretrainedFiles(folder, Layout(backbone.model.config))


def _stack_of(model: nn.Module, parameter: str) -> StackedLinear | None:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return owner if isinstance(owner, StackedLinear) else None


def _frozen(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # `_init_weights` passes it by
    return parameter


def _meta_buffers(module: nn.Module) -> list[str]:
    return [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]


def _initialise(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    with torch.no_grad(), device:
        model._init_weights(module)


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by its id; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
