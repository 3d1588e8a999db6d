"""`accelerate launch` starts the training script, as torchrun and deepspeed do."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers import QUICKSTART, ROOT, environment, error_lines, free_port, losses, python

SMALL = (
    "run.steps=2", "run.eval_every=0", "run.eval_at_start=false", "data.eval=null", "log.every=1",
    "data.train_records=32", "data.batch_size=4", "data.micro_batch_size=2", "run.verify=off",
    "log.tensorboard=false", "engine.kind=ddp", "model.quantization=none",
)  # fmt: skip


def accelerate(*arguments: str, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [
            "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port",
            str(free_port()), "launch/train.py", "--config", str(QUICKSTART), *arguments,
        ],
        cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_it_trains_on_two_processes(tmp_path: Path):
    given = (*SMALL, f"data.cache={tmp_path}/cache")
    code, out, err = accelerate(*given, f"run.dir={tmp_path}/a")
    assert code == 0, err
    assert "2 rank(s)" in out and out.count("rankcast  ") == 1
    code, _, err = python(
        "launch/train.py", "--config", QUICKSTART, *given, f"run.dir={tmp_path}/b", processes=2
    )
    assert code == 0, err
    assert losses(tmp_path / "a/quickstart") == losses(tmp_path / "b/quickstart")


@pytest.mark.parametrize(("variable", "said"), [
    ("ACCELERATE_USE_FSDP", "--use_fsdp given, by an argument or its configuration file; accepted"),
    ("ACCELERATE_USE_DEEPSPEED", "and engine.kind=deepspeed in the configuration"),
])  # fmt: skip
def test_engines_of_its_own_are_refused(variable, said, monkeypatch):
    monkeypatch.setenv(variable, "true")
    code, _, err = python("launch/train.py", "--config", QUICKSTART)
    assert code == 2 and len(error_lines(err)) == 1 and said in err
