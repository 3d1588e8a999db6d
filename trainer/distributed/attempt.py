"""A name that the ranks of one attempt agree on, in a store that outlives attempts.

torchrun's agent keeps its store when it restarts the ranks (`--max-restarts`, or hosts that come
and go), so they would meet the keys of the attempt before. TORCHELASTIC_RESTART_COUNT does not tell
attempts apart: an agent counts its own ranks' failures only.
"""

import datetime
import json
import secrets
import time

from torch.distributed import Store

_EVERY = 0.02  # seconds between two looks


def agree(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """Rank 0's fresh name. A rank takes it once it is offered in answer to a number that the rank
    has just drawn; rank 0 goes on once each has confirmed its newest number. Raises RuntimeError
    at the timeout."""
    own, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    others = [str(other) for other in range(1, size)]
    offered: dict[str, str] | None = None
    if rank > 0:
        store.set(f"wanted/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            wanted = {other: _get(store, f"wanted/{other}") for other in others}
            if wanted != offered:
                store.set("offer", json.dumps({"name": own, "wanted": wanted}))
                offered = wanted
            if all(
                wanted[other] and _get(store, f"taken/{own}/{other}") == wanted[other]
                for other in others
            ):
                return own
        elif (offer := _get(store, "offer")) and (
            json.loads(offer)["wanted"].get(str(rank)) == own
        ):
            name = str(json.loads(offer)["name"])
            store.set(f"taken/{name}/{rank}", own)
            return name
        time.sleep(_EVERY)
    raise RuntimeError("not all of them have started")


def _get(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
