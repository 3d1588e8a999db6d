"""`method.kind: peft`: what is refused, heads beside PEFT's modules, export from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import ALL, losses, quick_config, sample, save_random_model
from trainer.checkpoint.store import newest, read_tensors
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run

REFUSED = {
    "unknown kind": ({"peft_type": "LURA"}, [], r"method.peft.peft_type: LURA given; accepted: .*LORA"),
    "steered by its own loop": (
        {"peft_type": "ADALORA"}, [], r"peft_type: ADALORA given; accepted: method.kind=adalora",
    ),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, [], r"peft_type: PROMPT_TUNING given; accepted: "),
    "no kind": ({"r": 4}, [], r"method.peft.peft_type: None given; accepted: a kind of PEFT's"),
    "unknown key": ({"peft_type": "VERA", "rnk": 3}, [], r"method.peft.rnk: unknown to VERA; accepted:"),
    "targets": (
        {"peft_type": "LORA", "target_modules": ["q_proj"]}, [],
        r"method.peft.target_modules: .* accepted: method.targets",
    ),
    "changes W": (
        {"peft_type": "LORA", "init_lora_weights": "pissa"}, [],
        r"method.peft.init_lora_weights: 'pissa' given, which changes the backbone",
    ),
    "trains biases": ({"peft_type": "LORA", "bias": "all"}, [], r"method.peft.bias: 'all' given"),
    "not its values": ({"peft_type": "LORA", "r": -1}, [], r"method.peft: .*`r`.* accepted: what PEFT"),
    "our key": ({"peft_type": "LORA"}, ["method.rank=4"], r"method.rank: 4 given with method.kind=peft"),
    "quantised": (
        {"peft_type": "LORA"}, ["model.quantization=nf4"],
        r"model.quantization: nf4 given with method.kind=peft; accepted: none",
    ),
    "ZeRO-3": (
        {"peft_type": "LORA"}, ["engine.kind=deepspeed"],
        r"engine.kind: deepspeed given with method.kind=peft; accepted: auto, single, ddp, fsdp2",
    ),
}  # fmt: skip


def configuration(tmp: Path, given: dict[str, Any], *more: str) -> Config:
    return quick_config(
        tmp, "method.kind=peft", f"method.peft={given}", f"model.id={tmp}/model", "data.eval=null",
        "run.steps=2", *more,
    )  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(tmp_path, case):
    given, more, message = REFUSED[case]
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    with pytest.raises(UserError, match=message) as error:
        run(configuration(tmp_path, given, *more), World())
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_exported_as_the_run_was_and_not_merged(tmp_path):
    """VeRA: with its frozen random matrices, which all layers share."""
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    config = configuration(tmp_path, {"peft_type": "VERA", "r": 8}, "optim.learning_rate=1e-2")
    run(config, World())
    export_run(config.run_folder, tmp_path / "out", World())
    file = "adapter_model.safetensors"
    own, again = load_file(config.run_folder / "adapter" / file), load_file(tmp_path / "out" / file)
    assert own.keys() == again.keys() and "base_model.vera_A" in own
    for name, tensor in own.items():
        assert torch.equal(again[name], tensor), name
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["peft_type"] == "VERA" and described["task_type"] == "CAUSAL_LM"
    for more, message in (({"what": "merged"}, "merge_and_unload"), ({"rank": 2}, "--rank: given")):
        with pytest.raises(UserError, match=message):
            export_run(config.run_folder, tmp_path / "other", World(), **more)


def test_a_head_trains_beside_and_is_in_the_folder(tmp_path):
    save_random_model(tmp_path / "model", "bert", AutoModelForSequenceClassification)
    rows = "".join(
        f"{word} {n},{label}\n" for n in range(8) for word, label in (("good", 1), ("bad", 0))
    )
    (tmp_path / "records.csv").write_text("text,label\n" + rows)
    config = configuration(
        tmp_path, {"peft_type": "IA3", "feedforward_modules": []}, "run.steps=6",
        "method.targets=[query, value]", "task.kind=sequence_classification",
        f"data.train={tmp_path}/records.csv", "data.train_records=null",
        "optim.learning_rate=1e-2",
    )  # fmt: skip
    run(config, World())
    found = losses(config.run_folder)
    assert found[-1] < found[0]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    loaded = peft.PeftModel.from_pretrained(plain, config.run_folder / "adapter")
    stored = read_tensors(newest(config.run_folder / "checkpoints"))
    head = loaded.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, stored["head/classifier/inner.weight"])
    with torch.no_grad():
        assert loaded(torch.tensor([[5, 6, 7]])).logits.shape == (1, 2)


BFLOAT16 = {
    "lora": {"peft_type": "LORA", "use_dora": True},
    "vera": {"peft_type": "VERA", "r": 8},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 16},
}


@pytest.mark.parametrize("kind", sample(BFLOAT16, "vera"))
def test_it_trains_in_float32_beside_a_backbone_in_bfloat16(tmp_path, kind):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    config = configuration(
        tmp_path, BFLOAT16[kind], "model.dtype=bfloat16", "optim.learning_rate=1e-2",
        "run.verify=auto",
    )  # fmt: skip
    run(config, World())
    stored = read_tensors(newest(config.run_folder / "checkpoints"))
    trained = [t for name, t in stored.items() if name.startswith("trained/")]
    assert trained and all(t.dtype == torch.float32 and t.abs().max() > 0 for t in trained[:1])


@pytest.mark.skipif(not ALL, reason="every kind of PEFT's: make test-all")
def test_every_kind_that_is_not_refused_trains(tmp_path):
    """Or PEFT itself says why it does not fit, in one line."""
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    with pytest.raises(UserError) as error:
        run(configuration(tmp_path, {"peft_type": "NONE"}), World())
    kinds = str(error.value).rpartition("accepted: ")[2].split(", ")
    assert len(kinds) > 20
    trained = []
    for kind in kinds:
        config = configuration(
            tmp_path, {"peft_type": kind}, f"run.name={kind}", "optim.learning_rate=1e-2",
            "run.verify=auto",
        )  # fmt: skip
        try:
            run(config, World())
        except UserError as refused:
            print(kind, refused)
            assert str(refused).startswith("method.peft"), kind
            continue
        assert len(losses(config.run_folder)) == 2
        trained.append(kind)
    print("trained:", trained)
    assert {"LORA", "VERA", "IA3", "OFT"} <= set(trained)
