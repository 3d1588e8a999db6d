"""Whether all ranks see one run folder: checkpoints are written by all of them."""

import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from trainer.distributed.world import World
from trainer.errors import UserError, reason

_PATIENCE = 5.0  # seconds: a network file system may be that late


def refuse_unshared(folder: Path, world: World) -> None:
    """Raises UserError, on all ranks, where a rank does not find what rank 0 writes in `folder`, or
    in its nearest parent that exists. Collective."""
    if world.size == 1:
        return
    paths, token = [folder.absolute(), *folder.absolute().parents], None
    with world.all_or_none():
        if world.is_main:
            level = next(index for index, path in enumerate(paths) if path.is_dir())
            token = (level, f".rankcast-{secrets.token_hex(8)}")
            try:
                (paths[level] / token[1]).touch()
            except OSError as error:
                raise UserError(f"run.dir: {folder} cannot be written ({reason(error)})") from error
    level, name = world.broadcast(token)
    # By this rank's own path: a relative one may mean another folder here.
    found = world.gather((_sees(paths[level], name), socket.gethostname()))
    with world.all_or_none():
        if world.is_main:
            with suppress(OSError):
                (paths[level] / name).unlink()
        for rank, (sees, host) in enumerate(found):
            if not sees:
                raise UserError(
                    f"run.dir: {folder} is another folder for rank {rank} on {host}; accepted: a "
                    "path that all hosts share"
                )


def _sees(folder: Path, name: str) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with suppress(OSError):
            list(folder.iterdir())  # makes a network file system look again
    return True
