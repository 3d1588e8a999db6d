"""`method.kind: full`: what is refused, and what its folder, export and estimate hold."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import losses, quick_config, save_random_model
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.store import newest, read_tensors
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.memory.estimate import predict
from trainer.model.build import build
from trainer.model.footprint import estimate, trainable_parameters
from trainer.model.hub import load_tokenizer
from trainer.model.unfreeze import refuse_fixed
from trainer.run.run import run
from trainer.session import open_data
from trainer.tasks.registry import TASKS
from trainer.training.evaluation import evaluate_saved

REFUSED = {
    "quantised": (["model.quantization=nf4"], r"model.quantization: nf4 given with method.kind=full"),
    "peer": (["engine.kind=peer"], r"engine.kind: peer given with method.kind=full; accepted: auto, "),
    "targets": (["method.targets=[q_proj]"], r"method.targets: \['q_proj'\] given .*every parameter"),
    "no master weights": (
        ["model.dtype=bfloat16"],
        r"model.dtype: bfloat16 .* engine.kind=single, .*; accepted: float32, or engine.kind=fsdp2",
    ),
    "blocks kept whole": (
        ["engine.kind=fsdp2", "engine.unsharded_blocks=1"],
        r"engine.unsharded_blocks: 1 given with method.kind=full; accepted: auto or 0",
    ),
    "tokens": (["model.added_tokens=[<|x|>]"], r"model.added_tokens: .* with method.kind=full"),
}  # fmt: skip


def configuration(tmp: Path, *more: str) -> Config:
    return quick_config(
        tmp, "method.kind=full", f"model.id={tmp}/model", "run.steps=4", "optim.schedule=constant",
        "optim.learning_rate=1e-3", "run.verify=auto", *more,
    )  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(tmp_path, case):
    more, message = REFUSED[case]
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    with pytest.raises(UserError, match=message) as error:
        run(configuration(tmp_path, *more), World())
    assert "\n" not in str(error.value)


def test_biases_of_a_model_without_any_are_refused(tmp_path):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    message = r"method.kind: bitfit given, but LlamaForCausalLM here has nothing .*every bias.*acc"
    with pytest.raises(UserError, match=message):
        run(configuration(tmp_path, "method.kind=bitfit"), World())


@pytest.mark.parametrize("kind", ["bitfit", "layernorm"])
def test_a_part_of_the_backbone_trains_with_a_new_head(tmp_path, kind):
    save_random_model(tmp_path / "model", "bert", AutoModelForSequenceClassification)
    config = configuration(
        tmp_path, "task.kind=sequence_classification", f"method.kind={kind}", "data.eval=null"
    )
    task = TASKS["sequence_classification"](config.task, load_tokenizer(config.model))
    task.learn_labels(["bad", "good"])
    built = build(config, task, torch.device("cpu"))
    found = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < found
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in found
    query = "bert.encoder.layer.0.attention.self.query"
    assert (f"{query}.bias" in found) == (kind == "bitfit") and f"{query}.weight" not in found
    scale = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert (scale in found) == (kind == "layernorm")
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in built.model.parameters())
    assert trainable_parameters(built, config) == trained
    split = estimate(built, config, 2, "split")
    assert (split.held, split.backbone) == (8 * trained, 2 * (whole - trained))


def test_what_a_model_keeps_fixed_and_single_numbers_are_refused(tmp_path):
    save_random_model(tmp_path / "model", "roformer", AutoModelForSequenceClassification)
    config = configuration(tmp_path, "task.kind=sequence_classification", "data.eval=null")
    task = TASKS["sequence_classification"](config.task, load_tokenizer(config.model))
    task.learn_labels(["bad", "good"])
    with pytest.raises(UserError, match=r"embed_positions\.weight is kept fixed by the model; acc"):
        build(config, task, torch.device("cpu"))
    scaled = torch.nn.Linear(2, 2)
    scaled.register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(UserError, match="scale is a single number; accepted for this model"):
        refuse_fixed(scaled, config.method)


def test_a_tied_model_is_evaluated_and_exported_from_its_checkpoint(tmp_path):
    save_random_model(
        tmp_path / "model", "llama", AutoModelForCausalLM, tie_word_embeddings=True, vocab_size=512
    )
    config = configuration(tmp_path)
    run(config, World())
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    last = next(line for line in map(json.loads, lines) if "eval_loss" in line)
    scores = evaluate_saved(config, World(), read_saved(config.run_folder))
    assert scores["eval_loss"] == last["eval_loss"]
    export_run(config.run_folder, tmp_path / "out", World(), what="merged")
    own, again, before = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (config.run_folder / "model", tmp_path / "out", tmp_path / "model")
    )
    for name, tensor in own.items():
        assert torch.equal(again[name], tensor), name
        assert not torch.equal(before[name], tensor), name
    with pytest.raises(UserError, match=r"--what: adapter given .* accepted: merged, or backbone"):
        export_run(config.run_folder, tmp_path / "other", World())


def test_a_new_head_trains_with_the_backbone_and_is_in_the_model(tmp_path):
    save_random_model(tmp_path / "model", "bert", AutoModelForSequenceClassification)
    rows = "".join(f"{w} {n},{label}\n" for n in range(8) for w, label in (("good", 1), ("bad", 0)))
    (tmp_path / "records.csv").write_text("text,label\n" + rows)
    config = configuration(
        tmp_path, "task.kind=sequence_classification", f"data.train={tmp_path}/records.csv",
        "data.train_records=null", "data.eval=null", "run.steps=8",
    )  # fmt: skip
    run(config, World())
    found = losses(config.run_folder)
    assert found[-1] < found[0]
    saved = AutoModelForSequenceClassification.from_pretrained(config.run_folder / "model")
    head = read_tensors(newest(config.run_folder / "checkpoints"))["trained/classifier.weight"]
    assert torch.equal(saved.classifier.weight, head)


def test_its_memory_is_16_bytes_a_parameter_split_where_it_is_sharded(tmp_path):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    config = configuration(tmp_path)
    task = open_data(config, World())[1]
    built = build(config, task, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    scalars = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(built, config) == scalars
    assert estimate(built, config, 2, "whole").held == 16 * scalars
    assert estimate(built, config, 2, "split").held == 8 * scalars
    with pytest.raises(
        UserError, match=r"method.kind: full given; accepted: methods whose adapters"
    ):
        predict(configuration(tmp_path, "engine.device=auto"), 1, 2**36)
