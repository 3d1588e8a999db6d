"""Functional correctness of generated programs: HumanEval's and MBPP's tests, and pass@k.

Every program runs in a process of its own (`code_child.py`), with limits of time and memory, in an
empty folder, without network. That guards against accidents, not against malice.
"""

import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.errors import UserError

WARNING = (
    "--run-code runs programs that a model wrote, as this user, on this machine: without network "
    "and new processes, but they can read and delete files; use a container without anything to "
    "lose"
)
_CHILD = Path(__file__).with_name("code_child.py")
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.S)
_MARGIN = 5.0  # seconds beside a program's own, for the start of a process


def program(row: Mapping[str, Any], answer: str) -> str:
    """An answer and its tests: of HumanEval (`prompt`, `test`, `entry_point`) put together as its
    own script does, of MBPP (`test_list`, with `test_setup_code` or `test_imports`) after the
    answer. Of an answer with a block of code in ``` marks, that block; a whole function there takes
    the place of the one that the prompt begins. Raises UserError."""
    fenced = _FENCE.search(answer)
    if fenced is not None:
        answer = fenced.group(1)
    if {"prompt", "test", "entry_point"} <= row.keys():
        prompt, begins = str(row["prompt"]), f"def {row['entry_point']}("
        if fenced is not None and begins in answer:
            prompt = prompt.rpartition(begins)[0]
        return f"{prompt}{answer}\n{row['test']}\ncheck({row['entry_point']})"
    if "test_list" in row:
        before = [row.get("test_setup_code") or "", *(row.get("test_imports") or [])]
        return "\n".join([*before, answer, *row["test_list"]])
    raise UserError(
        f"--run-code: a row of {', '.join(row)} has no tests; accepted: prompt, test and "
        "entry_point (HumanEval), or test_list (MBPP)"
    )


def run_programs(
    programs: Sequence[str], seconds: float = 3.0, memory: int = 4 * 2**30
) -> list[str]:
    """Of each program `passed`, `timed out` (after `seconds`), or `failed: REASON`; several at a
    time. `memory`: bytes of address space, at most. Raises UserError where this system cannot keep
    a program from the network."""
    first = _run("pass", 60.0, memory)
    if first != "passed":
        raise UserError(
            f"--run-code: programs cannot be kept from the network here ({first}); accepted: Linux "
            "on x86_64 or aarch64 that takes filters of system calls (seccomp)"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda text: _run(text, seconds, memory), programs))


def _run(text: str, seconds: float, memory: int) -> str:
    token = secrets.token_hex()
    with tempfile.TemporaryDirectory(prefix="rankcast-code-") as folder:
        file = Path(folder) / "program.py"
        file.write_text(text, encoding="utf-8", errors="replace")
        command = [
            sys.executable, "-I", str(_CHILD), str(file), str(memory), str(math.ceil(seconds)),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, input=f"{token}\n", capture_output=True, text=True, errors="replace",
                cwd=folder, env={"OMP_NUM_THREADS": "1", "HOME": folder, "TMPDIR": folder},
                timeout=seconds + _MARGIN,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "timed out"
    if done.stdout == f"{token}\n":
        return "passed"
    if done.returncode < 0 and -done.returncode in (24, 9):  # SIGXCPU, and SIGKILL after it
        return "timed out"
    *_, last = ["", *done.stderr.strip().splitlines()]
    return f"failed: {last[:200] or 'it ended the process'}"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k answers, drawn from `samples` of which `passed` passed, passes:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_pass_at_k(passed: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """pass@k by name, over problems with the outcomes of their answers, for each k up to their
    number."""
    return {
        f"pass@{k}": sum(pass_at_k(len(of), sum(of), k) for of in passed) / len(passed)
        for k in ks
        if all(len(of) >= k for of in passed)
    }
