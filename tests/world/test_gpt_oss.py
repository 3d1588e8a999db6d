"""gpt-oss from MXFP4 files on two ranks: the losses of one process."""

from tests.gpt_oss import save_gpt_oss, save_mxfp4
from tests.helpers import ALL, losses, quick_config
from tests.world.cases import ok, run_cases
from trainer.distributed.world import World
from trainer.run.run import run

SHARDING = ["peer", "fsdp2", "deepspeed"] if ALL else ["fsdp2"]


def configuration(tmp, engine):
    return quick_config(
        tmp, f"model.id={tmp}/packed", f"engine.kind={engine}", f"run.name={engine}",
        "model.quantization=nf4", "method.targets=all-linear", "method.alpha=2", "run.steps=5",
        "data.batch_size=4",
    )  # fmt: skip


def test_losses_agree_with_one_process(tmp_path):
    save_mxfp4(save_gpt_oss(tmp_path / "plain"), tmp_path / "packed")
    run(configuration(tmp_path, "single"), World())
    cases = {e: ("train", configuration(tmp_path, e).model_dump()) for e in SHARDING}
    for results in run_cases(tmp_path / "work", cases).values():
        ok(results)
    alone = losses(tmp_path / "runs/single")
    assert alone[-1] < alone[0]
    for engine in SHARDING:
        spread = losses(tmp_path / f"runs/{engine}")
        assert max(abs(a - b) / a for a, b in zip(alone, spread, strict=True)) <= 1e-4, engine
