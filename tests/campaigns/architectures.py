"""Which architectures of the installed transformers train here, and are right?

    python -m tests.campaigns.architectures OUT [--part causal|classification] [--only NAME…]
        [--jobs N] [--without-ranks] [--again] [--table docs/models.md] [--only-table]

Every causal and every sequence-classification architecture is built tiny (`tests/tiny_models.py`)
and checked (`tests/architectures.py`) in a process of its own, which may crash or hang; then it
trains in two processes under FSDP2 and under DeepSpeed ZeRO-3, whose losses are those of one
process. Outcomes are lines of OUT/outcomes.jsonl; what is there already is not run again. At the
end the table is printed, or written into the file given. The exit code is 1 where anything was
wrong or crashed.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.architectures import CHECKS, ENGINES, Case, ranks_outcome
from tests.forkserver import Forked
from tests.helpers import ROOT, SERVER, environment, fork_ranks
from tests.tiny_models import PARTS, architectures, not_buildable

PATIENCE = 240.0
"""Seconds after which processes are taken to hang."""
COLUMNS = [*CHECKS, *ENGINES]
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

Outcomes = dict[str, dict[str, Any]]
"""By check: status (ok, refused, wrong, crashed), message, seconds."""


@dataclass
class Job:
    """What runs for one architecture: its checks in one process, then its ranks under engines."""

    name: str
    part: str
    folder: Path
    outcomes: Outcomes
    processes: list[Forked]
    deadline: float
    engines: list[str]
    """Engines that the processes are ranks of, in turn; empty: they run the checks."""

    @property
    def case(self) -> Case:
        return Case(self.name, self.part, self.folder)

    def start_checks(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        arguments = ["-m", "tests.architectures", self.name, self.part, str(self.folder)]
        self.processes = [SERVER.fork(arguments, self.folder / "log", environment(), ROOT)]
        self.deadline, self.engines = time.monotonic() + PATIENCE, []

    def start_ranks(self, engines: list[str]) -> None:
        folder = self.folder / f"ranks-{engines[0]}"
        folder.mkdir()
        cases = {
            engine: ("train", self.case.config(engine, f"engine.kind={ENGINES[engine]}"))
            for engine in engines
        }
        dumped = {engine: (kind, config.model_dump()) for engine, (kind, config) in cases.items()}
        (folder / "cases.json").write_text(json.dumps(dumped))
        arguments = ("-m", "tests.world.worker", str(folder / "cases.json"), str(folder))
        self.processes = fork_ranks(2, folder, *arguments)
        self.deadline, self.engines = time.monotonic() + PATIENCE, engines

    def ended(self) -> bool:
        """Whether its processes have ended; those of a rank that is lost, or that hang, are."""
        running = [process for process in self.processes if process.running]
        lost = len(running) < len(self.processes) and any(
            process.code for process in self.processes if process not in running
        )
        late = time.monotonic() > self.deadline
        if running and (late or (lost and time.monotonic() > self.deadline - PATIENCE + 30)):
            for process in running:
                process.kill()
        return not running or late or (lost and not any(p.running for p in self.processes))

    def why(self) -> str:
        """What is known about processes that ended without a result."""
        if time.monotonic() > self.deadline:
            return f"no end after {PATIENCE:.0f} s"
        lines = [
            line for process in self.processes for line in process.output()[1].splitlines() if line
        ]
        return f"died: {lines[-1] if lines else 'without a word'}"

    def go_on(self, with_ranks: bool) -> bool:
        """Take up the results; whether something more was started."""
        if not self.engines:
            return self._checks_ended() and with_ranks and self._start_ranks(list(ENGINES))
        folder = self.folder / f"ranks-{self.engines[0]}"
        files = [folder / f"{rank}.json" for rank in range(2)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        for position, engine in enumerate(self.engines):
            if not all(engine in results for results in found):
                self.outcomes[engine] = _crash(self.why())
                return self._start_ranks(self.engines[position + 1 :])
            results = [results[engine] for results in found]
            self.outcomes[engine] = ranks_outcome(self.case, engine, results)
        return False

    def _start_ranks(self, engines: list[str]) -> bool:
        if engines:
            self.start_ranks(engines)
        return bool(engines)

    def _checks_ended(self) -> bool:
        """Take up the outcomes of the checks; whether the architecture trains."""
        file = self.folder / "outcomes.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        for line in map(json.loads, lines):
            self.outcomes[line.pop("check")] = line
        train = self.outcomes.get("train", {}).get("status")
        missing = [check for check in CHECKS if check not in self.outcomes]
        if missing and train != "refused":
            self.outcomes[missing[0]] = _crash(self.why())
        return train == "ok"


def _crash(why: str) -> dict[str, Any]:
    return {"status": "crashed", "message": why[:600], "seconds": PATIENCE}


def run_all(out: Path, todo: list[tuple[str, str]], jobs: int, with_ranks: bool) -> None:
    """Run the architectures, `jobs` of them at a time, and append their outcomes to the file."""
    running: list[Job] = []
    waiting = list(reversed(todo))
    while waiting or running:
        while waiting and len(running) < jobs:
            part, name = waiting.pop()
            job = Job(name, part, out / f"{part}-{name}", {}, [], 0.0, [])
            job.start_checks()
            running.append(job)
        time.sleep(0.05)
        for job in [job for job in running if job.ended()]:
            if job.go_on(with_ranks):
                continue
            running.remove(job)
            for outcome in job.outcomes.values():
                outcome["message"] = outcome["message"].replace(f"{job.folder}/", "")
            line = {"part": job.part, "name": job.name, "outcomes": job.outcomes, "made": made()}
            with (out / "outcomes.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{job.part} {job.name}: {verdict(job.outcomes)} {note(job.outcomes)}", flush=True
            )
            shutil.rmtree(job.folder)


# --- the table ------------------------------------------------------------------------------------


def verdict(outcomes: Outcomes) -> str:
    """clean: every check is right, and packing right or refused; refused: some other check is."""
    of = {check: outcome["status"] for check, outcome in outcomes.items()}
    for bad in ("crashed", "wrong"):
        if bad in of.values():
            return bad
    return "refused" if "refused" in [of[c] for c in of if c != "packing"] else "clean"


def note(outcomes: Outcomes) -> str:
    """What was not ok, or not without a word, by sentence."""
    checks: dict[str, list[str]] = {}
    for check, outcome in outcomes.items():
        expected = "refused" if check == "packing" else "ok"
        if outcome["status"] not in ("ok", expected) or (
            outcome["status"] == "ok" and outcome["message"]
        ):
            checks.setdefault(outcome["message"], []).append(f"{check} {outcome['status']}")
    return "; ".join(f"{', '.join(c)}: {message}" for message, c in checks.items())


def made() -> str:
    """The day and the versions, which each line of outcomes has."""
    packages = ("torch", "transformers", "peft", "deepspeed")
    return f"{datetime.date.today()}, {', '.join(f'{p} {version(p)}' for p in packages)}"


def _lines(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines by (part, name); the last one of an architecture counts."""
    file = out / "outcomes.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {(line["part"], line["name"]): line for line in lines}


def read(out: Path) -> dict[tuple[str, str], Outcomes]:
    """Outcomes by (part, name)."""
    return {key: line["outcomes"] for key, line in _lines(out).items()}


def table(out: Path) -> str:
    """The page's section: how it was made, the counts, a table for each part."""
    found = read(out)
    on = sorted({line["made"] for line in _lines(out).values()})
    text = [
        "`make architectures` (`python -m tests.campaigns.architectures OUT --table docs/models.md`), "
        f"on CPUs, in float32, {'; '.join(on)}:",
        "",
        _counts(found),
    ]
    for part in PARTS:
        classes = PARTS[part][0]
        text += ["", f"### {PARTS[part][1].__name__}", ""]
        text.append("| architecture | class | " + " | ".join(COLUMNS) + " |")
        text.append("|---" * (len(COLUMNS) + 2) + "|")
        notes = []
        for name in architectures(part):
            why, outcomes = not_buildable(name, part), found.get((part, name))
            if why is not None:
                cells = ["not built", *[""] * (len(COLUMNS) - 1)]
                notes.append(f"- {name}: not built: {why}")
            elif outcomes is not None:
                cells = [_cell(outcomes.get(column)) for column in COLUMNS]
                notes += [f"- {name}: {note(outcomes)}"] if note(outcomes) else []
            else:
                continue
            text.append(f"| {name} | {classes[name]} | " + " | ".join(cells) + " |")
        text += ["", "What is not clean, and why:", "", *notes] if notes else []
    return "\n".join(text)


def _cell(outcome: dict[str, Any] | None) -> str:
    marks = {"ok": "✓", "refused": "refused", "wrong": "**wrong**", "crashed": "**crashed**"}
    return marks[outcome["status"]] if outcome else ""


def _counts(found: dict[tuple[str, str], Outcomes]) -> str:
    rows = ["| | clean | refused | wrong | crashed | not built |", "|---|---|---|---|---|---|"]
    for part in PARTS:
        verdicts = [verdict(outcomes) for (of, _), outcomes in found.items() if of == part]
        numbers = [verdicts.count(v) for v in ("clean", "refused", "wrong", "crashed")]
        absent = sum(not_buildable(name, part) is not None for name in architectures(part))
        rows.append(f"| {part} | " + " | ".join(map(str, [*numbers, absent])) + " |")
    return "\n".join(rows)


def write_table(page: Path, text: str) -> None:
    """Replace what is between the marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def chosen(part: str | None, only: Iterable[str] | None) -> list[tuple[str, str]]:
    """(part, name) of the architectures asked for that can be built tiny."""
    names = set(only or ())
    found = [
        (of, name)
        for of in ([part] if part else PARTS)
        for name in architectures(of)
        if (not names or name in names) and not_buildable(name, of) is None
    ]
    missing = names - {name for _, name in found}
    if missing:
        sys.exit(f"error: --only: {', '.join(sorted(missing))}: no such architecture, or not built")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=tuple(PARTS))
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--without-ranks", action="store_true", help="leave the two engines out")
    parser.add_argument("--again", action="store_true", help="also those whose outcomes are there")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    there = {} if arguments.again else read(out)
    todo = [key for key in chosen(arguments.part, arguments.only) if key not in there]
    run_all(out, [] if arguments.only_table else todo, arguments.jobs, not arguments.without_ranks)
    SERVER.close()
    found, text = read(out), table(out)
    if arguments.table:
        write_table(arguments.table, text)
    print(_counts(found) if arguments.table else text)
    return int(any(verdict(outcomes) in ("wrong", "crashed") for outcomes in found.values()))


if __name__ == "__main__":
    sys.exit(main())
