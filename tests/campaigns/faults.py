"""Break runs on purpose, for real, and count what is lost.

    python -m tests.campaigns.faults OUT [--kills 50] [--seed 0] [--only kill,disk,…]
        [--launchers torchrun] [--gpus 0,1] [section.key=value ...]

Every run has two processes on a CPU, or one on each GPU given. After each fault: no process is
left, every complete checkpoint still verifies, and the run, started again, ends with the losses of
an undisturbed one, to the last bit (on GPUs, whose sums have no fixed order, to 1e-4). Prints a
Markdown table; OUT/faults.json holds the single faults. Needs root for the file systems it mounts
(a full and a read-only one).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, finish, losses, quick_config, ranks_of, start
from trainer.checkpoint import store
from trainer.records.heartbeat import read_heartbeat

SCRIPT = ROOT / "launch/train.py"
STEPS, EVERY, TIMEOUT = 60, 5, 10

Fault = dict[str, Any]


class Campaign:
    """The folder, the dice, where runs take place, and the undisturbed ones to compare with."""

    def __init__(self, out: Path, seed: int, launchers: list[str], gpus: str, changes: list[str]):
        self.out, self.dice = out, random.Random(seed)
        self.launchers, self.gpus, self.changes = launchers, gpus, changes
        self.ranks = range(len(gpus.split(",")) if gpus else 2)
        self.faults: list[Fault] = []
        out.mkdir(parents=True, exist_ok=True)

    def config(self, name: str, folder: Path, *overrides: str) -> Path:
        """A configuration file of a run in `folder`."""
        config = quick_config(
            self.out, f"run.name={name}", f"run.dir={folder}", "engine.kind=auto",
            f"run.steps={STEPS}", f"checkpoint.every={EVERY}", "data.eval=null",
            "method.kind=lelora", "model.quantization=nf4", "data.batch_size=4",
            f"engine.timeout={TIMEOUT}", "model.dtype=float32", *overrides, *self.changes,
        )  # fmt: skip
        file = self.out / f"{name}.yaml"
        file.write_text(config.to_yaml())
        return file

    def begin(self, launcher: str, config: Path, **variables: str) -> subprocess.Popen:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            return start(launcher, len(self.ranks), SCRIPT, "--config", str(config), gpus=self.gpus)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def undisturbed(self, launcher: str, *overrides: str, steps: int = STEPS) -> list[float]:
        """Losses of a run that nothing happens to."""
        folder = self.out / "undisturbed" / f"{launcher}-{steps}"
        if not (folder / "adapter").is_dir():
            config = self.config(folder.name, folder.parent, f"run.steps={steps}", *overrides)
            code, _, err = finish(self.begin(launcher, config), seconds=900)
            assert code == 0, err[-3000:]
        return losses(folder)

    def same(self, found: list[float], launcher: str, **steps: int) -> bool:
        """Whether these are the losses of a run that nothing happened to."""
        expected = self.undisturbed(launcher, **steps)
        precision = 1e-4 if self.gpus else 0.0
        return len(found) == len(expected) and all(
            abs(a - b) <= precision * b for a, b in zip(found, expected, strict=True)
        )

    def note(self, fault: str, problem: str, lost: int | None, said: str = "") -> None:
        """One fault: what went wrong in spite of everything ('' : nothing), steps lost."""
        self.faults.append({"fault": fault, "problem": problem, "lost": lost, "said": said})
        (self.out / "faults.json").write_text(json.dumps(self.faults, indent=1))
        print(f"{len(self.faults):4d} {fault}: {problem or 'survived'}"
              f"{'' if lost is None else f', {lost} steps lost'}  {said}", flush=True)  # fmt: skip


def step_of(run: Path) -> int:
    """The last step that was logged."""
    file = run / "metrics.jsonl"
    return max(0, file.read_text().count("\n")) if file.exists() else 0


def until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> bool:
    """Wait for a condition; False where the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return True


def checkpoints(run: Path) -> list[int]:
    """Steps of the complete checkpoints; raises BadCheckpoint where one of them is not intact."""
    found = store.complete(run / "checkpoints")
    return [store.verify(path)["step"] for path in found]


def left_behind(process: subprocess.Popen) -> str:
    deadline = time.monotonic() + 5
    while ranks_of(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    return f"ranks {sorted(ranks_of(process))} left behind; " if ranks_of(process) else ""


def last_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith(("error:", "stopped:"))]
    return lines[0].split("(/")[0][:160] if lines else ""


def go_on(campaign: Campaign, launcher: str, config: Path, run: Path) -> tuple[str, int, str]:
    """Start a run again: (what is wrong with it, the step it went on from, what it said)."""
    process = campaign.begin(launcher, config)
    code, out, err = finish(process, seconds=600)
    resumed = [line for line in out.splitlines() if line.startswith("resumed")]
    origin = int(resumed[0].rsplit(" ", 1)[1]) if resumed else 0
    damaged = "; ".join(line for line in out.splitlines() if line.startswith("damaged"))
    if code != 0:
        return f"ended in {code}: {last_line(err)}", origin, damaged
    if not campaign.same(losses(run), launcher):
        return "other losses than undisturbed", origin, damaged
    return "", origin, damaged


# --- faults ---------------------------------------------------------------------------------------


def kill(campaign: Campaign, kills: int) -> None:
    """kill -9 of a random rank at random moments of one long run, every third while it saves."""
    launcher, steps = campaign.launchers[0], 20 * kills
    run = campaign.out / "runs/killed"
    config = campaign.config("killed", run.parent, f"run.steps={steps}", "log.progress=plain")
    for number in range(kills):
        process = campaign.begin(launcher, config)
        saving = number % 3 == 2
        until(lambda: read_heartbeat(run).get("pid") in ranks_of(process).values(), process)
        origin = max(checkpoints(run), default=0)
        if saving:
            alive = until(lambda: any((run / "checkpoints").glob(".step-*")), process)
        else:
            alive = until(lambda: step_of(run) > origin, process)
            time.sleep(campaign.dice.uniform(0, 1 if campaign.gpus else 2.5))
        victim = campaign.dice.choice(campaign.ranks)
        if not alive or process.poll() is not None:
            campaign.note("kill -9", "the run ended before it was killed", None)
            break
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        reached = step_of(run)
        code, _, _ = finish(process, seconds=120)
        problem = left_behind(process) + ("" if code else "exit code 0; ")
        complete = checkpoints(run)
        problem += "" if complete or reached < 2 * EVERY else "no checkpoint; "
        lost = reached - max(complete, default=0)
        moment = "while saving" if saving else "at random"
        campaign.note(f"kill -9, {moment}", problem, lost, f"rank {victim} at step {reached}")
    code, _, err = finish(campaign.begin(launcher, config), seconds=1800)
    same = code == 0 and campaign.same(losses(run), launcher, steps=steps)
    campaign.note("kill -9, the run in the end", "" if same else f"{code} {last_line(err)}", None,
                  f"{steps} steps, same losses as undisturbed")  # fmt: skip


def ask(campaign: Campaign, _: int) -> None:
    """Signals that ask to stop, at random moments: nothing is lost."""
    for launcher in campaign.launchers:
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            run = campaign.out / f"runs/{launcher}-{name}"
            config = campaign.config(run.name, run.parent, "log.progress=plain")
            process = campaign.begin(launcher, config)
            goal = campaign.dice.randrange(3, STEPS - 20)
            until(lambda: step_of(run) >= goal, process)
            os.kill(ranks_of(process)[campaign.dice.choice(campaign.ranks)], getattr(signal, name))
            code, _, err = finish(process, seconds=120)
            problem = left_behind(process) + ("" if code else "exit code 0; ")
            reached, said = step_of(run), last_line(err)
            wrong, origin, _ = go_on(campaign, launcher, config, run)
            campaign.note(f"{name} to one rank", problem + wrong, reached - origin,
                          f"{launcher}, {said}")  # fmt: skip


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def disk(campaign: Campaign, _: int) -> None:
    """The disk becomes full, or read-only, while a run goes on."""
    for launcher in campaign.launchers:
        for what in ("full disk", "read-only folder"):
            folder = campaign.out / f"disk-{launcher}-{what.split()[0]}"
            with small_disk(folder, "256m"):
                run = folder / "run"
                config = campaign.config("run", folder, "log.progress=plain")
                process = campaign.begin(launcher, config)
                until(lambda: len(store.complete(run / "checkpoints")) >= 2, process)
                if what == "full disk":
                    with (folder / "filler").open("wb") as filler:
                        try:
                            while True:
                                filler.write(bytes(2**16))
                                filler.flush()
                        except OSError:
                            pass
                else:  # a mount over itself: what is open stays writable, nothing new can be
                    mount("--bind", folder, folder)
                    mount("-o", "remount,bind,ro", folder)
                code, _, err = finish(process, seconds=120)
                problem = left_behind(process) + ("" if code else "exit code 0; ")
                reached, said = step_of(run), last_line(err)
                problem += "" if said else "no error line; "
                if what == "full disk":
                    (folder / "filler").unlink()
                else:
                    subprocess.run(["umount", folder], check=True)
                wrong, origin, _ = go_on(campaign, launcher, config, run)
                campaign.note(what, problem + wrong, reached - origin, f"{launcher}, {said}")


def damage(campaign: Campaign, _: int) -> None:
    """Files of the newest checkpoint truncated, one bit flipped, or gone, while no run goes on."""

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: campaign.dice.randrange(file.stat().st_size)])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[campaign.dice.randrange(len(content))] ^= 1 << campaign.dice.randrange(8)
        file.write_bytes(content)

    launcher = campaign.launchers[0]
    source = campaign.out / f"runs/{launcher}-SIGTERM"
    if not source.exists():
        ask(campaign, 0)
    for what, break_ in (("truncated", truncate), ("bit-flipped", flip), ("missing", Path.unlink)):
        for kind in ("*.safetensors", "state.json", "manifest.json"):
            run = campaign.out / f"runs/{what}-{kind.strip('*.')}"
            shutil.copytree(source, run)
            for part in ("adapter", "README.md"):
                target = run / part
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            config = campaign.config(run.name, run.parent, "log.progress=plain")
            newest = store.complete(run / "checkpoints")[-1]
            break_(campaign.dice.choice(sorted(newest.glob(kind))))
            wrong, origin, said = go_on(campaign, launcher, config, run)
            named = newest.name in said or (kind, what) == ("manifest.json", "missing")
            wrong += "" if named else "; the damage was not mentioned"
            wrong += "; went on from a damaged checkpoint" if origin >= STEPS else ""
            campaign.note(f"{kind} {what}", wrong, STEPS - origin, said[-120:])


def stall(campaign: Campaign, _: int) -> None:
    """A rank that stands still (SIGSTOP): the other leaves in time and names it."""
    for launcher in campaign.launchers:
        for rank in campaign.ranks if len(campaign.ranks) == 2 else ():
            run = campaign.out / f"runs/stall-{launcher}-{rank}"
            config = campaign.config(run.name, run.parent, "log.progress=plain")
            process = campaign.begin(launcher, config)
            until(lambda: step_of(run) >= 2 * EVERY, process)
            ranks = ranks_of(process)
            os.kill(ranks[rank], signal.SIGSTOP)
            began = time.monotonic()
            until(lambda: 1 - rank not in ranks_of(process), process)
            took = time.monotonic() - began
            code, _, err = finish(process, seconds=120)  # the launcher ends the one that stands
            problem = left_behind(process) + ("" if code else "exit code 0; ")
            problem += "" if f"lost rank {rank} " in err else "not named; "
            patience = TIMEOUT + (20 if campaign.gpus else 10)  # GPUs wait: the watchdog looks on
            problem += "" if took < patience else f"took {took:.0f} s; "
            reached, said = step_of(run), last_line(err)
            wrong, origin, _ = go_on(campaign, launcher, config, run)
            campaign.note("stalled rank", problem + wrong, reached - origin,
                          f"{launcher}, rank {rank}, {took:.0f} s: {said}")  # fmt: skip


def inside(campaign: Campaign, _: int) -> None:
    """A loss that is not a number, and a clock that is set back."""
    folder = str(Path(__file__).parent / "inject")
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    for launcher in campaign.launchers:
        for what in ("nan", "clock"):
            run = campaign.out / f"runs/{what}-{launcher}"
            config = campaign.config(run.name, run.parent, "log.progress=plain")
            process = campaign.begin(
                launcher, config, PYTHONPATH=path, RANKCAST_INJECT=f"{what}:{EVERY + 2}"
            )
            code, out, err = finish(process, seconds=300)
            problem = f"ended in {code}: {last_line(err)}" if code else ""
            lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
            if what == "nan":
                missing = [line["step"] for line in lines if line["loss"] is None]
                problem += "" if missing == [EVERY + 3] else f"not finite: {missing}; "
                problem += "" if "step skipped" in out else "not mentioned; "
                problem += "" if lines[-1]["skipped_steps"] == 1 else "not skipped; "
            elif not campaign.same([line["loss"] for line in lines], launcher):
                problem += "other losses; "
            said = next((x for x in out.splitlines() if "skipped" in x), "")
            campaign.note({"nan": "NaN in a batch", "clock": "clock set back a day"}[what],
                          problem, 0, f"{launcher} {said}")  # fmt: skip


def twice(campaign: Campaign, _: int) -> None:
    """Two runs started on one folder."""
    run = campaign.out / "runs/twice"
    config = campaign.config("twice", run.parent, "log.progress=plain", "run.steps=9999")
    first = campaign.begin(campaign.launchers[0], config)
    until(lambda: step_of(run) >= 2, first)
    code, _, err = finish(campaign.begin(campaign.launchers[0], config))
    problem = "" if code and "is in use by process" in err else f"{code}: {last_line(err)}"
    os.kill(ranks_of(first)[0], signal.SIGTERM)
    finish(first)
    problem += "" if len(losses(run)) == max(checkpoints(run)) else "; the first one was disturbed"
    campaign.note("two runs on one folder", problem, 0, last_line(err))


PARTS = {
    "ask": ask, "damage": damage, "disk": disk, "stall": stall, "inside": inside, "twice": twice,
    "kill": kill,
}  # fmt: skip


def table(faults: list[Fault]) -> str:
    """Faults by kind: injected, survived, steps lost."""
    rows = ["| fault | injected | survived | steps lost, mean (most) |", "|---|---|---|---|"]
    for kind in dict.fromkeys(fault["fault"] for fault in faults):
        members = [fault for fault in faults if fault["fault"] == kind]
        lost = [fault["lost"] for fault in members if fault["lost"] is not None]
        mean = f"{sum(lost) / len(lost):.1f} ({max(lost)})" if lost else ""
        survived = sum(not fault["problem"] for fault in members)
        rows.append(f"| {kind} | {len(members)} | {survived} | {mean} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", default="torchrun,deepspeed")
    parser.add_argument("--gpus", default="", help="one or two, by comma; none: a CPU")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="of every run")
    arguments = parser.parse_intermixed_args()
    campaign = Campaign(
        arguments.out.resolve(), arguments.seed, arguments.launchers.split(","), arguments.gpus,
        arguments.changes,
    )  # fmt: skip
    for part in arguments.only.split(","):
        PARTS[part](campaign, arguments.kills)
    print(table(campaign.faults))


if __name__ == "__main__":
    main()
