"""What a checkpoint holds of a session, and putting it back, on any engine and number of ranks.

Adapters, masks, heads, optimizer, method state and every rank's random generators; never the frozen
backbone. What the files look like stands in `store.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import seeds
from adapters.methods.base import InitialAdapter
from trainer.checkpoint.compatibility import check_same_run
from trainer.checkpoint.store import read_tensors
from trainer.data.loader import Loader
from trainer.errors import BadCheckpoint, refuse_mismatch
from trainer.files import INITIAL
from trainer.loading.initial_adapters import load_initial_adapters
from trainer.records.progress import Progress
from trainer.session import Session


def restore(session: Session, loader: Loader, checkpoint: Path, state: dict) -> Progress:
    """Put a checkpoint's state into a session that was opened with the same configuration.

    Each rank on its own: a new optimizer, split or not, has no moments that it would gather.
    """
    check_same_run(session, checkpoint, state)
    stored = read_tensors(checkpoint)
    load_trained(session, checkpoint, stored)
    with refuse_mismatch(checkpoint):
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
    with refuse_mismatch(checkpoint):
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
    wanted = {n: t for n, t in session_tensors(session).items() if n.startswith(groups)}
    held = {n: t for n, t in stored.items() if n.startswith(groups)}
    for name in sorted(wanted.keys() | held.keys()):
        found, expected = (
            (tuple(part[name].shape), part[name].dtype) if name in part else "nothing"
            for part in (held, wanted)
        )
        if found != expected:
            raise BadCheckpoint(f"{checkpoint}: {name}: {found}, expected {expected}")
    return wanted


def session_tensors(session: Session) -> dict[str, Tensor]:
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


def random_state(session: Session) -> dict[str, Tensor]:
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
