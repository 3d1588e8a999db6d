"""Asking a run to stop: signals, deadlines, the heartbeat and the lock."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from tests.helpers import ROOT, SERVER, environment, error_lines, free_port, losses, quick_config
from trainer.checkpoint.store import newest
from trainer.config.sections import RunOptions
from trainer.data import tokenise
from trainer.data.encode import Encoder
from trainer.distributed.world import World
from trainer.errors import EXIT_REQUEUE, UserError
from trainer.files import LOCK
from trainer.records.heartbeat import Heartbeat, read_heartbeat
from trainer.run.folder import RunFolder
from trainer.run.lock import Lock
from trainer.run.run import run
from trainer.training import step as training_step
from trainer.training import stop_request
from trainer.training.stop_request import Interrupted, StopRequest


@pytest.mark.parametrize("number", stop_request.SIGNALS)
def test_signals_leave_a_note_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopRequest(RunOptions()) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


BUSY = """
import sys, time
from trainer.config.sections import RunOptions
from trainer.training.stop_request import StopRequest
import hashlib
with StopRequest(RunOptions()):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as a collective may wait
"""


def test_a_second_interrupt_leaves_at_once_but_not_the_echo_of_the_first():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # a terminal's and a launcher's
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(stop_request._SAME_PRESS + 0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_deadline_is_counted_on_a_clock_that_nobody_sets_back(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    clock = {"monotonic": 1000.0, "time": 5000.0}
    for name in clock:
        monkeypatch.setattr(time, name, lambda name=name: clock[name])
    stop = StopRequest(RunOptions(max_hours=0.5))
    monkeypatch.setenv("SLURM_JOB_END_TIME", "8000")
    job = StopRequest(RunOptions(slurm_margin=200))
    clock["time"] = 0.0
    for later, first, second in ((2799, False, False), (2800, True, False), (3800, True, True)):
        clock["monotonic"] = later
        assert [stop.reason is not None, job.reason is not None] == [first, second]
    assert (stop.reason, job.reason) == ("run.max_hours: 0.5", "the SLURM job's time limit")


def ask_at(step: int):
    """A StopRequest that is asked while `step` is computed."""
    stop, honest = StopRequest(RunOptions()), training_step.accumulate

    def accumulate(session, batch, index):
        if index == step:
            stop._on_signal(signal.SIGUSR1, None)
        return honest(session, batch, index)

    return stop, patch.object(training_step, "accumulate", accumulate)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    def config(name):
        return quick_config(
            tmp_path, f"run.name={name}", "run.steps=6", "run.eval_every=2", "method.kind=lelora"
        )

    run(config("whole"), World())
    for step in (2, 3):  # an evaluation is due after the second of them
        stop, patched = ask_at(step)
        with patched, pytest.raises(Interrupted, match=f"stopped after step {step + 1}") as caught:
            run(config("asked"), World(), stop)
        assert caught.value.exit_code == EXIT_REQUEUE == 75
        saved = newest(tmp_path / "runs/asked/checkpoints")  # else it would begin anew, and agree
        assert saved.name == f"step-{step + 1:08d}" and str(saved) in str(caught.value)
        assert read_heartbeat(tmp_path / "runs/asked")["state"] == "interrupted"
    run(config("asked"), World())
    assert losses(tmp_path / "runs/asked") == losses(tmp_path / "runs/whole")
    texts = [(tmp_path / f"runs/{name}/metrics.jsonl").read_text() for name in ("asked", "whole")]
    assert texts[0].count("eval_loss") == texts[1].count("eval_loss") == 3
    assert read_heartbeat(tmp_path / "runs/asked")["state"] == "done"


def test_a_run_asked_in_its_last_step_simply_ends(tmp_path):
    stop, patched = ask_at(3)
    with patched:
        run(quick_config(tmp_path, "run.name=last"), World(), stop)
    assert (tmp_path / "runs/last/adapter").is_dir()


def test_a_run_asked_before_its_first_step_saves_nothing(tmp_path):
    stop, _ = ask_at(-1)
    stop._on_signal(signal.SIGTERM, None)
    with pytest.raises(Interrupted, match="after step 0; last checkpoint: none"):
        run(quick_config(tmp_path, "run.name=early"), World(), stop)


def test_a_run_asked_while_it_tokenises_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "_RECORDS", 10)
    monkeypatch.setattr(tokenise, "_LOOK", 0.0)
    stop, encode, rows = StopRequest(RunOptions()), Encoder.__call__, []

    def asked(work, chunk, *tick):
        rows.append(len(chunk))
        if len(rows) == 3:
            stop._on_signal(signal.SIGTERM, None)
        return encode(work, chunk, *tick)

    with patch.object(Encoder, "__call__", asked):
        with pytest.raises(Interrupted, match=r"SIGTERM: stopped while data was tokenised.*kept"):
            run(quick_config(tmp_path, "run.name=asked"), World(), stop)
        assert rows == [10, 10, 10]
        run(quick_config(tmp_path, "run.name=asked"), World())
    assert rows == [10, 10, 10, *[10] * 4, 4, 10, 6]  # 64 records to train on, 16 to evaluate


def test_a_failed_run_says_so(tmp_path):
    with patch.object(training_step, "accumulate", side_effect=UserError("broken")):
        with pytest.raises(UserError):
            run(quick_config(tmp_path, "run.name=failed"), World())
    beat = read_heartbeat(tmp_path / "runs/failed")
    assert (beat["state"], beat["reason"]) == ("failed", "broken")


def test_a_heartbeat_is_whole_and_written_once_a_second(tmp_path):
    beat = Heartbeat(tmp_path)
    with patch.object(time, "monotonic", lambda: now[0]):
        for step, now in enumerate(([10.0], [10.5], [11.1]), start=1):
            beat.beat(step=step, steps=100, loss=2.0)
            assert read_heartbeat(tmp_path)["step"] == {1: 1, 2: 1, 3: 3}[step]
    beat.end("failed", "no more")
    read = read_heartbeat(tmp_path)
    assert (read["state"], read["reason"], read["steps"], read["loss"]) == (
        "failed", "no more", 100, 2.0,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]
    (tmp_path / "heartbeat.json").write_text("{")
    assert read_heartbeat(tmp_path) == {}


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        second.acquire()
    first.release()
    second.acquire()
    assert second.held and not first.held
    second.release()


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path):
    """Though its file still names it: what a crash left keeps nobody out."""
    hold = (
        "import sys, time; from pathlib import Path; from trainer.run.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
        lock.acquire()
    holder.kill()
    holder.communicate()
    assert str(holder.pid) in (tmp_path / LOCK).read_text()
    lock.acquire()
    assert lock.held and str(os.getpid()) in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, code):
    """No soft lock in its place: that of a host that died would keep a requeued job out."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    first, second = Lock(tmp_path), Lock(tmp_path)
    for lock in (first, second):
        lock.acquire()
        assert lock.held and "file system without locks" in lock.note
        assert os.strerror(code) in lock.note
    first.release()
    assert not first.held


def test_a_folder_that_cannot_be_written_is_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run\.dir: .*file cannot be written \("):
        Lock(tmp_path / "file").acquire()


def test_a_folder_that_another_run_made_meanwhile_is_left_alone(tmp_path):
    config = quick_config(tmp_path, "run.name=race")
    honest = RunFolder.make

    def make(self):
        self.path.mkdir(parents=True)
        (self.path / "metrics.jsonl").write_text('{"step": 1}\n')
        honest(self)

    with patch.object(RunFolder, "make", make):
        with pytest.raises(UserError, match="made by another run just now"):
            run(config, World())
    assert (config.run_folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (config.run_folder / "heartbeat.json").exists()


def test_a_run_that_was_stopped_twice_evaluates_once(tmp_path):
    """At the start, and after a step whose evaluation was caught up and then not saved."""
    overrides = ("run.name=twice", "run.steps=6", "run.eval_every=2", "run.eval_at_start=true")
    config = quick_config(tmp_path, *overrides)
    for step in (0, 3, 4):
        stop, patched = ask_at(step)
        with patched, pytest.raises(Interrupted):
            run(config, World(), stop)
        if step == 3:  # evaluated after step 4 when it goes on, killed before it saves
            with patch.object(training_step, "accumulate", side_effect=KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    run(config, World())
    run(config, World())
    text = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    evaluated = [json.loads(line)["step"] for line in text if "eval_loss" in line]
    assert evaluated == [0, 2, 4, 6]


def test_the_heartbeat_knows_where_a_resumed_run_stands(tmp_path):
    config = quick_config(tmp_path, "run.name=again")
    run(config, World())
    run(config, World())
    beat = read_heartbeat(config.run_folder)
    assert (beat["state"], beat["step"], beat["steps"]) == ("done", 4, 4)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_stays_alone_at_the_start_says_so_in_one_line(tmp_path, monkeypatch, rank):
    config = quick_config(tmp_path, "engine.kind=ddp", "engine.timeout=2")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    alone = {
        "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    command = ["launch/train.py", "--config", str(tmp_path / "c.yaml")]
    process = SERVER.fork(command, tmp_path / "log", dict(os.environ), ROOT)
    assert process.wait(60) and process.code == 1
    err = process.output()[1]
    lines = error_lines(err)
    assert len(lines) == 1 and "2 processes of this run did not find each other" in lines[0]
    assert "Traceback" not in err


WAITING = """
import time
from unittest.mock import patch
from trainer.distributed import watchdog
from trainer.distributed.world import World
watchdog._MARGIN = 1.0
with (
    patch.object(watchdog, "report_lost", lambda reason: print(reason, flush=True)),
    watchdog.Watchdog(World(size=2), 2.0) as dog,
):
    for _ in range(8):
        dog.alive("a step")
        time.sleep(0.5)
    dog.alive("micro-batch 7")
    time.sleep(60)
"""


def test_a_watchdog_ends_a_process_that_waits_in_vain():
    done = subprocess.run(
        [sys.executable, "-c", WAITING], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 1, done
    assert re.fullmatch(r"micro-batch 7 has not ended for \d s\n", done.stdout), done
