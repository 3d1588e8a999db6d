"""A run from start to end: open the session, resume, train, export, complete the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters import seeds
from trainer.checkpoint.state import restore
from trainer.checkpoint.writer import CheckpointWriter, NoWriter
from trainer.config.config import Config
from trainer.data.prefetch import Prefetcher
from trainer.decisions.replay import Replay
from trainer.decisions.selection import match_selection
from trainer.device_memory import modules_set_aside
from trainer.distributed.world import World
from trainer.errors import Diverged, UserError
from trainer.generation.evaluation import check_answers
from trainer.loading.initial_adapters import initial_digest
from trainer.memory.graphs import capture_graphs, row_batches
from trainer.memory.planner import make_plan
from trainer.records import phases
from trainer.records.callbacks import UserCallbacks
from trainer.records.progress import Progress
from trainer.report.result import Result
from trainer.run.data_start import begin_from_data, save_starts
from trainer.run.finish import finish
from trainer.run.folder import RunFolder
from trainer.run.introduction import introduction, resumption
from trainer.run.launch import say
from trainer.run.outcome import find_fault
from trainer.run.parameters import Parameters, count_parameters
from trainer.run.second_stage import SecondStage
from trainer.run.start import Start, choose_start, refuse_made
from trainer.session import Session, open_session
from trainer.trackers.record import refuse_missing
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
    start = choose_start(config, world, folder)
    session, stage, lines = _open(config, world, stop, folder, start)
    torch.manual_seed(seeds.mixed(config.run.seed, world.rank))
    loader = make_loader(session, world)
    phases.enter("verifying what was loaded")
    proof, verified = _prove(session, start)  # of what was loaded, before a backbone trains
    progress = Progress()
    if start.checkpoint is not None:
        with world.all_or_none():
            progress = restore(session, loader, start.checkpoint, start.state)
    starts = None
    goes_on = start.checkpoint is not None or (stage is not None and stage.goes_on)
    if config.method.data_start is not None and not goes_on:
        with session.watchdog:
            starts, line = begin_from_data(session, folder.path)
        lines.append(line)
    _enter_on_gpu(world, "planning memory")
    plan = make_plan(session)
    phases.enter("opening the records")
    steps = total_steps(session, loader)
    replay, digest = None, start.state.get("initial")
    with world.all_or_none():
        refuse_made(start, config, progress, steps)
        _set_horizon(session, steps)
        if world.is_main:
            replay = _earlier_decisions(session, progress, steps)
            folder.make()
            digest = folder.describe(session, digest)
            if starts is not None:
                save_starts(session, starts, folder.path)
            folder.record(session, steps, progress, stop)
    recorder = folder.recorder
    said = introduction(session, folder, loader, steps)
    for line in (*said, *lines, *resumption(start, config)):
        recorder.log_line(line)
    recorder.log_line(f"verified  {proof}")
    log_plan(recorder, plan)

    def capture() -> str | None:
        return capture_graphs(session, row_batches(session, loader))

    _enter_on_gpu(world, "capturing graphs")
    log_graphs(recorder, capture())
    # Later in a run whole units may be masked or pruned, on purpose.
    watched = {"auto": start.checkpoint is None, "full": True, "off": False}[config.run.verify]
    first_steps = FirstSteps(session, recorder) if watched else None
    with Prefetcher(loader, world.device, steps - progress.step) as batches:
        training = Training(
            session, batches, steps, make_validate(session), recorder, replay, first_steps, capture
        )
        writer: CheckpointWriter | NoWriter = NoWriter(folder.checkpoints)
        if not scores_only:
            writer = CheckpointWriter(
                session, batches, folder.checkpoints, digest, verified, recorder.on_save
            )
        train(Run(training, writer, progress, stop))
    writer.close()
    return _end(session, folder, progress, scores_only)


def _open(
    config: Config, world: World, stop: StopRequest, folder: RunFolder, start: Start
) -> tuple[Session, SecondStage | None, list[str]]:
    """(the session, the stage that an earlier run's adapter begins, lines on it). Collective."""
    with world.all_or_none():
        found, recomputed = start.initial_adapters()
        if world.is_main:
            folder.begin()
    stage = None
    if config.model.adapter is not None and start.checkpoint is None:
        stage = SecondStage(config, world)
    session = open_session(
        config, world, found if stage is None else stage.initial_adapters, start.unreached,
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
        return session, stage, stage.begin(session) if stage is not None else []


def _earlier_decisions(session: Session, progress: Progress, steps: int) -> Replay | None:
    """Another run's decisions to repeat, or its selection given to the method. On rank 0."""
    method = session.config.method
    if method.replay is not None:
        return Replay(Path(method.replay), session.method, progress.step, steps)
    if method.selection_of is not None:
        match_selection(session.config, session.method)
    return None


def _enter_on_gpu(world: World, phase: str) -> None:
    if world.device.type == "cuda":
        phases.enter(phase)


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


def _prove(session: Session, start: Start) -> tuple[str, Conditions | None]:
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


def _set_horizon(session: Session, steps: int) -> None:
    """Set the method's horizon. Raises UserError where its options do not fit `steps`."""
    optim, method = session.config.optim, session.method
    try:
        method.options.check_steps(steps)
    except ValueError as error:
        raise UserError(str(error)) from error
    method.set_horizon(steps, lambda step: learning_rate(optim, step, steps) / optim.learning_rate)
