"""Whole runs in one process: the folder they leave, bad numbers, dry runs, the command line."""

import json
import math

import pytest
import torch
import yaml

from adapters.decision import Decision
from adapters.methods.lora import LoRA
from adapters.units import transformer_blocks
from docs.make_configuration import document
from tests.conftest import shared
from tests.helpers import ROOT, losses, python, quick_config
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.errors import RunFailed
from trainer.run.dry_run import dry_run
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.causal_lm import CausalLM
from trainer.training.validation import make_validate

METRICS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds",
    "peak_memory_gib", "trainable_parameters", "active_parameters", "skipped_steps",
}  # fmt: skip


@pytest.mark.whole_runs
def test_the_run_folder_explains_itself(tmp_path):
    config = quick_config(
        tmp_path, "run.steps=6", "run.eval_every=3", "run.eval_at_start=true", "checkpoint.every=3",
        "log.tensorboard=true", "model.quantization=nf4",
    )  # fmt: skip
    run(config, World())
    folder = config.run_folder
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "units.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter",
        "figures", "README.md", "heartbeat.json", ".lock",
    }  # fmt: skip
    assert load_config(folder / "config.yaml") == config
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert all(line.keys() == METRICS for line in trained) and len(trained) == 6
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert evaluated[0]["eval_perplexity"] == pytest.approx(math.exp(evaluated[0]["eval_loss"]))
    assert trained[0]["trainable_parameters"] == 8 * sum(
        4 * (a + b) for a, b in ((128, 128), (64, 128), (64, 128), (128, 128), *[(320, 128)] * 3)
    )
    assert (folder / "figures/loss.png").stat().st_size > 5000
    assert (folder / "figures/loss.svg").is_file()
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000003", "step-00000006",
    ]  # fmt: skip
    assert list((folder / "tensorboard").glob("events.*"))
    assert "nf4" in (folder / "README.md").read_text()


def poison(monkeypatch, factor, is_poisoned):
    """Multiplies the losses of those micro-batches, counted from 1, by `factor`."""
    honest, calls = CausalLM.loss, []

    def poisoned(self, model, batch):
        loss, predictions = honest(self, model, batch)
        if loss.is_meta:  # the model is looked at before it is loaded
            return loss, predictions
        calls.append(None)
        return (loss * factor if is_poisoned(len(calls)) else loss), predictions

    monkeypatch.setattr(CausalLM, "loss", poisoned)
    return honest


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    config = quick_config(tmp_path, "run.steps=6")
    run(config, World())
    poison(monkeypatch, float("nan"), {5, 6}.__contains__)  # the second step: calls 5 to 8
    poisoned_run = quick_config(tmp_path, "run.steps=6", "run.name=poisoned", "data.eval=null")
    run(poisoned_run, World())
    lines = [
        json.loads(line)
        for line in (poisoned_run.run_folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 1]
    assert losses(poisoned_run.run_folder)[0] == losses(config.run_folder)[0]
    assert all(math.isfinite(line["grad_norm"]) for line in lines[2:])


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path, monkeypatch):
    honest = poison(monkeypatch, float("inf"), lambda call: call > 12)
    config = quick_config(
        tmp_path,
        "run.steps=20",
        "checkpoint.every=3",
        "optim.max_skipped_steps=2",
        "data.eval=null",
    )
    with pytest.raises(RunFailed, match=r"step 5: .*2 times in a row.*step-00000003") as failure:
        run(config, World())
    assert failure.value.exit_code == 1
    monkeypatch.setattr(CausalLM, "loss", honest)
    run(config, World())
    assert all(math.isfinite(loss) for loss in losses(config.run_folder))


def test_a_short_run_in_which_no_step_is_made_is_no_success(tmp_path, monkeypatch):
    poison(monkeypatch, float("nan"), lambda call: True)
    config = quick_config(tmp_path, "run.steps=2", "data.eval=null")
    with pytest.raises(RunFailed, match=r"step 2: .* 2 times in a row"):
        run(config, World())
    assert not (config.run_folder / "adapter").exists()


def test_dry_run_says_what_would_be_and_leaves_nothing(tmp_path):
    config = quick_config(tmp_path, "model.quantization=nf4")
    text = dry_run(config, World())
    for part in ("64 of 64 records", "units               28", "71,680 parameters", "nf4", "MiB"):
        assert part in text
    assert not config.run_folder.exists()


def test_memory_estimate_is_what_is_held(tmp_path):
    from trainer.model.build import build
    from trainer.model.footprint import estimate
    from trainer.model.hub import load_tokenizer
    from trainer.session import open_session

    for quantization in ("none", "nf4", "int8"):
        config = quick_config(tmp_path, f"model.quantization={quantization}")
        task = CausalLM(config.task, load_tokenizer(config.model))
        expected = estimate(build(config, task, torch.device("cpu")), config, 1, "whole")
        session = open_session(config, World())
        assert session.engine.local_bytes(session.model) == expected.backbone


def test_split_moments_need_less_memory_by_the_number_of_ranks(tmp_path):
    from trainer.model.build import build
    from trainer.model.footprint import estimate, trainable_parameters
    from trainer.model.hub import load_tokenizer

    plain = quick_config(tmp_path)
    split = quick_config(tmp_path, "optim.shard_state=true")
    backbone = build(plain, CausalLM(plain.task, load_tokenizer(plain.model)), torch.device("cpu"))
    scalars = trainable_parameters(backbone, plain)

    def bytes_of_each(config, ranks):
        return estimate(backbone, config, ranks, "split").trainable / scalars

    assert [bytes_of_each(plain, ranks) for ranks in (1, 4)] == [28, 28]
    # values and gradients stay whole; two moments and as much again as a step's three temporaries
    assert [bytes_of_each(split, ranks) for ranks in (1, 2, 4)] == [28, 18, 13]


def test_print_config_and_overrides_anywhere(tmp_path):
    code, out, err = python(
        "launch/train.py", "run.steps=7", "--config", "configs/quickstart.yaml",
        "--print-config", "optim.learning_rate=1e-3", "optim.learning_rate=2e-3",
    )  # fmt: skip
    assert code == 0, err
    resolved = yaml.safe_load(out)
    assert resolved["run"]["steps"] == 7 and resolved["optim"]["learning_rate"] == 2e-3
    assert resolved["method"]["kind"] == "lora"


def test_the_documented_configuration_is_the_real_one():
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == document()


def test_shipped_gsm8k_config_runs_here_with_local_files(tmp_path):
    config = load_config(
        "configs/gsm8k_lora.yaml",
        [
            "model.id=HuggingFaceTB/nothing", f"model.id={shared('models/books-llama-28m')}",
            f"data.train={shared('data/gsm8k/train.jsonl')}",
            f"data.eval={shared('data/gsm8k/test.jsonl')}", f"data.cache={tmp_path}/cache",
            f"run.dir={tmp_path}", "run.steps=2", "data.train_records=50", "data.eval_records=4",
            "data.batch_size=2", "data.micro_batch_size=1", "log.progress=none", "run.eval_every=0",
        ],
    )  # fmt: skip
    run(config, World())
    first = json.loads((config.run_folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and 4.5 < first["eval_loss"] < 6.0


class Shrinking(LoRA):
    """Decides at step 1 that the second half of every unit's components rests."""

    decides = True

    def decide(self, step):
        return Decision(extra={"active": self.options.rank // 2}) if step == 1 else None

    def apply(self, decision):
        for adapter in self.adapters.values():
            adapter.mask[decision.extra["active"] :] = False
        return False


def test_decisions_reach_masks_and_the_optimizer(tmp_path, monkeypatch):
    from adapters.methods.registry import METHODS
    from trainer.checkpoint import store

    monkeypatch.setitem(METHODS, "lora", Shrinking)
    config = quick_config(tmp_path, "run.steps=3", "optim.weight_decay=0.1", "checkpoint.every=1")
    run(config, World())
    saved = [store.read_tensors(path) for path in store.complete(config.run_folder / "checkpoints")]
    name = "model.layers.1.mlp.up_proj"
    for role in ("A", "B"):
        early, late = (tensors[f"adapter/{name}/{role}"] for tensors in (saved[0], saved[2]))
        assert torch.equal(early[4:], late[4:]) and not torch.equal(early[:4], late[:4])
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    active = [json.loads(line).get("active_parameters") for line in lines if "grad_norm" in line]
    assert active == [71680, 35840, 35840]


def test_validation_with_gradients_recomputes_as_training_does(tmp_path):
    """Activation checkpointing holds there too; loss and gradient stay as they are."""
    results = []
    for checkpointing in (True, False):
        config = quick_config(
            tmp_path, "method.kind=lelora", "method.policy.signal=validation",
            f"engine.activation_checkpointing={str(checkpointing).lower()}",
        )  # fmt: skip
        session = open_session(config, World())
        forwards = []
        inner = session.model.get_submodule("model.layers.0.mlp.up_proj")
        inner.register_forward_hook(lambda *_, to=forwards: to.append(1))
        validate = make_validate(session)
        validate(False)
        once = len(forwards)
        loss = validate(True)
        assert len(forwards) == once * (3 if checkpointing else 2)
        assert session.model.training and not any(
            block.training is False for _, block in transformer_blocks(session.model)
        )
        results.append((loss, session.optimizer.gradients.clone()))
    assert results[0][0] == results[1][0] and results[0][1].any()
    torch.testing.assert_close(results[0][1], results[1][1])
