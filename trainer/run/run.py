"""A run from start to end: open the session, resume, train, export, complete the run folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adapters import seeds
from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from trainer.checkpoint.compatibility import changes, check_options
from trainer.checkpoint.state import frozen_adapters, read_initial_adapters, restore
from trainer.checkpoint.store import clear_the_way, find, read_tensors, verify
from trainer.checkpoint.writer import CheckpointWriter, NoWriter
from trainer.config.config import Config
from trainer.config.validation import local
from trainer.data.loader import Loader
from trainer.data.prefetch import Prefetcher
from trainer.data.sources import hub_ids
from trainer.data.templates import on_templates
from trainer.decisions.replay import Replay
from trainer.decisions.selection import match_selection
from trainer.device_memory import modules_set_aside, readable
from trainer.distributed import launcher
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, Diverged, UserError
from trainer.files import METRICS
from trainer.generation.evaluation import check_answers
from trainer.loading.initial_adapters import initial_digest
from trainer.memory.graphs import capture_graphs, row_batches
from trainer.memory.planner import make_plan
from trainer.model.backbone import Loading, class_name
from trainer.records import phases
from trainer.records.callbacks import UserCallbacks
from trainer.records.progress import Progress
from trainer.report.result import Result
from trainer.run.data_start import begin_from_data, save_starts
from trainer.run.finish import finish
from trainer.run.folder import RunFolder
from trainer.run.launch import say
from trainer.run.outcome import find_fault
from trainer.run.parameters import Parameters, count_parameters
from trainer.run.remarks import (
    describe_engine,
    on_batch,
    on_evaluation,
    on_length,
    on_rows,
    on_sources,
)
from trainer.run.second_stage import SecondStage
from trainer.run.shared import refuse_unshared
from trainer.session import Session, open_session
from trainer.trackers.record import refuse_missing
from trainer.training.best import is_exhausted
from trainer.training.loop import Run, make_loader, total_steps, train
from trainer.training.lr_schedule import learning_rate
from trainer.training.step import Training, log_graphs, log_plan
from trainer.training.stop_request import StopRequest
from trainer.training.validation import make_validate
from trainer.verification.first_steps import FirstSteps
from trainer.verification.verify import Conditions, conditions, verify_session


def run(
    config: Config,
    world: World,
    stop: StopRequest | None = None,
    callbacks: Sequence[Any] = (),
    *,
    scores_only: bool = False,
) -> Parameters:
    """Train as configured and complete the run folder. Returns counts of parameters. Collective.

    `stop` is polled at every step; Interrupted is raised once the run is saved. `callbacks`: as
    `trainer.records.callbacks.Callback`, called on rank 0. `scores_only`: neither checkpoints nor
    an adapter are written, such as in comparisons.
    """
    with world.all_or_none():
        users = UserCallbacks(callbacks if world.is_main else ())
        if world.is_main:
            refuse_missing(config.log)
    told = say if world.is_main and config.log.shown != "none" else None
    with (
        phases.until_step(told),
        modules_set_aside(),
        RunFolder(config.run_folder, users) as folder,
    ):
        return _run(config, world, stop or StopRequest(config.run), folder, scores_only)


def _run(
    config: Config, world: World, stop: StopRequest, folder: RunFolder, scores_only: bool
) -> Parameters:
    start = _choose_start(config, world, folder)
    with world.all_or_none():
        found, recomputed = _initial_adapters(start)
        unreached = None if start.checkpoint is None else start.state.get("unreached", [])
        if world.is_main:
            folder.begin()
    stage = None
    if config.model.adapter is not None and start.checkpoint is None:
        stage = SecondStage(config, world)
    session = open_session(
        config, world, found if stage is None else stage.initial_adapters, unreached,
        frozen=stage.frozen if stage is not None else lambda _: start.frozen,
        stop=stop.raise_if_asked,
    )  # fmt: skip
    with world.all_or_none():
        check_answers(session)
        if recomputed is not None and not session.method.splits_weight:
            raise recomputed  # an earlier stage's, which this method cannot compute
        if recomputed is not None and session.initial_adapters is not None:
            if initial_digest(session.initial_adapters) != start.state["initial"]:
                raise recomputed
            start.remarks.append(f"{recomputed}; computed again, and the same")
        stage_lines = stage.begin(session) if stage is not None else []
    torch.manual_seed(seeds.mixed(config.run.seed, world.rank))
    loader = make_loader(session, world)
    progress = Progress()
    phases.enter("verifying what was loaded")
    proof, verified = _prove(session, start)  # of what was loaded, before a backbone trains
    if start.checkpoint is not None:
        with world.all_or_none():
            progress = restore(session, loader, start.checkpoint, start.state)
    starts, start_lines = None, []
    goes_on = start.checkpoint is not None or (stage is not None and stage.goes_on)
    if config.method.data_start is not None and not goes_on:
        with session.watchdog:
            starts, start_line = begin_from_data(session, folder.path)
        start_lines = [start_line]
    if world.device.type == "cuda":
        phases.enter("planning memory")
    plan = make_plan(session)
    phases.enter("opening the records")
    steps = total_steps(session, loader)
    replay, digest = None, start.state.get("initial")
    with world.all_or_none():
        _refuse_made(start, config, progress, steps)
        _set_horizon(session, steps)
        if world.is_main:
            if config.method.replay is not None:
                replay = Replay(Path(config.method.replay), session.method, progress.step, steps)
            elif config.method.selection_of is not None:
                match_selection(config, session.method)
            folder.make()
            digest = folder.describe(session, digest)
            if starts is not None:
                save_starts(session, starts, folder.path)
            folder.record(session, steps, progress, stop)
    notes = [
        *([folder.lock.note] if folder.lock.note else []),
        *launcher.remarks(),
        *on_batch(config.data, len(loader.sequences(loader.epoch))),
        *on_length(session.backbone.model, session.train_data, session.eval_data),
        *on_templates(session.tokenizer, config.data),
    ]
    introduction = _introduction(session, loader, steps, notes)
    for line in (*introduction, *stage_lines, *start_lines, *_resumption(start, config)):
        folder.recorder.log_line(line)
    folder.recorder.log_line(f"verified  {proof}")
    log_plan(folder.recorder, plan)

    def capture() -> str | None:
        return capture_graphs(session, row_batches(session, loader))

    if world.device.type == "cuda":
        phases.enter("capturing graphs")
    log_graphs(folder.recorder, capture())
    # Later in a run whole units may be masked or pruned, on purpose.
    watched = {"auto": start.checkpoint is None, "full": True, "off": False}[config.run.verify]
    first_steps = FirstSteps(session, folder.recorder) if watched else None
    with Prefetcher(loader, world.device, steps - progress.step) as batches:
        training = Training(
            session, batches, steps, make_validate(session), folder.recorder, replay, first_steps,
            capture,
        )  # fmt: skip
        writer: CheckpointWriter | NoWriter = NoWriter(folder.checkpoints)
        if not scores_only:
            writer = CheckpointWriter(
                session, batches, folder.checkpoints, digest, verified, folder.recorder.on_save
            )
        train(Run(training, writer, progress, stop))
    writer.close()
    return _end(session, folder, progress, scores_only)


def _end(session: Session, folder: RunFolder, progress: Progress, scores_only: bool) -> Parameters:
    """Write what the run leaves. Returns counts of parameters. Raises Diverged where that is no
    result. Collective."""
    world, recorder = session.world, folder.recorder
    recorder.set_state("finishing")
    fault = find_fault(session, folder.path, progress.step)
    with world.all_or_none():
        if world.is_main and not scores_only:
            for line in finish(session, folder.path, progress, fault):
                recorder.log_line(line)
        if fault is not None:
            raise Diverged(
                f"{fault}; what it left is in {folder.path}, its adapter too; accepted: a lower "
                "optim.learning_rate or a longer optim.warmup_steps, and another run.name"
            )
        recorder.on_end(Result(folder.path))
        if recorder.failure is not None:
            raise recorder.failure
        recorder.close()
    return count_parameters(session)


@dataclass(frozen=True)
class _Start:
    """Where a run starts: at a checkpoint or at step 0."""

    checkpoint: Path | None
    """To resume from; None: start at step 0."""
    state: dict[str, Any]
    """The checkpoint's state.json."""
    remarks: list[str]
    """On damaged checkpoints."""

    @cached_property
    def frozen(self) -> dict[str, GatedAdapter]:
        """What earlier stages learned, by unit, from the checkpoint."""
        if self.checkpoint is None or self.state["config"]["model"].get("adapter") is None:
            return {}
        return frozen_adapters(read_tensors(self.checkpoint))


def _choose_start(config: Config, world: World, folder: RunFolder) -> _Start:
    """The checkpoint that rank 0 finds. Refuses to overwrite a run (UserError). Collective."""
    found = _Start(None, {}, [])
    refuse_unshared(config.run_folder, world)
    with world.all_or_none():
        if world.is_main:
            folder.take()
            checkpoint, state, remarks = find(config.run.resume, folder.checkpoints, verify)
            found = _Start(checkpoint, state or {}, remarks)
            if config.run.resume == "never" and (folder.path / METRICS).exists():
                raise UserError(
                    f"run.resume: never given, but {folder.path} holds a run already; accepted: "
                    "another run.name, or run.resume=auto"
                )
            if found.checkpoint is not None:
                check_options(config, found.checkpoint, found.state)
            step = found.state.get("step", 0)
            found.remarks.extend(clear_the_way(folder.checkpoints, step, config.run.resume))
    found = _Start(*world.broadcast((found.checkpoint, found.state, found.remarks)))
    with world.all_or_none():
        if found.checkpoint is not None and not world.is_main:
            verify(found.checkpoint)
    return found


def _initial_adapters(
    start: _Start,
) -> tuple[dict[str, InitialAdapter] | None, BadCheckpoint | None]:
    """Initial adapters of the resumed run, or why they have to be computed again."""
    if start.checkpoint is None:
        return None, None
    try:
        return read_initial_adapters(start.checkpoint, start.state), None
    except BadCheckpoint as error:
        return None, error


def _prove(session: Session, start: _Start) -> tuple[str, Conditions | None]:
    """(what the log says of the proof, the conditions of the last proof of this run, if there was
    any). A resumed run is proved unless its checkpoint says that it was, under the same conditions.
    Collective."""
    mode, before, now = session.config.run.verify, start.state.get("verified"), conditions(session)
    if mode == "off":
        return "no: run.verify=off", before
    if mode == "auto" and before == now:
        return "before: resumed on the same backbone, versions, engine and ranks", before
    proof = verify_session(session)
    return proof.line, now if proof.complete else None


def _refuse_made(start: _Start, config: Config, progress: Progress, steps: int) -> None:
    """Raises UserError where the run has made its `steps` already, and more or otherwise."""
    if progress.step > steps:
        given = "run.steps" if config.run.steps is not None else "run.epochs"
        raise UserError(
            f"{given}: {steps} steps given, but {start.checkpoint} has made {progress.step}; "
            f"accepted: {progress.step} or more, or another run.name for a new run"
        )
    has_ended = progress.step == steps or is_exhausted(config, progress)
    if edited := _edited(start, config) if has_ended else []:
        raise UserError(
            f"run.name: {config.run_folder} has made all of its {progress.step} steps, so this "
            f"configuration ({', '.join(edited)}) would train nothing; accepted: another "
            f"run.name (with model.adapter={config.run_folder} it starts from what that run "
            "learned), more steps or epochs, or the configuration as it was"
        )


def _set_horizon(session: Session, steps: int) -> None:
    """Set the method's horizon. Raises UserError where its options do not fit `steps`."""
    optim, method = session.config.optim, session.method
    try:
        method.options.check_steps(steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    method.set_horizon(steps, lambda step: learning_rate(optim, step, steps) / optim.learning_rate)


def _introduction(session: Session, loader: Loader, steps: int, notes: list[str]) -> list[str]:
    """Lines that describe the run on the terminal; `notes`: what else is to be said."""
    config, data = session.config, session.config.data
    engine, world = session.engine, session.world
    return [
        *(f"note      {note}" for note in notes),
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


def _resumption(start: _Start, config: Config) -> list[str]:
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


def _edited(start: _Start, config: Config) -> list[str]:
    """Keys that differ from those of the resumed run and change what it trains or reports."""
    if start.checkpoint is None:
        return []
    return changes(start.state, config, evaluation=True)


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
