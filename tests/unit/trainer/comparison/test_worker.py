"""Runs of one process: each as in a process of its own, and none stays in memory."""

import gc
import multiprocessing
import subprocess
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from tests.helpers import quick_config
from trainer.comparison import worker
from trainer.comparison.worker import make_run
from trainer.run import run as run_module

CASES = {
    "lora": [],
    "pissa": ["method.kind=pissa", "method.rank=4"],
    "lelora": ["method.kind=lelora", "model.quantization=nf4"],
}
IDENTITY = {"selects": False}
TIMES = ("seconds", "step_seconds", "start_seconds", "peak_memory_gib")


def made(tmp_path, case: str, name: str):
    config = quick_config(tmp_path, f"run.name={name}", "log.record_losses=true", *CASES[case])
    return make_run(IDENTITY, config)


def scores(result) -> dict:
    assert "error" not in result, result
    return {
        name: value
        for name, value in result.items()
        if name != "run" and not name.endswith("_seconds") and name not in TIMES
    }


def test_later_runs_of_a_process_have_the_results_of_first_ones(tmp_path):
    alone = {}
    for case in CASES:  # forks of a process that has made none
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fork:
            alone[case] = fork.submit(made, tmp_path, case, f"{case}-alone").result()
    for turn in range(2):
        for case in CASES:
            again = made(tmp_path, case, f"{case}-{turn}")
            assert scores(again) == scores(alone[case])
    assert len(scores(again)) > 10


def test_nothing_of_a_run_stays(tmp_path, monkeypatch):
    opened, sessions = run_module.open_session, []

    def noted(*args, **kwargs):
        session = opened(*args, **kwargs)
        sessions.append(weakref.ref(session.model))
        return session

    monkeypatch.setattr(run_module, "open_session", noted)
    for number in range(2):
        made(tmp_path, "lora", f"run-{number}")
    assert [session() for session in sessions] == [None, None]
    assert gc.get_freeze_count() > 0


drivers: list["Driver"] = []


COMPARISON = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from trainer.comparison.worker import prepare

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, prepare, (context.Value("i", 0),)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit({work}) if {work} else None
        signal.pause()
"""


@pytest.mark.parametrize("work", ["None", "signal.pause"])
def test_workers_end_with_a_comparison_that_is_killed(tmp_path, work):
    script = tmp_path / "comparison.py"
    script.write_text(COMPARISON.format(work=work))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker_process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    try:
        worker_process.wait(60)
    except psutil.TimeoutExpired:  # nobody has asked for its status
        assert worker_process.status() == psutil.STATUS_ZOMBIE


class Driver:
    """CUDA's driver with GPUs 0 and 1."""

    def __init__(self, name: str):
        assert name == "libcuda.so.1"
        self.calls: list[tuple] = []
        drivers.append(self)

    def cuInit(self, flags: int) -> int:
        self.calls.append(("init", flags))
        return 0

    def cuDeviceGet(self, handle, index: int) -> int:
        handle._obj.value = 70 + index
        return 0 if index < 2 else 101

    def cuDevicePrimaryCtxSetFlags_v2(self, handle, flags: int) -> int:
        self.calls.append((handle.value, flags))
        return 0


def test_a_worker_on_a_gpu_waits_asleep(monkeypatch):
    monkeypatch.setattr(worker.ctypes, "CDLL", Driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(worker, "_index", 5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with monkeypatch.context() as rocm:  # which has no such driver
        rocm.setattr(torch.version, "hip", "6.4")
        assert worker.device() == torch.device("cuda", 1) and not drivers
    for is_initialized in (False, True):  # of the second run there is a context
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda now=is_initialized: now)
        assert worker.device() == torch.device("cuda", 1)
    (driver,) = drivers
    assert driver.calls == [("init", 0), (71, 4)]
