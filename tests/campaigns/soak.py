"""Sixty interrupted starts over engines, numbers of processes and launchers.

    python -m tests.campaigns.soak OUT [--starts 5] [--seed 0] [--only lelora-ddp2,…]

Twelve runs, whose methods decide in every step. Each is interrupted `--starts` times at a random
moment, by a random signal to a rank, the launcher, or the launcher's process group; the next start,
under a random launcher, goes on; the last one ends the run. Losses and decisions are then those of
an undisturbed run, to the last bit; those of a run whose every start has another engine and number
of processes are compared to one process's, within 1e-4. After every start no process and no
listening port is left. Goes on where it was stopped; prints a Markdown table; OUT/soak.json holds
the single starts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.faults import checkpoints, last_line, step_of, until
from tests.campaigns.processes import left_over, listening, marked, still_open
from tests.helpers import ROOT, finish, losses, python, quick_config, ranks_of, start

SCRIPT = ROOT / "launch/train.py"
STEPS, EVERY, TIMEOUT = 60, 5, 60
METHODS = {
    "lelora": ["method.kind=lelora"],
    "lalora": ["method.kind=lalora", "method.gamma=5", "method.every=1"],
    "weightlora": ["method.kind=weightlora", "method.warmup_steps=30"],
    "adalora": ["method.kind=adalora", "method.delta_t=1"],
}
MIXED = [
    ("single", 1),
    *((kind, n) for kind in ("ddp", "fsdp2", "deepspeed", "peer") for n in (2, 3)),
]
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGKILL", "SIGSTOP and SIGKILL")
TARGETS = ("a rank", "the launcher", "the process group")


@dataclass(frozen=True)
class Chain:
    """A run of several starts; `engine` None: another one in every start."""

    method: str
    engine: str | None
    processes: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.engine or 'mixed'}{self.processes or ''}"


CHAINS = [
    Chain("lelora", "single", 1), Chain("lelora", "ddp", 2), Chain("lelora", "fsdp2", 2),
    Chain("lelora", "deepspeed", 2), Chain("lelora", "peer", 3), Chain("lelora", None, 0),
    Chain("lalora", "fsdp2", 3), Chain("lalora", "peer", 2), Chain("lalora", None, 0),
    Chain("weightlora", "deepspeed", 3), Chain("weightlora", None, 0), Chain("adalora", "ddp", 3),
]  # fmt: skip


@dataclass
class Start:
    """What was done to a start, and what came of it."""

    chain: str
    engine: str
    processes: int
    launcher: str
    signal: str
    target: str
    moment: str
    problem: str = ""
    """What went wrong in spite of everything; '' where nothing did."""
    seconds: float = 0.0
    """From the signal until no process was left."""
    reached: int = 0
    """Steps logged when it ended."""
    lost: int = 0
    """Of them, those after its newest checkpoint."""


def configuration(out: Path, name: str, method: str, engine: str, folder: str) -> Path:
    config = quick_config(
        out, f"run.name={name}", f"run.dir={out / folder}", f"engine.kind={engine}",
        f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "data.eval=null", "data.batch_size=6",
        "data.micro_batch_size=2", "model.quantization=nf4", "model.dtype=float32",
        f"engine.timeout={TIMEOUT}", "engine.device=cpu", "log.progress=plain", *METHODS[method],
    )  # fmt: skip
    file = out / f"{name}-{engine}.yaml"
    file.write_text(config.to_yaml())
    return file


def results(run: Path) -> tuple[list[float], list[str]]:
    """(losses, digests of the decisions)."""
    lines = (run / "allocation.jsonl").read_text().splitlines()
    return losses(run), [json.loads(line)["digest"] for line in lines]


def undisturbed(
    out: Path, method: str, engine: str, processes: int
) -> tuple[list[float], list[str]]:
    """Losses and decisions of a run that nothing happens to."""
    run = out / "undisturbed" / f"{method}-{engine}{processes}"
    if not (run / "adapter").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        file = configuration(out, run.name, method, engine, "undisturbed")
        code, _, err = python(SCRIPT, "--config", file, processes=processes, seconds=1200)
        assert code == 0, err[-3000:]
    return results(run)


def interrupt(process: subprocess.Popen, told: Start, dice: random.Random) -> None:
    """Send the signal to its target."""
    ranks = ranks_of(process) if told.launcher != "python" else {0: process.pid}
    rank = ranks[dice.choice(sorted(ranks))] if ranks else process.pid
    with suppress(ProcessLookupError):
        for name in told.signal.split(" and "):
            number = getattr(signal, name)
            if told.target == "the process group":
                os.killpg(process.pid, number)
            else:
                os.kill(rank if told.target == "a rank" else process.pid, number)
            if number == signal.SIGSTOP:
                time.sleep(dice.uniform(0.1, 3))


def disturbed(out: Path, run: Path, told: Start, file: Path, dice: random.Random) -> Start | None:
    """Begin a start and interrupt it; None where it ended before."""
    origin, began = step_of(run), time.monotonic()
    process = start(told.launcher, told.processes, SCRIPT, "--config", str(file))
    if told.moment == "at start":
        deadline = began + dice.uniform(0, 15)
        alive = until(lambda: time.monotonic() > deadline, process)
    else:
        goal = origin + dice.randrange(1, 9)
        alive = until(lambda: origin < goal <= step_of(run), process, seconds=600)
        time.sleep(dice.uniform(0, 0.2))
    sockets = listening(list(marked(process.mark)))
    if not alive or process.poll() is not None:
        code, _, err = finish(process)
        told.problem = f"refused, {code}: {last_line(err)}" if code else ""
        return told if code else None
    interrupt(process, told, dice)
    signalled = time.monotonic()
    orphans = left_over(process.mark, TIMEOUT + 15)
    told.seconds = round(time.monotonic() - signalled, 1)
    code, _, err = finish(process)
    told.reached = step_of(run)
    told.lost = told.reached - max(checkpoints(run), default=0)
    told.problem = f"processes {orphans} left; " if orphans else ""
    ports = still_open(sockets)
    told.problem += f"ports {ports} left; " if ports else ""
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs" / f"{told.chain}-{time.time_ns()}").write_text(f"{told}\n{code}\n{err}")
    return told


def drawn(chain: Chain, dice: random.Random) -> tuple[str, int, str]:
    """(engine, processes, launcher) of a start."""
    engine, processes = (chain.engine, chain.processes) if chain.engine else dice.choice(MIXED)
    launchers = ["python"] if engine == "single" else ["torchrun", "deepspeed"]
    return engine, processes, dice.choice(launchers)


def soak(out: Path, chain: Chain, interruptions: int, seed: int) -> dict[str, Any]:
    """A run, interrupted again and again, then ended: its starts, and what differs in the end."""
    dice = random.Random(f"{seed}-{chain.name}")
    run, starts = out / "runs" / chain.name, []
    shutil.rmtree(run, ignore_errors=True)
    while len(starts) < interruptions:
        engine, processes, launcher = drawn(chain, dice)
        file = configuration(out, chain.name, chain.method, engine, "runs")
        told = Start(
            chain.name, engine, processes, launcher, dice.choice(SIGNALS), dice.choice(TARGETS),
            "at start" if dice.random() < 0.25 else "in a step",
        )  # fmt: skip
        if disturbed(out, run, told, file, dice) is None:
            break
        starts.append(told)
        print(f"{told}", flush=True)
        if told.problem.startswith("refused"):
            break
    engine, processes, launcher = drawn(chain, dice)
    file = configuration(out, chain.name, chain.method, engine, "runs")
    code, _, err = finish(start(launcher, processes, SCRIPT, "--config", str(file)), seconds=1200)
    if code:
        return {
            "starts": [asdict(told) for told in starts],
            "end": f"ended in {code}: {last_line(err)}",
        }
    reference = (chain.engine, chain.processes) if chain.engine else ("single", 1)
    (expected, decided), (found, decisions) = (
        undisturbed(out, chain.method, *reference),
        results(run),
    )
    return {
        "starts": [asdict(told) for told in starts], "end": "", "steps": len(found),
        "losses": max(abs(a - b) / b for a, b in zip(found, expected, strict=True)),
        "decided": len(decided),
        "decisions": sum(a != b for a, b in zip(decisions, decided, strict=True)),
    }  # fmt: skip


def table(chains: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| run | interrupted starts | no process, port or refusal left | longest until all had ended "
        "| losses compared, largest difference | decisions compared, different |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in chains.items():
        starts = result["starts"]
        clean = sum(not told["problem"] for told in starts)
        longest = max((told["seconds"] for told in starts), default=0)
        compared = result["end"] or (
            f"{result['steps']}, {result['losses']:.1g} | {result['decided']}, {result['decisions']}"
        )
        rows.append(f"| {name} | {len(starts)} | {clean} | {longest:.0f} s | {compared} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--starts", type=int, default=5, help="interruptions of every run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(chain.name for chain in CHAINS), help="by comma")
    arguments = parser.parse_args()
    for name in (signal.SIGINT, signal.SIGHUP):  # where they are ignored, starts inherit that
        signal.signal(name, signal.SIG_DFL)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "soak.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    for chain in CHAINS:
        if chain.name in arguments.only.split(",") and chain.name not in done:
            done[chain.name] = soak(out, chain, arguments.starts, arguments.seed)
            print(
                chain.name, {k: v for k, v in done[chain.name].items() if k != "starts"}, flush=True
            )
            file.write_text(json.dumps(done, indent=1))
    print(table(done))


if __name__ == "__main__":
    main()
