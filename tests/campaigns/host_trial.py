"""A run over hosts: started, broken, looked at, and started again."""

import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaigns.faults import checkpoints, step_of
from tests.campaigns.namespaces import Host, Started
from tests.campaigns.processes import left_over, marked
from tests.helpers import ROOT, losses, python, quick_config

SCRIPT = ROOT / "launch/train.py"
STEPS, EVERY, TIMEOUT, MARGIN = 40, 5, 30, 15
PORT = "29500"
START = 240  # seconds that processes may take to come up on a busy machine


@dataclass
class Trial:
    """A run over hosts, and what was found out about it."""

    out: Path
    name: str
    engine: str
    launcher: str
    hosts: list[Host]
    elastic: bool = False
    problems: list[str] = field(default_factory=list)
    said: str = ""
    seconds: float | None = None
    """From the fault, or from what was said first of it, until the last host had ended."""

    @property
    def run(self) -> Path:
        return self.out / "runs" / self.name

    def config(self, file: str, *changes: str, name: str = "", folder: str = "runs") -> Path:
        """A configuration file."""
        name = name or self.name
        config = quick_config(
            self.out, f"run.name={name}", f"run.dir={self.out / folder}", f"run.steps={STEPS}",
            f"engine.kind={self.engine}", f"checkpoint.every={EVERY}", "method.kind=lelora",
            "model.quantization=nf4", "model.dtype=float32", "data.batch_size=6", "data.eval=null",
            f"model.id={ROOT}/configs/quickstart/model", "log.progress=plain",
            f"data.train={ROOT}/configs/quickstart/train.jsonl", f"engine.timeout={TIMEOUT}",
            "engine.device=cpu", *changes,
        )  # fmt: skip
        path = self.out / f"{name}-{file}.yaml"
        path.write_text(config.to_yaml())
        return path

    def command(self, rank: int, hosts: int, config: Path) -> tuple[list[str], dict[str, str]]:
        """(command line, variables) that start this trial's launcher on a host."""
        script, address = [str(SCRIPT), "--config", str(config)], self.hosts[0].address
        if self.launcher == "none":  # as srun starts ranks
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(hosts), "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address, "MASTER_PORT": PORT,
            }  # fmt: skip
            return [sys.executable, *script], variables
        if self.launcher == "deepspeed":
            file = self.out / f"{self.name}.hostfile"
            lines = [f"{host.name} slots=1" for host in self.hosts[:hosts]]
            file.write_text("\n".join(lines) + "\n")
            head = [
                str(Path(sys.executable).parent / "deepspeed"), "--no_ssh", "--hostfile", str(file),
                "--node_rank", str(rank), "--master_addr", address, "--master_port", PORT,
            ]  # fmt: skip
            return [*head, *script], {}
        head = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
        if self.elastic:
            head += [
                "--nnodes", f"1:{len(self.hosts)}", "--rdzv_backend", "c10d", "--rdzv_id", "run",
                "--rdzv_endpoint", f"{address}:{PORT}", "--rdzv_conf", "last_call_timeout=5",
                "--max_restarts", "2",
            ]  # fmt: skip
        else:
            head += ["--nnodes", str(hosts), "--node_rank", str(rank), "--master_addr", address,
                     "--master_port", PORT]  # fmt: skip
        return [*head, *script], {}

    def begin(
        self,
        *changes: str,
        only: Sequence[int] | None = None,
        world: int | None = None,
        last: Mapping[str, Any] | None = None,
    ) -> list[Started]:
        """Start on the hosts (`only`: on those); `last`: of the last host, other `changes` of its
        configuration, `variables`, `mounts` or `cwd`."""
        started = []
        chosen = list(range(len(self.hosts)) if only is None else only)
        for rank in chosen:
            host, special = self.hosts[rank], dict(last or {}) if rank == chosen[-1] else {}
            config = self.config(host.name, *changes, *special.pop("changes", ()))
            command, variables = self.command(rank, world or len(self.hosts), config)
            variables |= special.pop("variables", {})
            (self.out / "logs").mkdir(exist_ok=True)
            log = self.out / "logs" / f"{self.name}-{host.name}-{time.time_ns()}"
            started.append(host.start(command, log, variables=variables, **special))
        return started

    def until(self, condition: Callable[[], bool], started: list[Started]) -> None:
        """Wait for a condition; a start that ends before is an error of the campaign."""
        deadline = time.monotonic() + START
        while not condition():
            ended = [one for one in started if one.process.poll() is not None]
            assert not ended, ended[0].err[-3000:]
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    def until_step(self, step: int, started: list[Started]) -> None:
        self.until(lambda: step_of(self.run) >= step, started)

    def until_said(self, started: list[Started]) -> None:
        """Wait until a host says that the start is refused."""
        deadline = time.monotonic() + START
        while not any("error:" in one.err for one in started):
            assert time.monotonic() < deadline, "nothing was said"
            time.sleep(0.05)

    def ends(self, started: list[Started], pattern: str, since: float, patience: float) -> None:
        """Every start ends in time, says a line that matches, and leaves nothing behind."""
        deadline = since + patience
        while time.monotonic() < deadline and any(one.running for one in started):
            time.sleep(0.2)
        self.seconds = time.monotonic() - since
        for one in started:
            names = [variables.get("RANK", "launcher") for variables in marked(one.mark).values()]
            if left_over(one.mark, 0):
                self.problems.append(f"{one.host.name}: ranks {names} left")
            elif ports := one.host.ports():
                self.problems.append(f"{one.host.name}: listens on {ports}")
            lines = [x for x in one.err.splitlines() if x.startswith(("error:", "stopped:"))]
            named = [line for line in lines if re.search(pattern, line)]
            self.said = self.said or (named[0] if named else "")
            if not named:
                self.problems.append(f"{one.host.name}: {pattern!r} not in {lines}")
            if one.process.poll() == 0:
                self.problems.append(f"{one.host.name}: exit code 0")

    def undisturbed(self, processes: int) -> list[float]:
        """Losses of a run that nothing happens to."""
        name = f"{self.engine}{processes}"
        run = self.out / "undisturbed" / name
        if not (run / "adapter").is_dir():
            shutil.rmtree(run, ignore_errors=True)
            config = self.config("undisturbed", name=name, folder="undisturbed")
            code, _, err = python(SCRIPT, "--config", config, processes=processes, seconds=900)
            assert code == 0, err[-3000:]
        return losses(run)

    def goes_on_forked(self) -> None:
        """As `goes_on`, with the ranks on one host, forked: nothing but the start was wrong."""
        config = self.config("again")
        code, _, err = python(SCRIPT, "--config", config, processes=len(self.hosts), seconds=900)
        if code or losses(self.run) != self.undisturbed(len(self.hosts)):
            self.problems.append(f"again: {code}, {err[-300:]}")

    def goes_on(self, started: list[Started] | None = None, precision: float = 0.0) -> None:
        """The run (started again, unless it is given) ends with the losses of an undisturbed one."""
        reached = max(checkpoints(self.run), default=0) if started is None else 0
        again = self.begin() if started is None else started
        deadline = time.monotonic() + 2 * START
        while time.monotonic() < deadline and any(one.running for one in again):
            time.sleep(0.2)
        for one in again:
            pids, code = left_over(one.mark, 0), one.process.poll()
            if pids or code != 0 or one.host.ports():
                lines = [x for x in one.err.splitlines() if x.startswith(("error:", "stopped:"))]
                self.problems.append(f"again on {one.host.name}: {code}, {pids} left, {lines}")
                return
        if reached and f"at step {reached}\n" not in "".join(one.out for one in again):
            self.problems.append(f"did not resume at step {reached}")
        found, expected = losses(self.run), self.undisturbed(len(self.hosts))
        if len(found) != STEPS or any(
            abs(a - b) > precision * b for a, b in zip(found, expected, strict=True)
        ):
            self.problems.append("other losses than undisturbed")


@dataclass(frozen=True)
class Case:
    engine: str
    hosts: int
    launcher: str
    what: Callable[[Trial], None]
    elastic: bool = False
