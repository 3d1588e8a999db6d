"""Checkpoint folders: layout, search, verification and removal.

    checkpoints/step-00000100/
        state.json                    step, loader position, configuration, backbone's digest …
        shard-*.safetensors           tensors, written by all ranks in parallel
        manifest.json                 size and SHA-256 of every other file; written last

Written into a hidden folder that is renamed when complete: a folder of the final name is complete.
Tensors are safetensors and the rest is JSON: loading executes no code.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from adapters.options import Section
from trainer.config.aliases import rename_keys
from trainer.config.validation import validate
from trainer.config.yaml import parse_json
from trainer.errors import BadCheckpoint, UserError, refuse_mismatch
from trainer.files import sha256, sync

FORMAT = 1


PARTIAL = ".partial"


_MOST = 2**31
Counts = dict[str, Annotated[int, Field(ge=0, lt=_MOST)]]


class _State(Section):
    """Schema of state.json, written by `CheckpointWriter`."""

    format: int
    step: int = Field(ge=0, lt=_MOST)
    progress: Counts
    loader: Counts
    engine: str
    world_size: int
    backbone: str
    data: str
    labels: dict[str, list[str]]
    initial: str | None
    unreached: list[str] = []
    """Earlier runs trained adapters of all layers."""
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
    """The newest complete checkpoint, or None."""
    return max(complete(folder), default=None)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file's size and SHA-256; returns state.json. Raises BadCheckpoint."""
    try:
        manifest = parse_json((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        held = {file.name for file in checkpoint.glob("*.safetensors")}
        for name in sorted({"state.json", *held} - manifest.keys()):
            raise BadCheckpoint(f"{checkpoint}: {name} is not in its manifest.json")
        for name, (size, digest) in manifest.items():
            file = checkpoint / name
            if not file.is_file() or file.resolve().parent != checkpoint.resolve():
                raise BadCheckpoint(f"{checkpoint}: {name} is missing")
            if file.stat().st_size != size:
                raise BadCheckpoint(
                    f"{file}: {file.stat().st_size} bytes, {size} were written: truncated"
                )
            if sha256(file) != digest:
                raise BadCheckpoint(f"{file}: checksum differs from the one written: damaged")
        state = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"))
        found = state.get("format")
    except OSError as error:
        raise BadCheckpoint(
            f"{checkpoint}: no checkpoint of this project ({error.strerror}: "
            f"{Path(error.filename).name}); accepted: a folder such as step-00000100"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise BadCheckpoint(f"{checkpoint}: damaged ({error})") from error
    if found != FORMAT:
        raise BadCheckpoint(f"{checkpoint}: format {found!r}; accepted: {FORMAT}")
    try:
        validate("", state, _State)
        rename_keys(state["config"])
    except UserError as error:
        raise BadCheckpoint(f"{checkpoint}/state.json: {error}") from error
    return state


def find(resume: str, folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint to resume from, its state, remarks on damaged newer ones)."""
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
            "accepted: run.resume=PATH of a good one, or another run.name for a new run"
        )
    return None, {}, []


def clear_the_way(folder: Path, step: int, resume: str) -> list[str]:
    """Before resuming from `step`, quarantine damaged newer checkpoints. Returns remarks; raises
    BadCheckpoint rather than overwrite good ones.

    Retention keeps the highest steps: a newer checkpoint that is damaged, or of a diverged run,
    would push out those that this run writes.
    """
    remarks = []
    for newer in complete(folder):
        if int(newer.name.removeprefix("step-")) <= step:
            continue
        try:
            verify(newer)
        except BadCheckpoint:
            quarantine = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(quarantine, ignore_errors=True)
            newer.rename(quarantine)
            remarks.append(f"{newer.name} is damaged; moved to {quarantine}")
            continue
        raise BadCheckpoint(
            f"run.resume: {resume} is older than {newer}, which resuming from it would overwrite; "
            "accepted: another run.name, or delete the newer checkpoints first"
        )
    return remarks


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with refuse_mismatch(file), safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def write_manifest(folder: Path) -> None:
    """Sync every file to disk, then record its size and SHA-256."""
    manifest = {}
    for file in sorted(folder.iterdir()):
        sync(file)
        manifest[file.name] = (file.stat().st_size, sha256(file))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def remove_partial(folder: Path) -> None:
    """Delete a checkpoint that a killed run left incomplete."""
    if folder.name.endswith(PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)
