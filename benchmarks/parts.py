"""`benchmarks.throughput --data`: this project and PEFT on real records, one process a part.

Parts: `single` (documents of `data.max_length` tokens, one a row: the speed to compare with),
`packed`, `unpacked` (as the configuration lays rows), `peft-packed` (by position ids) and
`peft-padded`. A part that fails leaves the others alone.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = {
    "single": "single", "packed": "real", "unpacked": "real", "peft-packed": "peft",
    "peft-padded": "peft",
}  # fmt: skip
"""Who runs each part."""
WARM_UP_OF_PEFT = 3
"""Steps, at most: it compiles nothing."""


@dataclass(frozen=True)
class Job:
    """What to measure."""

    config: str
    data: str
    overrides: Sequence[str]
    records: tuple[int, int] | None
    """(records of a micro-batch, micro-batches of a step) of rows that are not packed; None: as in
    the configuration."""
    warm_up: int
    timeout: float
    """Seconds that a part may take; after half of them in steps it ends with those it has."""
    profile: Path | None
    """Folder of the profiles."""

    def changes(self, part: str) -> list[str]:
        """Overrides of the configuration for a part."""
        packed = part in ("single", "packed", "peft-packed")
        found = [f"data.train={self.data}", f"data.packing={str(packed).lower()}", *self.overrides]
        if not packed and self.records is not None:
            size, count = self.records
            found += [f"data.micro_batch_size={size}", f"data.batch_size={size * count}"]
        return found


def compare(job: Job, parts: Mapping[str, int], out: Path | None) -> bool:
    """Run `parts`, each for as many steps as it says, and print a table; whether all succeeded."""
    found: list[dict[str, Any]] = []
    for part, steps in parts.items():
        found.append(_run(job, part, steps))
        if out is not None:
            out.write_text(json.dumps({"job": job.config, "parts": found}, indent=1))
    print(table(found), flush=True)
    return all("error" not in part for part in found)


def _run(job: Job, part: str, steps: int) -> dict[str, Any]:
    """Figures of a part, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "out.json"
        is_peft = PARTS[part] == "peft"
        warm_up = min(job.warm_up, WARM_UP_OF_PEFT) if is_peft else job.warm_up
        command = [
            sys.executable, "-m", "benchmarks.real_part", part, job.config, "--steps", str(steps),
            "--warm-up", str(warm_up), "--out", str(result), "--seconds", f"{job.timeout // 2:.0f}",
        ]  # fmt: skip
        if job.profile is not None:
            job.profile.mkdir(parents=True, exist_ok=True)
            command += ["--profile", str(job.profile / f"{part}.txt")]
        print(f"--- {part}, {steps} steps", flush=True)
        log = Path(folder) / "log"
        with log.open("w") as stream:
            try:
                code: int | str = subprocess.run(
                    [*command, *job.changes(part)], stdout=stream, stderr=subprocess.STDOUT,
                    timeout=job.timeout,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = f"more than {job.timeout:.0f} s"
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(tail), flush=True)
        # A part whose profile fails has its figures.
        if result.exists():
            return {**json.loads(result.read_text()), "code": code}
        return {"part": part, "error": code, "log": tail}


def table(found: Sequence[dict[str, Any]]) -> str:
    """What was measured, as Markdown."""
    speeds = {part["part"]: part["tokens_per_second"] for part in found if "error" not in part}
    single = speeds.get("single")
    peers = [speed for name, speed in speeds.items() if name.startswith("peft")]
    lines = [
        "| part | tokens/s, mean | median | of single | over PEFT's best | fill | tokens a step | "
        "step, s | slowest / median | compiled: programs, kernels (before) | first step, s | "
        "peak, GiB |",
        "|" + "---|" * 12,
    ]
    for part in found:
        name = part["part"]
        if "error" in part:
            lines.append(f"| {name} | failed: {part['error']} " + "| " * 10 + "|")
            continue
        speed = part["tokens_per_second"]
        of_single = f"{speed / single:.2f}" if single else ""
        over = f"{speed / max(peers):.2f}" if peers and not name.startswith("peft") else ""
        cells = [
            name, f"{speed:,.0f}", f"{part['median_tokens_per_second']:,.0f}", of_single, over,
            f"{part['fill']:.3f}", f"{part['tokens_per_step']:,.0f}",
            f"{part['step_seconds']:.4f}", f"{part['slowest_over_median']:.2f}",
            f"{part['programs']}, {part['kernels']} ({part['programs_before']})",
            f"{part['first_step_seconds']:.1f}", f"{part['peak_gib']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    for part in found:
        lines += [f"{part['part']}: {line}" for line in part.get("about", [])]
    return "\n".join(lines)
