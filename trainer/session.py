"""`Session`: data, engine, backbone, method and optimizer of a run, built in dependency order; and
`LoadedModel`, the same without data.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import nn

from adapters.casts import Casts
from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.registry import METHODS
from adapters.methods.spectral import SpectralMethod
from adapters.optimizer import MaskedAdamW, Share
from adapters.trainable import Trainable
from adapters.units import transformer_blocks
from trainer.config.config import Config
from trainer.config.data_options import DataOptions
from trainer.data.cache import cache_root
from trainer.data.dataset import TokenDataset
from trainer.data.held_out import hold_out
from trainer.data.mixture import prepare_training
from trainer.data.rows import Rows
from trainer.data.templates import read_anew
from trainer.data.tokenise import prepare, read_labels
from trainer.distributed.watchdog import Watchdog
from trainer.distributed.world import World
from trainer.engine.base import Engine, Optimizer
from trainer.engine.select import make_engine
from trainer.errors import UserError
from trainer.loading.load import check_backbone, load_backbone
from trainer.loading.spectral_init import SpectralInit
from trainer.model.backbone import BuiltModel, LoadedBackbone
from trainer.model.image_processor import load_processor
from trainer.records import phases
from trainer.tasks.base import Task
from trainer.tasks.options import TaskOptions
from trainer.tasks.positions import longest_row, longest_text
from trainer.tasks.registry import TASKS

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """All of a session but its data: enough to generate."""

    config: Config
    world: World
    tokenizer: "PreTrainedTokenizerBase"
    task: Task
    engine: Engine
    backbone: LoadedBackbone
    method: Method
    optimizer: Optimizer
    watchdog: Watchdog
    initial_adapters: Mapping[str, InitialAdapter] | None
    """Rank 0: what spectral initialisation, of this method or an earlier stage's, took out of W;
    None without one."""

    @cached_property
    def casts(self) -> Casts:
        """The adapters in the dtype of the products."""
        optimizer = self.optimizer
        if not isinstance(optimizer, MaskedAdamW):  # there are no adapters
            return Casts(None, {}, torch.float32)
        return Casts(optimizer, self.method.adapters, self.backbone.dtype)

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def masked_optimizer(self) -> MaskedAdamW:
        """The optimizer of what every rank holds whole: adapters."""
        assert isinstance(self.optimizer, MaskedAdamW), "the backbone trains, sharded"
        return self.optimizer

    @property
    def frozen(self) -> dict[str, GatedAdapter]:
        """What earlier stages learned, frozen beside the adapters, by the layer's name."""
        layers = self.backbone.adapted_layers
        return {name: layer.frozen for name, layer in layers.items() if layer.frozen is not None}

    def trainables(self) -> list[Trainable]:
        """Adapters first, then the parameters of new heads, then the rows of added tokens."""
        return _trainables(self.method, self.backbone)


@dataclass(frozen=True)
class Session(LoadedModel):
    """The components that training, evaluation and export share."""

    train_data: TokenDataset
    eval_data: Mapping[str, TokenDataset]
    """Evaluation data other than training records, by name ("": that of a single set)."""
    left_out: np.ndarray
    """Indices of the training examples held out from training, record by record."""
    evaluated: np.ndarray
    """Those of them that are evaluated on, where there is no `eval_data`."""

    def held_out(self, name: str = "") -> tuple[TokenDataset, np.ndarray]:
        """(evaluation data set, indices of its examples to evaluate on) of that name."""
        if name in self.eval_data:
            return self.eval_data[name], np.arange(len(self.eval_data[name]))
        return self.train_data, self.evaluated

    def evaluation_digest(self) -> str:
        """Digest of all that is evaluated on, whatever it was read from."""
        digest = xxhash.xxh3_128()
        for name in self.config.data.eval_names:
            data, examples = self.held_out(name)
            digest.update(f"{name} {data.digest} ".encode())
            digest.update(examples.tobytes())
        return digest.hexdigest()


def _trainables(method: Method, backbone: LoadedBackbone) -> list[Trainable]:
    heads = [
        Trainable(f"{path}.{name}", parameter)
        for path, head in backbone.heads.items()
        for name, parameter in head.named_parameters()
    ]
    rows = [  # decay would pull them towards 0, from where no row in use is
        Trainable(f"{path}.token_rows", rows.values, decay_ratio=0.0)
        for path, rows in backbone.token_rows.items()
    ]
    own = [Trainable(name, parameter) for name, parameter in method.trained_parameters.items()]
    return method.adapters.trainables() + own + heads + rows


def open_data(
    config: Config, world: World, stop: Callable[[], None] = lambda: None
) -> tuple["PreTrainedTokenizerBase", Task, TokenDataset, dict[str, TokenDataset]]:
    """Tokenizer, task, tokenised training data, and evaluation data by name. Local rank 0
    tokenises, then the others read its cache. `stop` raises where this rank is asked to stop.
    Collective; it may take any time."""
    read_anew()
    phases.enter("reading the data")
    with world.all_or_none(world.patience(stop)):
        tokenizer = load_processor(config)
        task = TASKS[config.task.kind](config.task, tokenizer)
        if config.task.needs_labels:
            labels = [
                read_labels(source, own.train_split, own, config.task.data_formats[0])
                for source, own in config.data.sources
            ]
            task.learn_labels([label for of_source in labels for label in of_source])
    prepared = None
    for turn in (True, False):
        patience = world.patience(stop)
        with world.all_or_none(patience):
            if (world.local_rank == 0) == turn:
                prepared = _prepare(config, task, patience.check)
    assert prepared is not None
    keys = world.gather([prepared[0].key, *(data.key for data in prepared[1].values())])
    with world.all_or_none():
        for rank, key in enumerate(keys):
            if key != keys[0]:
                raise UserError(
                    f"{config.data.train_name}, or data.eval or the tokenizer, is not the "
                    f"same for rank {rank} as for rank 0; accepted: the same files on every host"
                )
    return tokenizer, task, *prepared


def refuse_longer(
    model: "PreTrainedModel",
    options: DataOptions,
    train_data: TokenDataset,
    eval_data: Mapping[str, TokenDataset],
    *,
    together: bool = False,
    task: TaskOptions | None = None,
) -> None:
    """Raises UserError where a record, or a row of packed ones, is longer than the model's position
    tables. Positions of packed records restart at 0 where the model takes them; so only tables that
    they do not look up limit a row. `together`: a row holds all examples of a record."""
    packs = options.packing or together
    of_text, of_row = longest_text(model), longest_row(model) if packs else None
    rows = Rows() if task is None else Rows(source_apart=task.source_apart)
    limits = {"data.max_length": options.max_length}
    limits |= {} if task is None else task.limits(options.max_length)
    for data in (train_data, *eval_data.values()):
        texts = rows.widths(data.lengths, data.weights).max(0).tolist()
        row = max(*texts, min(options.max_length, int(data.lengths.sum())))
        if together:
            starts = np.flatnonzero(np.diff(data.records, prepend=-1))
            row = int(np.add.reduceat(data.lengths, starts).max())
        lengths = [("texts", text, of_text) for text in texts] + [("packed rows", row, of_row)]
        for (what, length, limit), key in zip(lengths, [*limits, "data.max_length"], strict=True):
            if limit is not None and length > limit:
                raise UserError(
                    f"{key}: {limits[key]} given, and the data has {what} of "
                    f"{length} tokens, but {type(model).__name__} has positions for {limit}; "
                    f"accepted: at most {limit}"
                )


def _prepare(
    config: Config, task: Task, check: Callable[[], None]
) -> tuple[TokenDataset, dict[str, TokenDataset]]:
    data, shown = config.data, config.log.shown
    train = prepare_training(data, task, shown, check)
    split, limit = data.eval_split, data.eval_records
    return train, {
        name: prepare(source, split, limit, data, task, shown, check)
        for name, source in data.eval_sources.items()
    }


def open_session(
    config: Config,
    world: World,
    initial_adapters: Mapping[str, InitialAdapter] | None = None,
    unreached: Sequence[str] | None = None,
    frozen: Callable[[BuiltModel], Mapping[str, GatedAdapter]] = lambda _: {},
    stop: Callable[[], None] = lambda: None,
) -> Session:
    """Load data and backbone, shard it, attach the method's adapters. Collective.

    `initial_adapters`, `unreached`: of a checkpoint's run; the first where spectral initialisation
    took them out of W, the second as for `trainer.model.build.build`. `frozen`: what earlier stages
    learned, by the layer's name, given the model without weights. `stop`: as for `open_data`.
    """
    tokenizer, task, train_data, eval_data = open_data(config, world, stop)
    phases.enter("building the model")
    with world.all_or_none():  # fails before any weight is loaded
        built = check_backbone(config, task, world.device, unreached)
        left_out, evaluated = hold_out(config, train_data, task)
        refuse_longer(
            built.model, config.data, train_data, eval_data,
            together=task.options.records_together, task=task.options,
        )  # fmt: skip
        beside = frozen(built)
        method = _make_method(config, built)
    model = _load(config, world, tokenizer, task, method, built, initial_adapters, beside)
    session = Session(
        **vars(model),
        train_data=train_data,
        eval_data=eval_data,
        left_out=left_out,
        evaluated=evaluated,
    )
    session.casts  # noqa: B018 (their memory is there before any is planned)
    return session


def open_model(
    config: Config,
    world: World,
    initial_adapters: Mapping[str, InitialAdapter] | None = None,
    unreached: Sequence[str] | None = None,
    frozen: Callable[[BuiltModel], Mapping[str, GatedAdapter]] = lambda _: {},
) -> LoadedModel:
    """`open_session` without data, for tasks that learn no labels. Collective."""
    read_anew()
    with world.all_or_none():
        tokenizer = load_processor(config)
        task = TASKS[config.task.kind](config.task, tokenizer)
        built = check_backbone(config, task, world.device, unreached)
        beside = frozen(built)
        method = _make_method(config, built)
    return _load(config, world, tokenizer, task, method, built, initial_adapters, beside)


def _make_method(config: Config, built: BuiltModel) -> Method:
    method = METHODS[config.method.kind](config.method, config.run.seed)
    try:
        method.check(built.units)
    except ValueError as error:
        raise UserError(str(error)) from error
    return method


def _load(
    config: Config,
    world: World,
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    method: Method,
    built: BuiltModel,
    initial_adapters: Mapping[str, InitialAdapter] | None,
    beside: Mapping[str, GatedAdapter],
) -> LoadedModel:
    """Load the backbone, shard it, attach the method's adapters. Collective."""
    phases.enter("loading the model")
    engine = make_engine(config, world, task)
    spectral_init = None
    if isinstance(method, SpectralMethod) or initial_adapters is not None:
        spectra = cache_root(config.data) / "spectra"
        spectral_init = SpectralInit(method, world, spectra, initial_adapters)
    backbone = load_backbone(config, task, engine, world, spectral_init, built)
    if spectral_init is not None:
        initial_adapters = spectral_init.initial_adapters
    phases.enter("attaching adapters")
    method.attach(backbone.units, backbone.adapted_layers, world.device, initial_adapters)
    optimizer = engine.sharded_optimizer(backbone.model)
    if config.method.scales_rows:
        _read_weights(method, backbone, engine)
    if config.method.trains != "adapters" and optimizer is None:
        _attach_modules(method, backbone, engine, world)
    for name, adapter in beside.items():
        backbone.adapted_layers[name].frozen = adapter.requires_grad_(False).to(world.device)
    return LoadedModel(
        config=config,
        world=world,
        tokenizer=tokenizer,
        task=task,
        engine=engine,
        backbone=backbone,
        method=method,
        optimizer=optimizer or _make_optimizer(config, world, method, backbone),
        watchdog=Watchdog(world, config.engine.timeout),
        initial_adapters=initial_adapters if world.is_main else None,
    )


def _read_weights(method: Method, backbone: LoadedBackbone, engine: Engine) -> None:
    """Let the method read the weights of its units, block by block. Collective."""
    left = [unit.name for unit in method.units]
    for path, module in [*transformer_blocks(backbone.model), ("", backbone.model)]:
        names = [name for name in left if f"{name}.".startswith(f"{path}." if path else "")]
        left = [name for name in left if name not in names]
        with engine.unsharded(module):
            method.read_weights(names, backbone.dtype)


def _attach_modules(method: Method, backbone: LoadedBackbone, engine: Engine, world: World) -> None:
    """Let the method put its own modules into the model. Collective."""
    with ExitStack() as stack:
        if method.reads_weights:
            for _, block in transformer_blocks(backbone.model):
                stack.enter_context(engine.unsharded(block))
            stack.enter_context(engine.unsharded(backbone.model))
        with world.all_or_none():
            try:
                method.attach_modules(backbone.model)
            except ValueError as error:
                raise UserError(str(error)) from error


def _make_optimizer(
    config: Config, world: World, method: Method, backbone: LoadedBackbone
) -> MaskedAdamW:
    optim = config.optim
    share = Share(world.rank, world.size, world.gather_parts_)
    return MaskedAdamW(
        _trainables(method, backbone),
        learning_rate=optim.learning_rate,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        no_bias_correction=method.no_bias_correction,
        share=share if optim.shard_state else Share(),
    )
