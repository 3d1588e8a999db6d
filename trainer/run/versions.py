"""Whether all hosts run the same code: another version may compute something else, silently."""

import socket
from importlib.metadata import version
from pathlib import Path

import trainer
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.files import sha256

_LIBRARIES = ("torch", "transformers")
_PACKAGES = ("adapters", "trainer", "launch")


def refuse_other_versions(world: World) -> None:
    """Raises UserError, on all ranks, where a rank's code differs from rank 0's. Collective."""
    if len(world.nodes) == 1:
        return
    found = world.gather((_versions(), socket.gethostname()) if world.local_rank == 0 else None)
    with world.all_or_none():
        first, host = found[0]
        for rank, (theirs, name) in ((r, f) for r, f in enumerate(found) if f is not None):
            for key in {**first, **theirs}:
                if first.get(key) != theirs.get(key):
                    raise UserError(
                        f"{key} of rank {rank} on {name} is not that of rank 0 on {host}; "
                        f"accepted: one version of rankcast, {' and '.join(_LIBRARIES)} on every "
                        "host"
                    )


def _versions() -> dict[str, str]:
    """Versions of libraries, and digests of this project's files, by name."""
    found = {name: version(name) for name in _LIBRARIES}
    root = Path(trainer.__file__).parents[1]
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            found[str(file.relative_to(root))] = sha256(file)[:16]
    return found
