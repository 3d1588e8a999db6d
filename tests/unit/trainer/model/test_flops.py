"""Model FLOPs against torch's own counter, pairs of attention against masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adapters.layers.expert_modules import AdaptedExperts
from adapters.layers.experts import StackedLinear
from trainer.model.flops import model_flops
from trainer.model.peak_flops import peak_flops

WIDTHS = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
ROWS, LENGTH = 2, 20


def tiny(model_type, **changes):
    config = AutoConfig.for_model(model_type, **WIDTHS, **changes)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config)


def counted(model, *, trains):
    """FLOPs of forward and backward of ROWS documents, by torch."""
    model.requires_grad_(trains)
    inputs = model.get_input_embeddings()(torch.randint(0, 96, (ROWS, LENGTH))).detach()
    inputs.requires_grad_(True)  # as if adapters were below
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(model_type, trains):
    model = tiny(model_type)
    # The counter takes all pairs: its products do not know what a mask hides.
    found = replace(model_flops(model, trains=trains), causal=False)
    total = counted(model, trains=trains)
    assert found.of_step(np.full(ROWS, LENGTH), ROWS * LENGTH) == total


@pytest.mark.parametrize("trains", [False, True])
def test_a_tower_for_images_counts_nothing_in_a_step_on_text(trains):
    """Gemma 3: its vision tower and projector are part of the model, and not of the step."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=WIDTHS, vision_config=vision, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    assert any(isinstance(m, torch.nn.Linear) for m in model.model.vision_tower.modules())
    found = replace(model_flops(model, trains=trains), causal=False)
    total = counted(model, trains=trains)
    assert found.of_step(np.full(ROWS, LENGTH), ROWS * LENGTH) == total


def test_a_mixture_counts_the_experts_that_a_token_takes():
    model = tiny(
        "mixtral", num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    )
    total = counted(model, trains=False)
    routers = 3 * 32 * 4  # not counted by the formula
    for layer in model.model.layers:  # as the project's own layers hold them
        layer.mlp.experts = AdaptedExperts(layer.mlp.experts)
    found = replace(model_flops(model), causal=False)
    assert any(isinstance(module, StackedLinear) for module in model.modules())
    of_routers = 4 * routers * ROWS * LENGTH
    assert found.of_step(np.full(ROWS, LENGTH), ROWS * LENGTH) == total - of_routers


def test_pairs_are_those_of_the_masks():
    lengths = np.array([1, 7, 20])
    for changes, window in (({}, None), ({"sliding_window": 6}, 6)):
        found = model_flops(tiny("mistral", **changes))
        pairs = 0
        for n in lengths:
            i, j = np.indices((n, n))
            pairs += int(((j <= i) & (i - j < (window or n))).sum())
        attention = replace(found, matrices=0, head=0).of_step(lengths, 0)
        assert attention == 3 * 3 * 2 * pairs * 4 * (8 + 8)  # layers, passes, heads


def test_the_head_counts_where_tokens_are_learned():
    found = model_flops(tiny("llama"))
    lengths = np.array([10, 10])
    assert found.of_step(lengths, 20) - found.of_step(lengths, 5) == 15 * 4 * 32 * 96


def test_what_the_formula_does_not_describe_has_none():
    t5 = AutoConfig.for_model("t5", num_layers=1, d_model=8, d_ff=8, num_heads=1, vocab_size=9)
    assert model_flops(AutoModelForSeq2SeqLM.from_config(t5)) is None
    # Layers of other kinds than those that are counted: Conv1D, experts in one parameter.
    gpt2 = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    assert model_flops(AutoModelForCausalLM.from_config(gpt2)) is None
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    mixtral = AutoConfig.for_model(
        "mixtral", **small, num_attention_heads=1, num_key_value_heads=1, num_local_experts=4
    )
    assert model_flops(AutoModelForCausalLM.from_config(mixtral)) is None


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H200", 989.5),
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L4", 121.0), ("NVIDIA L40", None),
    ("NVIDIA L40S", 362.05), ("NVIDIA A10-24Q", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_the_peak_is_known_or_absent(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
