"""Jobs in a real SLURM (`make test-slurm`): interrupted, saved, requeued, resumed, as if they had
not been. Two nodes with one task each, on CPUs, through the batch scripts of launch/slurm."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, launch, losses, quick_config
from tests.slurm.cluster import Cluster, cluster

pytestmark = pytest.mark.skipif("RANKCAST_TEST_SLURM" not in os.environ, reason="make test-slurm")

SCRIPTS = ROOT / "launch/slurm"
STEPS = 30
ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
TWO_NODES = ("--nodes=2", *ONE_NODE[1:])
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def whole(folder) -> Callable[..., list[float]]:
    """Losses of a run that nothing interrupted, outside SLURM."""
    known: dict[tuple, list[float]] = {}

    def run(launcher: str, processes: int, steps: int = STEPS, seed: int = 0) -> list[float]:
        key = (launcher, processes, steps, seed)
        if key not in known:
            name = f"whole-{'-'.join(map(str, key))}"
            file = write_config(folder, name, steps)
            overrides = ("--config", file, f"run.seed={seed}")
            code, out, err = launch(launcher, processes, ROOT / "launch/train.py", *overrides)
            assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"
            known[key] = losses(folder / "runs" / name)
        return known[key]

    return run


def write_config(folder: Path, name: str, steps: int = STEPS, *overrides: str) -> str:
    config = quick_config(
        folder, f"run.steps={steps}", f"run.name={name}", "engine.kind=auto", "engine.device=cpu",
        "run.slurm_margin=10", "model.quantization=nf4", "data.eval=null", "log.progress=plain",
        *overrides,
    )  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(config.to_yaml())
    return str(file)


def submit(
    slurm: Cluster, folder: Path, script: str, options: tuple[str, ...], *arguments: str
) -> str:
    """The log is folder/JOB.out."""
    output = f"--output={folder}/%j.out"
    return slurm.submit(output, *options, str(SCRIPTS / script), *arguments)


def wait_until(slurm: Cluster, job: str, what: str, ready: Callable[[], bool], seconds: float):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, (
            f"{what}: not in {seconds} s\n{slurm.job(job)}\n{slurm.log(job)}\n{slurm.logs()}"
        )
        time.sleep(0.2)


def wait_for_steps(slurm: Cluster, job: str, run: Path, steps: int = 5) -> None:
    file = run / "metrics.jsonl"
    reached = lambda: file.exists() and len(file.read_text().splitlines()) >= steps  # noqa: E731
    wait_until(slurm, job, f"step {steps} of {run.name}", reached, 180)


def wait_for_end(slurm: Cluster, job: str, seconds: float = 240) -> dict[str, str]:
    wait_until(slurm, job, "end", lambda: slurm.job(job)["JobState"] in ENDED, seconds)
    return slurm.job(job)


def check_resumed(slurm: Cluster, job: str, run: Path, uninterrupted: list[float]) -> int:
    """The job ended well after at least one restart, which went on from a checkpoint, with every
    loss of `uninterrupted` to the last bit. Returns the number of restarts."""
    ended, log = wait_for_end(slurm, job), slurm.log(job)
    assert ended["JobState"] == "COMPLETED", log
    restarts = int(ended["Restarts"])
    assert restarts >= 1, log
    assert f"start {restarts + 1} on" in log, log  # what SLURM_RESTART_COUNT said
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "done"
    assert len(list((run / "checkpoints").glob("step-*"))) >= 2, "of the interruption, of the end"
    assert "resumed from" in log, log
    assert losses(run) == uninterrupted
    return restarts


def step_seconds(run: Path) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line)


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sbatch")))
def test_batch_scripts_are_accepted_as_they_are(slurm, script):
    slurm.run("sbatch", "--test-only", str(SCRIPTS / script))


def test_examples_know_their_jobs(slurm, folder):
    """As far as this goes without the memory: shapes, data and units, in one process each."""
    llama = submit(slurm, folder, "llama70b.sbatch", ONE_NODE, "nf4", "--dry-run")
    mixtral = submit(slurm, folder, "mixtral.sbatch", ONE_NODE, "int8", "--dry-run")
    for job, facts in ((llama, ("LlamaFor", "nf4")), (mixtral, ("MixtralFor", "int8"))):
        assert wait_for_end(slurm, job)["JobState"] == "COMPLETED", slurm.log(job)
        assert all(fact in slurm.log(job) for fact in facts), slurm.log(job)


def test_scripts_pass_shellcheck():
    files = sorted(SCRIPTS.glob("*.s*h"))
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "launcher"), [("srun.sbatch", "torchrun"), ("zero3.sbatch", "deepspeed")]
)
def test_a_signalled_job_requeues_and_ends_as_if_nothing_had_been(
    slurm, folder, whole, script, launcher
):
    uninterrupted = whole(launcher, 2)
    name = script.removesuffix(".sbatch")
    job = submit(slurm, folder, script, TWO_NODES, write_config(folder, name))
    wait_for_steps(slurm, job, folder / "runs" / name)
    slurm.run("scancel", "--signal=USR1", job)
    assert check_resumed(slurm, job, folder / "runs" / name, uninterrupted) == 1


def test_a_job_under_torchrun_is_requeued_before_its_time_limit(slurm, folder, whole):
    # SLURM looks at time limits every 30 s: of 120 s, the signal comes after 45 to 75.
    limit = ("--time=2", "--signal=USR1@45")
    whole("torchrun", 2)  # to know how long a step takes
    steps = int(70 / step_seconds(folder / "runs" / f"whole-torchrun-2-{STEPS}-0"))
    file = write_config(folder, "fsdp2", steps)
    job = submit(slurm, folder, "fsdp2.sbatch", TWO_NODES + limit, file)
    wait_for_end(slurm, job, 600)
    assert "stopped: SIGUSR1" in slurm.log(job), slurm.log(job)
    check_resumed(slurm, job, folder / "runs" / "fsdp2", whole("torchrun", 2, steps))


def test_each_seed_of_an_array_is_requeued_alone(slurm, folder, whole):
    file = write_config(folder, "array")
    options = ("--job-name=array", "--array=3-4", "--cpus-per-task=1")
    array = submit(slurm, folder, "seeds.sbatch", options, file)
    for seed in (3, 4):
        wait_for_steps(slurm, f"{array}_{seed}", folder / "runs" / f"array-seed{seed}")
        slurm.run("scancel", "--signal=USR1", f"{array}_{seed}")
    for seed in (3, 4):
        run = folder / "runs" / f"array-seed{seed}"
        assert check_resumed(slurm, f"{array}_{seed}", run, whole("python", 1, seed=seed)) == 1


@pytest.mark.parametrize(
    ("script", "mistake", "error"),
    [
        ("fsdp2.sbatch", "data.train=nowhere.jsonl", "error: nowhere.jsonl: no such file"),
        ("srun.sbatch", "run.stepz=4", "error: run.stepz"),
    ],
)
def test_a_job_that_fails_is_not_requeued(slurm, folder, script, mistake, error):
    name = f"failing-{script}"
    run = folder / "runs" / name
    run.mkdir(parents=True)
    # An earlier start was interrupted: that must not count for this one.
    (run / "heartbeat.json").write_text(json.dumps({"state": "interrupted"}))
    job = submit(slurm, folder, script, ONE_NODE, write_config(folder, name), mistake)
    ended, log = wait_for_end(slurm, job), slurm.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log
    assert error in log, log
    assert "not requeued" in log, log


def test_a_cancelled_job_is_not_requeued(slurm, folder):
    options = ("--job-name=cancelled", "--array=0-0", "--cpus-per-task=1")
    job = submit(slurm, folder, "seeds.sbatch", options, write_config(folder, "cancelled", 10_000))
    wait_for_steps(slurm, job, folder / "runs" / "cancelled-seed0")
    slurm.run("scancel", job)
    wait_until(slurm, job, "idle nodes", lambda: set(slurm.states()) == {"idle"}, 60)
    ended = slurm.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), slurm.log(job)
