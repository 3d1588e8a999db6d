"""What is imported when: a mistake is told before torch is, and nothing is imported that no one uses."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

HEAVY = (
    "torch", "transformers", "numpy", "bitsandbytes", "scipy", "sklearn", "matplotlib", "deepspeed",
    "datasets", "pyarrow", "pandas", "tensorboard",
)  # fmt: skip
LATE = ("bitsandbytes", "sklearn", "matplotlib", "deepspeed", "datasets", "pandas", "tensorboard")
"""What no module of a run needs before it is used."""

IMPORTED = """
import atexit, json, runpy, sys
names = {names!r}
def tell(*_):
    print("IMPORTED " + json.dumps([name for name in names if name in sys.modules]), flush=True)
{program}
"""
SCRIPT = """
import os
leave = os._exit
os._exit = lambda code: (tell(), leave(code))
atexit.register(tell)
sys.argv = {argv!r}
runpy.run_path({argv!r}[0], run_name="__main__")
"""


def imported(program: str, names: tuple[str, ...]) -> tuple[list[str], int, str]:
    """(which of `names` a program has imported at its end, its exit code, what it said)."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(names=names, program=program)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("IMPORTED ")]
    return json.loads(line.removeprefix("IMPORTED ")), done.returncode, done.stdout + done.stderr


def script(*argv: str) -> tuple[list[str], int, str]:
    return imported(SCRIPT.format(argv=list(argv)), HEAVY)


QUICKSTART = ("launch/train.py", "--config", "configs/quickstart.yaml")


@pytest.mark.parametrize(("override", "said"), [
    ("run.sed=1", "error: run.sed: unknown key"),
    ("data.packing=1", "error: data.packing: 1 given"),
    ("method.policy.mode=learned", "error: method.policy: unknown key"),
    ("method.kind=lelorra", "error: method.kind: 'lelorra' given"),
    ("task.kind=causal", "error: task.kind: 'causal' given"),
    ("engine.kind=fsdp", "error: engine.kind: 'fsdp' given"),
    ("engine.unsharded_blocks=3", "error: engine.unsharded_blocks: 3 given with engine.kind="),
    ("model.quantization=nf5", "error: model.quantization: 'nf5' given"),
    ("data.format=classification", "error: data.format: classification given with task.kind="),
    ("optim.warmup_steps=9999", "error: optim.warm"),
])  # fmt: skip
def test_a_mistake_is_told_before_torch_is_imported(override, said):
    found, code, out = script(*QUICKSTART, override)
    assert (found, code) == ([], 2) and said in out, out
    assert out.count("error:") == 1


@pytest.mark.parametrize("argv", [
    ("launch/train.py", "--help"), ("launch/train.py", "--version"), ("launch/main.py", "--help"),
    ("launch/estimate.py", "--help"), ("launch/export.py", "--help"),
    ("launch/evaluate.py", "--help"), ("launch/compare.py", "--help"),
    ("launch/report.py", "--help"), ("launch/watch.py", "--help"),
])  # fmt: skip
def test_help_imports_nothing(argv):
    found, code, out = script(*argv)
    assert (found, code) == ([], 0), out


def test_an_estimate_and_a_watch_check_first():
    found, code, out = script("launch/estimate.py", "configs/quickstart.yaml", "run.sed=1")
    assert (found, code) == ([], 2) and "error: run.sed: unknown key" in out
    found, code, out = script("launch/watch.py", "/nowhere", "--once")
    assert (found, code) == ([], 2) and "error: /nowhere" in out


def test_every_method_and_task_is_checked_without_torch():
    program = """
from adapters.methods.registry import OPTIONS as METHODS
from trainer.config.config import parse_config
from trainer.tasks.registry import OPTIONS as TASKS
base = {"model": {"id": "m"}, "data": {"train": "t"}}
for kind in METHODS:
    parse_config({**base, "method": {"kind": kind}})
for kind in TASKS:
    parse_config({**base, "task": {"kind": kind}})
tell()
"""
    assert imported(program, HEAVY)[0] == []


def test_a_run_imports_late_what_it_may_not_need():
    assert imported("import trainer.run.run\ntell()", LATE)[0] == []


def test_engine_files_import_without_their_libraries():
    program = "import trainer.engine.deepspeed, trainer.engine.deepspeed_config\ntell()"
    assert imported(program, ("deepspeed",))[0] == []


def test_the_first_line_is_printed_before_torch_is_imported():
    """What imports torch ends here."""
    program = """
class Ends:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            tell()
            leave(7)
import os
leave = os._exit
sys.meta_path.insert(0, Ends())
sys.argv = ["launch/train.py", "--config", "configs/quickstart.yaml", "log.progress=plain"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    found, code, out = imported(program, HEAVY)
    assert code == 7 and found == [], out
    assert out.startswith("rankcast  ") and "configs/quickstart.yaml: importing torch" in out


def test_what_a_run_opens_with_is_imported_before_modules_are_set_aside(tmp_path):
    """Else every full collection of a start would go through the compiler and transformers' models,
    which are imported as the tokenizer is read and the blocks are wrapped."""
    program = f"""
import gc, os
leave = os._exit
def set_aside():
    tell()
    leave(7)
gc.freeze = set_aside
sys.argv = ["launch/train.py", "--config", "configs/quickstart.yaml", "engine.kind=single",
            "engine.compile=true", "run.dir={tmp_path}"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    opening = (
        "torch._inductor.lowering", "torch._functorch.aot_autograd", "transformers.generation.utils",
        "transformers.modeling_utils", "transformers.models.auto.tokenization_auto",
    )  # fmt: skip
    found, code, out = imported(program, opening)
    assert code == 7 and found == list(opening), out
