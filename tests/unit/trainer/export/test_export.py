"""What is exported is what was trained: PEFT and transformers give the same logits."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adapters.gated import GatedAdapter
from adapters.peft_export import export_adapter
from tests.conftest import shared
from tests.helpers import TINY, python, quick_config
from trainer.checkpoint import store
from trainer.checkpoint.state import load_trained
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session


def inputs():
    return torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(5))


def trained_logits(config, **more):
    """Logits of the trained session itself."""
    session = open_session(config, World())
    newest = store.newest(config.run_folder / "checkpoints")
    load_trained(session, newest, store.read_tensors(newest))
    session.model.eval()
    with torch.no_grad():
        return session.model(inputs(), **more).logits


def export(config, out, **options):
    return export_run(config.run_folder, out, World(), **options)


def through_peft(model, folder):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder).eval()(inputs()).logits


@pytest.mark.parametrize("name", ["quickstart", "books-llama-28m"])
def test_unquantised_adapter_and_merged_model(name, tmp_path):
    folder = TINY if name == "quickstart" else shared(f"models/{name}")
    config = quick_config(tmp_path, f"model.id={folder}", "run.steps=3", "method.dropout=0.1")
    run(config, World())
    expected = trained_logits(config)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untouched = plain(inputs()).logits
    logits = through_peft(plain, config.run_folder / "adapter")
    assert (expected - untouched).abs().max() > 1e-2, "training changed nothing"
    assert torch.allclose(logits, expected, atol=1e-4)
    export(config, tmp_path / "merged", what="merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert torch.allclose(merged(inputs()).logits, expected, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_on_the_identical_dequantised_backbone(quantization, tmp_path):
    config = quick_config(tmp_path, f"model.quantization={quantization}", "run.steps=3")
    run(config, World())
    expected = trained_logits(config)
    export(config, tmp_path / "backbone", what="backbone", measure=False, dtype="float32")
    said = export(config, tmp_path / "adapter")
    dequantised = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    assert torch.allclose(through_peft(dequantised, tmp_path / "adapter"), expected, atol=1e-4)
    export(config, tmp_path / "merged", what="merged", measure=False, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(inputs()).logits, expected, atol=1e-4)
    assert "on the unquantised backbone" in said
    assert said.splitlines()[0] in (tmp_path / "adapter/README.md").read_text()
    export(
        config, tmp_path / "original", what="merged", base="original", measure=False,
        dtype="float32",
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    on_plain = through_peft(plain, tmp_path / "adapter")
    assert torch.allclose(original(inputs()).logits, on_plain, atol=1e-4)
    assert not torch.allclose(on_plain, expected, atol=1e-3)


def test_classifier_head_travels_with_the_adapter(tmp_path):
    rows = [f"text {word},{i % 3}" for i, word in enumerate("abcdefghijklmnopqr")]
    (tmp_path / "l.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    config = quick_config(
        tmp_path,
        "task.kind=sequence_classification",
        f"data.train={tmp_path}/l.csv",
        "data.eval=null",
    )
    run(config, World())
    plain = AutoModelForSequenceClassification.from_pretrained(
        TINY, dtype=torch.float32, num_labels=3, pad_token_id=0
    )
    logits = through_peft(plain, config.run_folder / "adapter")
    assert torch.allclose(logits, trained_logits(config), atol=1e-4)
    assert "num_labels=3" in (config.run_folder / "adapter/README.md").read_text()
    export_run(config.run_folder, tmp_path / "again", World())
    assert "num_labels=3" in (tmp_path / "again/README.md").read_text()


def test_every_unit_has_alpha_over_r_of_one_and_empty_ones_are_left_out(tmp_path):
    adapters = {
        f"model.layers.{i}.mlp.up_proj": GatedAdapter(
            torch.randn(r, 128), torch.full((r,), 0.5 + i), torch.randn(r, 320)
        )
        for i, r in enumerate((4, 4, 2, 0))
    }
    export_adapter(
        tmp_path / "a",
        adapters,
        base_model=str(TINY),
        task_type="CAUSAL_LM",
    )
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert list(config["rank_pattern"].values()) == [2]
    assert not any("layers.3" in name for name in config["target_modules"])
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for name, adapter in adapters.items():
        expected.get_submodule(name).weight.data += adapter.delta()
    with torch.no_grad():
        assert torch.allclose(
            through_peft(model, tmp_path / "a"), expected(inputs()).logits, atol=1e-4
        )


def test_command_line(tmp_path):
    config = quick_config(tmp_path, "run.steps=1", "model.quantization=nf4")
    run(config, World())
    script, folder = "launch/export.py", str(config.run_folder)
    code, out, err = python(script, folder, str(tmp_path / "a"))
    assert code == 0, err
    assert "Trained on the nf4 backbone: held-out loss" in out and "adapter of" in out
    with pytest.raises(UserError, match="exists already; accepted: a folder that does not"):
        export(config, tmp_path / "a")
    with pytest.raises(UserError, match="neither a run folder with a checkpoint nor a checkpoint"):
        export_run(tmp_path, tmp_path / "b", World())
    state = store.newest(config.run_folder / "checkpoints") / "state.json"
    made_by = json.loads(state.read_text())
    made_by["config"]["engine"]["kind"] = "deepspeed"  # what it was trained on need not be here
    state.write_text(json.dumps(made_by, indent=1))
    (state.parent / "manifest.json").unlink()
    store.write_manifest(state.parent)
    code, out, err = python("launch/evaluate.py", folder)
    assert code == 0, err
    last = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").open()][-1]
    scores = json.loads(out.splitlines()[-1])
    assert scores["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
