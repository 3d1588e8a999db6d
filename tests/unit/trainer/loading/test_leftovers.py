"""What the files hold and the model does not take: refused where it belongs to what the model has."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForPreTraining

from tests.helpers import TINY
from tests.tiny_models import CAUSAL, CLASSIFICATION, save_tiny
from tests.unit.trainer.loading.test_every_tensor import load, prepared
from trainer.errors import UserError
from trainer.loading.load import check_backbone


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def reconfigure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder, part=CAUSAL):
    """What a dry run and loading say; the same."""
    config, task = prepared(folder, part=part)
    with pytest.raises(UserError) as first:
        check_backbone(config, task, torch.device("cpu"))
    with pytest.raises(UserError) as second:
        load(folder, part=part)
    assert str(first.value) == str(second.value)
    return str(first.value)


STRAY = {
    "a bias": {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
    "a norm of a block": {"model.layers.1.self_attn.q_norm.weight": torch.ones(16)},
    "a further layer": {"model.layers.9.mlp.up_proj.weight": torch.ones(96, 64)},
    "a norm outside": {"model.embed_norm.weight": torch.ones(64)},
    "the bias of the head": {"lm_head.bias": torch.ones(576)},
    "scales": {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def folder(llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("stray", STRAY)
def test_a_tensor_of_a_module_that_the_model_has_is_refused(folder, stray, bare):
    if bare and not next(iter(STRAY[stray])).startswith("model.layers"):
        pytest.skip("no part of a block")

    def without_prefix(stored):
        stored = stored | STRAY[stray]
        return {n.removeprefix("model.") if bare else n: tensor for n, tensor in stored.items()}

    rewrite(folder, without_prefix)
    said = refusal(folder)
    key = next(iter(STRAY[stray])).removeprefix("model." if bare else "")
    assert said == (
        f"model.id: {folder}: holds 1 tensor(s) that LlamaForCausalLM does not have, such as {key}; "
        "accepted: what config.json makes, and other heads or towers"
    )


def test_a_config_with_fewer_layers_than_the_files_is_refused(folder):
    reconfigure(folder, num_hidden_layers=1)
    assert "holds 9 tensor(s)" in (said := refusal(folder)) and "model.layers.1." in said


def test_other_heads_and_towers_are_left_out_and_named(folder):
    others = {
        "vision_tower.layers.0.norm.weight": torch.ones(3),
        "model.visual.patch_embed.proj.weight": torch.ones(3, 3),
        "score.weight": torch.ones(2, 64),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 3),
    }
    rewrite(folder, lambda stored: stored | others)
    said = load(folder).left_out
    assert said.startswith("model.id: 4 tensor(s) of parts that LlamaForCausalLM does not have")


def test_values_that_the_model_computes_are_no_weights(folder):
    computed = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.position_ids": torch.arange(8),
        "model.version": torch.ones(1),
    }
    rewrite(folder, lambda stored: stored | computed)
    assert load(folder).left_out is None


def test_a_vendors_own_file_beside_the_model_is_not_read(folder):
    other = {"layers.0.attention.wq.weight": torch.ones(64, 64)}
    save_file(other, folder / "consolidated.safetensors")
    assert load(folder).left_out is None


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    folder = save_tiny(tmp_path / "model", "glm4_moe_lite")
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    further = f"model.layers.{count}.eh_proj.weight"
    rewrite(folder, lambda stored: stored | {further: torch.ones(4, 4)})
    reconfigure(folder, num_nextn_predict_layers=0)
    assert further in refusal(folder)
    reconfigure(folder, num_nextn_predict_layers=1)
    assert further in load(folder).left_out


@pytest.mark.parametrize("causal", [True, False])
def test_a_backbone_is_read_with_another_head(tmp_path, causal):
    folder = save_tiny(tmp_path / "model", "llama", CAUSAL if causal else CLASSIFICATION)
    if causal:
        reconfigure(folder, tie_word_embeddings=False)
        found = load(folder, part=CLASSIFICATION).left_out
        assert found is not None and "such as lm_head.weight" in found
    else:
        rewrite(folder, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()})
        assert "such as score.weight" in load(folder).left_out


def test_an_encoder_is_read_without_its_pretraining_heads(tmp_path):
    config = BertConfig(vocab_size=576, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96)  # fmt: skip
    BertForPreTraining(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    assert "such as cls." in load(tmp_path / "model", part=CLASSIFICATION).left_out


def test_two_tensors_that_are_one_in_the_model_must_be_equal(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda stored: stored | {name.removeprefix("model."): stored[name].clone()})
    loaded = load(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = loaded.model.get_parameter(name)
    assert torch.equal(ours, expected.get_parameter(name))
    rewrite(folder, lambda stored: stored | {name.removeprefix("model."): stored[name] + 1})
    with pytest.raises(UserError, match=r"differ, and both are .*up_proj.* accepted: one of them"):
        load(folder)


@pytest.mark.parametrize(
    "name, value, dtype, setting",
    [
        ("model.layers.1.mlp.up_proj.weight", torch.nan, "float32", "model.quantization=nf4"),
        ("model.layers.1.mlp.up_proj.weight", -torch.inf, "float32", "model.quantization=none"),
        ("model.norm.weight", torch.nan, "bfloat16", "model.quantization=none"),
        ("model.embed_tokens.weight", 3.4e38, "bfloat16", "model.quantization=none"),
    ],
)
def test_values_that_are_not_finite_are_the_files(folder, name, value, dtype, setting):
    def spoilt(stored):
        stored[name].view(-1)[5] = value
        return stored

    rewrite(folder, spoilt)
    with pytest.raises(UserError) as refused:
        load(folder, f"model.dtype={dtype}", setting, "run.verify=off")
    assert str(refused.value) == (
        f"model.id: {folder}: {name} holds values that are not finite in {dtype}; accepted: finite "
        "values"
    )


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    folder = save_tiny(tmp_path / "model", "mixtral")
    name = next(n for n in load_file(folder / "model.safetensors") if ".experts.2.w1." in n)

    def spoilt(stored):
        stored[name][0, 0] = torch.inf
        return stored

    rewrite(folder, spoilt)
    with pytest.raises(UserError, match=r"layers\.0\..*experts.*, expert 2, holds values that are"):
        load(folder)
