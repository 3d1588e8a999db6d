"""Published sizes on the meta device: every large matrix of the blocks is adapted or named.

The small models of other tests stay below the size from which a matrix that is no linear layer
counts (`other_matrices`). Values from the models' config.json; fewer layers, of every kind.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.gpt_oss import modeling_gpt_oss

from adapters.layers.base import PackedLayer
from adapters.units import transformer_blocks
from tests.helpers import TINY, quick_config
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.model.mixture import gates
from trainer.tasks.registry import TASKS

MODELS = {
    "gpt-oss-20b": ("gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2,
        "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
    }),
    "Llama 4 Scout": ("llama4_text", {
        "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_hidden_layers": 4, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "vocab_size": 202048,
    }),
    "Qwen3-Next-80B-A3B": ("qwen3_next", {
        "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "vocab_size": 151936,
    }),
    "DeepSeek-V3": ("deepseek_v3", {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 3, "vocab_size": 129280,
    }),
}  # fmt: skip
DBRX = {
    "d_model": 6144, "n_heads": 48, "n_layers": 1, "vocab_size": 100352,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
}  # fmt: skip
HYBRIDS = {
    "Granite 4": ("granitemoehybrid", {
        "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 12,
        "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6,
        "shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2, "vocab_size": 100352,
    }),
    "Nemotron-H-8B": ("nemotron_h", {
        "hidden_size": 4096, "hybrid_override_pattern": "M-M*", "num_hidden_layers": 4,
        "intermediate_size": 21504, "mamba_num_heads": 128, "mamba_head_dim": 64,
        "ssm_state_size": 128, "n_groups": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
    }),
    "Mamba-2.8B": ("mamba", {
        "hidden_size": 2560, "num_hidden_layers": 2, "state_size": 16, "vocab_size": 50280,
    }),
}  # fmt: skip
LARGE = 1 << 20


def built(tmp_path, model_type, values, quantization):
    folder = tmp_path / "model"
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    config = quick_config(
        tmp_path, f"model.id={folder}", "method.targets=all-linear",
        f"model.quantization={quantization}",
    )  # fmt: skip
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    return build(config, task, torch.device("cpu"))


@pytest.mark.parametrize(
    ("model", "quantization"), [*((m, "nf4") for m in MODELS), ("gpt-oss-20b", "none")]
)
def test_every_large_matrix_is_adapted_or_a_router(tmp_path, model, quantization):
    found = built(tmp_path, *MODELS[model], quantization)
    adapted = {id(layer.layer) for layer in found.adapted_layers.values()}
    units = {unit.name for unit in found.units}
    routers = {path for path, _, _ in gates(found.model)}
    stacks = 0
    for path, block in transformer_blocks(found.model):
        for name, module in block.named_modules(prefix=path):
            sizes = [p.numel() for p in module.parameters(recurse=False) if p.dim() > 1]
            if not any(size > LARGE for size in sizes) or name in routers:
                continue
            assert isinstance(module, PackedLayer) and id(module) in adapted, name
            assert module.weight_format == quantization, name
            assert units.issuperset(module.layer_names(name)), name
            stacks += module.stacked
    assert stacks >= 2 and not any("layout" in left.reason for left in found.left_alone)


@pytest.mark.parametrize("model", HYBRIDS)
def test_what_a_model_reads_itself_stays_unquantised_and_is_named(tmp_path, model):
    """Mamba's fused kernels take the weight of `out_proj`."""
    found = built(tmp_path, *HYBRIDS[model], "nf4")
    (left,) = [left for left in found.left_alone if "reads its weight" in left.reason]
    assert "stays unquantised" in left.reason
    named = {path.rpartition(".")[2] for path in left.paths}
    assert "out_proj" in named
    for path, module in found.model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > LARGE:
            assert path == "lm_head" or path.rpartition(".")[2] in named, path


def test_flat_experts_are_named_and_not_quantised(tmp_path):
    """DBRX holds all its experts in three matrices (E · width, hidden)."""
    (left,) = [
        left for left in built(tmp_path, "dbrx", DBRX, "none").left_alone if "layout" in left.reason
    ]
    assert [name.rpartition(".")[2] for name in left.paths] == ["v1", "w1", "w2"]
    with pytest.raises(UserError, match=r"nf4.*experts\.mlp\.w1 \(172032, 6144\).* none"):
        built(tmp_path, "dbrx", DBRX, "nf4")


def test_a_large_matrix_of_no_known_layer_is_named(tmp_path, monkeypatch):
    """As an architecture nobody here has seen may hold one."""
    kind, values = MODELS["gpt-oss-20b"]
    construct = modeling_gpt_oss.GptOssAttention.__init__

    def with_another(self, config, layer_idx):
        construct(self, config, layer_idx)
        self.mixing = nn.Parameter(torch.empty(2048, 1024))

    monkeypatch.setattr(modeling_gpt_oss.GptOssAttention, "__init__", with_another)
    (left,) = built(tmp_path, kind, values, "none").left_alone
    assert left.paths == ("self_attn.mixing",)
    with pytest.raises(UserError, match=r"self_attn\.mixing \(2048, 1024\)"):
        built(tmp_path, kind, values, "nf4")
