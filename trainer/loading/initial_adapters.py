"""The file of a run's initial adapters, for methods with spectral initialisation.

A run writes `initial.safetensors` and its SHA-256 once and then always loads it: recomputed signs
and vectors of clustered singular values would differ.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from adapters.unit import Unit
from trainer.errors import BadCheckpoint, UserError, reason, refuse_mismatch
from trainer.files import INITIAL, replacing, sha256, write_text


def save_initial_adapters(initial_adapters: Mapping[str, InitialAdapter], folder: Path) -> str:
    """Write a run's initial adapters and a file with their SHA-256. Returns it."""
    save_tensors(as_tensors(initial_adapters), folder / INITIAL)
    digest = sha256(folder / INITIAL)
    text = f"{digest}  {INITIAL}\n"
    write_text((folder / INITIAL).with_suffix(".sha256"), text, durable=True)
    return digest


def initial_digest(initial_adapters: Mapping[str, InitialAdapter]) -> str:
    """SHA-256 of the file that `save_initial_adapters` would write."""
    return hashlib.sha256(save(as_tensors(initial_adapters))).hexdigest()


def as_tensors(initial_adapters: Mapping[str, InitialAdapter]) -> dict[str, Tensor]:
    """The tensors of initial adapters by `UNIT/ROLE`."""
    tensors = {}
    for name, initial in initial_adapters.items():
        adapter = initial.adapter
        for role, tensor in (("A", adapter.A), ("g", adapter.g), ("B", adapter.B)):
            tensors[f"{name}/{role}"] = tensor.detach().cpu().contiguous()
        tensors[f"{name}/spectrum"] = initial.spectrum.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, InitialAdapter]:
    """Initial adapters by unit, from what `as_tensors` made of them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.rpartition("/")
        parts.setdefault(name, {})[role] = tensor
    return {
        name: InitialAdapter(
            GatedAdapter(p["A"], p["g"], p["B"]).requires_grad_(False), p["spectrum"]
        )
        for name, p in parts.items()
    }


def load_initial_adapters(file: Path, digest: str) -> dict[str, InitialAdapter]:
    """A run's initial adapters by unit. Raises BadCheckpoint where the file is missing, or its
    SHA-256 is not `digest`, the checkpoint's."""
    remedy = "accepted: start its run again, which computes it from the same backbone"
    try:
        if not file.is_file():
            raise BadCheckpoint(
                f"{file} is missing: the initial tensors that the run's checkpoints build on; "
                f"{remedy}"
            )
        content = file.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{file}: cannot be read ({reason(error)})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise BadCheckpoint(f"{file}: checksum differs from the one written: damaged; {remedy}")
    with refuse_mismatch(file):
        return from_tensors(load(content))


def initial_adapter_of(stored: Mapping[str, InitialAdapter], unit: Unit) -> InitialAdapter:
    """The initial adapter of `unit`. Raises BadCheckpoint where it is absent or misshapen."""
    initial = stored.get(unit.name)
    shape = None if initial is None else (initial.adapter.B.shape[1], initial.adapter.A.shape[1])
    if initial is None or shape != (unit.out_features, unit.in_features):
        raise BadCheckpoint(
            f"{unit.name}: {shape or 'nothing'} in {INITIAL}, which was made on another backbone; "
            "accepted: a checkpoint of this one"
        )
    return initial


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file atomically, also with concurrent writers. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True, durable=True) as partial:
            save_file(dict(tensors), partial, metadata)
    except (OSError, SafetensorError) as error:  # the library has its own for a full disk
        raise UserError(f"{file}: cannot be written ({reason(error)})") from error
