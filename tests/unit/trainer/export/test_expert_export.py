"""Experts' adapters one by one: what vLLM and SGLang read, what PEFT makes of it, what it computes.

The servers' rules are restated from vLLM 0.33.0 (`lora/utils.py`, `lora/lora_model.py`,
`lora/lora_weights.py` `pack_moe`, `lora/peft_helper.py`, `layers/fused_moe/routed_experts.py`) and
SGLang 0.5.23 (`lora/lora.py`, `lora/mem_pool.py`).
"""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers import TINY, quick_config, save_mixture, thorough
from trainer.checkpoint import store
from trainer.checkpoint.state import load_trained
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 96, 4, 2

SERVED = {
    # model type: (path of the experts, projections (gate, down, up)) in both servers
    "mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3")),
    "qwen2_moe": ("mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "down_proj", "up_proj")),
}
ADALORA = ["method.kind=adalora", "method.tinit=1", "method.tfinal=1", "method.delta_t=1"]
CASES = [
    ("mixtral", {}, ["method.targets=all-linear"]),
    ("qwen3_moe", {}, ["method.targets=[gate_up_proj,down_proj]", *ADALORA]),
    ("olmoe", {}, [r"method.targets=.*layers\.1\.mlp\.experts\.gate_up_proj"]),
    pytest.param(
        "qwen2_moe", {"shared_expert_intermediate_size": 96}, ["method.targets=all-linear"],
        marks=thorough,
    ),
]  # fmt: skip


def ids():
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(tmp_path, model_type, shape, changes):
    folder = save_mixture(tmp_path / "model", model_type, **shape)
    config = quick_config(
        tmp_path, f"model.id={folder}", "checkpoint.every=4", "optim.learning_rate=1e-2", *changes
    )
    run(config, World())
    return folder, config


def trained_logits(config):
    session = open_session(config, World())
    newest = store.newest(config.run_folder / "checkpoints")
    load_trained(session, newest, store.read_tensors(newest))
    with session.method.inference(), torch.no_grad():
        return session.model.eval()(ids()).logits


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_close(logits, expected):
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-5


def served_experts(tensors, model_type):
    """{layer: {projection: {expert: (A, B)}}} as vLLM packs them; asserts what it asserts."""
    path, projections = SERVED[model_type]
    layers = {}
    for key, value in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert found, f"vLLM: {key} is unsupported LoRA weight"
        module, factor = found.groups()
        if ".experts" not in module:
            continue
        expert = re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(path)}\.(\d+)\.(\w+)", module)
        assert expert, f"vLLM: unexpected module {module}"
        layer, number, projection = expert.groups()
        assert projection in projections and int(number) < EXPERTS
        slot = layers.setdefault(int(layer), {}).setdefault(projection, {})
        slot.setdefault(int(number), {})[factor] = value
    gate, down, up = projections
    widths = {
        gate: (INTERMEDIATE, HIDDEN),
        up: (INTERMEDIATE, HIDDEN),
        down: (HIDDEN, INTERMEDIATE),
    }
    for found in layers.values():
        assert set(found) == set(projections)  # pack_moe: w1, w2 and w3
        for projection, experts in found.items():
            assert sorted(experts) == list(range(EXPERTS))  # of every expert
            ranks = {pair["A"].shape[0] for pair in experts.values()}
            assert len(ranks) == 1  # torch.stack; "different LoRA ranks"
            out_features, in_features = widths[projection]
            for pair in experts.values():
                assert pair["A"].shape == (*ranks, in_features)
                assert pair["B"].shape == (out_features, *ranks)
    return layers


@pytest.mark.parametrize("model_type, shape, changes", CASES)
def test_servers_and_peft_compute_what_was_trained(model_type, shape, changes, tmp_path):
    folder, config = trained(tmp_path, model_type, shape, changes)
    expected = trained_logits(config)
    assert (base(folder)(ids()).logits - expected).abs().max() > 1e-2
    adapter = config.run_folder / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert served_experts(tensors, model_type)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (
        settings["lora_alpha"]
        == settings["r"]
        in {value.shape[0] for key, value in tensors.items() if "lora_A" in key}
    )
    assert settings["alpha_pattern"] == settings["rank_pattern"]
    # As a server does: W + B A of every tensor in the files, by the name that both share.
    files = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        files[name] += tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    shutil.copytree(folder, tmp_path / "merged")
    save_file(files, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert_close(base(tmp_path / "merged")(ids()).logits, expected)
        assert_close(PeftModel.from_pretrained(base(folder), adapter)(ids()).logits, expected)
        export_run(config.run_folder, tmp_path / "stacked", World(), experts="stacked")
        stacked = PeftModel.from_pretrained(base(folder), tmp_path / "stacked")
        assert_close(stacked(ids()).logits, expected)
    assert not any(
        re.search(r"experts\.\d", key)
        for key in load_file(tmp_path / "stacked/adapter_model.safetensors")
    )
    for written, words in ((adapter, "--max-lora-rank"), (tmp_path / "stacked", "refuse or drop")):
        assert words in (written / "README.md").read_text()


def test_one_rank_for_sglang(tmp_path):
    """SGLang gives every matrix a buffer of the config's rank, and wants q, k and v together."""
    changes = ["method.targets=all-linear", *ADALORA]
    folder, config = trained(tmp_path, "qwen3_moe", {}, changes)
    own = load_file(config.run_folder / "adapter/adapter_model.safetensors")
    assert len({value.shape[0] for key, value in own.items() if "lora_A" in key}) > 1
    export_run(config.run_folder, tmp_path / "out", World(), same_rank=True)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {settings["r"]}
    for layer in range(LAYERS):
        for name in "qkv":
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_A.weight"
            assert path in tensors
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base(folder), tmp_path / "out")(ids()).logits
        assert_close(logits, trained_logits(config))


def test_a_model_without_experts_in_its_files(tmp_path):
    config = quick_config(tmp_path, f"model.id={TINY}", "run.steps=1")
    run(config, World())
    with pytest.raises(UserError, match="--experts: per_expert given, but the files of Llama"):
        export_run(config.run_folder, tmp_path / "out", World(), experts="per_expert")
