"""The data-driven start of a run: found once, written with a checksum, always read again.

A run that begins again before its first checkpoint, on any number of ranks, reads the file; later
ones resume from a checkpoint, which holds A.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from adapters.methods.options import StartedOptions
from adapters.starts import Start
from trainer.files import START, sha256, write_text
from trainer.loading.initial_adapters import save_tensors
from trainer.session import Session
from trainer.training.starts import find_starts

_VERSION = 1  # of what the file holds and of its computation


def begin_from_data(session: Session, folder: Path) -> tuple[dict[str, Start], str]:
    """Start the adapters from the data: from the folder's file, if it is of such a run, else from
    the first batches. Returns the starts and a line for the log. Collective. Raises UserError."""
    world = session.world
    held = None
    with world.all_or_none():
        if world.is_main:
            held = _digest_of_file(session, folder / START)
    held = world.broadcast(held)
    starts: dict[str, Start] = {}
    if held is None:
        starts = find_starts(session)
    with world.all_or_none():
        if held is not None:
            starts = _read(folder / START, held)
        if session.method.adopt(starts):
            session.masked_optimizer.rebind_parameters(session.trainables())
    return starts, _described(session, read=held is not None)


def save_starts(session: Session, starts: Mapping[str, Start], folder: Path) -> None:
    """Write the run's starts and their SHA-256, unless they are there. Rank 0. Raises UserError."""
    file = folder / START
    if _digest_of_file(session, file) is not None:
        return
    tensors = {
        f"{name}/{part}": getattr(start, part).contiguous()
        for name, start in starts.items()
        for part in ("A", "worth", "gain")
    }
    save_tensors(tensors, file, {"key": _key(session)})
    write_text(file.with_suffix(".sha256"), f"{sha256(file)}  {START}\n", durable=True)


def _digest_of_file(session: Session, file: Path) -> str | None:
    """SHA-256 of the file; None where there is none, or it is damaged or of another run."""
    try:
        digest = sha256(file)
        written = file.with_suffix(".sha256").read_text(encoding="utf-8").split()[0]
        with safe_open(file, framework="pt") as opened:
            key = (opened.metadata() or {}).get("key")
    except (OSError, IndexError, UnicodeDecodeError, SafetensorError):
        return None
    return digest if digest == written and key == _key(session) else None


def _read(file: Path, digest: str) -> dict[str, Start]:
    content = file.read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest, f"{file} was replaced meanwhile"
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load(content).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    return {name: Start(**of_unit) for name, of_unit in parts.items()}


def _key(session: Session) -> str:
    """Digest of all that the starts follow from, but the number of ranks and the engine."""
    config = session.config
    given = {
        "version": _VERSION,
        "seed": config.run.seed,
        "backbone": session.backbone.digest,
        "data": session.train_data.digest,
        "earlier": _digest_of_earlier(session),
        "units": [unit.name for unit in session.method.units],
        "config": config.model_dump(mode="json", include={"model", "data", "task", "method"}),
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def _digest_of_earlier(session: Session) -> str:
    """Of what `model.adapter` holds beside the adapters: files may change under the same path."""
    digest = hashlib.sha256()
    for name, adapter in sorted(session.frozen.items()):
        digest.update(name.encode())
        for part in (adapter.A, adapter.g, adapter.B):
            digest.update(part.detach().float().cpu().numpy().tobytes())
    for path, head in sorted(session.backbone.heads.items()):
        for name, parameter in head.named_parameters():
            digest.update(f"{path}.{name}".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _described(session: Session, *, read: bool) -> str:
    method, options = session.method, session.config.method
    assert isinstance(options, StartedOptions)
    ranks = sorted(adapter.rank for adapter in method.adapters.values())
    source = "the run's file" if read else f"{options.start_options.batches} batches"
    line = f"start     A from {options.data_start}s of {source}"
    if options.start_options.ranks == "fixed":
        return line
    return (
        f"{line}; ranks {ranks[0]} to {ranks[-1]} on {len(ranks)} of {len(method.units)} "
        f"matrices, {session.masked_optimizer.numel:,} trainable parameters"
    )
