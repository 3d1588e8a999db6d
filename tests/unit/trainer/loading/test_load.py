"""Backbones of several architectures: the same logits as transformers', in every format."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from adapters.formats.formats import FORMATS
from adapters.methods.registry import METHODS
from tests.conftest import shared
from tests.helpers import TINY, quick_config, save_random_model
from trainer.distributed.world import World
from trainer.engine.single import SingleEngine
from trainer.loading.load import load_backbone
from trainer.model.hub import load_tokenizer
from trainer.tasks.registry import TASKS

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
ENCODERS = ["bert", "roberta"]


def load(config, labels=("0", "1")):
    tokenizer = load_tokenizer(config.model)
    task = TASKS[config.task.kind](config.task, tokenizer)
    task.learn_labels(list(labels))
    return load_backbone(config, task, SingleEngine(config, World()), World()), task


def inputs(rows=2, width=11):
    return torch.randint(3, 512, (rows, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", DECODERS)
def test_decoder_logits_are_those_of_transformers(model_type, tmp_path):
    folder = save_random_model(tmp_path / "model", model_type, AutoModelForCausalLM)
    backbone, _ = load(quick_config(tmp_path, f"model.id={folder}"))
    expected = AutoModelForCausalLM.from_pretrained(  # sdpa lacks soft caps in transformers 5.17
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    backbone.model.eval()
    assert len(backbone.units) == 14
    ours, theirs = backbone.model(inputs()).logits, expected(inputs()).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not any(p.is_meta for p in backbone.model.parameters())


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoder_with_a_stored_head_gives_transformers_logits(model_type, tmp_path):
    folder = save_random_model(
        tmp_path / "model", model_type, AutoModelForSequenceClassification, num_labels=2
    )
    config = quick_config(
        tmp_path, f"model.id={folder}", "task.kind=sequence_classification", "data.format=auto"
    )
    backbone, _ = load(config)
    expected = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    backbone.model.eval()
    assert torch.allclose(
        backbone.model(inputs()).logits, expected.eval()(inputs()).logits, atol=1e-5
    )
    assert {unit.layer for unit in backbone.units} >= {0, 1}
    assert list(backbone.heads) == ["classifier"]
    assert all(p.requires_grad for p in backbone.heads["classifier"].parameters())


def test_bare_encoder_checkpoint_finds_its_prefix_and_draws_a_head(tmp_path):
    config = BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    run = quick_config(tmp_path, f"model.id={tmp_path}/model", "task.kind=sequence_classification")
    first, second = load(run)[0], load(run)[0]
    for a, b in zip(
        first.heads["classifier"].parameters(), second.heads["classifier"].parameters(), strict=True
    ):
        assert torch.equal(a, b)  # every rank draws the same head
    weight = first.heads["classifier"].inner.weight
    assert 0.005 < weight.std() < 0.05


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_logits_are_those_of_the_dequantised_matrices(quantization, tmp_path):
    config = quick_config(tmp_path, f"model.quantization={quantization}")
    backbone, _ = load(config)
    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for path, host in backbone.adapted_layers.items():
        linear = reference.get_submodule(path)
        packed = FORMATS[quantization].pack(linear.weight.detach(), torch.float32)
        restored = FORMATS[quantization].unpack(packed, tuple(linear.weight.shape), torch.float32)
        linear.weight.data.copy_(restored)
        assert host.weight.dim() == 1 and not host.weight.requires_grad
    backbone.model.eval()
    assert torch.allclose(backbone.model(inputs()).logits, reference(inputs()).logits, atol=1e-4)
    assert 0.005 < backbone.quantization_error < 0.15


def test_real_models_give_transformers_logits(tmp_path):
    for name in ("stories260K", "books-llama-28m"):
        folder = shared(f"models/{name}")
        backbone, _ = load(quick_config(tmp_path, f"model.id={folder}"))
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        backbone.model.eval()
        assert torch.allclose(backbone.model(inputs()).logits, expected(inputs()).logits, atol=1e-4)


def test_tied_head_stays_tied_and_can_host_an_adapter(tmp_path):
    config = quick_config(tmp_path, "method.include_head=true", "method.targets=[lm_head]")
    backbone, _ = load(config)
    model = backbone.model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    method = METHODS["lora"](config.method, 0)
    method.attach(backbone.units, backbone.adapted_layers, torch.device("cpu"))
    before = model(inputs()).logits.detach()
    method.adapters["lm_head"].B.data.normal_()
    assert not torch.allclose(model(inputs()).logits, before)


def test_fresh_adapters_change_nothing_and_are_the_same_on_every_rank(tmp_path):
    config = quick_config(tmp_path)
    adapters = []
    for _ in range(2):
        backbone, _ = load(config)
        backbone.model.eval()
        before = backbone.model(inputs()).logits
        method = METHODS["lora"](config.method, config.run.seed)
        method.attach(backbone.units, backbone.adapted_layers, torch.device("cpu"))
        assert torch.equal(backbone.model(inputs()).logits, before)
        adapters.append(method.adapters)
    for name, adapter in adapters[0].items():
        assert torch.equal(adapter.A, adapters[1][name].A)
        assert adapter.A.abs().max() <= adapter.A.shape[1] ** -0.5 + 1e-6  # Kaiming-uniform(√5)
    names = list(adapters[0])
    assert not torch.equal(adapters[0][names[0]].A, adapters[0][names[7]].A)


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    found = []
    for setting in ("false", "true"):
        config = quick_config(
            tmp_path, f"engine.activation_checkpointing={setting}", "method.dropout=0.2"
        )
        backbone, _ = load(config)
        method = METHODS["lora"](config.method, 0)
        method.attach(backbone.units, backbone.adapted_layers, torch.device("cpu"))
        for adapter in method.adapters.values():
            adapter.B.data.fill_(0.01)
        method.adapters.set_dropout_seed(3, 1)
        backbone.model(inputs(), use_cache=False).logits.square().mean().backward()
        found.append([adapter.A.grad for adapter in method.adapters.values()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0


def test_random_weights_need_no_files_and_keep_their_shapes(tmp_path):
    config = quick_config(
        tmp_path, "model.weights=random", "model.overrides.num_hidden_layers=2",
        "model.overrides.tie_word_embeddings=false",
    )  # fmt: skip
    first, second = load(config)[0], load(config)[0]
    assert len(first.units) == 14 and first.model.lm_head.weight.shape == (512, 128)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.isfinite(first.model(inputs()).logits).all()
