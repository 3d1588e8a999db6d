"""Generated programs: what passes, what they may not do, and pass@k by HumanEval's own script."""

import json
import os

import numpy as np
import pytest

from launch import generate
from tests.helpers import quick_config
from tests.unit.trainer.generation.official_human_eval import estimate_pass_at_k
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.generation.code import mean_pass_at_k, pass_at_k, program, run_programs
from trainer.run.run import run

HUMAN_EVAL = {
    "task_id": "test/0", "prompt": "def return1():\n", "entry_point": "return1",
    "test": "def check(candidate):\n    assert candidate() == 1",
}  # fmt: skip
"""The form of openai/human-eval's data/example_problem.jsonl."""
MBPP = {
    "text": "Write a function to add two numbers.", "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.5, 0.25), 0.75)"],
}  # fmt: skip


def test_programs_are_put_together_as_their_data_sets_say():
    answers = [
        (HUMAN_EVAL, "    return 1\n"),
        (HUMAN_EVAL, "    return 2\n"),
        (HUMAN_EVAL, "Here it is:\n```python\ndef return1():\n    return 1\n```\nDone."),
        (HUMAN_EVAL, "    return 1 +\n"),
        (MBPP, "def add(a, b):\n    return a + b\n"),
        (MBPP, "def add(a, b):\n    return a - b\n"),
    ]
    results = run_programs([program(row, answer) for row, answer in answers])
    assert [result == "passed" for result in results] == [True, False, True, False, True, False]
    assert results[1] == "failed: AssertionError" and "SyntaxError" in results[3]
    with pytest.raises(UserError, match="no tests"):
        program({"prompt": "x"}, "")


BLOCKED = {
    "network": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "process": "import subprocess\nsubprocess.run(['true'])",
    "fork": "import os\nos.fork()",
    "memory": "x = bytearray(2**31)",
    "file": "open('large', 'wb').write(bytes(2**21))",
}


def test_a_program_gets_neither_network_nor_processes_nor_much_memory_or_disk():
    guarded = [f"import math\n{text}" for text in BLOCKED.values()]
    results = run_programs([*guarded, "import threading\nthreading.Thread(target=print).start()"],
                           memory=2**30)  # fmt: skip
    by_name = dict(zip([*BLOCKED, "thread"], results, strict=True))
    assert by_name.pop("thread") == "passed"
    assert by_name.pop("memory") == "failed: MemoryError"
    assert "File too large" in by_name.pop("file")
    for name, result in by_name.items():
        assert "PermissionError" in result, name


def test_a_program_that_does_not_end_or_ends_its_process_has_not_passed():
    results = run_programs(
        ["while True: pass", "import time\ntime.sleep(30)", "import sys\nsys.exit(0)",
         "import os\nos._exit(0)", "print('x' * 100)\nraise ValueError('no')"], seconds=1.0,
    )  # fmt: skip
    assert results[:2] == ["timed out"] * 2
    assert all(result.startswith("failed") for result in results[2:])
    assert results[4] == "failed: ValueError: no"


def test_programs_see_an_empty_folder_and_no_variables_of_this_process(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    text = "import os\nassert os.listdir('.') == ['program.py']\nassert 'SECRET' not in os.environ"
    assert run_programs([text]) == ["passed"]
    assert "SECRET" in os.environ


def test_pass_at_k_is_that_of_the_official_script():
    generator = np.random.default_rng(0)
    for samples in (1, 5, 20, 200):
        correct = generator.integers(0, samples + 1, 30)
        for k in (1, 2, 5, 10, 100):
            if k > samples:
                continue
            expected = estimate_pass_at_k(samples, correct, k)
            found = [pass_at_k(samples, int(c), k) for c in correct]
            np.testing.assert_allclose(found, expected, atol=1e-12)
            outcomes = [[index < c for index in range(samples)] for c in correct]
            mean = mean_pass_at_k(outcomes, [k, 1000])
            assert mean == {f"pass@{k}": pytest.approx(expected.mean())}


def test_the_command_runs_code_only_when_told_to(tmp_path, capsys):
    run(quick_config(tmp_path, "data.eval=null", "run.name=a"), World())
    problems = tmp_path / "problems.jsonl"
    passing = {
        **HUMAN_EVAL,
        "test": "def check(candidate):\n    pass",
        "prompt": "def return1():\n  pass\n#",
    }
    problems.write_text("\n".join(map(json.dumps, [passing, HUMAN_EVAL])))
    out = tmp_path / "out.jsonl"
    arguments = [str(tmp_path / "runs/a"), "--data", str(problems), "--out", str(out)]
    short = ["data.prompt=prompt", "generation.max_new_tokens=3", "generation.stop=['\\n']",
             "log.progress=none"]  # fmt: skip
    generate.main([*arguments, *short])
    assert all("passed" not in line for line in out.read_text().splitlines())
    assert "warning" not in capsys.readouterr().err
    drawn = ["--samples", "2", "--k", "1,2", "generation.temperature=1.0"]
    generate.main([*arguments, "--run-code", *drawn, *short])
    printed, err = capsys.readouterr()
    assert json.loads(printed) == {"pass@1": 0.5, "pass@2": 0.5}
    assert "warning: --run-code runs programs that a model wrote" in err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["passed"] for line in lines] == [True, True, False, False]
    with pytest.raises(UserError, match="--k: 3 given with --samples 1"):
        generate.main([*arguments, "--run-code", "--k", "3", *short])
    problems.write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(UserError, match="no tests"):
        generate.main([*arguments, "--run-code", *short])
