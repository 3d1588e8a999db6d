"""Checkpoint folders: layout, search, verification and removal.

    checkpoints/step-00000100/
        state.json                    step, loader position, configuration, backbone's digest …
        shard-*.safetensors           tensors, written by all ranks in parallel
        manifest.json                 size and SHA-256 of every other file; written last

Written into a hidden folder that is renamed when complete: a folder of the final name is complete.
Tensors are safetensors and the rest is JSON: loading executes no code.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from torch import Tensor

from adapters.options import Section
from trainer import __version__
from trainer.config.aliases import rename_keys
from trainer.config.validation import validate
from trainer.config.yaml import parse_json
from trainer.errors import BadCheckpoint, DamagedCheckpoint, UserError, refuse_mismatch
from trainer.files import sha256, sync
from trainer.records.progress import Best

_T = TypeVar("_T")

FORMAT = 1


PARTIAL = ".partial"


_MOST = 2**31
Counts = dict[str, Annotated[int, Field(ge=0, lt=_MOST)]]


class _State(Section):
    """Schema of state.json, written by `CheckpointWriter`."""

    format: int
    version: str = ""
    step: int = Field(ge=0, lt=_MOST)
    progress: Counts
    best: Best | None = None
    """The best evaluation so far, whose checkpoint is kept too; None without `run.keep_best`."""
    loader: Counts
    engine: str
    world_size: int
    backbone: str
    hub_id: str | None = None
    """Of the base model, where it was known; earlier runs do not say."""
    weights: dict[str, str] = {}
    """Digests of the tensors that were read; earlier runs have none."""
    data: str
    labels: dict[str, list[str]]
    chat_template: str | dict[str, str] | None = None
    """The template that `data.chat_template` and `data.template_arguments` set, if they do."""
    initial: str | None
    unreached: list[str] = []
    """Earlier runs trained adapters of all layers."""
    verified: dict[str, str | int] | None = None
    """Conditions of the last proof (`trainer/verification/verify.py`), if there was any."""
    config: dict[str, dict[str, Any]]


def check_complete(folder: Path, names: Iterable[str], ranks: int) -> None:
    """Raises OSError where rank 0 does not see the tensors of every rank."""
    written = {
        key
        for file in folder.glob("*.safetensors")
        for key in safe_open(file, framework="pt").keys()  # noqa: SIM118
    }
    missing = {*names, *(f"random/{rank}/cpu" for rank in range(ranks))} - written
    if missing:
        raise OSError(f"{min(missing)} is missing; accepted: a run.dir that all nodes share")


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdecimal() and (path / "manifest.json").is_file()
    )


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. A folder is not listed at one moment: the listing
    may miss both a checkpoint and the one that replaces it, so an empty one is made again."""
    return max(complete(folder) or complete(folder), default=None)


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or goes."""
    return folder / f"step-{step:08d}"


def expired(folder: Path, keep: int) -> list[Path]:
    """Complete checkpoints besides the newest `keep` and the best ones that these name."""
    found = complete(folder)
    best = {of_step(folder, step) for step in map(_best_step, found[-keep:]) if step is not None}
    return [path for path in found[:-keep] if path not in best]


def _best_step(checkpoint: Path) -> int | None:
    """The step of the best evaluation up to a checkpoint; None where it names none."""
    try:
        best = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"))["best"]
        return None if best is None else int(best["step"])
    except (OSError, ValueError, TypeError, KeyError):  # damaged, or an earlier version's
        return None


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file's size and SHA-256; returns state.json. Raises DamagedCheckpoint where they
    differ from what was written, BadCheckpoint where the checkpoint cannot be used."""
    return _read(checkpoint, None)


def load(checkpoint: Path, *, mapped: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state.json, all tensors on the CPU) of the bytes that were verified; `mapped`: of the files,
    mapped into memory, of which all ranks of a host hold one copy. Raises as `verify`."""
    tensors: dict[str, Tensor] = {}
    return _read(checkpoint, tensors, mapped=mapped), tensors


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, verified, on the CPU."""
    return load(checkpoint)[1]


def _read(
    checkpoint: Path, tensors: dict[str, Tensor] | None, *, mapped: bool = False
) -> dict[str, Any]:
    """Read every file once: verify it and, if it holds tensors and `tensors` is given, add them."""
    content = b""
    try:
        if (checkpoint / "manifest.json").exists() and not (checkpoint / "manifest.json").is_file():
            raise BadCheckpoint(f"{checkpoint}/manifest.json: no regular file")
        manifest = parse_json((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        manifest = _files(checkpoint, manifest)
        held = {file.name for file in checkpoint.glob("*.safetensors")}
        for name in sorted({"state.json", *held} - manifest.keys()):
            raise DamagedCheckpoint(f"{checkpoint}: {name} is not in its manifest.json")
        with ExitStack() as stack:
            # All are opened first: the run that writes checkpoints may delete this one meanwhile.
            opened = {name: stack.enter_context(_open(checkpoint, name)) for name in manifest}
            for name, (size, digest) in manifest.items():
                kept = name == "state.json" or (name in held and tensors is not None)
                keep = kept and not (mapped and name in held)
                data = _verified(checkpoint / name, opened[name], size, digest, keep=keep)
                if name == "state.json":
                    content = data
                elif kept and tensors is not None:
                    with refuse_mismatch(checkpoint / name):
                        tensors |= load_tensors(data) if keep else load_file(checkpoint / name)
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedCheckpoint(f"{error.filename or checkpoint}: {error.strerror}") from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise BadCheckpoint(
                f"{error.filename or checkpoint}: cannot be read ({error.strerror}); accepted: a "
                "checkpoint that can be"
            ) from error
        raise BadCheckpoint(
            f"{checkpoint}: no checkpoint of this project ({error.strerror}: "
            f"{Path(error.filename).name}); accepted: a folder such as step-00000100"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpoint(f"{checkpoint}: damaged ({error})") from error
    return _parse_state(checkpoint, content)


def _step(checkpoint: Path, state: dict[str, Any]) -> int:
    """The step of a checkpoint by the name of its folder; the state's where it has another."""
    number = checkpoint.absolute().name.removeprefix("step-")
    return int(number) if number.isdecimal() else state["step"]


def _files(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Size and SHA-256 by file. Raises BadCheckpoint for the manifest of another format."""
    found = manifest.get("format", FORMAT)
    if found != FORMAT:
        raise _of_another_version(checkpoint, found, manifest.get("version"))
    return {name: entry for name, entry in manifest.items() if name not in ("format", "version")}


def _of_another_version(checkpoint: Path, found: object, version: object) -> BadCheckpoint:
    made_by = version if isinstance(version, str) and version else "unknown"
    return BadCheckpoint(
        f"{checkpoint}: format {found!r}, made by version {made_by}; accepted: format {FORMAT}, "
        f"which this version, {__version__}, reads, or another run.name for a new run"
    )


def _open(checkpoint: Path, name: str) -> BufferedReader:
    file = checkpoint / name
    if not file.is_file() or file.resolve().parent != checkpoint.resolve():
        raise DamagedCheckpoint(f"{checkpoint}: {name} is missing")
    return file.open("rb")


def _verified(file: Path, opened: BufferedReader, size: int, digest: str, *, keep: bool) -> bytes:
    """Contents of a file, b"" unless `keep`. Raises DamagedCheckpoint."""
    found = os.fstat(opened.fileno()).st_size
    if found != size:
        raise DamagedCheckpoint(f"{file}: {found} bytes, {size} were written: truncated")
    data = opened.read() if keep else b""
    digested = hashlib.sha256(data) if keep else hashlib.file_digest(opened, "sha256")
    if digested.hexdigest() != digest:
        raise DamagedCheckpoint(f"{file}: checksum differs from the one written: damaged")
    return data


def _parse_state(checkpoint: Path, content: bytes) -> dict[str, Any]:
    """state.json, checked. Raises BadCheckpoint."""
    try:
        state = parse_json(content.decode("utf-8"))
        found, version = state.get("format"), state.get("version")
    except (ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{checkpoint}: no state of a checkpoint ({error})") from error
    if found != FORMAT:
        raise _of_another_version(checkpoint, found, version)
    try:
        validate("", state, _State)
        rename_keys(state["config"])
        if not state["step"] == state["progress"].get("step", 0) == _step(checkpoint, state):
            raise UserError(
                f"progress.step: {state['progress'].get('step', 0)}, with step {state['step']} in "
                f"{checkpoint.name}; accepted: the same"
            )
    except UserError as error:
        made_by = version if isinstance(version, str) and version else "unknown"
        raise BadCheckpoint(
            f"{checkpoint}/state.json: {error} (made by version {made_by}, this is {__version__})"
        ) from error
    return state


def find(
    resume: str, folder: Path, read: Callable[[Path], _T]
) -> tuple[Path | None, _T | None, list[str]]:
    """(checkpoint to resume from, what `read` (such as `verify`) makes of it, remarks on damaged
    newer ones). Raises BadCheckpoint."""
    if resume == "never":
        return None, None, []
    if resume != "auto":
        path = Path(resume)
        return path, read(path), []
    remarks: list[str] = []
    for checkpoint in reversed(complete(folder)):
        try:
            return checkpoint, read(checkpoint), remarks
        except DamagedCheckpoint as error:
            remarks.append(str(error))
    if remarks:
        raise BadCheckpoint(
            f"run.resume: auto found no undamaged checkpoint in {folder} ({remarks[0]}); "
            "accepted: run.resume=PATH of a good one, or another run.name for a new run"
        )
    return None, None, []


def clear_the_way(folder: Path, step: int, resume: str) -> list[str]:
    """Before resuming from `step`, quarantine damaged newer checkpoints. Returns remarks; raises
    BadCheckpoint rather than overwrite others: good ones, another version's, unreadable ones.

    Retention keeps the highest steps: a newer checkpoint that is damaged, or of a diverged run,
    would push out those that this run writes.
    """
    remarks = []
    for newer in complete(folder):
        if int(newer.name.removeprefix("step-")) <= step:
            continue
        try:
            verify(newer)
        except DamagedCheckpoint:
            quarantine = _unused(newer.with_name(f"damaged-{newer.name}"))
            newer.rename(quarantine)
            remarks.append(f"{newer.name} is damaged; moved to {quarantine}")
            continue
        raise BadCheckpoint(
            f"run.resume: {resume} begins at step {step}, older than {newer}, which it would "
            "overwrite; accepted: another run.name, or delete the newer checkpoints first"
        )
    return remarks


def _unused(path: Path) -> Path:
    """`path`, or with the first number that makes it a new one: nothing is ever overwritten."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(new for new in numbered if not new.exists())


def write_manifest(folder: Path) -> None:
    """Sync every file to disk, then record its size and SHA-256."""
    manifest: dict[str, Any] = {"format": FORMAT, "version": __version__}
    for file in sorted(folder.iterdir()):
        sync(file)
        manifest[file.name] = (file.stat().st_size, sha256(file))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: its manifest first, without which it is none, whatever is left of it."""
    with suppress(OSError):
        (checkpoint / "manifest.json").unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Delete a checkpoint that a killed run left incomplete."""
    if folder.name.endswith(PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)
