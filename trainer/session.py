"""A run's parts, put together in the one order in which they depend on each other."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from adapters.method import Method
from adapters.optimizer import MaskedAdamW, Trainable
from adapters.registry import METHODS
from trainer import architecture
from trainer import backbone as backbones
from trainer.architecture import Backbone
from trainer.config import Config, DataOptions
from trainer.data import TokenDataset, prepare, read_labels
from trainer.distributed import World
from trainer.engine import make_engine
from trainer.engine.base import Engine
from trainer.tasks import TASKS
from trainer.tasks.base import Task


@dataclass
class Session:
    """Everything that training, evaluation and export share."""

    config: Config
    world: World
    tokenizer: PreTrainedTokenizerBase
    task: Task
    train_data: TokenDataset
    eval_data: TokenDataset | None
    engine: Engine
    backbone: Backbone
    method: Method
    optimizer: MaskedAdamW

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def trainables(self) -> list[Trainable]:
        """Adapters first, then the parameters of new heads."""
        heads = [
            Trainable(f"{path}.{name}", parameter)
            for path, head in self.backbone.heads.items()
            for name, parameter in head.named_parameters()
        ]
        return self.method.trainables() + heads


def open_data(
    config: Config, world: World
) -> tuple[PreTrainedTokenizerBase, Task, TokenDataset, TokenDataset | None]:
    """Tokenizer, task and tokenised data; each node's first rank tokenises, the others follow."""
    with world.together():
        tokenizer = architecture.load_tokenizer(config.model)
        task = TASKS[config.task.kind](config.task, tokenizer)
        if config.task.kind == "sequence_classification":
            task.learn_labels(read_labels(config.data.train, config.data.train_split, config.data))
    prepared = None
    for turn in (True, False):
        with world.together():
            if (world.local_rank == 0) == turn:
                prepared = _prepare(config.data, task)
    assert prepared is not None
    return tokenizer, task, *prepared


def _prepare(data: DataOptions, task: Task) -> tuple[TokenDataset, TokenDataset | None]:
    train = prepare(data.train, data.train_split, data.train_records, data, task)
    if data.eval is None:
        return train, None
    return train, prepare(data.eval, data.eval_split, data.eval_records, data, task)


def open_session(config: Config, world: World) -> Session:
    """Load data and backbone, shard it, attach the method's adapters. The same on every rank."""
    with world.together():
        engine = make_engine(config, world)
    tokenizer, task, train_data, eval_data = open_data(config, world)
    with world.together():  # what is wrong with the model shows without its weights
        backbones.check(config, task, world.device)
    backbone = backbones.load(config, task, engine, world)
    method = METHODS[config.method.kind](config.method, config.run.seed)
    method.attach(backbone.units, backbone.hosts, world.device)
    session = Session(
        config, world, tokenizer, task, train_data, eval_data, engine, backbone, method,
        optimizer=None,  # type: ignore[arg-type]  # follows at once, from the session's trainables
    )  # fmt: skip
    session.optimizer = MaskedAdamW(
        session.trainables(),
        learning_rate=config.optim.learning_rate,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    return session
