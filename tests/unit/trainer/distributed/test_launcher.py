"""Ranks whose launcher is gone, and launchers that start again."""

import concurrent.futures
import datetime
import itertools
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.helpers import ROOT, environment, free_port
from trainer.distributed import process_group
from trainer.distributed.attempt import agree

RANK = """
import os, sys, time
from trainer.config.sections import RunOptions
from trainer.distributed import launcher
from trainer.training.stop_request import StopRequest
launcher.watch()
print(len(launcher._ancestors), flush=True)
if sys.argv[1] == "train":
    with StopRequest(RunOptions()) as stop:
        while stop.reason is None:
            time.sleep(0.01)
        print("saved:", stop.reason, flush=True)
        os._exit(75)
time.sleep(100)
"""
STARTS = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def started(tmp_path, stage: str, *, by_shell: bool):
    """(process that started the launcher: another one, or a shell; how many ancestors of the rank
    are launchers)."""
    (tmp_path / "rank.py").write_text(RANK)
    rank = [sys.executable, str(tmp_path / "rank.py"), stage]
    inner = [sys.executable, "-c", STARTS, *rank]
    outer = subprocess.Popen(
        ["sh", "-c", f"{shlex.join(inner)} & wait"]
        if by_shell
        else [sys.executable, "-c", STARTS, *inner],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env=environment() | {"RANK": "0"}, start_new_session=True,
    )  # fmt: skip
    return outer, int(outer.stdout.readline())


@pytest.mark.parametrize("stage", ["train", "load"])
def test_a_rank_ends_with_the_launcher_of_its_launcher(stage, tmp_path):
    outer, ancestors = started(tmp_path, stage, by_shell=False)
    assert ancestors == 2
    outer.kill()
    out, err = outer.communicate(timeout=20)  # until the rank has closed its end
    said = f"the launcher (process {outer.pid}) is gone"
    assert (out, err) == (
        (f"saved: {said}\n", "") if stage == "train" else ("", f"stopped: {said}\n")
    )


def test_a_shell_that_started_a_run_may_end(tmp_path):
    """The rank looks at the launcher alone."""
    outer, ancestors = started(tmp_path, "load", by_shell=True)
    os.killpg(outer.pid, signal.SIGKILL)
    outer.communicate()
    assert ancestors == 1


def test_the_ranks_of_an_attempt_agree_on_a_name_of_their_own():
    """In a store that holds what two attempts before left, one of which was cut short; ranks come
    in any order."""
    store, wait = dist.HashStore(), datetime.timedelta(seconds=30)
    names = set()
    for attempt, order in enumerate(itertools.permutations(range(3))):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            found = {pool.submit(agree, store, rank, 3, wait) for rank in order}
            (name,) = {future.result() for future in found}
        names.add(name)
        store.set("wanted/2", "of a rank that was killed before it was answered")
        assert len(names) == attempt + 1


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout():
    with pytest.raises(RuntimeError, match="not all"):
        agree(dist.HashStore(), 0, 2, datetime.timedelta(seconds=0.1))


def test_the_store_of_torchruns_agent_is_shared_by_attempts(monkeypatch):
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "RANK": "0",
        "MASTER_PORT": str(port), "WORLD_SIZE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    first, second = (
        process_group._rendezvous(datetime.timedelta(seconds=30))["store"] for _ in range(2)
    )
    first.set("rank/0", "here")
    assert first.check(["rank/0"]) and not second.check(["rank/0"])
    del agent


IGNORED = """
import os, signal
from trainer.config.sections import RunOptions
from trainer.training.stop_request import StopRequest
with StopRequest(RunOptions()) as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.reason)
"""


@pytest.mark.parametrize(("prefix", "said"), [([], "SIGHUP"), (["nohup"], "None")])
def test_a_hangup_is_a_stop_request_unless_it_is_ignored(prefix, said):
    done = subprocess.run(
        [*prefix, sys.executable, "-c", IGNORED], capture_output=True, text=True, cwd=ROOT,
        env=environment(), check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.strip() == said


PROCESS_1 = """
import os, signal, subprocess, sys
if sys.argv[2] == "handles":
    signal.signal(signal.SIGTERM, lambda *_: None)
subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv])
"""
UNDER_IT = """
from trainer.distributed import launcher
launcher._ancestors.append((1, launcher._started(1)))
print(launcher.remarks())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="process 1 of a namespace needs root")
@pytest.mark.parametrize("handles", ["handles", "does not"])
def test_a_launcher_that_a_containers_sigterm_does_not_reach_is_named(handles):
    found = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", PROCESS_1, UNDER_IT, handles],
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=True,
    )  # fmt: skip
    assert ("start it with --init" in found.stdout) == (handles == "does not")
