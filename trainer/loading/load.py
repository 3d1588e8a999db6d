"""Load the frozen backbone: meta device → read → decompose → quantise → broadcast → shard.

The tensors are assigned to the ranks of a host: each is read and quantised by one rank and
broadcast packed to the others. This proceeds in groups of as many blocks as a host has ranks, to
balance the work; the engine then shards them block by block. At any time a rank holds, in addition
to its shard: one unquantised matrix and the next one being read; the packed matrices of the group
that it read itself, about one block; and one unsharded block (at the end: the embedding and the
head). With a GPU, host memory holds only the reader's buffers.
"""

import dataclasses
import hashlib
import json
import resource
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.token_rows import TokenRows
from adapters.unit import Unit
from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.config.yaml import parse_json
from trainer.device_memory import release, trim
from trainer.distributed.world import World
from trainer.engine.base import Engine, compiles
from trainer.errors import UserError
from trainer.loading.assignment import ParamTask, param_tasks
from trainer.loading.key_mapping import Converted
from trainer.loading.leftovers import left_out
from trainer.loading.materialize import Materializer
from trainer.loading.safetensors_files import tensor_digests
from trainer.loading.source import Source
from trainer.loading.spectral_init import SpectralInit
from trainer.model.backbone import BuiltModel, LoadedBackbone, Loading, TrainedModule, set_module
from trainer.model.blocks import Blocks, check_unsharded_blocks
from trainer.model.build import build
from trainer.model.hub import resolve_folder
from trainer.model.meta import is_unset
from trainer.tasks.base import Task


def load_backbone(
    config: Config,
    task: Task,
    engine: Engine,
    world: World,
    spectral_init: SpectralInit | None = None,
    built: BuiltModel | None = None,
) -> LoadedBackbone:
    """Build the model, materialize and shard it block by block. Collective.

    `built`: the model without weights (`check_backbone`), which is then the loaded one.
    `spectral_init` subtracts the initial adapters from the units' matrices before they are packed.
    An error on one rank ends all of them (`World.all_or_none`). Raises UserError.
    """
    started = time.perf_counter()
    with world.all_or_none():
        if built is None:
            built = build(config, task, world.device)
        model = built.model
        blocks = _take_over_blocks(config, built, engine, world)
        source = Source(built, config, world.device)
        built = dataclasses.replace(built, left_out=left_out(source))
        if source.files is not None:
            source.files.check_copies()
        split = spectral_init.units(built) if spectral_init is not None else []
        for path, head in built.heads.items():
            _fill_head(source, path, head)
        _fill_buffers(source)
        apart = {} if config.method.trains == "backbone" else dict(built.heads)
        for path in apart:
            set_module(model, path, None)  # no sharder sees it
    materializer = _materialize(source, engine, world, spectral_init, split)
    heads = {path: TrainedModule(head) for path, head in apart.items()}
    for path, head in heads.items():
        set_module(model, path, head)
    token_rows = _train_rows(built, engine)
    with world.all_or_none():
        digest = _digest(source)
    weights = _weights(source, world)
    loaded = LoadedBackbone(
        **{f.name: getattr(built, f.name) for f in dataclasses.fields(built)} | {"heads": heads},
        token_rows=token_rows,
        blocks=blocks,
        digest=digest,
        weights=weights,
        quantization_error=materializer.quantization_error(),
        probes=materializer.probes(),
        loading=_figures(source, materializer, world, started),
    )
    unsharded = config.engine.unsharded_blocks
    if unsharded != "auto" and unsharded > 0:
        engine.keep_unsharded(unsharded)
    release(world.device)
    model.train()
    return loaded


def _take_over_blocks(config: Config, built: BuiltModel, engine: Engine, world: World) -> Blocks:
    compiled = compiles(config, type(engine), built, world.device)
    cache = config.engine.compile_cache
    blocks = Blocks(built.model, world.device, compiled=compiled, cache=cache)
    if config.engine.activation_checkpointing is True:
        blocks.keep(0)
    check_unsharded_blocks(config.engine, len(blocks))
    return blocks


def _materialize(
    source: Source,
    engine: Engine,
    world: World,
    spectral_init: SpectralInit | None,
    split: Sequence[Unit],
) -> Materializer:
    """Materialize and shard the model, group by group; `spectral_init` takes a part out of the
    matrices of `split`. Collective."""
    model = source.model
    rest: tuple[str, nn.Module] = ("", model)
    groups = [*in_groups(model, world), [rest]]
    seen: set[int] = set()
    tasks = [[param_tasks(model, split, [part], seen) for part in group] for group in groups]
    flat = [[task for of_part in of_group for task in of_part] for of_group in tasks]
    materializer = Materializer(source, world, spectral_init, flat)
    for group, of_group, all_of_it in zip(groups, tasks, flat, strict=True):
        materializer.pack(all_of_it)
        for (_, part), of_part in zip(group, of_group, strict=True):
            for task in of_part:
                materializer.assign_to_model(task)
            if part is model:
                engine.shard(model)
            else:
                engine.shard_block(part)
            # Untrimmed, the heap pages of freed unquantised matrices, which lie between the packed
            # ones, would add up to the whole unquantised model.
            trim()
    return materializer


def _train_rows(built: BuiltModel, engine: Engine) -> dict[str, TokenRows]:
    """Give the added tokens trained rows, which start as those that were loaded. Collective."""
    if built.added is None:
        return {}
    model, ids = built.model, list(built.added.ids)
    with engine.unsharded(model):
        rows = {
            path: TokenRows(ids, model.get_submodule(path).weight[ids])  # type: ignore[index]
            for path in built.tables
        }
    of_embedding, *_ = of_head = [rows[path] for path in built.tables]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    of_embedding.attach_to_embedding(embedding)
    head = model.get_output_embeddings()
    if head is not None:
        of_head[-1].attach_to_head(head)
    return rows


def in_groups(model: nn.Module, world: World) -> list[list[tuple[str, nn.Module]]]:
    """The blocks (path, module) in groups of as many as a host has ranks."""
    blocks, size = transformer_blocks(model), len(world.nodes[0])
    return [blocks[i : i + size] for i in range(0, len(blocks), size)]


def check_backbone(
    config: Config, task: Task, device: torch.device, unreached: Sequence[str] | None = None
) -> BuiltModel:
    """Build the model (`trainer.model.build.build`) and check the names and shapes of its files,
    without reading weights. Returns it, still without weights. Raises UserError."""
    backbone = build(config, task, device, unreached)
    if config.model.weights == "random":
        return backbone
    source = Source(backbone, config, device)
    if config.method.trains == "backbone":
        _refuse_converted(source)
    heads = tuple(f"{path}." for path in task.trained_modules(backbone.model))
    for name, parameter in backbone.model.named_parameters():
        if heads and name.startswith(heads):
            continue
        owner = backbone.model.get_submodule(name.rpartition(".")[0])
        for expert in ParamTask(name, parameter, owner, []).requests:
            source.check(*expert)
    return dataclasses.replace(backbone, left_out=left_out(source))


def _refuse_converted(source: Source) -> None:
    """Raises UserError for parameters that the files hold in another form (stacks of experts): a
    trained model could not be written as its files are."""
    assert source.files is not None
    for name, _ in source.model.named_parameters():
        if isinstance(source.files.find(name), Converted):
            raise UserError(
                f"method.kind: {source.config.method.kind} given, but {name} is stored in another "
                "form; accepted for this model: methods that leave the backbone frozen"
            )


def _fill_head(source: Source, path: str, module: nn.Module) -> None:
    """Materialize a head from the files if they hold it in this shape, else initialise it. Raises
    UserError naming a parameter that the model does not initialise."""
    device = source.device
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.full(parameter.shape, torch.nan, dtype=torch.float32, device=device)
            setattr(part, name, nn.Parameter(empty, parameter.requires_grad))
    module.to(device, torch.float32)
    with torch.random.fork_rng([]), torch.no_grad(), device:
        torch.manual_seed(source.config.run.seed)
        for part in module.modules():
            source.model._init_weights(part)
    parameters = dict(module.named_parameters())
    stored = {name: source.stored(f"{path}.{name}") for name in parameters}
    tensors = {name: tensor for name, tensor in stored.items() if tensor is not None}
    if tensors.keys() == parameters.keys() and all(
        tensors[name].shape == parameters[name].shape for name in tensors
    ):
        for name, tensor in tensors.items():
            source.check_finite(f"{path}.{name}", None, tensor, torch.float32)
            parameters[name].data.copy_(tensor)
    for name, parameter in parameters.items():
        if parameter.isnan().any():
            raise UserError(
                f"model.id: {source.config.model.id}: no values for {path}.{name}, which "
                f"{type(source.model).__name__} does not initialise; accepted: files that hold it"
            )


def _fill_buffers(source: Source) -> None:
    """Move the buffers to the device, persistent ones with their values from the files. Raises
    UserError naming one of another shape, or without values."""
    model, moved = source.model, dict[Tensor, Tensor]()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer not in moved:
                full = f"{path}.{name}" if path else name
                persistent = name not in module._non_persistent_buffers_set
                moved[buffer] = _buffer(source, full, buffer, persistent)
            setattr(module, name, moved[buffer])


def _buffer(source: Source, name: str, buffer: Tensor, persistent: bool) -> Tensor:
    stored = source.stored(name) if persistent else None
    if stored is not None:
        if stored.shape != buffer.shape:
            raise UserError(
                f"model.id: {source.config.model.id}: {name} is {tuple(stored.shape)}; accepted: "
                f"{tuple(buffer.shape)}, as config.json makes it"
            )
        if stored.is_floating_point():
            source.check_finite(name, None, stored, buffer.dtype)
        return stored.to(source.device, buffer.dtype)
    if is_unset(buffer):
        raise UserError(
            f"model.id: {source.config.model.id}: no values for {name}, which "
            f"{type(source.model).__name__} does not compute; accepted: files that hold it"
        )
    return buffer.to(source.device)


def _digest(source: Source) -> str:
    """Digest of the backbone: config.json and a sample of the weights, or the seed of random
    ones."""
    options = source.config.model
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    content = (folder / "config.json").read_bytes()
    if source.files is not None:
        weights = source.files.digest()
    else:
        weights = f"random {source.config.run.seed} {options.overrides}"
    values = json.dumps(parse_json(content), sort_keys=True)
    return hashlib.sha256(f"{values}{weights}".encode()).hexdigest()


def _weights(source: Source, world: World) -> dict[str, str]:
    """Digests of all tensors that any rank has read, by key. Raises UserError where two ranks have
    read different bytes. Collective."""
    whole: dict[tuple[str, int], bytes] = {}
    if source.files is None:
        return {}
    gathered = world.gather(source.files.parts_read())
    with world.all_or_none():
        for rank, parts in enumerate(gathered):
            for part, digest in parts.items():
                if whole.setdefault(part, digest) != digest:
                    raise UserError(
                        f"model.id: {source.files.folder}: {part[0]} is not the same for rank "
                        f"{rank} as for others; accepted: the same files on every host"
                    )
    return tensor_digests(whole)


def _figures(source: Source, materializer: Materializer, world: World, started: float) -> Loading:
    read = source.files.bytes_read if source.files is not None else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = world.gather((read, resident))
    return Loading(
        seconds=time.perf_counter() - started,
        bytes_read=sum(read for read, _ in counts),
        stages=dict(materializer.seconds),
        peak_host_bytes=max(resident for _, resident in counts),
        mxfp4=source.files is not None and source.files.mxfp4,
    )
