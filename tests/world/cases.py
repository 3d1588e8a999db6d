"""Cases for the worker: written, run on real processes, read back."""

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, launch


def run_cases(
    folder: Path, cases: dict[str, tuple[str, Any]], processes: int = 2, device: str = "cpu"
) -> dict[str, list]:
    """Every rank's result by case. Fails where a rank did not finish the list."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = ROOT / "tests/world/worker.py"
    arguments = (str(folder / "cases.json"), str(folder), device)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") if device == "cuda" else ""
    code, out, err = launch("torchrun", processes, worker, *arguments, seconds=480, gpus=gpus)
    assert code == 0, f"{out[-3000:]}\n{err[-6000:]}"
    per_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: [results[name] for results in per_rank] for name in cases}


def ok(results: list[dict[str, Any]]) -> list[Any]:
    """What each rank returned; an error on any of them fails the test with its traceback."""
    for rank, result in enumerate(results):
        assert "ok" in result, f"rank {rank}: {result.get('traceback')}"
    return [result["ok"] for result in results]
