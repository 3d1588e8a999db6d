"""Save a session and put it back, on any engine and any number of ranks.

Holds adapters, masks, heads, optimizer, method state and every rank's random generators; never
the frozen backbone. What the files look like stands in `checkpoint_files.py`.
"""

import concurrent.futures
import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from adapters import seeds
from adapters.methods.base import InitialAdapter
from trainer.checkpoint import store as files
from trainer.config.config import Config
from trainer.data.loader import Loader
from trainer.errors import RunFailed
from trainer.loading.spectral_init import INITIAL, load_initial_adapters
from trainer.records.progress import Progress
from trainer.session import Session


class CheckpointWriter:
    """Saves a session, in the background where asked for, and keeps the newest few."""

    def __init__(self, session: Session, loader: Loader, folder: Path):
        self.session, self.loader, self.folder = session, loader, folder
        self._options = session.config.checkpoint
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = 0

    def save(self, progress: Progress) -> None:
        """Snapshot now; write now or in the background. All ranks call it at the same step."""
        self.wait()
        tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in (_tensors(self.session) | _random_state(self.session)).items()
        }
        state = _describe(self.session, self.loader, progress)
        self._pending_step = progress.step
        self._pending = self._thread.submit(self._write, tensors, state)
        if not self._options.asynchronous:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether what was to be written in the background could not be."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Until what is being written is complete. Raises RunFailed where it could not be."""
        pending, self._pending = self._pending, None
        if self.session.world.gather(pending is None)[0]:
            return
        with self.session.world.all_or_none():
            assert pending is not None
            try:
                pending.result()
            except BaseException as error:  # torch's CheckpointException is no Exception
                last = files.newest(self.folder)
                raise RunFailed(
                    f"checkpoint of step {self._pending_step} could not be written in "
                    f"{self.folder}: {_root_cause(error)}; last good checkpoint: {last or 'none'}"
                ) from error

    def close(self) -> None:
        """Finish what is being written, then let the thread go."""
        self.wait()
        self._thread.shutdown()

    def _open(self, partial: Path) -> None:
        """Make the folder; where one rank cannot, none goes on to wait for it."""
        world, problem = self.session.world, None
        try:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            problem = error.strerror or str(error)
        problem = world.gather(problem, world.saving)[0]
        if problem is not None:
            raise OSError(problem)

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """In the background: all ranks write tensors, rank 0 adds the rest and renames."""
        world = self.session.world
        final = self.folder / f"step-{state['step']:08d}"
        partial = self.folder / f".{final.name}{files.PARTIAL}"
        try:
            self._open(partial)
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=world.saving,
            )
            if world.is_main:
                files.check_complete(partial, tensors.keys(), world.size)
                (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
                files.write_manifest(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                files.sync(self.folder)
                for old in files.complete(self.folder)[: -self._options.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def restore(session: Session, loader: Loader, checkpoint: Path, state: dict) -> Progress:
    """Put a checkpoint's state into a session that was opened with the same configuration.

    Each rank on its own: a new optimizer, split or not, has no moments that it would gather.
    """
    _check_same_run(session, checkpoint, state)
    stored = files.read_tensors(checkpoint)
    load_trained(session, checkpoint, stored)
    with files.refuse_mismatch(checkpoint):
        _check_fit(session, checkpoint, stored, "optimizer/")
        session.optimizer.load_state_dict(_unflatten(stored, "optimizer/"))
        if session.world.is_main:
            session.method.load_decider_state(_below(stored, "decider/"))
        loader.load_state_dict(state["loader"])
        _restore_random_state(session, stored, state["step"])
        return Progress(**state["progress"])


def load_trained(session: Session, checkpoint: Path, stored: dict[str, Tensor]) -> None:
    """Structure, adapters, masks and heads, without what only training needs."""
    method = session.method
    with files.refuse_mismatch(checkpoint):
        method.load_state_dict(_below(stored, "method/"))
        if method.changes_structure:
            method.adapters.resize(
                {
                    name.split("/")[1]: tensor.shape[0]
                    for name, tensor in stored.items()
                    if name.startswith("adapter/") and name.endswith("/A")
                }
            )
            session.optimizer.rebind_parameters(session.trainables())
        for name, tensor in _check_fit(session, checkpoint, stored, "adapter/", "head/").items():
            tensor.data.copy_(stored[name])


def _check_fit(
    session: Session, checkpoint: Path, stored: dict[str, Tensor], *groups: str
) -> dict[str, Tensor]:
    """The session's tensors of some groups, once the stored ones have their names and shapes."""
    wanted = {n: t for n, t in _tensors(session).items() if n.startswith(groups)}
    held = {n: t for n, t in stored.items() if n.startswith(groups)}
    for name in sorted(wanted.keys() | held.keys()):
        found, expected = (
            (tuple(part[name].shape), part[name].dtype) if name in part else "nothing"
            for part in (held, wanted)
        )
        if found != expected:
            raise files.BadCheckpoint(f"{checkpoint}: {name}: {found}, expected {expected}")
    return wanted


def _tensors(session: Session) -> dict[str, Tensor]:
    """Everything that every rank holds alike, by name, and rank 0's own of the method. The moments
    are whole, so all ranks call it together once a step was made (`optim.shard_state`)."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in session.method.adapters.items():
        for role in ("A", "g", "B", "mask"):
            tensors[f"adapter/{name}/{role}"] = getattr(adapter, role)
    for path, head in session.backbone.heads.items():
        for name, parameter in head.named_parameters():
            tensors[f"head/{path}/{name}"] = parameter
    for name, moments in session.optimizer.state_dict().items():
        for part, tensor in moments.items():
            tensors[f"optimizer/{name}/{part}"] = tensor
    for name, tensor in session.method.state_dict().items():
        tensors[f"method/{name}"] = tensor
    if session.world.is_main:
        for name, tensor in session.method.decider_state().items():
            tensors[f"decider/{name}"] = tensor
    return tensors


def read_initial_adapters(
    checkpoint: Path, state: Mapping[str, Any]
) -> dict[str, InitialAdapter] | None:
    """What the run of a checkpoint started from, where its method splits matrices."""
    digest = state.get("initial")
    return (
        None
        if digest is None
        else load_initial_adapters(checkpoint.resolve().parents[1] / INITIAL, digest)
    )


def _below(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}


def _unflatten(stored: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        if name.startswith(prefix):
            owner, _, part = name.removeprefix(prefix).rpartition("/")
            nested.setdefault(owner, {})[part] = tensor
    return nested


def _random_state(session: Session) -> dict[str, Tensor]:
    """This rank's generators; each rank adds its own."""
    world = session.world
    states = {f"random/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random/{world.rank}/cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _restore_random_state(session: Session, stored: dict[str, Tensor], step: int) -> None:
    """This rank's generators; a rank that did not exist then starts its own from (seed, step)."""
    world = session.world
    cpu = stored.get(f"random/{world.rank}/cpu")
    cuda = stored.get(f"random/{world.rank}/cuda")
    if cpu is None:
        torch.manual_seed(seeds.mixed(session.config.run.seed, step, world.rank))
        return
    torch.set_rng_state(cpu)
    if world.device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, world.device)


def _describe(session: Session, loader: Loader, progress: Progress) -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "step": progress.step,
        "progress": dataclasses.asdict(progress),
        "loader": loader.state_dict(),
        "engine": session.engine.kind,
        "world_size": session.world.size,
        "backbone": session.backbone.digest,
        "data": session.train_data.key,
        "labels": session.task.labels_state(),
        "initial": session.initial_digest,
        "config": session.config.model_dump(mode="json"),
    }


_MUST_AGREE = {
    "model": ("quantization",),
    "task": None,
    "method": None,
    "data": (
        "format",
        "max_length",
        "packing",
        "shuffle",
        "batch_size",
        "micro_batch_size",
        "leave_out",
    ),
    "run": ("seed",),
}
"""Keys without which a resumed run would not be the same run (None: the whole section)."""

_MAY_CHANGE = {"model": ("dtype", "attention"), "optim": None, "run": ("steps", "epochs")}
"""Keys that a user may change on purpose, and should see that they did."""


def check_options(config: Config, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raises BadCheckpoint, naming the key, where a run of `config` would not be the same run."""
    now = config.model_dump(mode="json")
    for key, old, new in _differences(state["config"], now, _MUST_AGREE):
        raise files.BadCheckpoint(
            f"{key}: {new!r} given, but {checkpoint} was made with {old!r}; "
            "accepted: the same, or another run.name to start anew"
        )


def _check_same_run(session: Session, checkpoint: Path, state: dict[str, Any]) -> None:
    if state["backbone"] != session.backbone.digest:
        raise files.BadCheckpoint(
            f"{checkpoint}: was made on another backbone "
            f"({state['config'].get('model', {}).get('id')}); accepted: a checkpoint of "
            f"{session.config.model.id}"
        )
    if state["data"] != session.train_data.key:
        raise files.BadCheckpoint(
            f"data.train: {session.config.data.train} does not hold the records (or they are not "
            f"read in the way) that {checkpoint} was made with; accepted: the same, or another "
            "run.name to start anew"
        )


def changes(state: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run does otherwise than the run that it goes on from."""
    return [
        f"{key} {old!r} -> {new!r}"
        for key, old, new in _differences(state["config"], now, _MAY_CHANGE)
    ]


def _differences(
    then: dict[str, Any], now: dict[str, Any], table: Mapping[str, tuple[str, ...] | None]
) -> Iterator[tuple[str, Any, Any]]:
    for section, keys in table.items():
        made = then.get(section, {})
        for key in keys or sorted({*now[section], *made}, key=lambda k: (k != "kind", k)):
            old, new = made.get(key), now[section].get(key)
            if old != new:
                yield f"{section}.{key}", old, new


def _root_cause(error: BaseException) -> str:
    """The reason at the bottom of what torch.distributed.checkpoint wraps, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))[0]
        return _root_cause(inner)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
