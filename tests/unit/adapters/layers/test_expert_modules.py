"""Modules of experts, form by form, against transformers' own forward on merged weights."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from adapters.gated import GatedAdapter
from adapters.layers.expert_modules import AdaptedExperts, experts_form

E, H, WIDTH, T, RANK = 4, 32, 48, 24, 3
CONFIG = SimpleNamespace(
    hidden_size=H, moe_hidden_size=H, intermediate_size=WIDTH, moe_intermediate_size=WIDTH,
    expert_ffn_hidden_size=WIDTH, ffn_hidden_size=WIDTH, moe_latent_size=None, num_local_experts=E,
    num_experts=E, n_routed_experts=E, moe_num_experts=E, zero_expert_num=1, n_shared_experts=E,
    num_experts_per_tok=2, hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.702,
    swiglu_limit=0.5, post_norm_eps=1e-5, ffn_act_fn={"name": "silu"},
    _experts_implementation="eager",
)  # fmt: skip
"""What the classes' constructors read; the limit is small, so that gates are clamped."""

FORMS = {
    "plain": "mixtral.MixtralExperts",
    "transposed, biases, interleaved": "gpt_oss.GptOssExperts",
    "transposed, biases": "openai_privacy_filter.OpenAIPrivacyFilterExperts",
    "transposed": "aria.AriaExperts",
    "no gate": "nemotron_h.NemotronHExperts",
    "norm": "muse_spark.MuseSparkExperts",
    "clamped": "minimax_m3_vl.MiniMaxM3VLExperts",
    "gate in float32": "beam.BeamExperts",
    "without flags": "step3p7.Step3p7Experts",
}
OTHER = [
    "longcat_flash.LongcatFlashExperts",  # some experts are the identity
    "dbrx.DbrxExperts",  # flat matrices
    "inkling.InklingSharedExperts",
]


def made(name: str) -> nn.Module:
    module, _, kind = name.rpartition(".")
    try:
        home = import_module(f"transformers.models.{module}.modeling_{module}")
    except ImportError:
        pytest.skip(f"transformers has no {module}")
    torch.manual_seed(0)
    experts = getattr(home, kind)(CONFIG)
    if hasattr(experts, "fc1"):
        pytest.skip(f"{module} has experts of another form in this transformers")
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts


def adapted(experts: nn.Module) -> tuple[AdaptedExperts, list[torch.Tensor]]:
    """With random adapters, and all their tensors."""
    ours = AdaptedExperts(experts)
    tensors = []
    for name in ours.form.stacks:
        stack = getattr(ours, name)
        for layer in stack.layers:
            layer.adapter = GatedAdapter(
                torch.randn(RANK, stack.in_features), 1 + torch.rand(RANK),
                torch.randn(RANK, stack.out_features) / 8,
            ).requires_grad_(True)  # fmt: skip
            tensors += [layer.adapter.A, layer.adapter.g, layer.adapter.B]
    return ours, tensors


def merged(experts: nn.Module, ours: AdaptedExperts) -> dict[str, torch.Tensor]:
    """The model's own stacks plus ΔW, differentiable in the adapters."""
    weights = {}
    for name in ours.form.stacks:
        adapters = [layer.adapter for layer in getattr(ours, name).layers]
        delta = torch.stack([(a.B * a.g.unsqueeze(1)).T @ a.A for a in adapters])
        weights[name] = getattr(experts, name).detach() + (
            delta.mT if ours.form.transposed else delta
        )
    return weights


def check_gradients(found, expected, x, tensors):
    theirs = torch.autograd.grad(expected.square().sum(), [x, *tensors])
    found.square().sum().backward()
    for ours, reference in zip([x, *tensors], theirs, strict=True):
        scale = reference.abs().max() + 1e-6
        torch.testing.assert_close(ours.grad / scale, reference / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", list(FORMS))
def test_experts_with_adapters_are_transformers_own_with_merged_weights(form):
    experts = made(FORMS[form])
    ours, tensors = adapted(experts)
    x = torch.randn(T, H, requires_grad=True)
    index = torch.stack([torch.randperm(E - 1)[:2] for _ in range(T)])  # nobody chooses the last
    weights = torch.rand(T, 2)
    expected = functional_call(experts, merged(experts, ours), (x, index, weights))
    found = ours(x, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    check_gradients(found, expected, x, tensors)
    assert ours.down_proj.tokens.grad.tolist() == index.flatten().bincount(minlength=E).tolist()


def test_parameters_keep_their_paths():
    names = {name for name, _ in AdaptedExperts(made(FORMS["norm"])).named_parameters()}
    stacks = {"gate_up_proj.weight", "down_proj.weight"}
    assert names - stacks == {
        n for n, _ in made(FORMS["norm"]).named_parameters() if "norm" in n
    }  # fmt: skip
    names = {name for name, _ in AdaptedExperts(made("gpt_oss.GptOssExperts")).named_parameters()}
    assert names == {*stacks, "gate_up_proj_bias", "down_proj_bias"}


def test_llama_4_s_experts_get_all_rows_and_count_the_chosen_ones():
    block = made("llama4.Llama4TextMoe")
    block.shared_expert = None
    ours, tensors = adapted(block.experts)
    assert ours.swapped and not AdaptedExperts(made("gpt_oss.GptOssExperts")).swapped
    x = torch.randn(T, H, requires_grad=True)
    scores, _ = block.router(x.detach())
    rows = (x.repeat(E, 1) * scores.T.reshape(-1, 1)).detach().requires_grad_(True)
    expected = functional_call(block.experts, merged(block.experts, ours), (rows,))
    found = ours(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    chosen = (rows != 0).any(1, keepdim=True)
    # The router multiplies the gradients of the other rows by zero.
    check_gradients(found, expected * chosen, rows, tensors)
    counts = chosen.view(E, T).sum(1)
    assert ours.gate_up_proj.tokens.grad.tolist() == counts.tolist() and counts.sum() == 2 * T


@pytest.mark.parametrize("name", OTHER)
def test_experts_of_another_form_are_left_alone(name):
    assert experts_form(made(name)) is None


def test_stacks_whose_shapes_contradict_the_flags_are_left_alone():
    experts = made("mixtral.MixtralExperts")
    experts.down_proj = nn.Parameter(experts.down_proj.mT.contiguous())
    assert experts_form(experts) is None
