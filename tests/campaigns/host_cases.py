"""What happens to hosts: the cases of `tests.campaigns.hosts`."""

import shutil
import time
from collections.abc import Callable

from tests.campaigns.host_trial import MARGIN, TIMEOUT, Case, Trial
from tests.helpers import ROOT, environment

LOST = r"lost rank \d"


def in_training(trial: Trial, fault: Callable[[], None], spared: list[int]) -> None:
    """A fault after a few steps; the hosts at `spared` have to say so and to end."""
    started = trial.begin()
    trial.until_step(8, started)
    fault()
    trial.ends([started[i] for i in spared], LOST, time.monotonic(), TIMEOUT + MARGIN)
    for host in trial.hosts:
        host.restore()
        host.kill()


def cut(trial: Trial) -> None:
    """Cable of a host pulled in training."""
    in_training(trial, trial.hosts[-1].cut, list(range(len(trial.hosts))))
    trial.goes_on()


def cut_at_start(trial: Trial) -> None:
    """Cable of a host pulled while the model is loaded."""
    started = trial.begin()
    trial.until(trial.run.is_dir, started)
    trial.hosts[-1].cut()
    trial.ends(started, LOST, time.monotonic(), TIMEOUT + MARGIN)
    trial.hosts[-1].restore()
    trial.goes_on()


def killed(trial: Trial) -> None:
    """Last host: kill -9 of every process."""
    in_training(trial, trial.hosts[-1].kill, list(range(len(trial.hosts) - 1)))
    trial.goes_on()


def first_killed(trial: Trial) -> None:
    """First host, which holds the store: kill -9 of every process."""
    in_training(trial, trial.hosts[0].kill, list(range(1, len(trial.hosts))))
    trial.goes_on()


def slow(trial: Trial) -> None:
    """A link of 4 Mbit/s on which packets wait up to 400 ms."""
    for host in trial.hosts:
        host.slow("4mbit", "400ms")
    trial.goes_on(trial.begin())


def lossy(trial: Trial) -> None:
    """Every host loses 3 % of the packets that it sends."""
    for host in trial.hosts:
        host.lose(3)
    trial.goes_on(trial.begin())


def refused(trial: Trial, pattern: str, **last: object) -> None:
    """A difference of the last host is named by every host; without it the run starts."""
    started = trial.begin(last=last)
    trial.until_said(started)
    trial.ends(started, pattern, time.monotonic(), TIMEOUT + MARGIN)
    trial.goes_on_forked()


def folder(trial: Trial) -> None:
    """The run folder is another one on the last host."""
    for name in ("runs", "elsewhere"):
        (trial.out / name).mkdir(exist_ok=True)
    mounts = {trial.out / "runs": trial.out / "elsewhere"}
    refused(trial, r"run\.dir: .* is another folder for rank 1 on host-1", mounts=mounts)


def relative_data(trial: Trial) -> None:
    """data.train is a relative path, which the last host does not have."""
    here, there = (trial.out / f"cwd-{name}" for name in ("here", "there"))
    for place in (here, there):
        place.mkdir(exist_ok=True)
    shutil.copy(ROOT / "configs/quickstart/train.jsonl", here / "mine.jsonl")
    started = trial.begin("data.train=mine.jsonl", only=[0], last={"cwd": here})
    started += trial.begin("data.train=mine.jsonl", only=[1], last={"cwd": there})
    trial.until_said(started)
    trial.ends(started, r"mine\.jsonl: no such file", time.monotonic(), TIMEOUT + MARGIN)
    trial.goes_on_forked()


def cache(trial: Trial) -> None:
    """Every host has a data cache of its own, that of the last one empty."""
    shutil.rmtree(trial.out / "empty", ignore_errors=True)
    (trial.out / "empty").mkdir()
    (trial.out / "cache").mkdir(exist_ok=True)
    mounts = {trial.out / "cache": trial.out / "empty"}
    trial.goes_on(trial.begin(last={"mounts": mounts}))


def configuration(trial: Trial) -> None:
    """The last host's configuration has another learning rate."""
    refused(trial, r"optim\.learning_rate: 0\.004 on rank 0, 0\.001 on rank 1",
            changes=["optim.learning_rate=1e-3"])  # fmt: skip


def code(trial: Trial) -> None:
    """A file of the project differs on the last host."""
    other = trial.out / "adapters"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(ROOT / "adapters", other)
    with (other / "optimizer.py").open("a") as file:
        file.write("# changed\n")
    refused(trial, r"adapters/optimizer\.py of rank 1 on host-1 is not that of rank 0",
            mounts={ROOT / "adapters": other})  # fmt: skip


def clock(trial: Trial) -> None:
    """The last host's clock is a day behind, its monotonic clock 100,000 s ahead."""
    inject = f"{ROOT}/tests/campaigns/inject:{environment()['PYTHONPATH']}"
    variables = {"RANKCAST_INJECT": "clock:0", "PYTHONPATH": inject}
    trial.goes_on(trial.begin(last={"variables": variables, "monotonic": 100_000}))


def late(trial: Trial) -> None:
    """The last host starts 15 s after the others."""
    started = trial.begin(only=range(len(trial.hosts) - 1))
    trial.until(lambda: bool(trial.hosts[0].ports()), started)
    time.sleep(15)
    trial.goes_on(started + trial.begin(only=[len(trial.hosts) - 1]))


def never(trial: Trial) -> None:
    """The last host does not start."""
    started = trial.begin(only=range(len(trial.hosts) - 1))
    trial.until(lambda: bool(trial.hosts[0].ports()), started)
    trial.ends(started, "did not find each other", time.monotonic(), TIMEOUT + MARGIN)
    trial.goes_on(trial.begin())


def elastic(trial: Trial) -> None:
    """Last host killed under torchrun --nnodes 1:2: the other goes on by itself."""
    started = trial.begin()
    trial.until_step(8, started)
    trial.hosts[-1].kill()
    trial.goes_on(started[:1], precision=1e-4)


def elastic_again(trial: Trial) -> None:
    """Last host killed; started again with torchrun --nnodes 1:3 on the two that are left."""
    started = trial.begin()
    trial.until_step(8, started)
    for host in trial.hosts:  # all launchers end, as after a power failure
        host.kill()
    trial.goes_on(trial.begin(only=[0, 1]), precision=1e-4)


CASES = {
    "cut-fsdp2": Case("fsdp2", 2, "torchrun", cut),
    "cut-ddp": Case("ddp", 3, "none", cut),
    "cut-deepspeed": Case("deepspeed", 2, "deepspeed", cut),
    "cut-peer": Case("peer", 2, "torchrun", cut),
    "cut-at-start": Case("fsdp2", 2, "none", cut_at_start),
    "killed-fsdp2": Case("fsdp2", 3, "none", killed),
    "killed-peer": Case("peer", 2, "torchrun", killed),
    "first-killed-deepspeed": Case("deepspeed", 2, "deepspeed", first_killed),
    "slow": Case("deepspeed", 2, "none", slow),
    "lossy": Case("fsdp2", 2, "none", lossy),
    "folder": Case("ddp", 2, "none", folder),
    "cache": Case("fsdp2", 2, "none", cache),
    "relative-data": Case("peer", 2, "none", relative_data),
    "configuration": Case("deepspeed", 2, "deepspeed", configuration),
    "code": Case("fsdp2", 2, "none", code),
    "clock": Case("fsdp2", 2, "torchrun", clock),
    "late": Case("ddp", 2, "none", late),
    "never": Case("deepspeed", 2, "deepspeed", never),
    "elastic": Case("fsdp2", 2, "torchrun", elastic, elastic=True),
    "elastic-again": Case("ddp", 3, "torchrun", elastic_again, elastic=True),
}
