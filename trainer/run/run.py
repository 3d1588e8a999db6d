"""A run from start to end: open the session, resume, train, export, complete the run folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters import seeds
from adapters.layers.expert_modules import swapped_stacks
from adapters.methods.base import InitialAdapter
from adapters.peft_export import NothingToExport, export_adapter
from adapters.units import expert_counts, fan_in_fan_out
from trainer.checkpoint.compatibility import changes, check_options
from trainer.checkpoint.state import read_initial_adapters, restore
from trainer.checkpoint.store import clear_the_way, find, verify
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.config import Config
from trainer.config.data_options import LEFT_OUT
from trainer.config.validation import local
from trainer.data.loader import Loader
from trainer.data.prefetch import Prefetcher
from trainer.decisions.replay import Replay
from trainer.device_memory import peak_gib, readable
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, RunFailed, UserError
from trainer.export.added_tokens import trained_tokens
from trainer.export.expert_layouts import chosen_layouts
from trainer.export.export import written_folder
from trainer.files import ADAPTER, FIGURES, METRICS
from trainer.loading.initial_adapters import initial_digest
from trainer.memory.planner import make_plan
from trainer.model.backbone import Loading, class_name
from trainer.model.peft_names import PeftKeys, former_experts, modules_to_save
from trainer.records.jsonl import read_metrics
from trainer.records.progress import Progress
from trainer.report.loss_curve import draw_loss
from trainer.run.folder import RunFolder
from trainer.run.remarks import describe_engine, on_batch, on_length, on_rows
from trainer.run.shared import refuse_unshared
from trainer.session import Session, open_session
from trainer.training.loop import Run, make_loader, total_steps, train
from trainer.training.lr_schedule import learning_rate
from trainer.training.step import Training, log_plan
from trainer.training.stop_request import StopRequest
from trainer.training.validation import make_validate
from trainer.verification.first_steps import FirstSteps
from trainer.verification.verify import Conditions, conditions, verify_session


def run(config: Config, world: World, stop: StopRequest | None = None) -> None:
    """Train as configured and complete the run folder. Collective.

    `stop` is polled at every step; Interrupted is raised once the run is saved.
    """
    with RunFolder(config.run_folder) as folder:
        _run(config, world, stop or StopRequest(config.run), folder)


def _run(config: Config, world: World, stop: StopRequest, folder: RunFolder) -> None:
    start = _choose_start(config, world, folder)
    with world.all_or_none():
        initial_adapters, recomputed = _initial_adapters(start)
        unreached = None if start.checkpoint is None else start.state.get("unreached", [])
        if world.is_main:
            folder.begin()
    session = open_session(config, world, initial_adapters, unreached, stop.raise_if_asked)
    with world.all_or_none():
        if recomputed is not None and session.initial_adapters is not None:
            if initial_digest(session.initial_adapters) != start.state["initial"]:
                raise recomputed
            start.remarks.append(f"{recomputed}; computed again, and the same")
    torch.manual_seed(seeds.mixed(config.run.seed, world.rank))
    loader = make_loader(session, world)
    progress = Progress()
    if start.checkpoint is not None:
        with world.all_or_none():
            progress = restore(session, loader, start.checkpoint, start.state)
    proof, verified = _prove(session, start)
    plan = make_plan(session)
    steps = total_steps(session, loader)
    replay, digest = None, start.state.get("initial")
    with world.all_or_none():
        if progress.step > steps:
            given = "run.steps" if config.run.steps is not None else "run.epochs"
            raise UserError(
                f"{given}: {steps} steps given, but {start.checkpoint} has made {progress.step}; "
                f"accepted: {progress.step} or more, or another run.name for a new run"
            )
        _set_horizon(session, steps)
        if world.is_main:
            if config.method.replay is not None:
                replay = Replay(Path(config.method.replay), session.method, progress.step, steps)
            folder.make()
            digest = folder.describe(session, digest)
            folder.record(session, steps, progress)
    notes = [
        *([folder.lock.note] if folder.lock.note else []),
        *on_batch(config.data, len(loader.sequences(loader.epoch))),
        *on_length(session.backbone.model, session.train_data, session.eval_data),
    ]
    for line in (*_introduction(session, loader, steps, notes), *_resumption(start, config)):
        folder.recorder.log_line(line)
    folder.recorder.log_line(f"verified  {proof}")
    log_plan(folder.recorder, plan)
    # Later in a run whole units may be masked or pruned, on purpose.
    watched = {"auto": start.checkpoint is None, "full": True, "off": False}[config.run.verify]
    first_steps = FirstSteps(session, folder.recorder) if watched else None
    with Prefetcher(loader, world.device, steps - progress.step) as batches:
        training = Training(
            session, batches, steps, make_validate(session), folder.recorder, replay, first_steps
        )
        writer = CheckpointWriter(session, batches, folder.checkpoints, digest, verified)
        train(Run(training, writer, progress, stop))
    writer.close()
    with world.all_or_none():
        folder.recorder.close()
        if world.is_main:
            _finish(session, folder.path, steps)


@dataclass(frozen=True)
class _Start:
    """Where a run starts: at a checkpoint or at step 0."""

    checkpoint: Path | None
    """To resume from; None: start at step 0."""
    state: dict[str, Any]
    """The checkpoint's state.json."""
    remarks: list[str]
    """On damaged checkpoints."""


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
    eval_data = session.eval_data
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
        *([f"          eval {eval_data.counts}"] if eval_data is not None else []),
        f"backbone  {class_name(session.model)}, {session.backbone.dtype}, "
        f"{config.model.quantization}, "
        f"{readable(engine.local_bytes(session.model))} per rank",
        _loading(session.backbone.loading),
        f"attention {session.backbone.attention}",
        f"engine    {describe_engine(engine)}, {world.size} rank(s), {world.device}",
        f"method    {config.method.kind}, rank {config.method.rank}, "
        f"{len(session.method.units)} units, {session.optimizer.numel:,} trainable parameters",
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
        changed = changes(state, config.model_dump(mode="json"))
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
    for key, name, revision, fixed in (
        ("model.id", model.id, model.revision, "model.revision=COMMIT"),
        ("model.tokenizer", model.tokenizer, None, "a local folder"),
        ("data.train", data.train, data.revision, "data.revision=COMMIT"),
        ("data.eval", data.eval, data.revision, "data.revision=COMMIT"),
    ):
        if name not in (None, LEFT_OUT) and revision is None and local(name) is None:
            yield key, name, fixed


def _finish(session: Session, folder: Path, steps: int) -> None:
    """Export the adapter, draw the loss, write README.md. Rank 0 only: adapters are replicated."""
    adapter = folder / ADAPTER
    try:
        with written_folder(adapter, RunFailed) as unfinished:
            note, where = _export(session, unfinished), str(adapter)
    except NothingToExport as error:
        note, where = "", f"none: {error}"
    figure = draw_loss([folder], folder / FIGURES / "loss")
    lines = read_metrics(folder / METRICS)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    scores: dict = next((line for line in reversed(lines) if "eval_loss" in line), {})
    summary = f"done      {steps} steps"
    if losses:
        summary += f", loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    for name, value in scores.items():
        if name != "step" and value is not None:
            summary += f", {name} {value:.4g}"
    summary += f", peak {peak_gib(session.world.device):.2f} GiB"
    (folder / "README.md").write_text(
        _readme(session.config, summary.removeprefix("done").strip(), note), encoding="utf-8"
    )
    if session.config.log.progress != "none":
        print(f"{summary}\nadapter   {where}\nfigure    {figure}", flush=True)


def _export(session: Session, folder: Path) -> str:
    config = session.config
    heads = {
        path: {
            name.removeprefix("inner."): parameter.detach()
            for name, parameter in head.named_parameters()
        }
        for path, head in session.backbone.heads.items()
    }
    rows = {path: one.values.detach() for path, one in session.backbone.token_rows.items()}
    note = ""
    if config.model.quantization != "none":
        note = (
            f"Trained on the {config.model.quantization} backbone, whose matrices differ from the "
            f"unquantised ones by {session.backbone.quantization_error:.2%} (Frobenius). `python "
            "launch/export.py RUN OUT` measures the effect on held-out data."
        )
    with session.method.inference():
        export_adapter(
            folder,
            session.method.adapters,
            initial={
                name: initial.adapter for name, initial in (session.initial_adapters or {}).items()
            },
            base_model=config.model.id,
            revision=config.model.revision,
            task_type=session.task.peft_task_type,
            model_class=session.task.auto_class.__name__,
            heads=heads,
            labels=session.task.head_outputs(session.task.labels_state()),
            experts=expert_counts(session.model),
            swapped=swapped_stacks(session.model),
            fan_in_fan_out=fan_in_fan_out(
                session.backbone.adapted_layers[unit.name] for unit in session.backbone.units
            ),
            layouts=chosen_layouts(session.backbone.model),
            former_experts=former_experts(session.backbone.model),
            key=PeftKeys(session.backbone.model),
            modules_to_save=modules_to_save(session.backbone.model, heads),
            note=note,
            tokens=trained_tokens(session.backbone, rows, session.tokenizer),
        )
    if rows:
        session.tokenizer.save_pretrained(folder)
    return note


def _readme(config: Config, summary: str, note: str) -> str:
    return f"""# {config.run.name}

{config.method.kind} on `{config.model.id}` ({config.model.quantization}): {summary}.

| | |
|---|---|
| `config.yaml` | the resolved configuration |
| `units.json` | the adapted matrices |
| `allocation.jsonl` | the decisions of an adaptive method |
| `initial.safetensors` | initial adapters (LeLoRA, PiSSA, MiLoRA); checkpoints need it |
| `metrics.jsonl` | one object per logged step or evaluation |
| `heartbeat.json` | state of the run, for `rankcast watch` and monitoring |
| `tensorboard/` | the metrics, for `tensorboard --logdir` |
| `checkpoints/` | resumable on any engine and number of ranks |
| `adapter/` | a LoRA that `peft.PeftModel.from_pretrained` loads |
| `figures/` | the loss curve |

![loss](figures/loss.png)

{note}
"""
