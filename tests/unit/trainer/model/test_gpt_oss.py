"""gpt-oss: experts with biases, from plain and from MXFP4 files, against transformers and PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from adapters.formats.formats import FORMATS
from tests.gpt_oss import save_gpt_oss, save_mxfp4
from tests.helpers import losses, quick_config, sample
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.loading.mxfp4 import unpack
from trainer.run.run import run
from trainer.session import open_session

ADAPTED = ["method.targets=all-linear", "method.rank=4"]


def ids():
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def test_fp4_blocks_are_unpacked_as_transformers_does():
    """All values of a byte with all scales from the second; the first is subnormal in bfloat16."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 16, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).clamp(min=1, max=252)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    found = unpack(blocks, scales, transposed=True)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert unpack(blocks, scales).shape == (1, 16, 512)
    smallest = unpack(torch.full((1, 16), 0x22, dtype=torch.uint8), torch.zeros(1, 1).byte())
    assert smallest.float().unique().tolist() == [2.0**-127]


@pytest.mark.parametrize("fmt", sample(["none", "nf4", "int8"], "nf4"))
def test_experts_compute_with_the_matrices_they_stand_for(tmp_path, fmt):
    folder = save_gpt_oss(tmp_path / "model")
    config = quick_config(tmp_path, f"model.id={folder}", *ADAPTED, f"model.quantization={fmt}")
    session = open_session(config, World())
    assert {u.kind for u in session.backbone.units} >= {
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip
    expected = loaded(folder)
    for name, parameter in expected.named_parameters():
        if parameter.dim() < 2 or any(k in name for k in ("embed", "lm_head", "router", "bias")):
            continue
        rows = parameter.data.mT if parameter.dim() == 3 else parameter.data
        matrix, fmt_ = rows.flatten(0, -2), FORMATS[fmt]
        restored = fmt_.unpack(fmt_.pack(matrix, torch.float32), matrix.shape, torch.float32)
        restored = restored.view(rows.shape)
        parameter.data = restored.mT if parameter.dim() == 3 else restored
    torch.testing.assert_close(logits(session.model), logits(expected), rtol=1e-4, atol=1e-4)


def check_exports(tmp_path, config, plain):
    """Adapter and merged model compute the same, and not what the base computes."""
    export_run(config.run_folder, tmp_path / "out", World())
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged", dtype="float32")
    base = loaded(plain)
    untrained, merged = logits(base), loaded(tmp_path / "merged")
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    assert (logits(merged) - untrained).abs().max() > 0.01
    torch.testing.assert_close(adapted, logits(merged), rtol=1e-4, atol=1e-4)
    return merged


def test_training_lowers_the_loss_and_exports_what_peft_loads(tmp_path):
    folder = save_gpt_oss(tmp_path / "model")
    config = quick_config(
        tmp_path, f"model.id={folder}", *ADAPTED, "run.steps=4",
        "checkpoint.every=4", "optim.learning_rate=1e-2",
    )  # fmt: skip
    run(config, World())
    found = losses(config.run_folder)
    assert found[-1] < found[0]
    check_exports(tmp_path, config, folder)


def test_sinks_are_respected_or_the_attention_refused(tmp_path):
    folder = save_gpt_oss(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if name.endswith("sinks"):
            stored[name] = torch.full_like(stored[name], 3.0)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    session = open_session(quick_config(tmp_path, f"model.id={folder}"), World())
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    torch.testing.assert_close(logits(session.model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"model.attention=sdpa: .*scaled_dot_product_attention"):
        open_session(quick_config(tmp_path, f"model.id={folder}", "model.attention=sdpa"), World())


def test_mxfp4_files_train_as_the_values_they_hold(tmp_path, capsys):
    plain = save_gpt_oss(tmp_path / "plain")
    folder = save_mxfp4(plain, tmp_path / "packed")
    config = quick_config(
        tmp_path, f"model.id={folder}", *ADAPTED, "run.steps=2", "checkpoint.every=2",
        "optim.learning_rate=1e-2", "log.progress=plain",
    )  # fmt: skip
    session = open_session(config, World())
    torch.testing.assert_close(logits(session.model), logits(loaded(plain)), rtol=1e-4, atol=1e-4)
    run(config, World())
    assert "weights are stored as MXFP4, read as bfloat16" in capsys.readouterr().out
    merged = check_exports(tmp_path, config, plain)
    assert not hasattr(merged.config, "quantization_config")


def test_mxfp4_files_are_packed_again_by_the_run_s_format(tmp_path):
    plain = save_gpt_oss(tmp_path / "plain")
    folder = save_mxfp4(plain, tmp_path / "packed")
    sessions = [
        open_session(
            quick_config(tmp_path, f"model.id={where}", *ADAPTED, "model.quantization=nf4"), World()
        )
        for where in (folder, plain)
    ]
    ours, theirs = (logits(session.model) for session in sessions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_other_prequantised_files_are_refused(tmp_path):
    folder = save_mxfp4(save_gpt_oss(tmp_path / "plain"), tmp_path / "packed")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for changed, message in (
        ({**stored, name: stored[name][:, :, :1].contiguous()}, rf"{name} is \(4, 64, 1\)"),
        ({**stored, name: stored[name].float()}, f"{name} is stored as F32; accepted: uint8"),
        ({n: t for n, t in stored.items() if n != name}, f"no tensor for {name}"),
    ):
        save_file(changed, folder / "model.safetensors")
        config = quick_config(tmp_path, f"model.id={folder}")
        with pytest.raises(UserError, match=message):
            open_session(config, World())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised already .*gptq"):
        open_session(quick_config(tmp_path, f"model.id={folder}"), World())
