"""Cases for the worker: written, run on real processes, read back.

Ranks on a CPU are forked from a server that has imported everything (`tests/forkserver.py`); on
GPUs torchrun starts them.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.forkserver import Forked
from tests.helpers import WORKER, fork_ranks, launch

Cases = dict[str, tuple[str, Any]]

PATIENCE = 150.0
"""Seconds without a finished case after which the ranks are taken to hang."""


def run_cases(
    folder: Path, cases: Cases, processes: int = 2, device: str = "cpu"
) -> dict[str, list]:
    """Every rank's result by case. A case in which a rank dies or hangs has an error in its place,
    and those after it get new processes."""
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        return _launched(folder, cases, processes)
    results: dict[str, list] = {}
    while len(results) < len(cases):
        left = {name: case for name, case in cases.items() if name not in results}
        results |= _forked(folder / f"from-{len(results)}", left, processes)
    return results


def _forked(folder: Path, cases: Cases, processes: int) -> dict[str, list]:
    """Results up to the first case that a rank did not survive, and its failure."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = ("-m", "tests.world.worker", str(folder / "cases.json"), str(folder))
    ranks = fork_ranks(processes, folder, *arguments)
    reason = _wait(folder, ranks, len(cases))
    for rank in ranks:
        rank.kill()
    found = [_read(folder, number) for number in range(processes)]
    complete = [name for name in cases if all(name in results for results in found)]
    if reason is None and len(complete) == len(cases):
        return {name: [results[name] for results in found] for name in cases}
    # Whoever outlives another rank ends its case in an error of its own, and may go on to the next.
    crashed = min(len(results) for results in found)
    names = list(cases)
    logs = "\n".join(_log(rank) for rank in ranks)
    failure = {
        "error": "Crashed", "message": reason, "exit_code": -1, "seconds": PATIENCE,
        "traceback": f"{names[min(crashed, len(names) - 1)]}: {reason}\n{logs}",
    }  # fmt: skip
    return {name: [results[name] for results in found] for name in names[:crashed]} | {
        name: [failure] * processes for name in names[crashed : crashed + 1]
    }


def _wait(folder: Path, ranks: list[Forked], cases: int) -> str | None:
    """Until all ranks have ended; what went wrong, where something did."""
    latest, done = time.monotonic(), 0
    while any(rank.running for rank in ranks):
        time.sleep(0.02)
        for number, rank in enumerate(ranks):
            if not rank.running and rank.code != 0:
                return f"rank {number} died"
        files = [folder / f"{number}.json" for number in range(len(ranks))]
        finished = sum(file.stat().st_mtime_ns for file in files if file.exists())
        if finished != done:
            latest, done = time.monotonic(), finished
        if time.monotonic() - latest > PATIENCE:
            return f"no case ended for {PATIENCE:.0f} s"
    return None if all(rank.code == 0 for rank in ranks) else "a rank died"


def _read(folder: Path, rank: int) -> dict[str, Any]:
    file = folder / f"{rank}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _log(rank: Forked) -> str:
    out, err = rank.output()
    return f"rank {rank.log.stem}: {out[-1000:]}\n{err[-4000:]}"


def _launched(folder: Path, cases: Cases, processes: int) -> dict[str, list]:
    """On GPUs, started by torchrun."""
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = (str(folder / "cases.json"), str(folder), "cuda")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    code, out, err = launch("torchrun", processes, WORKER, *arguments, seconds=480, gpus=gpus)
    assert code == 0, f"{out[-3000:]}\n{err[-6000:]}"
    found = [_read(folder, rank) for rank in range(processes)]
    return {name: [results[name] for results in found] for name in cases}


def ok(results: list[dict[str, Any]]) -> list[Any]:
    """What each rank returned; an error on any of them fails the test with its traceback."""
    for rank, result in enumerate(results):
        assert "ok" in result, f"rank {rank}: {result.get('traceback')}"
    return [result["ok"] for result in results]
