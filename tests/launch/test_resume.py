"""Kill one rank without warning, resume, and get the losses of a run that was never interrupted."""

import json
import os
import random
import shutil
import signal

import pytest

from tests.helpers import (
    ALL,
    ROOT,
    finish,
    kept_steps,
    launch,
    losses,
    python,
    quick_config,
    ranks_of,
    sample,
    start,
    wait_for_step,
)
from trainer.records.jsonl import DECISIONS

STEPS = 12
SCRIPT = ROOT / "launch/train.py"
METHOD = {"deepspeed": "lora", "fsdp2": "lelora"}
PAIRS = {  # what is killed → what goes on, with how many processes, and how exactly
    "deepspeed": [("deepspeed", 2, 0.0), ("fsdp2", 2, 1e-4), ("single", 1, 1e-4)],
    "fsdp2": [("fsdp2", 2, 0.0), ("ddp", 3, 1e-4) if ALL else ("single", 1, 1e-4)],
}


def arguments(tmp, name: str, engine: str, method: str) -> list[str]:
    slowly = ["optim.learning_rate=5e-4"] if method == "lelora" else []  # test_methods.py says why
    config = quick_config(
        tmp, f"run.steps={STEPS}", f"run.name={name}", f"engine.kind={engine}",
        "checkpoint.every=3", "model.quantization=nf4", "method.alpha=8", "data.batch_size=6",
        "data.eval=null", f"method.kind={method}", *slowly,
    )  # fmt: skip
    file = tmp / f"{name}-{engine}.yaml"
    file.write_text(config.to_yaml())
    return ["--config", str(file)]


def launcher(engine: str) -> str:
    return {"deepspeed": "deepspeed", "single": "python"}.get(engine, "torchrun")


def train(
    tmp, name: str, engine: str, processes: int, method: str, *, launched: bool
) -> list[float]:
    """`launched`: by the real launcher, not forked."""
    command = (SCRIPT, *arguments(tmp, name, engine, method))
    if launched:
        code, out, err = launch(launcher(engine), processes, *command)
    else:
        code, out, err = python(*command, processes=processes)
    assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return losses(tmp / "runs" / name)


def decisions(run) -> list[dict]:
    file = run / DECISIONS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("engine", sample(PAIRS, "fsdp2"))
def test_a_killed_run_goes_on_as_if_it_had_not_been(engine, tmp_path):
    method, runs = METHOD[engine], tmp_path / "runs"
    uninterrupted = train(tmp_path, "whole", engine, 2, method, launched=ALL)
    assert len(uninterrupted) == STEPS

    process = start(launcher(engine), 2, SCRIPT, *arguments(tmp_path, "killed", engine, method))
    step = random.SystemRandom().randint(4, STEPS - 2)  # anywhere after the first checkpoint
    wait_for_step(runs / "killed", step, process)
    victim = random.SystemRandom().choice([0, 1])
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    code, _, _ = finish(process, seconds=60)
    assert code != 0, "the launcher must report the loss of a rank"
    saved = sorted(path.name for path in (runs / "killed/checkpoints").glob("step-*"))
    assert saved, "a checkpoint was complete before the kill"
    origin = int(saved[-1].removeprefix("step-"))

    for successor, processes, tolerance in PAIRS[engine]:
        name = f"resumed-{successor}-{processes}"
        shutil.copytree(runs / "killed", runs / name)
        resumed = train(tmp_path, name, successor, processes, method, launched=ALL)
        assert len(resumed) == STEPS
        worst = max(abs(a - b) / a for a, b in zip(uninterrupted, resumed, strict=True))
        assert worst <= tolerance, f"{successor} after a kill at step {step} (saved: {saved})"
        assert kept_steps(runs / name, origin) == kept_steps(runs / "killed", origin)
        digests = [[d["digest"] for d in decisions(runs / run)] for run in ("whole", name)]
        assert digests[0] == digests[1] and len(digests[0]) == (STEPS if method == "lelora" else 0)
