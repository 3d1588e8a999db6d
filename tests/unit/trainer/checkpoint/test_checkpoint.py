"""Checkpoints: what they hold, what is refused, and that nothing good is lost."""

import json
import resource
import shutil
import signal
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open

from tests.helpers import losses, quick_config
from trainer.checkpoint import store
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError
from trainer.run.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of six steps, with checkpoints at 2, 4 and 6."""
    tmp = tmp_path_factory.mktemp("finished")
    run(quick_config(tmp, "run.steps=6", "checkpoint.every=2"), World())
    return tmp


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of that run which a test may damage, and its folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = quick_config(tmp_path, "run.steps=6", "checkpoint.every=2")
    return tmp_path, config.run_folder


def again(tmp, *overrides):
    run(quick_config(tmp, "run.steps=6", "checkpoint.every=2", *overrides), World())


def names(folder):
    return [path.name for path in store.complete(folder / "checkpoints")]


def test_holds_everything_but_the_backbone(saved):
    _, folder = saved
    last = folder / "checkpoints/step-00000006"
    tensors = store.read_tensors(last)
    groups = {name.split("/")[0] for name in tensors}
    assert groups == {"adapter", "optimizer", "random"}
    unit = "model.layers.0.self_attn.q_proj"
    assert {f"adapter/{unit}/{role}" for role in ("A", "B", "g", "mask")} <= tensors.keys()
    assert {f"optimizer/{unit}.A/{part}" for part in ("exp_avg", "exp_avg_sq", "step")} <= (
        tensors.keys()
    )
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 1_200_000
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == 6 and state["loader"] == {
        "epoch": 0, "offset": 48, "sequences": 64,
    }  # fmt: skip
    assert not [file for file in last.iterdir() if file.suffix not in (".safetensors", ".json")]


def test_keeps_the_newest(tmp_path):
    config = quick_config(tmp_path, "run.steps=9", "checkpoint.every=2", "checkpoint.keep=2")
    run(config, World())
    assert names(config.run_folder) == ["step-00000008", "step-00000009"]


def test_resuming_a_finished_run_changes_nothing(saved):
    tmp, folder = saved
    before = losses(folder)
    again(tmp)
    assert losses(folder) == before


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_resume_is_bit_identical(tmp_path, asynchronous):
    setting = f"checkpoint.asynchronous={asynchronous}"
    whole = quick_config(tmp_path, "run.name=whole", "run.steps=8", "method.dropout=0.1", setting)
    run(whole, World())
    parts = ["run.name=parts", "method.dropout=0.1", setting, "optim.schedule=constant"]
    constant = quick_config(tmp_path, *parts, "run.name=constant", "run.steps=8")
    run(constant, World())
    for steps in (3, 8):  # a constant schedule: the first part does not know the end
        run(quick_config(tmp_path, *parts, f"run.steps={steps}"), World())
    assert losses(tmp_path / "runs/parts") == losses(tmp_path / "runs/constant")
    assert losses(whole.run_folder) != losses(constant.run_folder)
    with (
        safe_open(next((tmp_path / "runs/parts/adapter").glob("*.safetensors")), "pt") as a,
        safe_open(next((tmp_path / "runs/constant/adapter").glob("*.safetensors")), "pt") as b,
    ):
        assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in a.keys())


def test_metrics_of_the_lost_steps_are_replaced(saved):
    tmp, folder = saved
    expected = losses(folder)
    for step in ("step-00000004", "step-00000006"):
        (folder / "checkpoints" / step / "manifest.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut short by a crash
    again(tmp)
    assert losses(folder) == expected


def damage(folder, kind):
    newest = folder / "checkpoints/step-00000006"
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        content[-100] ^= 1
        file.write_bytes(content)
    elif kind == "missing":
        file.unlink()
    elif kind == "state":
        (newest / "state.json").write_text("{}")
    return newest


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, kind, capsys):
    tmp, folder = saved
    expected, newest = losses(folder), damage(folder, kind)
    again(tmp, "log.progress=plain")
    said = capsys.readouterr().out
    assert f"damaged   {newest}" in said and "resumed from" in said and "step-00000004" in said
    assert losses(folder) == expected
    assert store.verify(newest)["step"] == 6  # written anew


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_asked_for_by_name_is_refused(saved, kind):
    tmp, folder = saved
    newest = damage(folder, kind)
    with pytest.raises(UserError, match=r"truncated|damaged|missing"):
        again(tmp, f"run.resume={newest}")
    assert names(folder)[:2] == ["step-00000002", "step-00000004"]


CHANGED = {
    "method.rank=4": "method.rank: 4 given.*made with 8",
    "run.seed=1": "run.seed: 1 given.*made with 0",
    "data.batch_size=4": "data.batch_size: 4 given.*made with 8",
    "model.quantization=nf4": "model.quantization: 'nf4' given.*made with 'none'",
    "data.prompt=question": "data.train: .* does not hold the records",
}


@pytest.mark.parametrize("change", list(CHANGED))
def test_another_run_is_not_taken_for_this_one(saved, change):
    tmp, folder = saved
    with pytest.raises(UserError, match=CHANGED[change]):
        again(tmp, change)
    assert names(folder) == ["step-00000002", "step-00000004", "step-00000006"]


def test_another_backbone_is_refused(saved, tmp_path):
    from transformers import LlamaForCausalLM

    from tests.helpers import TINY

    tmp, folder = saved
    import shutil

    shutil.copytree(TINY, tmp_path / "other")
    model = LlamaForCausalLM.from_pretrained(TINY)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="made on another backbone"):
        again(tmp, f"model.id={tmp_path}/other")
    assert len(names(folder)) == 3


def test_never_does_not_overwrite(saved):
    tmp, folder = saved
    with pytest.raises(UserError, match=r"run.resume: never given.*holds a run already"):
        again(tmp, "run.resume=never")
    assert len(names(folder)) == 3


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(tmp_path):
    """A real limit of the operating system on the size of written files."""
    config = quick_config(tmp_path, "run.steps=2", "checkpoint.every=2", "method.rank=2")
    run(config, World())
    good = names(config.run_folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            RunFailed, match=r"step 4 could not be written.*last good checkpoint: .*02"
        ):
            run(
                quick_config(tmp_path, "run.steps=6", "checkpoint.every=2", "method.rank=2"),
                World(),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(config.run_folder) == good
    assert not list((config.run_folder / "checkpoints").glob(".*"))
    run(quick_config(tmp_path, "run.steps=6", "checkpoint.every=2", "method.rank=2"), World())
    assert len(losses(config.run_folder)) == 6


def test_a_checkpoint_that_could_not_be_written_ends_the_run_before_the_next_is_due(tmp_path):
    config = quick_config(tmp_path, "run.steps=40", "checkpoint.every=20", "data.eval=null")
    with patch.object(CheckpointWriter, "_write", side_effect=OSError(28, "disk full")):
        with pytest.raises(RunFailed, match="checkpoint of step 20 could not be written"):
            run(config, World())
    assert 20 <= len(losses(config.run_folder)) < 40
