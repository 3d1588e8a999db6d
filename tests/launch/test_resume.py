"""Kill one rank without warning, resume, and get the losses of a run that was never interrupted."""

import os
import random
import shutil
import signal

import pytest

from tests.helpers import ROOT, finish, launch, losses, quick_config, start, wait_for_step

STEPS = 12
SCRIPT = ROOT / "launch/train.py"
PAIRS = {  # what is killed → what goes on, with how many processes, and how exactly
    "deepspeed": [("deepspeed", 2, 0.0), ("fsdp2", 2, 1e-4), ("single", 1, 1e-4)],
    "fsdp2": [("fsdp2", 2, 0.0), ("ddp", 3, 1e-4)],
}


def arguments(tmp, name: str, engine: str) -> list[str]:
    config = quick_config(
        tmp, f"run.steps={STEPS}", f"run.name={name}", f"engine.kind={engine}",
        "checkpoint.every=3", "model.quantization=nf4", "method.alpha=8", "data.batch_size=6", "data.eval=null",
    )  # fmt: skip
    file = tmp / f"{name}-{engine}.yaml"
    file.write_text(config.to_yaml())
    return ["--config", str(file)]


def launcher(engine: str) -> str:
    return {"deepspeed": "deepspeed", "single": "python"}.get(engine, "torchrun")


def train(tmp, name: str, engine: str, processes: int) -> list[float]:
    code, out, err = launch(launcher(engine), processes, SCRIPT, *arguments(tmp, name, engine))
    assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return losses(tmp / "runs" / name)


@pytest.mark.parametrize("engine", list(PAIRS))
def test_a_killed_run_goes_on_as_if_it_had_not_been(engine, tmp_path):
    from tests.helpers import ranks_of

    uninterrupted = train(tmp_path, "whole", engine, 2)
    assert len(uninterrupted) == STEPS

    process = start(launcher(engine), 2, SCRIPT, *arguments(tmp_path, "killed", engine))
    run = tmp_path / "runs" / "killed"
    step = random.SystemRandom().randint(4, STEPS - 2)  # anywhere after the first checkpoint
    wait_for_step(run, step, process)
    victim = random.SystemRandom().choice([0, 1])
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    code, _, _ = finish(process, seconds=60)
    assert code != 0, "the launcher must report the loss of a rank"
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert saved, "a checkpoint was complete before the kill"

    for successor, processes, tolerance in PAIRS[engine]:
        name = f"resumed-{successor}-{processes}"
        shutil.copytree(run, tmp_path / "runs" / name)
        resumed = train(tmp_path, name, successor, processes)
        assert len(resumed) == STEPS
        worst = max(abs(a - b) / a for a, b in zip(uninterrupted, resumed, strict=True))
        assert worst <= tolerance, f"{successor} after a kill at step {step} (saved: {saved})"
