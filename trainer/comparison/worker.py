"""A worker process: makes one run after the other on its GPU, with all that is imported, compiled
and cached from the runs before."""

import ctypes
import datetime
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.comparison.allocation import Replayed
from trainer.comparison.jobs import Result
from trainer.comparison.statistics import MEASURES
from trainer.comparison.survivors import held
from trainer.config.config import Config
from trainer.errors import Diverged
from trainer.files import LOSSES, METRICS, PREDICTIONS
from trainer.records.heartbeat import read_heartbeat
from trainer.records.jsonl import final_scores, read_metrics

if TYPE_CHECKING:
    import torch

    from trainer.run.parameters import Parameters

_index = 0
"""Of this worker."""
_BLOCKING_SYNC = 4
"""CU_CTX_SCHED_BLOCKING_SYNC of the CUDA driver."""
_KEPT = ("answer", "label", "score", "loss", "weight")
"""Of a record, in results."""


def prepare(count: Any) -> None:
    """Number a worker. Called once in each, before torch is imported."""
    global _index
    with count.get_lock():
        _index = count.value
        count.value += 1
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Else each starts a pool of its own, of as many processes as there are cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _end_with_parent() -> None:
    """End with the comparison, however that ended: it may have been killed, and a worker that waits
    for its next run holds memory of a GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def device() -> "torch.device":
    """Of this worker's runs: GPUs round-robin, or one CPU thread."""
    import torch  # late: a mistake in the comparison's file is reported before

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", _index % torch.cuda.device_count())
    if torch.version.hip is None and not torch.cuda.is_initialized():
        _sleep_while_waiting(found.index)
    torch.cuda.set_device(found)
    return found


def _sleep_while_waiting(index: int) -> None:
    """Let threads that wait for GPU `index` leave their core to other workers instead of asking
    again and again: flags of the driver's context, before there is one."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), index) == 0:
        driver.cuDevicePrimaryCtxSetFlags_v2(handle, _BLOCKING_SYNC)


def make_run(identity: Result, config: Config, replayed: Replayed | None = None) -> Result:
    """One run from start to end, of the allocation `replayed` if given; a failure is returned as a
    result."""
    from trainer.device_memory import forget_peak, set_aside
    from trainer.distributed.world import World
    from trainer.run.run import run

    began = time.perf_counter()
    try:
        if config.run_folder.exists():  # interrupted or failed
            shutil.rmtree(config.run_folder)
        if replayed is not None:
            replayed.write()
        where = device()
        forget_peak(where)
        parameters = run(config, World(device=where), scores_only=True)
        found = summary(config.run_folder, parameters, selects=identity["selects"])
        found |= durations(config.run_folder)
    except Exception as error:  # the other runs continue; the table counts the runs
        found = {"error": f"{type(error).__name__}: {error}"}
        if isinstance(error, Diverged):  # with these numbers it would again
            found["diverged"] = True
        else:
            found["where"] = traceback.format_exc(limit=-3)
    finally:
        set_aside()  # the model is gone before the next one is loaded
    return {
        **identity, "run": config.run.name, **found, **_circumstances(),
        "seconds": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def _circumstances() -> dict[str, str]:
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def summary(folder: Path, parameters: "Parameters", *, selects: bool = False) -> Result:
    """Scores, the method's last scalars (without those of groups of units), speed and sizes of a
    finished run; unless it `selects` a learning rate also what is kept of each record."""
    lines = read_metrics(folder / METRICS)
    steps = [line for line in lines if "active_parameters" in line]
    scalars = {  # each as it was last: a policy that has decided for good says no more
        k.removeprefix("method/"): v for s in steps for k, v in s.items() if k.startswith("method/")
    }
    scores = {k: v for k, v in final_scores(lines).items() if k.startswith("eval_")}
    result: Result = {name: value for name, value in scalars.items() if "/" not in name} | scores
    if scores.get("eval_loss") is None:
        raise Diverged("eval_loss is not finite")
    result["mean_active_parameters"] = statistics.mean(s["active_parameters"] for s in steps)
    result["active_parameters"] = steps[-1]["active_parameters"]
    result["trainable_parameters"] = steps[-1]["trainable_parameters"]
    result["touched_parameters"] = parameters.touched
    result["exported_parameters"] = parameters.exported
    result["other_parameters"] = parameters.others
    result["step_seconds"] = statistics.median(s["step_seconds"] for s in steps)
    result["peak_memory_gib"] = max(s["peak_memory_gib"] for s in steps)
    if not selects:
        if (ranks := held(folder)) is not None:
            result["held"] = ranks
        result["records"] = records_of(folder)
    return result


def durations(folder: Path) -> Result:
    """Seconds of a run's parts: phases of its start to the end of the first step, all other steps,
    the last evaluation. What is left of its `seconds` is writing, and freeing what it held."""
    beat = read_heartbeat(folder)
    found = {name: beat[name] for name in ("start_seconds", "evaluation_seconds") if name in beat}
    lines = [line for line in read_metrics(folder / METRICS) if "step_seconds" in line]
    steps = itertools.pairwise(line["step"] for line in lines)
    spent = [
        (stop - start) * line["step_seconds"]
        for (start, stop), line in zip(steps, lines[1:], strict=True)
    ]
    return found | {"steps_seconds": round(sum(spent), 3)}


def records_of(folder: Path) -> dict[str, list[Any]]:
    """What was kept of each record of the last evaluation: lists of equal length by name."""
    found: dict[Any, dict[str, Any]] = {}
    for name in (PREDICTIONS, LOSSES):
        for line in _objects(folder / name):
            key = (line.get("set", ""), line["id"])
            found.setdefault(key, {}).update({k: line[k] for k in _KEPT if k in line})
    records = [{"id": f"{where} {n}".strip(), **found[where, n]} for where, n in sorted(found)]
    shared = set.intersection(*map(set, records)) if records else set()
    return {name: [_short(record[name]) for record in records] for name in sorted(shared)}


def _objects(file: Path) -> list[Mapping[str, Any]]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return []


def _short(value: Any) -> Any:
    """With 6 digits, which hold a loss to 1e-5."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describes(measure: str, records: Mapping[str, Any]) -> bool:
    """Whether the kept records suffice for a score."""
    try:
        MEASURES[measure].summands(records)
    except KeyError:
        return False
    return bool(records["id"])
