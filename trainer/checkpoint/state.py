"""A session's state as named tensors, and restoring it on any engine and number of ranks.

Adapters (those of earlier stages too), masks, heads, rows of added tokens, optimizer, method state
and every rank's RNG states; never the frozen backbone. `store.py` describes the files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import seeds
from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from adapters.optimizer import MaskedAdamW
from trainer.checkpoint.compatibility import check_same_run
from trainer.checkpoint.store import load
from trainer.data.loader import Loader
from trainer.engine.sharded_optimizer import Gathered, ShardedOptimizer
from trainer.errors import BadCheckpoint, refuse_mismatch
from trainer.files import INITIAL
from trainer.loading.initial_adapters import load_initial_adapters
from trainer.records.progress import Best, Progress
from trainer.session import LoadedModel, Session

_MOMENTS = ("exp_avg", "exp_avg_sq")


def restore(session: Session, loader: Loader, checkpoint: Path, state: dict) -> Progress:
    """Load a checkpoint into a session opened with the same configuration. Raises BadCheckpoint.

    Not collective: a new optimizer, sharded or not, has no moments to gather.
    """
    check_same_run(session, checkpoint, state)
    mapped = isinstance(session.optimizer, ShardedOptimizer)  # larger than a rank's memory
    found, stored = load(checkpoint, mapped=mapped)
    if found != state:
        raise BadCheckpoint(f"{checkpoint}: was replaced meanwhile; accepted: try again")
    load_learned(session, checkpoint, stored)
    with refuse_mismatch(checkpoint):
        _check_tensors(session, checkpoint, stored, "optimizer/")
        if isinstance(session.optimizer, MaskedAdamW):
            session.optimizer.load_state_dict(_unflatten(stored, "optimizer/"))
        loader.load_state_dict(state["loader"])
        _restore_random_state(session, stored, state["step"])
        best = state.get("best")
        return Progress(
            **state["progress"], best=None if best is None else Best.model_validate(best)
        )


def load_learned(session: LoadedModel, checkpoint: Path, stored: dict[str, Tensor]) -> None:
    """`load_trained`, and what the method decides by."""
    load_trained(session, checkpoint, stored)
    with refuse_mismatch(checkpoint):
        if session.world.is_main:
            session.method.load_decider_state(_below(stored, "decider/"))


def load_trained(session: LoadedModel, checkpoint: Path, stored: dict[str, Tensor]) -> None:
    """Load adapters (resized to the stored ranks), masks and heads, but no training state."""
    method = session.method
    with refuse_mismatch(checkpoint):
        method.load_state_dict(_below(stored, "method/"))
        if isinstance(session.optimizer, ShardedOptimizer):
            _load_sharded(session, checkpoint, stored)
            return
        if method.changes_structure:
            method.adapters.resize(
                {
                    name.split("/")[1]: tensor.shape[0]
                    for name, tensor in stored.items()
                    if name.startswith("adapter/") and name.endswith("/A")
                }
            )
            session.masked_optimizer.rebind_parameters(session.trainables())
        for name, tensor in _check_tensors(
            session, checkpoint, stored, "adapter/", "frozen/", "trained/", "head/", "rows/"
        ).items():
            tensor.data.copy_(stored[name])


def _check_tensors(
    session: LoadedModel, checkpoint: Path, stored: dict[str, Tensor], *groups: str
) -> dict[str, Tensor]:
    """The session's tensors of some groups. Raises BadCheckpoint where the stored names, shapes or
    dtypes differ."""
    named = session_tensors(session) | _sharded_layout(session)
    wanted = {n: t for n, t in named.items() if n.startswith(groups)}
    held = {n: t for n, t in stored.items() if n.startswith(groups)}
    for name in sorted(wanted.keys() | held.keys()):
        found, expected = (
            (tuple(part[name].shape), part[name].dtype) if name in part else "nothing"
            for part in (held, wanted)
        )
        if found != expected:
            raise BadCheckpoint(f"{checkpoint}: {name}: {found}, expected {expected}")
    return wanted


def session_tensors(session: LoadedModel) -> dict[str, Tensor]:
    """Replicated tensors by name, and on rank 0 the state by which the method decides. All-gathers
    sharded moments (`optim.shard_state`), so collective once a step was made."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in session.method.adapters.items():
        for role in ("A", "g", "B", "mask"):
            tensors[f"adapter/{name}/{role}"] = getattr(adapter, role)
    for name, adapter in session.frozen.items():
        for role in ("A", "g", "B"):
            tensors[f"frozen/{name}/{role}"] = getattr(adapter, role)
    for name, parameter in session.method.trained_parameters.items():
        tensors[f"trained/{name}"] = parameter
    for path, head in session.backbone.heads.items():
        for name, parameter in head.named_parameters():
            tensors[f"head/{path}/{name}"] = parameter
    for path, rows in session.backbone.token_rows.items():
        tensors[f"rows/{path}"] = rows.values
    if isinstance(session.optimizer, MaskedAdamW):
        for name, moments in session.optimizer.state_dict().items():
            for part, tensor in moments.items():
                tensors[f"optimizer/{name}/{part}"] = tensor
    for name, tensor in session.method.state_dict().items():
        tensors[f"method/{name}"] = tensor
    if session.world.is_main:
        for name, tensor in session.method.decider_state().items():
            tensors[f"decider/{name}"] = tensor
    return tensors


def sharded_tensors(session: Session) -> dict[str, Tensor]:
    """Of a backbone that trains and is sharded: the tensors that this rank saves, on the CPU. All
    are gathered one by one, and each is kept by one rank. Collective."""
    optimizer, world = session.optimizer, session.world
    kept: dict[str, Tensor] = {}
    if not isinstance(optimizer, ShardedOptimizer):
        return kept
    for number, (name, shape) in enumerate(optimizer.shapes.items()):
        whole = optimizer.gathered(name)
        if number % world.size == world.rank:
            tensors = (
                whole.value,
                whole.exp_avg,
                whole.exp_avg_sq,
                _counts(shape, optimizer.steps),
            )
            for key, tensor in zip(_sharded_names(name), tensors, strict=True):
                kept[key] = tensor.to("cpu", copy=True)
    return kept


def _sharded_names(name: str) -> list[str]:
    """A trained parameter's names in a checkpoint: value, moments and step counts. They are those
    that it has where the backbone is whole."""
    return [
        f"trained/{name}",
        *(f"optimizer/{name}/{part}" for part in _MOMENTS),
        f"optimizer/{name}/step",
    ]


def _counts(shape: torch.Size, steps: int) -> Tensor:
    return torch.full(shape[:1], float(steps))


def _sharded_layout(session: LoadedModel) -> dict[str, Tensor]:
    """All tensors of such a backbone by name, without values."""
    optimizer = session.optimizer
    if not isinstance(optimizer, ShardedOptimizer):
        return {}
    return {
        key: torch.empty(shape if key.rpartition("/")[2] != "step" else shape[:1], device="meta")
        for name, shape in optimizer.shapes.items()
        for key in _sharded_names(name)
    }


def _load_sharded(session: LoadedModel, checkpoint: Path, stored: dict[str, Tensor]) -> None:
    """Load values and moments of such a backbone; every rank takes its part."""
    optimizer = session.optimizer
    assert isinstance(optimizer, ShardedOptimizer)
    _check_tensors(session, checkpoint, stored, "adapter/", "frozen/", "trained/", "head/", "rows/")
    _check_tensors(session, checkpoint, stored, "optimizer/")
    for name in optimizer.shapes:
        value, exp_avg, exp_avg_sq, counts = (stored[key] for key in _sharded_names(name))
        optimizer.load(name, Gathered(value, exp_avg, exp_avg_sq), int(counts[0]))


def read_initial_adapters(
    checkpoint: Path, state: Mapping[str, Any]
) -> dict[str, InitialAdapter] | None:
    """Initial adapters of a checkpoint's run; None without spectral initialisation."""
    digest = state.get("initial")
    if digest is None:
        return None
    # As the path was written, in which checkpoints/ may be a link to another disk; else as it is.
    files = [path.parents[1] / INITIAL for path in (checkpoint.absolute(), checkpoint.resolve())]
    file = next((file for file in files if file.exists()), files[0])
    return load_initial_adapters(file, digest)


def frozen_adapters(stored: Mapping[str, Tensor]) -> dict[str, GatedAdapter]:
    """What earlier stages learned, by unit, from a checkpoint's tensors."""
    units = [name.split("/")[1] for name in stored if name.startswith("frozen/")]
    return {
        unit: GatedAdapter(*(stored[f"frozen/{unit}/{role}"] for role in ("A", "g", "B")))
        for unit in dict.fromkeys(units)
    }


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
    """RNG states of this rank; each rank saves its own."""
    world = session.world
    states = {f"random/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random/{world.rank}/cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _restore_random_state(session: Session, stored: dict[str, Tensor], step: int) -> None:
    """Restore this rank's RNG states; a rank without any is seeded by (seed, step, rank)."""
    world = session.world
    cpu = stored.get(f"random/{world.rank}/cpu")
    cuda = stored.get(f"random/{world.rank}/cuda")
    if cpu is None:
        torch.manual_seed(seeds.mixed(session.config.run.seed, step, world.rank))
        return
    torch.set_rng_state(cpu)
    if world.device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, world.device)
