"""Runs that are asked to stop, stalled ranks and doubled runs, with real launchers and signals."""

import json
import os
import select
import signal

import psutil
import pytest

from tests.helpers import (
    ALL,
    ROOT,
    error_lines,
    finish,
    kept_steps,
    launch,
    losses,
    python,
    quick_config,
    ranks_of,
    start,
    thorough,
    wait_for_step,
)
from trainer.checkpoint.store import newest
from trainer.errors import EXIT_REQUEUE
from trainer.records.heartbeat import read_heartbeat

STEPS = 30
SCRIPT = ROOT / "launch/train.py"
EXIT_CODES = {"deepspeed": EXIT_REQUEUE, "torchrun": 1}  # torchrun keeps its workers' codes back


def arguments(tmp, name: str, *overrides: str) -> list[str]:
    config = quick_config(
        tmp, f"run.steps={STEPS}", f"run.name={name}", "engine.kind=auto", "run.eval_every=4",
        "model.quantization=nf4", "data.batch_size=4", *overrides,
    )  # fmt: skip
    file = tmp / f"{name}.yaml"
    file.write_text(config.to_yaml())
    return ["--config", str(file)]


def lines(run) -> list[dict]:
    """metrics.jsonl, without what depends on the machine."""
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "grad_norm", "eval_loss")
    return [{k: line[k] for k in kept if k in line} for line in read]


@pytest.mark.parametrize(
    ("launcher", "name"),
    [("deepspeed", "SIGUSR1"), pytest.param("torchrun", "SIGTERM", marks=thorough)],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(launcher, name, tmp_path):
    engine = {"deepspeed": "deepspeed", "torchrun": "fsdp2"}[launcher]  # as `auto` chooses
    whole = arguments(tmp_path, "whole", f"engine.kind={engine}")
    code, _, err = python(SCRIPT, *whole, processes=2)
    assert code == 0, err[-3000:]
    run = tmp_path / "runs/asked"
    process = start(launcher, 2, SCRIPT, *arguments(tmp_path, "asked"))
    wait_for_step(run, 5, process)
    # One rank alone hears of it; the others agree.
    os.kill(ranks_of(process)[1], getattr(signal, name))
    code, _, err = finish(process)
    assert code == EXIT_CODES[launcher], err[-3000:]
    assert not ranks_of(process)
    assert not error_lines(err)
    said = [line for line in err.splitlines() if line.startswith("stopped:")]
    assert len(said) == 1 and f"{name}: stopped after step" in said[0]
    beat = read_heartbeat(run)
    assert beat["state"] == "interrupted" and 5 <= beat["step"] < STEPS
    assert str(run / f"checkpoints/step-{beat['step']:08d}") in beat["reason"]
    assert len(losses(run)) == beat["step"]
    before = kept_steps(run, beat["step"])
    if ALL:
        code, _, err = launch(launcher, 2, SCRIPT, *arguments(tmp_path, "asked"))
    else:
        resumed = arguments(tmp_path, "asked", f"engine.kind={engine}")
        code, _, err = python(SCRIPT, *resumed, processes=2)
    assert code == 0, err[-3000:]
    assert kept_steps(run, beat["step"])[: len(before)] == before, "it began anew"
    assert lines(run) == lines(tmp_path / "runs/whole")  # an evaluation that was due is caught up
    assert read_heartbeat(run)["state"] == "done"


@pytest.mark.parametrize(
    ("launcher", "rank"), [("torchrun", 1), pytest.param("deepspeed", 0, marks=thorough)]
)
def test_a_stalled_rank_is_named_by_the_others(launcher, rank, tmp_path):
    run = tmp_path / "runs/stalled"
    process = start(
        launcher, 2, SCRIPT, *arguments(tmp_path, "stalled", "engine.timeout=15", "run.steps=9999")
    )
    wait_for_step(run, 3, process)
    ranks = ranks_of(process)
    os.kill(ranks[rank], signal.SIGSTOP)
    wait_until_gone(ranks[1 - rank], seconds=120)
    os.kill(ranks[rank], signal.SIGKILL)  # the launcher would give it half a minute more
    code, _, err = finish(process)
    assert code != 0
    assert any(f"lost rank {rank} (" in line for line in error_lines(err)), err[-3000:]
    assert not ranks_of(process)


def wait_until_gone(pid: int, seconds: float) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        assert ready, f"process {pid} did not end within {seconds} s"
    finally:
        os.close(descriptor)


def test_a_second_run_on_the_same_folder_refuses(tmp_path):
    run = tmp_path / "runs/one"
    process = start("torchrun", 2, SCRIPT, *arguments(tmp_path, "one", "run.steps=9999"))
    wait_for_step(run, 2, process)
    assert_private(process)
    code, _, err = python(SCRIPT, *arguments(tmp_path, "one", "run.steps=9999"))
    assert code == 2
    assert len(error_lines(err)) == 1
    assert "run.name" in err and "is in use by process" in err
    process.send_signal(signal.SIGINT)  # as Ctrl-C does; the launcher passes it on
    finish(process)
    beat = read_heartbeat(run)
    assert beat["state"] == "interrupted" and beat["reason"].startswith("SIGINT")
    assert len(losses(run)) == beat["step"]


def assert_private(process) -> None:
    """Ranks of one host listen on the loopback interface alone. (torchrun's own process, which is
    not ours, listens to everyone.)"""
    heard = [
        connection.laddr.ip
        for pid in ranks_of(process).values()
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert heard and all(ip in ("127.0.0.1", "::1") for ip in heard)


@thorough
def test_deepspeed_s_ranks_listen_on_the_loopback_interface_alone(tmp_path):
    process = start("deepspeed", 2, SCRIPT, *arguments(tmp_path, "listen", "run.steps=9999"))
    wait_for_step(tmp_path / "runs/listen", 1, process)
    assert_private(process)
    os.kill(ranks_of(process)[0], signal.SIGTERM)
    finish(process)


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ("torchrun", "SIGKILL"),
        pytest.param("torchrun", "SIGUSR1", marks=thorough),
        pytest.param("deepspeed", "SIGTERM", marks=thorough),
        pytest.param("deepspeed", "SIGHUP", marks=thorough),
        pytest.param("deepspeed", "SIGKILL", marks=thorough),
    ],
)
def test_a_launcher_that_is_gone_leaves_no_ranks_and_loses_nothing(launcher, name, tmp_path):
    run = tmp_path / "runs/left"
    given = arguments(tmp_path, "left", "run.steps=9999", "engine.kind=ddp")
    process = start(launcher, 2, SCRIPT, *given)
    wait_for_step(run, 3, process)
    ranks = ranks_of(process)
    process.send_signal(getattr(signal, name))
    for pid in ranks.values():
        wait_until_gone(pid, seconds=60)
    finish(process)
    beat = read_heartbeat(run)
    assert beat["state"] == "interrupted" and "launcher" in beat["reason"]
    assert len(losses(run)) == beat["step"]
    assert newest(run / "checkpoints").name == f"step-{beat['step']:08d}"
    more = arguments(tmp_path, "left", f"run.steps={beat['step'] + 1}", "engine.kind=ddp")
    code, _, err = python(SCRIPT, *more, processes=2)
    assert code == 0, err[-3000:]


@thorough
def test_torchrun_restarts_a_killed_rank_twice(tmp_path):
    whole = arguments(tmp_path, "whole", "engine.kind=ddp", "checkpoint.every=2")
    code, _, err = python(SCRIPT, *whole, processes=2)
    assert code == 0, err[-3000:]
    run = tmp_path / "runs/killed"
    given = arguments(
        tmp_path, "killed", "engine.kind=ddp", "checkpoint.every=2", "engine.timeout=30"
    )
    process = start("torchrun", 2, SCRIPT, *given, options=("--max-restarts", "3"))
    for step, rank in ((5, 1), (12, 0)):
        wait_for_step(run, step, process)
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err[-3000:]
    assert lines(run) == lines(tmp_path / "runs/whole")
