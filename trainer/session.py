"""`Session`: data, engine, backbone, method and optimizer of a run, built in dependency order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.registry import METHODS
from adapters.methods.spectral import SpectralMethod
from adapters.optimizer import MaskedAdamW, Share, Trainable
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
from trainer.engine.base import Engine
from trainer.engine.select import make_engine
from trainer.errors import UserError
from trainer.loading.load import check_backbone, load_backbone
from trainer.loading.spectral_init import SpectralInit
from trainer.model.backbone import BuiltModel, LoadedBackbone
from trainer.model.hub import load_tokenizer
from trainer.tasks.base import Task
from trainer.tasks.options import TaskOptions
from trainer.tasks.positions import longest_row, longest_text
from trainer.tasks.registry import TASKS

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Session:
    """The components that training, evaluation and export share."""

    config: Config
    world: World
    tokenizer: "PreTrainedTokenizerBase"
    task: Task
    train_data: TokenDataset
    eval_data: TokenDataset | None
    left_out: np.ndarray
    """Indices of the training examples held out from training, record by record."""
    evaluated: np.ndarray
    """Those of them that are evaluated on, where there is no `eval_data`."""
    engine: Engine
    backbone: LoadedBackbone
    method: Method
    optimizer: MaskedAdamW
    watchdog: Watchdog
    initial_adapters: Mapping[str, InitialAdapter] | None
    """Rank 0: what spectral initialisation, of this method or an earlier stage's, took out of W;
    None without one."""

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    @property
    def frozen(self) -> dict[str, GatedAdapter]:
        """What earlier stages learned, frozen beside the adapters, by the layer's name."""
        layers = self.backbone.adapted_layers
        return {name: layer.frozen for name, layer in layers.items() if layer.frozen is not None}

    def held_out(self) -> tuple[TokenDataset, np.ndarray]:
        """(evaluation data set, indices of its examples to evaluate on)."""
        if self.eval_data is not None:
            return self.eval_data, np.arange(len(self.eval_data))
        return self.train_data, self.evaluated

    def trainables(self) -> list[Trainable]:
        """Adapters first, then the parameters of new heads, then the rows of added tokens."""
        return _trainables(self.method, self.backbone)


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
    return method.adapters.trainables() + heads + rows


def open_data(
    config: Config, world: World, stop: Callable[[], None] = lambda: None
) -> tuple["PreTrainedTokenizerBase", Task, TokenDataset, TokenDataset | None]:
    """Tokenizer, task and tokenised data. Local rank 0 tokenises, then the others read its cache.
    `stop` raises where this rank is asked to stop. Collective; it may take any time."""
    read_anew()
    with world.all_or_none(world.patience(stop)):
        tokenizer = load_tokenizer(config.model)
        task = TASKS[config.task.kind](config.task, tokenizer)
        if config.task.needs_labels:
            labels = [
                read_labels(source, own.train_split, own) for source, own in config.data.sources
            ]
            task.learn_labels([label for of_source in labels for label in of_source])
    prepared = None
    for turn in (True, False):
        patience = world.patience(stop)
        with world.all_or_none(patience):
            if (world.local_rank == 0) == turn:
                prepared = _prepare(config, task, patience.check)
    assert prepared is not None
    keys = world.gather([data.key for data in prepared if data is not None])
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
    eval_data: TokenDataset | None,
    task: TaskOptions | None = None,
) -> None:
    """Raises UserError where a record, or a row of packed ones, is longer than the model's position
    tables. Positions of packed records restart at 0 where the model takes them; so only tables that
    they do not look up limit a row."""
    limits = {"data.max_length": options.max_length}
    rows = Rows() if task is None else Rows(source_apart=task.source_apart)
    limits |= {} if task is None else task.limits(options.max_length)
    of_text, of_row = longest_text(model), longest_row(model) if options.packing else None
    for data in (train_data, eval_data):
        if data is None:
            continue
        texts = rows.widths(data.lengths, data.weights).max(0).tolist()
        row = max(*texts, min(options.max_length, int(data.lengths.sum())))
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
) -> tuple[TokenDataset, TokenDataset | None]:
    data, shown = config.data, config.log.shown
    train = prepare_training(data, task, shown, check)
    if data.eval_source is None:
        return train, None
    split, limit = data.eval_split, data.eval_records
    return train, prepare(data.eval_source, split, limit, data, task, shown, check)


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
    with world.all_or_none():  # fails before any weight is loaded
        built = check_backbone(config, task, world.device, unreached)
        left_out, evaluated = hold_out(config, train_data, task)
        refuse_longer(built.model, config.data, train_data, eval_data, config.task)
        beside = frozen(built)
    engine = make_engine(config, world, task)
    method = METHODS[config.method.kind](config.method, config.run.seed)
    spectral_init = None
    if isinstance(method, SpectralMethod) or initial_adapters is not None:
        spectra = cache_root(config.data) / "spectra"
        spectral_init = SpectralInit(method, world, spectra, initial_adapters)
    backbone = load_backbone(config, task, engine, world, spectral_init, built.unreached)
    if spectral_init is not None:
        initial_adapters = spectral_init.initial_adapters
    method.attach(backbone.units, backbone.adapted_layers, world.device, initial_adapters)
    for name, adapter in beside.items():
        backbone.adapted_layers[name].frozen = adapter.requires_grad_(False).to(world.device)
    return Session(
        config=config,
        world=world,
        tokenizer=tokenizer,
        task=task,
        train_data=train_data,
        eval_data=eval_data,
        left_out=left_out,
        evaluated=evaluated,
        engine=engine,
        backbone=backbone,
        method=method,
        optimizer=_make_optimizer(config, world, method, backbone),
        watchdog=Watchdog(world, config.engine.timeout),
        initial_adapters=initial_adapters if world.is_main else None,
    )


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
