"""Whole runs with a data-driven start: what they write, read again, resume and export."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import TINY, losses, quick_config
from trainer.distributed.world import World
from trainer.files import START
from trainer.run.run import run
from trainer.training import starts

REDISTRIBUTED = [
    "method.start=activation", "method.start_options.ranks=redistributed", "method.rank=4",
    "method.alpha=8", "method.start_options.batches=2", "run.steps=3",
]  # fmt: skip

GRADIENT = [
    "method.start=gradient", "method.rank=4", "method.alpha=8", "method.start_options.batches=2",
    "run.steps=2",
]  # fmt: skip


def finished(tmp_path, name, *overrides):
    config = quick_config(tmp_path, f"run.name={name}", *overrides)
    run(config, World())
    return config.run_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole runs: LoRA, from gradients, and from activations with other ranks."""
    tmp = tmp_path_factory.mktemp("starts")
    finished(tmp, "plain", "method.rank=4", "method.alpha=8", "run.steps=2")
    finished(tmp, "gradient", *GRADIENT)
    finished(tmp, "whole", *REDISTRIBUTED, "checkpoint.every=1", "checkpoint.keep=9")
    return tmp


def test_the_first_batch_is_computed_as_without_it(runs):
    plain = losses(runs / "runs/plain")
    for name in ("gradient", "whole"):
        found = losses(runs / "runs" / name)
        assert found[0] == plain[0] and found[1] != plain[1]


def test_a_run_that_begins_again_reads_its_file(runs, monkeypatch):
    folder, computed = runs / "runs/again", []
    shutil.copytree(runs / "runs/whole", folder)
    whole = (folder / START).read_bytes()

    def counted(*arguments):
        computed.append(1)
        return starts.find_starts(*arguments)

    monkeypatch.setattr("trainer.run.data_start.find_starts", counted)
    for damaged in (False, True):
        (folder / "metrics.jsonl").unlink()
        shutil.rmtree(folder / "checkpoints")
        if damaged:
            (folder / START).write_bytes(whole[:-4] + b"\0\0\0\1")
        finished(runs, "again", *REDISTRIBUTED)
        assert losses(folder) == losses(runs / "runs/whole")
        assert (folder / START).read_bytes() == whole
        assert len(computed) == damaged


def test_it_resumes_to_the_last_bit_and_peft_loads_what_it_exports(runs):
    whole, part = runs / "runs/whole", runs / "runs/part"
    shutil.copytree(whole, part)
    for step in (2, 3):
        shutil.rmtree(part / f"checkpoints/step-{step:08d}")
    finished(runs, "part", *REDISTRIBUTED, "checkpoint.every=1", "checkpoint.keep=9")
    assert losses(part) == losses(whole)
    exported = load_file(whole / "adapter/adapter_model.safetensors")
    again = load_file(part / "adapter/adapter_model.safetensors")
    assert exported.keys() == again.keys()
    assert all(torch.equal(exported[key], again[key]) for key in exported)
    ranks = {len(t) for key, t in exported.items() if "lora_A" in key}
    assert len(ranks) > 1 and max(ranks) <= 8
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, whole / "adapter").state_dict()
    held = {key.replace(".default", ""): tensor for key, tensor in loaded.items() if "lora" in key}
    assert {key: tensor.shape for key, tensor in held.items()} == {
        key: tensor.shape for key, tensor in exported.items()
    }


@pytest.mark.parametrize("kind", ["lalora", "dora"])
def test_other_methods_start_from_the_same_directions(runs, kind):
    folder = finished(runs, kind, f"method.kind={kind}", *GRADIENT, "run.steps=1")
    expected = load_file(runs / "runs/gradient" / START)
    for name, tensor in load_file(folder / START).items():  # DoRA's products round otherwise
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)
