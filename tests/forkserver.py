"""Real processes without their start: forked from a server that has imported everything.

Importing torch, transformers, DeepSpeed and the trainer takes ten seconds of CPU time; a fork of a
process that has them takes milliseconds. The server has no thread, no process group and no GPU, so
that what is forked from it is as good as new, and what it leaves behind (a broken group, DeepSpeed's
global state) ends with it. `tests/world/cases.py` forks ranks, `tests/helpers.py` scripts.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRELOADED = [
    "bitsandbytes", "deepspeed", "deepspeed.ops.transformer", "deepspeed.module_inject", "peft",
    "torch._dynamo", "torch._dynamo.backends.debugging", "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.profiler", "datasets",
    "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.bert.modeling_bert", "transformers.generation", "setuptools",
    "sympy.physics.units", "torch.distributed.tensor",
    "trainer.engine.deepspeed", "trainer.engine.fsdp2", "trainer.engine.peer",
    "trainer.engine.ddp", "tests.world.worker",
]  # fmt: skip
"""What a run may import; whatever is missing here, every child imports for itself."""

_READY = "ready"
_ARROWS_ALLOCATOR = "jemalloc_bg_thd"  # a thread that jemalloc itself starts anew after a fork
_DRIVERS = "cuda"  # the CUDA driver's thread: what is forked uses no GPU
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Forked:
    """A process that the server has forked; its exit code is left in a file."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.log = pid, log
        self._exit = log.with_suffix(".exit")

    @property
    def running(self) -> bool:
        try:  # the server reaps its children at once
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    @property
    def code(self) -> int:
        """Its exit code once it has ended; -9 where it was killed or crashed."""
        return int(self._exit.read_text()) if self._exit.exists() else -signal.SIGKILL

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.wait(10)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def output(self) -> tuple[str, str]:
        """(stdout, stderr)"""
        files = self.log, self.log.with_suffix(".err")
        out, err = (f.read_text(errors="replace") if f.exists() else "" for f in files)
        return out, err


class Server:
    """Started when it is first needed, ended with the session."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def fork(
        self, arguments: list[str], log: Path, environment: Mapping[str, str], cwd: Path
    ) -> Forked:
        """A new process that does what Python does with these arguments (`SCRIPT …` or `-m MODULE
        …`). It prints to `log`, and its errors to the same name with `.err`."""
        process = self._started(environment, cwd)
        request = {
            "arguments": arguments, "log": str(log), "environment": dict(environment),
            "cwd": str(cwd),
        }  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return Forked(int(self._answer(process)), log)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self, environment: Mapping[str, str], cwd: Path) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver"], cwd=cwd, text=True,
                env={**environment, "CUDA_VISIBLE_DEVICES": ""},  # a driver's threads are not forked
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self._answer(self._process) == _READY
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen) -> str:
        assert process.stdout is not None
        answer = process.stdout.readline().strip()
        assert answer, "the server of ranks has ended; its error is above"
        return answer


SERVER = Server()


# --- the server's side ----------------------------------------------------------------------------


def serve() -> None:
    """Import everything once, then fork a child per request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    from tests.helpers import lean_patches

    torch.set_num_threads(1)
    for patch in lean_patches():
        patch.start()
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    lost = [t for t in threads[1:] if t != _ARROWS_ALLOCATOR and not t.startswith(_DRIVERS)]
    assert not lost, f"a fork loses {lost}"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    gc.collect()
    gc.freeze()  # else the first collection of a child would copy every page
    print(_READY, file=answers, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            _child(json.loads(line))
        print(pid, file=answers, flush=True)


def _child(request: dict[str, Any]) -> None:
    """Never returns."""
    ctypes.CDLL("libc.so.6").prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log, code = Path(request["log"]), 1
    for descriptor, path, mode in (
        (0, "/dev/null", os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    honest = os._exit

    def leave(code: int) -> None:
        sys.stdout.flush(), sys.stderr.flush()
        log.with_suffix(".exit").write_text(str(code))
        honest(code)

    os._exit = leave  # type: ignore[assignment]  # the trainer leaves by it, too
    os.environ.clear(), os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    try:
        code = _run(request["arguments"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def _run(arguments: list[str]) -> int:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    serve()
