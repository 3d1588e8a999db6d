"""What a run says of itself before its first step."""

from collections.abc import Iterator

from trainer.checkpoint.compatibility import changes
from trainer.config.config import Config
from trainer.config.validation import local
from trainer.data.loader import Loader
from trainer.data.sources import hub_ids
from trainer.data.templates import on_templates
from trainer.device_memory import readable
from trainer.distributed import launcher
from trainer.model.backbone import Loading, class_name
from trainer.run.folder import RunFolder
from trainer.run.remarks import (
    describe_engine,
    on_batch,
    on_evaluation,
    on_length,
    on_rows,
    on_sources,
)
from trainer.run.start import Start
from trainer.run.without_effect import on_keys
from trainer.session import Session


def introduction(session: Session, folder: RunFolder, loader: Loader, steps: int) -> list[str]:
    """Lines that describe the run on the terminal."""
    config, data = session.config, session.config.data
    engine, world = session.engine, session.world
    return [
        *(f"note      {note}" for note in _notes(session, folder, loader)),
        *(
            f"note      {key}: {name} is not pinned to a revision; {fixed} pins it"
            for key, name, fixed in _unpinned(config)
        ),
        *(f"note      {left}" for left in session.backbone.left_alone),
        *([f"note      {left_out}"] if (left_out := session.backbone.left_out) else []),
        *([f"note      {added}"] if (added := session.backbone.added) else []),
        *(
            ["note      weights are stored as MXFP4, read as bfloat16"]
            if session.backbone.loading.mxfp4
            else []
        ),
        f"run       {config.run_folder}",
        f"data      train {session.train_data.counts}",
        *(f"          {line}" for line in session.task.remarks()),
        *(f"          {line}" for line in on_sources(session.train_data)),
        *(
            f"          eval {name}{': ' if name else ''}{held}"
            for name in data.eval_names
            if (held := on_evaluation(*session.held_out(name)))
        ),
        f"backbone  {class_name(session.model)}, {session.backbone.dtype}, "
        f"{config.model.quantization}, "
        f"{readable(engine.local_bytes(session.model))} per rank",
        _loading(session.backbone.loading),
        f"attention {session.backbone.attention}",
        f"engine    {describe_engine(engine)}, {world.size} rank(s), {world.device}",
        f"method    {config.method.described(len(session.method.units))}, "
        f"{session.optimizer.numel:,} trainable parameters",
        f"steps     {steps} of {data.batch_size} sequences",
        *(f"          {line}" for line in on_rows(loader)),
    ]


def _notes(session: Session, folder: RunFolder, loader: Loader) -> list[str]:
    config = session.config
    return [
        *([folder.lock.note] if folder.lock.note else []),
        *launcher.remarks(),
        *on_batch(config.data, len(loader.sequences(loader.epoch))),
        *on_length(session.backbone.model, session.train_data, session.eval_data),
        *on_templates(session.tokenizer, config.data),
        *on_keys(config, session.train_data, session.eval_data),
    ]


def resumption(start: Start, config: Config) -> list[str]:
    """Lines on the resumed checkpoint: damaged ones, its origin, changed keys."""
    lines = [f"damaged   {remark}" for remark in start.remarks]
    if start.checkpoint is not None:
        state = start.state
        lines.append(
            f"resumed from {start.checkpoint} (made by {state['engine']} on "
            f"{state['world_size']} ranks) at step {state['step']}"
        )
        changed = changes(state, config)
        lines += [f"changed   {change}" for change in changed]
    return lines


def _loading(figures: Loading) -> str:
    return (
        f"          loaded in {figures.seconds:.1f} s, {readable(figures.bytes_read)} read, "
        f"host memory at most {readable(figures.peak_host_bytes)} per rank"
    )


def _unpinned(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, hub id, what pins it) of models and data sets from the hub without a fixed revision."""
    model, data = config.model, config.data
    train = "data.train" if data.mixture is None else "data.mixture"
    sources = [(train, source, own.revision) for source, own in data.sources]
    sources += [("data.eval", source, data.revision) for source in data.eval_sources.values()]
    for key, name, revision, fixed in (
        ("model.id", model.id, model.revision, "model.revision=COMMIT"),
        ("model.tokenizer", model.tokenizer, None, "a local folder"),
        *(
            (key, name, revision, "data.revision=COMMIT")
            for key, source, revision in sources
            for name in hub_ids(source)
        ),
    ):
        if name is not None and revision is None and local(name) is None:
            yield key, name, fixed
