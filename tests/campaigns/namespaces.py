"""Hosts on one machine: network namespaces on a bridge, with host names and mounts of their own.

Needs root. Every process of a host runs in its network namespace, in a UTS namespace with the
host's name, and in a mount namespace, where a path may be another folder than on other hosts.
"""

import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaigns.processes import MARK, marked
from tests.helpers import ROOT, environment


def _run(command: str) -> str:
    return subprocess.run(
        shlex.split(command), check=True, capture_output=True, text=True
    ).stdout.strip()


class Host:
    """A namespace, its name and its address."""

    def __init__(self, network: "Network", index: int):
        self.name, self.address = f"host-{index}", f"10.77.0.{index + 1}"
        self.namespace = f"{network.namespace}-{index}"
        self._network, self._port = network, f"port{index}"
        switch = network.namespace
        _run(f"ip netns add {self.namespace}")
        _run(
            f"ip -n {switch} link add {self._port} type veth peer name eth0 netns {self.namespace}"
        )
        _run(f"ip -n {switch} link set {self._port} master bridge up")
        _run(f"ip -n {self.namespace} address add {self.address}/24 dev eth0")
        for device in ("lo", "eth0"):
            _run(f"ip -n {self.namespace} link set {device} up")

    def cut(self) -> None:
        """Pull its cable."""
        _run(f"ip -n {self._network.namespace} link set {self._port} down")

    def slow(self, rate: str, latency: str) -> None:
        """What it sends queues before a link of this rate, for at most this long."""
        _run(f"tc -n {self.namespace} qdisc replace dev eth0 root tbf rate {rate} burst 16kb "
             f"latency {latency}")  # fmt: skip

    def lose(self, percent: int) -> None:
        """So many of the packets that it sends are dropped, at random."""
        rules = (
            "table netdev loss { chain sent { type filter hook egress device eth0 priority 0; "
            f"numgen random mod 100 < {percent} drop; }}; }}"
        )
        subprocess.run(
            ["ip", "netns", "exec", self.namespace, "nft", "-f", "-"], input=rules, text=True,
            check=True,
        )  # fmt: skip

    def restore(self) -> None:
        """The link as it was at first."""
        _run(f"ip -n {self._network.namespace} link set {self._port} up")
        _run(f"ip netns exec {self.namespace} nft flush ruleset")
        with suppress(subprocess.CalledProcessError):  # none was set
            _run(f"tc -n {self.namespace} qdisc delete dev eth0 root")

    def pids(self) -> list[int]:
        return [int(pid) for pid in _run(f"ip netns pids {self.namespace}").split()]

    def kill(self) -> None:
        """kill -9 of every process."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ports(self) -> list[str]:
        """Addresses that are listened on."""
        sockets = _run(f"ip netns exec {self.namespace} ss -Hltn")
        return [line.split()[3] for line in sockets.splitlines()]

    def start(
        self,
        command: Sequence[str],
        log: Path,
        cwd: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        mounts: Mapping[Path, Path] | None = None,
        monotonic: int = 0,
    ) -> "Started":
        """Start a command. `mounts`: what is seen at a path, by path; `monotonic`: seconds that the
        monotonic clock is ahead."""
        binds = {Path("/etc/hosts"): self._network.names, **(mounts or {})}
        steps = [f"hostname {self.name}"]
        steps += [f"mount --bind {source} {target}" for target, source in binds.items()]
        shell = " && ".join([*steps, 'exec "$@"'])
        unshare = ["unshare", "--uts", "--mount"]
        if monotonic:
            unshare += ["--time", "--monotonic", str(monotonic), "--fork"]
        mark = uuid.uuid4().hex
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *unshare, "sh", "-c", shell, "sh",
                 *command],
                cwd=cwd, env=environment() | {MARK: mark} | dict(variables or {}),
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        return Started(self, process, mark, log)


@dataclass
class Started:
    """A launcher that was started on a host."""

    host: Host
    process: subprocess.Popen
    mark: str
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> bool:
        """Whether any of its processes, the launcher or a rank, is there."""
        return self.process.poll() is None or bool(marked(self.mark))

    @property
    def ranks(self) -> int:
        """Number of processes that a launcher gave a rank to."""
        return sum("RANK" in variables for variables in marked(self.mark).values())

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text(errors="replace")


class Network:
    """Context manager: hosts on one bridge; at its end nothing of them is left."""

    def __init__(self, folder: Path, count: int):
        self.namespace, self.names = f"rankcast-{os.getpid()}", folder / "hosts"
        self._count = count

    def __enter__(self) -> list[Host]:
        _run(f"ip netns add {self.namespace}")
        _run(f"ip -n {self.namespace} link add bridge type bridge")
        _run(f"ip -n {self.namespace} link set bridge up")
        self._hosts = [Host(self, index) for index in range(self._count)]
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self._hosts)]
        self.names.write_text("\n".join(lines) + "\n")
        return self._hosts

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            host.kill()
        for name in (*(host.namespace for host in self._hosts), self.namespace):
            _run(f"ip netns delete {name}")
