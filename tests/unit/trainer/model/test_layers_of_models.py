"""Architectures whose projections are not plain calls of nn.Linear: outputs changed in place,
`Conv1D`, weights read by the block, matrices smaller than the rank."""

import json
import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import losses, quick_config, sample, save_random_model
from tests.references import with_peft
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.model.build import build
from trainer.run.dry_run import dry_run
from trainer.run.run import run
from trainer.session import open_data, open_session

CAUSAL, CLASSIFIER = AutoModelForCausalLM, AutoModelForSequenceClassification
MODELS = {
    "falcon": {"num_kv_heads": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    "deberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_labels": 3,
                "head_dim": None, "num_key_value_heads": None},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mamba": {"state_size": 8, "time_step_rank": 16},
}  # fmt: skip


def saved(folder, model_type):
    return save_random_model(
        folder / "model", model_type, CLASSIFIER if model_type == "deberta" else CAUSAL,
        **MODELS[model_type],
    )  # fmt: skip


def config_of(tmp_path, folder, *overrides):
    if (
        folder
        and "Classification" in json.loads((folder / "config.json").read_text())["architectures"][0]
    ):
        rows = [f"text {word},{i % 3}" for i, word in enumerate("abcdefghijklmnopqr")]
        (tmp_path / "l.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        overrides = (
            "task.kind=sequence_classification", f"data.train={tmp_path}/l.csv", "data.eval=null",
            *overrides,
        )  # fmt: skip
    return quick_config(
        tmp_path, f"model.id={folder}", "method.kind=lora", "method.rank=4",
        "method.targets=all-linear", "run.steps=2", "checkpoint.every=2", "model.dtype=float32",
        *overrides,
    )  # fmt: skip


def ids():
    return torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(5))


def loss_of(model, classifier):
    labels = torch.tensor([0, 2]) if classifier else ids()
    return model(ids(), labels=labels).loss


@pytest.mark.parametrize(
    "model_type", sample(MODELS, "falcon", "gpt2")
)  # others: test_architectures
def test_loss_and_gradients_equal_transformers_and_peft(tmp_path, model_type):
    folder = saved(tmp_path, model_type)
    config = config_of(tmp_path, folder)
    session = open_session(config, World())
    session.model.eval()
    classifier = model_type == "deberta"
    auto = CLASSIFIER if classifier else CAUSAL
    plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
    loss = loss_of(session.model, classifier)
    torch.testing.assert_close(loss, loss_of(plain, classifier), rtol=1e-5, atol=1e-5)
    loss.backward()
    adapters = {n: a for n, a in session.method.adapters.items() if "experts" not in n}
    theirs = with_peft(auto.from_pretrained(folder, dtype=torch.float32), adapters)
    loss_of(theirs, classifier).backward()
    for name, adapter in adapters.items():
        assert adapter.B.grad.any(), name
        lora_b = theirs.base_model.model.get_submodule(name).lora_B["default"].weight
        torch.testing.assert_close(adapter.B.grad.T, lora_b.grad, rtol=1e-3, atol=1e-5)
    run(config, World())
    assert len(losses(config.run_folder)) == 2


@pytest.mark.parametrize(
    "case", sample([("lora", "none"), ("pissa", "nf4"), ("lora", "int8")], ("pissa", "nf4"))
)
def test_conv1d_trains_and_leaves_in_every_form(tmp_path, case):
    kind, quantization = case
    folder = saved(tmp_path, "gpt2")
    config = config_of(
        tmp_path, folder, f"method.kind={kind}", f"model.quantization={quantization}",
        "optim.learning_rate=0.01",
    )  # fmt: skip
    run(config, World())
    export_run(config.run_folder, tmp_path / "again", World(), measure=False)
    export_run(
        config.run_folder, tmp_path / "merged", World(), what="merged", base="original",
        measure=False,
    )  # fmt: skip
    plain = CAUSAL.from_pretrained(folder, dtype=torch.float32).eval()
    before = plain(ids()).logits
    merged = CAUSAL.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = merged(ids()).logits
    assert (expected - before).abs().max() > 1e-2, "training changed nothing"
    for adapter in (config.run_folder / "adapter", tmp_path / "again"):
        assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
            plain = CAUSAL.from_pretrained(folder, dtype=torch.float32)
            wrapped = peft.PeftModel.from_pretrained(plain, adapter).eval()
        torch.testing.assert_close(wrapped(ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_conv1d_of_another_shape_is_named(tmp_path):
    folder = saved(tmp_path, "gpt2")
    settings = json.loads((folder / "config.json").read_text()) | {"n_inner": 128}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"mlp\.c_fc\.weight is \(64, 256\).*\(64, 128\)"):
        open_session(config_of(tmp_path, folder), World())


def test_what_is_left_out_is_said_and_stays_unquantised(tmp_path, capsys):
    folder = saved(tmp_path, "mamba")
    config = config_of(tmp_path, folder, "model.quantization=nf4", "log.progress=plain")
    run(config, World())
    note = "no adapters on mixer.dt_proj, mixer.out_proj, mixer.x_proj: the model reads"
    assert f"note      {note}" in capsys.readouterr().out
    assert note in dry_run(config, World())
    with pytest.raises(UserError, match=r"method\.targets: .*dt_proj: MambaForCausalLM reads"):
        dry_run(config_of(tmp_path, folder, "method.targets=[in_proj,dt_proj]"), World())


def test_auxiliary_matrices_smaller_than_the_rank_are_left_out(tmp_path):
    folder = save_random_model(
        tmp_path / "model", "gemma3n_text", CAUSAL, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=576, altup_num_inputs=2, num_kv_shared_layers=0, laurel_rank=2,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0],
        intermediate_size=[96, 96],
    )  # fmt: skip
    config = config_of(tmp_path, folder)
    _, task, *_ = open_data(config, World())
    built = build(config, task, torch.device("cpu"))
    small = next(left for left in built.left_alone if left.reason == "smaller than the rank")
    assert set(small.paths) == {
        "altup.modality_router", "laurel.linear_left", "laurel.linear_right"
    }  # fmt: skip
    assert "mlp.up_proj" in {unit.kind for unit in built.units}
