"""A throw-away SLURM: one controller and two nodes on this machine, all of it in one folder.

Needs no root, no systemd and no cgroups; what it needs installed, `make test-slurm` installs.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT, environment, free_port

# Two loopback addresses serve as names, so that "the first host of the job" resolves as it does on
# a real cluster, and nothing needs to be written into /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")

CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (usually 120 s).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, no accounting, no mail: what a container without systemd can do.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
KillWait=5
ReturnToService=2
# Nodes as the batch scripts ask for them, whatever this machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=1000 Gres=gpu:8
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]}
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES State=UP
"""


def _program(name: str) -> str | None:
    # Daemons live in sbin, which few users' PATH has.
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


@dataclass
class Cluster:
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """A SLURM command's stdout; its stderr is in the error if it fails."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Id of the new job."""
        return self.run("sbatch", "--parsable", *arguments)

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job (or of an array's task, as ID_TASK)."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        """What a job has printed until now."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else "(nothing)"

    def states(self) -> list[str]:
        """The nodes' states."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def logs(self) -> str:
        """The ends of the daemons' logs, for an error message."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start munged, slurmctld and a slurmd a node as this user; at the end, end just those."""
    # In /tmp: the path of a socket may have 107 characters, and SLURM adds to it.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as daemons:
        folder = Path(name)
        variables = environment() | {"SLURM_CONF": f"{folder}/slurm.conf"}
        started = Cluster(folder, variables)
        _write_config(folder)

        def start(name: str, *arguments: str) -> None:
            daemons.enter_context(_daemon(started, name, *arguments))

        # --force: munged only warns, then, that other users cannot reach its socket.
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "seed", "pid", "log")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        _wait("munged", started, lambda: (folder / "munge.socket").exists())
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        _wait("two idle nodes", started, lambda: _idle(started))
        try:
            yield started
        finally:
            _cancel_everything(started)


def _write_config(folder: Path) -> None:
    ports = [free_port() for _ in range(3)]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, user=getpass.getuser(), folder=folder, nodes=NODES, ports=ports)
    )
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    for index in range(8):
        (folder / f"gpu{index}").touch()  # stands for a device; SLURM complains, and counts it
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)


@contextmanager
def _daemon(started: Cluster, name: str, *arguments: str) -> Iterator[None]:
    path = _program(name)
    assert path is not None, f"{name} is not installed"
    with (started.folder / f"{name}.out.log").open("ab") as out:
        process = subprocess.Popen(
            [path, *arguments], env=started.environment, cwd=started.folder,
            stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(started: Cluster) -> bool:
    try:
        return started.states() == ["idle"] * len(NODES)
    except AssertionError:  # the controller does not answer yet
        return False


def _cancel_everything(started: Cluster) -> None:
    """Jobs' processes outlive slurmd, so they go first."""
    started.run("scancel", f"--user={getpass.getuser()}")
    _wait("end of all jobs", started, lambda: not started.run("squeue", "--noheader"))
    _wait("two idle nodes", started, lambda: _idle(started))


def _wait(what: str, started: Cluster, ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s\n{started.logs()}"
        time.sleep(0.2)
