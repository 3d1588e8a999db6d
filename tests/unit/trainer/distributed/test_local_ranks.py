"""`--processes`: the ranks' variables, exit codes and signals; with ranks that import no torch."""

import itertools
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment
from trainer.distributed import local_ranks
from trainer.errors import EXIT_REQUEUE

SCRIPT = """
import os, signal, sys
from trainer.distributed import local_ranks
from trainer.distributed.failures import guarded

local_ranks._GRACE = 0.3
if not local_ranks.is_rank():
    with guarded():
        sys.exit(local_ranks.run_ranks(3))
rank = int(os.environ["RANK"])
"""


def started(tmp_path, program, **variables):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT + program)
    return subprocess.Popen(
        [sys.executable, script, "word"], cwd=ROOT, env=environment() | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ranks_find_each_other_by_the_usual_variables(tmp_path):
    program = """
names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
sys.stdout.write(" ".join([str(rank), *map(os.environ.get, names), *sys.argv[1:]]) + "\\n")
"""
    process = started(tmp_path, program)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    lines = [line.split() for line in sorted(out.splitlines())]
    port = lines[0][5]
    assert lines == [[str(r), str(r), "3", "3", "127.0.0.1", port, "word"] for r in range(3)]
    assert int(port) > 0


@pytest.mark.parametrize(("program", "code"), [
    ("sys.exit(5 if rank == 1 else 0)", 5),
    ("sys.exit(5) if rank == 1 else signal.pause()", 5),  # terminated
    ("signal.signal(signal.SIGTERM, lambda *_: None)\n"
     "while rank != 1: signal.pause()\nsys.exit(6)", 6),  # killed
    ("os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else None", 128 + signal.SIGKILL),
])  # fmt: skip
def test_the_first_failure_ends_all(tmp_path, program, code):
    process = started(tmp_path, program)
    process.communicate(timeout=60)
    assert process.returncode == code


@pytest.mark.parametrize(("code", "sent"), [(EXIT_REQUEUE, []), (5, [15, 9])])
def test_ranks_that_were_asked_to_stop_take_their_time(monkeypatch, code, sent):
    class Rank:
        def __init__(self, asked):
            self.asked, self.sent = asked, []

        def poll(self):
            self.asked -= 1
            return None if self.asked > 0 else code

        def send_signal(self, number):
            self.sent.append(number)

    seconds = itertools.count(step=100)
    monkeypatch.setattr(local_ranks.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(local_ranks, "_POLL", 0)
    ranks = [Rank(1), Rank(6)]
    assert local_ranks._wait(ranks) == code
    assert ranks[1].sent == sent


def test_signals_reach_the_ranks(tmp_path):
    program = """
def ended(*_):
    sys.stdout.write("told\\n")
    sys.exit(75)
signal.signal(signal.SIGUSR1, ended)
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    signal.pause()
"""
    process = started(tmp_path, program)
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.count("told")) == (75, 3)


def test_another_launcher_is_refused(tmp_path):
    process = started(tmp_path, "", RANK="0", WORLD_SIZE="1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith("error: --processes: given to a rank of")
