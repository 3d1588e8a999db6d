"""Attention within documents with dropout, against all scores in plain torch."""

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from trainer.model import attention
from trainer.model.attention import dense_mask, spans_mask, varlen_forward
from trainer.model.varlen import BOTH_WAYS
from trainer.model.varlen_dropout import kept, varlen_attention_with_dropout
from trainer.tasks.documents import Documents

DOCUMENTS = Documents.of(torch.tensor([[0, 1, 2, 3, 4, 0, 1]]))
P = 0.4


def given() -> list[torch.Tensor]:
    return [torch.randn(7, heads, 8, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [0, BOTH_WAYS])
def test_output_and_gradients(window: int) -> None:
    tensors, dout = given(), torch.randn(7, 4, 8)
    out, _, state = varlen_attention_with_dropout(*tensors, DOCUMENTS.boundaries, 8, window, 0.3, P)
    masks = kept(state, DOCUMENTS.boundaries, 4, P)
    each = torch.stack([torch.block_diag(*(mask[head] for mask in masks)) for head in range(4)])
    attends = bidirectional_mask_function if window else causal_mask_function
    spans = spans_mask(DOCUMENTS, mask_function=attends, batch_size=1, q_length=7, kv_length=7)
    query, key, value = tensors
    wide_key, wide_value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", query, wide_key) * 0.3
    p = scores.masked_fill(~dense_mask(spans, 1, 7)[0, 0], -torch.inf).softmax(2)
    expected = torch.einsum("hqk,khd->qhd", p * each, wide_value)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(y, tensors, dout) for y in (out, expected))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_share_that_is_dropped() -> None:
    """And what is kept makes up for it."""
    boundaries = torch.tensor([0, 300], dtype=torch.int32)
    (mask,) = kept(torch.tensor([5, 0]).view(torch.uint64), boundaries, 2, P)
    assert float((mask == 0).float().mean()) == pytest.approx(P, abs=0.01)
    assert float(mask.mean()) == pytest.approx(1, abs=0.01)


def test_operator_is_well_formed() -> None:
    torch.library.opcheck(
        varlen_attention_with_dropout, (*given(), DOCUMENTS.boundaries, 8, BOTH_WAYS, 0.3, P),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_models_drop_by_spans_in_training() -> None:
    """A mask of spans and dropout: drawn anew in each call, from torch's generator."""
    module = torch.nn.Module()
    module.is_causal = False
    rows = [t.detach().transpose(0, 1).unsqueeze(0) for t in given()]
    shape = {"batch_size": 1, "q_length": 7, "kv_length": 7}
    spans = spans_mask(DOCUMENTS, mask_function=bidirectional_mask_function, **shape)

    def out(dropout: float) -> torch.Tensor:
        return varlen_forward(module, *rows, spans, dropout=dropout)[0]

    torch.manual_seed(3)
    first, second = out(P), out(P)
    torch.manual_seed(3)
    assert torch.equal(out(P), first) and not torch.equal(first, second)
    several = torch.stack([out(P) for _ in range(300)]).mean(0)
    torch.testing.assert_close(several, out(0.0), rtol=0, atol=0.3)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("function", [bidirectional_mask_function, causal_mask_function])
def test_the_kernel_drops(function, sinks: bool, monkeypatch) -> None:
    """For encoders and decoders, but for attention with sinks, which is made step by step."""
    asked = []

    def noted(*arguments):
        asked.append(arguments)
        return varlen_attention_with_dropout(*arguments)

    monkeypatch.setattr(attention, "varlen_attention_with_dropout", noted)
    module = torch.nn.Module()
    module.is_causal = function is causal_mask_function
    rows = [t.detach().transpose(0, 1).unsqueeze(0) for t in given()]
    shape = {"batch_size": 1, "q_length": 7, "kv_length": 7}
    spans = spans_mask(DOCUMENTS, mask_function=function, **shape)
    s_aux = torch.zeros(4) if sinks else None
    out, _ = varlen_forward(module, *rows, spans, dropout=P, s_aux=s_aux)
    assert out.shape == (1, 7, 4, 8) and len(asked) == (not sinks)
