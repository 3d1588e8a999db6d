"""Checkpoints that belong to no engine and no world size.

    checkpoints/step-00000100/
        state.json                    step, loader position, configuration, backbone's digest …
        shard-*.safetensors           tensors, written by all ranks in parallel
        manifest.json                 size and SHA-256 of every other file; written last

Written into a hidden folder that is renamed when complete: what has the final name is whole.
Holds adapters, masks, heads, optimizer, method state and every rank's random generators; never
the frozen backbone. Tensors are in safetensors and the rest is JSON: loading executes nothing.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from trainer.errors import RunFailed, UserError
from trainer.loader import Loader
from trainer.session import Session

FORMAT = 1
_PARTIAL = ".partial"


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides what its parts know themselves."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Steps skipped since the loss or gradient was not finite."""
    skipped_in_a_row: int = 0


class BadCheckpoint(UserError):
    """A checkpoint that cannot be used; the message says why."""


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

    def wait(self) -> None:
        """Until what is being written is complete. Raises RunFailed where it could not be."""
        pending, self._pending = self._pending, None
        if self.session.world.gather(pending is None)[0]:
            return
        with self.session.world.together():
            assert pending is not None
            try:
                pending.result()
            except Exception as error:
                last = newest(self.folder)
                raise RunFailed(
                    f"checkpoint of step {self._pending_step} could not be written in "
                    f"{self.folder}: {_root_cause(error)}; last good checkpoint: {last or 'none'}"
                ) from error

    def close(self) -> None:
        """Finish what is being written, then let the thread go."""
        self.wait()
        self._thread.shutdown()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """In the background: all ranks write tensors, rank 0 adds the rest and renames."""
        world = self.session.world
        final = self.folder / f"step-{state['step']:08d}"
        partial = self.folder / f".{final.name}{_PARTIAL}"
        try:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=world.saving,
            )
            if world.is_main:
                (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
                _write_manifest(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                _sync(self.folder)
                for old in complete(self.folder)[: -self._options.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return max(complete(folder), default=None)


def verify(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json, once every file has its recorded size and SHA-256."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            file = checkpoint / name
            if Path(name).name != name or not file.is_file():
                raise BadCheckpoint(f"{checkpoint}: {name} is missing")
            if file.stat().st_size != size:
                raise BadCheckpoint(
                    f"{file}: {file.stat().st_size} bytes, {size} were written: truncated"
                )
            if _digest(file) != digest:
                raise BadCheckpoint(f"{file}: checksum differs from the one written: damaged")
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(
            f"{checkpoint}: no checkpoint of this project ({error.strerror}: "
            f"{Path(error.filename).name}); accepted: a folder such as step-00000100"
        ) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise BadCheckpoint(f"{checkpoint}: damaged ({error})") from error
    if state.get("format") != FORMAT:
        raise BadCheckpoint(f"{checkpoint}: format {state.get('format')}; accepted: {FORMAT}")
    return state


def find(resume: str, folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint to resume from, its state, remarks on newer ones that are damaged)."""
    if resume == "never":
        return None, {}, []
    if resume != "auto":
        path = Path(resume)
        return path, verify(path), []
    remarks: list[str] = []
    for checkpoint in reversed(complete(folder)):
        try:
            return checkpoint, verify(checkpoint), remarks
        except BadCheckpoint as error:
            remarks.append(str(error))
    if remarks:
        raise BadCheckpoint(
            f"run.resume: auto found no undamaged checkpoint in {folder} ({remarks[0]}); "
            "accepted: run.resume=PATH of a good one, or another run.name to start anew"
        )
    return None, {}, []


def restore(session: Session, loader: Loader, checkpoint: Path, state: dict) -> Progress:
    """Put a checkpoint's state into a session that was opened with the same configuration."""
    _check_same_run(session, checkpoint, state)
    stored = read_tensors(checkpoint)
    load_trained(session, checkpoint, stored)
    session.optimizer.load_state_dict(_unflatten(stored, "optimizer/"))
    session.method.load_state_dict(
        {n.removeprefix("method/"): t for n, t in stored.items() if n.startswith("method/")}
    )
    loader.load_state_dict(state["loader"])
    _restore_random_state(session, stored, state["step"])
    return Progress(**state["progress"])


def load_trained(session: Session, checkpoint: Path, stored: dict[str, Tensor]) -> None:
    """Adapters, masks and heads, without what only training needs."""
    for name, tensor in _tensors(session).items():
        if not name.startswith(("adapter/", "head/")):
            continue
        if name not in stored or stored[name].shape != tensor.shape:
            found = tuple(stored[name].shape) if name in stored else "nothing"
            raise BadCheckpoint(f"{checkpoint}: {name}: {found}, expected {tuple(tensor.shape)}")
        tensor.data.copy_(stored[name])


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def _tensors(session: Session) -> dict[str, Tensor]:
    """Everything that every rank holds alike, by name."""
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
    return tensors


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
        torch.manual_seed((session.config.run.seed << 32) + (step << 12) + world.rank)
        return
    torch.set_rng_state(cpu)
    if world.device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, world.device)


def _describe(session: Session, loader: Loader, progress: Progress) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": progress.step,
        "progress": dataclasses.asdict(progress),
        "loader": loader.state_dict(),
        "engine": session.engine.kind,
        "world_size": session.world.size,
        "backbone": session.backbone.digest,
        "labels": session.task.labels_state(),
        "config": session.config.model_dump(mode="json"),
    }


_MUST_AGREE = (
    ("model", ("quantization", "overrides", "weights")),
    ("task", None),
    ("method", None),
    (
        "data",
        (
            "train", "subset", "train_split", "format", "prompt", "completion", "text", "messages",
            "label", "max_length", "on_long_record", "on_bad_record", "train_records", "packing",
            "shuffle", "batch_size", "micro_batch_size",
        ),
    ),
    ("run", ("seed",)),
)  # fmt: skip
"""Keys without which a resumed run would not be the same run (None: the whole section)."""


def _check_same_run(session: Session, checkpoint: Path, state: dict[str, Any]) -> None:
    if state["backbone"] != session.backbone.digest:
        raise BadCheckpoint(
            f"{checkpoint}: was made on another backbone "
            f"({state['config']['model']['id']}); accepted: a checkpoint of "
            f"{session.config.model.id}"
        )
    now, then = session.config.model_dump(mode="json"), state["config"]
    for section, keys in _MUST_AGREE:
        for key in keys or sorted({*now[section], *then[section]}):
            old, new = then[section].get(key), now[section].get(key)
            if old != new and not (section == "data" and key == "train" and _same_name(old, new)):
                raise BadCheckpoint(
                    f"{section}.{key}: {new!r} given, but {checkpoint} was made with {old!r}; "
                    "accepted: the same, or another run.name to start anew"
                )


def _same_name(old: str, new: str) -> bool:
    """A data file may have moved with its folder."""
    return Path(old).name == Path(new).name


def _write_manifest(folder: Path) -> None:
    manifest = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        manifest[file.name] = (file.stat().st_size, _digest(file))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make sure that a file (or a folder's entries) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def remove_partial(folder: Path) -> None:
    """Delete what a killed run had begun to write."""
    if folder.name.endswith(_PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)
