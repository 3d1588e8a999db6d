"""The loss inside the head: against torch's cross entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.layers.linear import AdaptedLinear
from adapters.token_rows import TokenRows, frozen_tables
from tests.helpers import SMALL, sample
from trainer.tasks import chunked_cross_entropy
from trainer.tasks.base import IGNORED
from trainer.tasks.chunked_cross_entropy import loss_head, loss_inside
from trainer.tasks.logits import LogitMap, logit_map

TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe"]


CHANGING = {
    "gemma2": {"final_logit_softcapping": 0.7},
    "gemma3_text": {"final_logit_softcapping": 0.7},
    "granite": {"logits_scaling": 0.3},
    "granitemoe": {"logits_scaling": 0.3},
    "cohere": {"logit_scale": 2.5},
    "cohere2": {"logit_scale": 2.5},
}
"""Kinds of models that scale or cap their logits, and by how much."""


def model_of(model_type, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)


def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (3, 21), generator=generator)
    targets = ids.where(torch.rand(3, 21, generator=generator) < 0.6, IGNORED)
    targets[1] = IGNORED  # a row without a loss
    return ids, targets[:, 1:]


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("model_type", TYPES)
def test_loss_and_gradient_are_those_of_whole_logits(model_type, rows, monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", rows * SMALL["vocab_size"])
    model, (ids, targets) = model_of(model_type), inputs()
    learned = targets != IGNORED
    head = loss_head(model)
    assert head is model.lm_head
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    largest = []
    linear = F.linear

    def watched(x, weight, bias=None):
        y = linear(x, weight, bias)
        if weight is head.weight:
            largest.append(y.shape[:-1].numel())
        return y

    monkeypatch.setattr(F, "linear", watched)
    with loss_inside(model, head, learned, targets[learned]):
        losses = model(inputs_embeds=embedded, use_cache=False).logits
    assert max(largest) == min(rows, int(learned.sum()))
    weights = torch.linspace(0.5, 1.5, len(losses))
    found = torch.autograd.grad(losses @ weights, embedded)[0]
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    assert logits.shape == (3, 21, SMALL["vocab_size"])  # the head is what it was
    expected = F.cross_entropy(logits[:, :-1][learned].double(), targets[learned], reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected @ weights.double(), embedded)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_trained_rows_of_tokens_have_the_gradients_of_a_whole_head(rows, monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", rows * SMALL["vocab_size"])
    model, (ids, targets) = model_of("llama"), inputs()
    head, learned, tokens = model.lm_head, targets != IGNORED, [7, 300, 575]
    targets[0, :3] = torch.tensor(tokens)  # learned, and in the sums of all others
    learned[0, :3] = True
    start = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    whole = head.weight.detach().clone()
    whole[tokens] = start
    whole.requires_grad_(True)
    trained = TokenRows(tokens, start)
    trained.attach_to_head(head)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    with loss_inside(model, head, learned, targets[learned]):
        losses = model(inputs_embeds=embedded, use_cache=False).logits
    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((losses * weights).sum(), [embedded, trained.values])
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    plain = torch.func.functional_call(
        model_of("llama"), {"lm_head.weight": whole}, kwargs={"inputs_embeds": embedded}
    ).logits
    torch.testing.assert_close(logits, plain)
    with frozen_tables({"lm_head": trained}):
        frozen = model(inputs_embeds=embedded, use_cache=False).logits
    assert not torch.allclose(frozen[..., tokens], plain[..., tokens], atol=0.1)
    expected = F.cross_entropy(plain[:, :-1][learned], targets[learned], reduction="none")
    dx, dW = torch.autograd.grad((expected * weights).sum(), [embedded, whole])
    for ours, theirs in zip(found, (dx, dW[tokens]), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_without_gradients_only_the_loss_is_computed():
    model, (ids, targets) = model_of("llama"), inputs()
    learned = targets != IGNORED
    with torch.no_grad(), loss_inside(model, model.lm_head, learned, targets[learned]):
        losses = model(ids, use_cache=False).logits
    assert not losses.requires_grad and losses.shape == (int(learned.sum()),)


def test_nothing_to_learn_is_no_loss():
    model, (ids, targets) = model_of("llama"), inputs()
    learned = torch.zeros_like(targets, dtype=torch.bool)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    with loss_inside(model, model.lm_head, learned, targets[learned]):
        losses = model(inputs_embeds=embedded, use_cache=False).logits
    assert losses.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), embedded)[0].any()


@pytest.mark.parametrize("model_type", sample(CHANGING, "gemma2", "granite", "cohere"))
def test_what_models_do_to_their_logits(model_type, monkeypatch):
    """Loss and gradient, also of trained rows, are those of the logits that the model returns."""
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", 7 * SMALL["vocab_size"])
    model, (ids, targets) = model_of(model_type, **CHANGING[model_type]), inputs()
    learned, head = targets != IGNORED, loss_head(model)
    assert head is model.lm_head
    change = logit_map(model)
    assert change.cap is not None or change.scale not in (0.0, 1.0)
    trained = TokenRows([7, 300], torch.randn(2, 64, generator=torch.Generator().manual_seed(3)))
    trained.attach_to_head(head)
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    with loss_inside(model, head, learned, targets[learned]):
        losses = model(inputs_embeds=embedded, use_cache=False).logits
    weights = torch.linspace(0.5, 1.5, len(losses))
    found = torch.autograd.grad(losses @ weights, [embedded, trained.values])
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]  # as it always does
    expected = F.cross_entropy(logits[learned].double(), targets[learned], reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(expected @ weights.double(), [embedded, trained.values])
    for ours, their in zip(found, theirs, strict=True):
        assert (ours - their).abs().max() <= 1e-5 * their.abs().max()


def test_a_model_without_its_cap_has_none():
    model = model_of("gemma2", final_logit_softcapping=None)
    assert logit_map(model) == LogitMap() and loss_head(model) is model.lm_head


def test_other_changes_keep_the_logits_whole():
    class Shifted(type(model_of("llama"))):
        def forward(self, hidden_states):
            logits = self.lm_head(hidden_states)
            logits = logits + self.config.shift
            return logits  # noqa: RET504

    model = model_of("llama")
    model.__class__ = Shifted
    assert loss_head(model) is None


def test_a_head_that_trains_keeps_its_logits():
    model = model_of("llama")
    model.set_output_embeddings(AdaptedLinear(nn.Linear(64, 576, bias=False), "none"))
    assert loss_head(model) is None
