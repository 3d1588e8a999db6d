"""Load the frozen backbone: meta device → read → split → quantise → share → place or shard.

The ranks of a host deal its tensors out among themselves: each is read, quantised and measured by
one of them, and the others get it packed. This goes by groups of as many blocks as a host has
ranks, so that each has its share of work; then block by block is handed to the engine. So at any
time a rank holds, beside its share: one unquantised matrix and the next one being read; the packed
matrices of the group that it read itself, some one block; and one block (at the end: the embedding
and the head) whole. On a GPU's host there are only the reader's buffers.
"""

import hashlib
import resource
import time

import torch
from torch import nn
from transformers import PreTrainedModel

from adapters.layers.experts import StackedLinear
from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.engine.base import Engine, compiles
from trainer.loading.materialize import Materializer, param_tasks
from trainer.loading.source import Source, names_of_parameters, open_files
from trainer.loading.spectral_init import SpectralInit
from trainer.model.blocks import Blocks, check_unsharded_blocks
from trainer.model.build import Backbone, Loading, TrainedModule, build, resolve_folder, set_module
from trainer.model.footprint import release, trim
from trainer.tasks.base import Task


def load(
    config: Config,
    task: Task,
    engine: Engine,
    world: World,
    spectral_init: SpectralInit | None = None,
) -> Backbone:
    """Build, then fill every block with its tensors and hand it to the engine.

    `splitter` takes a method's part out of the units' matrices before they are packed. A tensor
    that one rank cannot read or use ends all of them (`World.together`).
    """
    started = time.perf_counter()
    with world.all_or_none():
        backbone = build(config, task, world.device)
        backbone.blocks = Blocks(
            backbone.model,
            world.device,
            compiled=compiles(config, type(engine), backbone, world.device),
        )
        if config.engine.activation_checkpointing is True:
            backbone.blocks.keep(0)
        check_unsharded_blocks(config.engine, len(backbone.blocks))
        source = Source(backbone, config, world.device)
        if spectral_init is not None:
            spectral_init.resume(backbone.units)
        for path, head in backbone.heads.items():
            _fill_head(source, path, head)
            set_module(backbone.model, path, None)  # no sharder sees it
    model = backbone.model
    rest: tuple[str, nn.Module] = ("", model)
    groups = [*in_groups(model, world), [rest]]
    seen: set[int] = set()
    items = [[param_tasks(backbone, [part], seen) for part in group] for group in groups]
    flat = [[item for of_part in of_group for item in of_part] for of_group in items]
    filler = Materializer(source, world, spectral_init, flat)
    for group, of_group, all_of_it in zip(groups, items, flat, strict=True):
        with world.all_or_none():
            for path, part in group:
                _fill_buffers(source, path, part)
        filler.pack(all_of_it)
        for (_, part), of_part in zip(group, of_group, strict=True):
            for item in of_part:
                filler.assign_to_model(item)
            if part is model:
                engine.shard(model)
            else:
                engine.shard_block(part)
            # Between the packed matrices, which stay, the freed copies of unquantised ones would
            # otherwise add up to the whole unquantised model.
            trim()
    for path, head in backbone.heads.items():
        backbone.heads[path] = TrainedModule(head)
        set_module(model, path, backbone.heads[path])
    with world.all_or_none():
        backbone.digest = _digest(source)
    backbone.quantization_error = filler.quantization_error()
    backbone.loading = _figures(source, filler, world, started)
    whole = config.engine.unsharded_blocks
    if whole != "auto" and whole > 0:
        engine.keep_unsharded(whole)
    release(world.device)
    model.train()
    return backbone


def in_groups(model: nn.Module, world: World) -> list[list[tuple[str, nn.Module]]]:
    """The blocks (path, module), as many at a time as a host has ranks."""
    blocks, size = transformer_blocks(model), len(world.nodes[0])
    return [blocks[i : i + size] for i in range(0, len(blocks), size)]


def check(config: Config, task: Task, device: torch.device) -> None:
    """Everything that can be wrong with a model and shows without reading its weights."""
    backbone = build(config, task, device)
    if config.model.weights == "random":
        return
    files = open_files(config, backbone, device)
    heads = tuple(f"{path}." for path in task.trained_modules(backbone.model))
    names = names_of_parameters(backbone.model)
    prefix = backbone.model.base_model_prefix
    for name, parameter in backbone.model.named_parameters():
        if heads and name.startswith(heads):
            continue
        owner = backbone.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, StackedLinear):
            files.check(names[id(parameter)], prefix, tuple(parameter.shape))
            continue
        for expert in range(owner.experts):
            files.check_expert(name.removesuffix(".weight"), expert, prefix, owner.shape)


def _fill_head(source: Source, path: str, module: nn.Module) -> None:
    """A head: from the files where they have it in this shape, else freshly drawn."""
    waiting = {name: _meta_buffers(part) for name, part in module.named_modules()}
    module.to_empty(device=source.device)
    module.to(torch.float32)
    with torch.random.fork_rng([]):
        torch.manual_seed(source.config.run.seed)
        for part in module.modules():
            _initialise(source.model, part, source.device)
        for name, part in module.named_modules():
            _fill_own_buffers(source, f"{path}.{name}" if name else path, part, waiting[name])
    parameters = dict(module.named_parameters())
    stored = {name: source.stored(f"{path}.{name}") for name in parameters}
    tensors = {name: tensor for name, tensor in stored.items() if tensor is not None}
    if tensors.keys() == parameters.keys() and all(
        tensors[name].shape == parameters[name].shape for name in tensors
    ):
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)


def _fill_buffers(source: Source, path: str, module: nn.Module) -> None:
    """Give every buffer below `module` that is still on meta its value."""
    for name, child in module.named_modules(prefix=path):
        _fill_own_buffers(source, name, child, _meta_buffers(child))


def _fill_own_buffers(source: Source, path: str, module: nn.Module, missing: list[str]) -> None:
    if not missing:
        return
    model, device = source.model, source.device
    for name in missing:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    # As transformers itself does after loading onto meta: computed buffers (rotary
    # frequencies, position ids) come from the model's own initialisation.
    _initialise(model, module, device)
    for name in missing:
        # A router's balancing bias, whose rounding would change which experts are chosen.
        if name in (model._keep_in_fp32_modules_strict or ()):
            setattr(module, name, getattr(module, name).float())
        if name not in module._non_persistent_buffers_set:
            stored = source.stored(f"{path}.{name}" if path else name)
            if stored is not None:
                getattr(module, name).copy_(stored)


def _meta_buffers(module: nn.Module) -> list[str]:
    return [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]


def _initialise(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    with torch.no_grad(), device:
        model._init_weights(module)


def _digest(source: Source) -> str:
    """Identity of the backbone: config.json and weights, or what these were drawn from."""
    options = source.config.model
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if source.files is not None:
        digest.update(source.files.digest().encode())
    else:
        digest.update(f"random {source.config.run.seed} {options.overrides}".encode())
    return digest.hexdigest()


def _figures(source: Source, filler: Materializer, world: World, started: float) -> Loading:
    read = source.files.bytes_read if source.files is not None else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = world.gather((read, resident))
    return Loading(
        seconds=time.perf_counter() - started,
        bytes_read=sum(read for read, _ in counts),
        shares=dict(filler.seconds),
        peak_host_bytes=max(resident for _, resident in counts),
    )
