"""Attention by document: choice, spans, and the kernel's surroundings, on a CPU in plain torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from tests.unit.trainer.tasks.test_documents import alone, examples, gradients, made
from trainer.errors import UserError
from trainer.model import blocks
from trainer.model.attention import (
    VARLEN,
    attended_window,
    choose_attention,
    dense_mask,
    register_attention,
    spans_mask,
    varlen_forward,
)
from trainer.model.varlen import BOTH_WAYS, flash_window, varlen_attention
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.documents import Documents

CUDA, HALF = torch.device("cuda"), torch.bfloat16
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [0, 0, 1, 2, 0, 1, 2]])
DOCUMENTS = Documents.of(POSITIONS)


@pytest.fixture(scope="module")
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


def test_boundaries_of_rows_end_to_end() -> None:
    assert DOCUMENTS.boundaries.tolist() == [0, 5, 7, 8, 11, 14]
    assert DOCUMENTS.boundaries.dtype == torch.int32
    assert DOCUMENTS.longest == 8  # 5 tokens
    assert Documents.of(torch.arange(8).view(1, 8)).longest == 8
    assert Documents.of(torch.arange(9).view(1, 9)).longest == 16


@pytest.mark.parametrize(
    ("attends", "window"),
    [
        (causal_mask_function, 0),
        (sliding_window_causal_mask_function(3), 3),
        (sliding_window_causal_mask_function(1), 1),
        (sliding_window_causal_mask_function(12), 0),  # as long as the row
        (chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long)), None),
        (bidirectional_mask_function, BOTH_WAYS),
        (lambda row, head, query, key: (query - key).abs() < 3, None),  # a window both ways
    ],
)
def test_window_of_a_pattern(attends, window: int | None) -> None:
    assert attended_window(attends, 12) == window


@pytest.mark.parametrize("window", [0, 2, 3])
def test_spans_stand_for_the_dense_mask(window: int) -> None:
    attends = sliding_window_causal_mask_function(window) if window else causal_mask_function
    shape = {"batch_size": 2, "q_length": 7, "kv_length": 7}
    spans = spans_mask(DOCUMENTS, mask_function=attends, **shape)
    assert spans.shape == (1, window + 1, 8, 6) and spans.dtype == torch.int32
    assert spans.untyped_storage().nbytes() == 6 * 4
    separate = DOCUMENTS.separate(attends)
    expected = sdpa_mask(mask_function=separate, allow_is_causal_skip=False, **shape)
    assert torch.equal(dense_mask(spans, 2, 7), expected)


def test_spans_of_encoders() -> None:
    """Every token of a document attends to every other."""
    shape = {"batch_size": 2, "q_length": 7, "kv_length": 7}
    spans = spans_mask(DOCUMENTS, mask_function=bidirectional_mask_function, **shape)
    assert spans.shape == (2, 1, 8, 6) and spans.dtype == torch.int32
    separate = DOCUMENTS.separate(bidirectional_mask_function)
    expected = sdpa_mask(mask_function=separate, allow_is_causal_skip=False, **shape)
    assert torch.equal(dense_mask(spans, 2, 7), expected)


def test_other_patterns_keep_a_dense_mask() -> None:
    chunks = chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))
    shape = {"batch_size": 2, "q_length": 7, "kv_length": 7, "allow_is_causal_skip": False}
    padding = torch.ones(2, 7, dtype=torch.bool)
    for attends, attention_mask in ((chunks, None), (causal_mask_function, padding)):
        mask = spans_mask(DOCUMENTS, mask_function=attends, attention_mask=attention_mask, **shape)
        assert mask.dtype == torch.bool and mask.shape == (2, 1, 7, 7)


def test_flash_counts_keys_beside_the_query() -> None:
    assert flash_window(0) == (True, -1, 0)
    assert flash_window(BOTH_WAYS) == (False, -1, -1)
    assert flash_window(1) == (False, 0, 0)
    assert flash_window(128) == (False, 127, 0)


def reference(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor, scale: float
) -> Tensor:
    """By all scores of one row of documents: queries (T, H, D), mask (T, T)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(query), 1)], 2)
    return torch.einsum("hqk,khd->qhd", scores.softmax(2)[..., : len(key)], value)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 3])
def test_operator_against_all_scores(window: int, with_sinks: bool) -> None:
    """4 query heads on 2 key heads; output and all gradients, sinks included."""
    attends = sliding_window_causal_mask_function(window) if window else causal_mask_function
    documents = Documents.of(POSITIONS[:1])
    spans = spans_mask(documents, mask_function=attends, batch_size=1, q_length=7, kv_length=7)
    query, key, value = (torch.randn(7, h, 8, requires_grad=True) for h in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    given = [t for t in (query, key, value, sinks) if t is not None]
    dout = torch.randn(7, 4, 8)
    out, _ = varlen_attention(query, key, value, sinks, documents.boundaries, 8, window, 0.3)
    expected = reference(query, key, value, sinks, dense_mask(spans, 1, 7)[0, 0], 0.3)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(y, given, dout) for y in (out, expected))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_operator_is_well_formed() -> None:
    query, key, value = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    boundaries = Documents.of(POSITIONS[:1]).boundaries
    torch.library.opcheck(
        varlen_attention, (query, key, value, None, boundaries, 8, 0, 0.3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["rotary, sdpa", "window", "window and soft cap", "sinks and window", "chunks",
     "learned positions, GPT-2", "positions from the mask"],
)  # fmt: skip
def test_models_by_document(kind: str, task: CausalLM) -> None:
    """Loss and gradients of packed and of single records, against transformers' own attention."""
    model, records = made(kind), examples()
    expected = alone(model, records)
    wanted = gradients(model, expected)
    model.set_attn_implementation(VARLEN)
    packed, _ = task.loss(model, task.collate([records[:3], records[3:]]))
    assert float(packed.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradients(model, packed), wanted, rtol=1e-4, atol=2e-4)
    single, _ = task.loss(model, task.collate([[record] for record in records]))
    assert float(single.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_value_heads_smaller_than_query_heads() -> None:
    """Latent attention; two rows, queries (rows, H, length, D)."""
    query, key = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    value = torch.randn(2, 2, 7, 8)
    shape = {"batch_size": 2, "q_length": 7, "kv_length": 7}
    spans = spans_mask(DOCUMENTS, mask_function=causal_mask_function, **shape)
    out, _ = varlen_forward(torch.nn.Module(), query, key, value, spans)
    mask = dense_mask(spans, 2, 7)
    expected = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_what_it_does_not_know_is_refused() -> None:
    q = torch.randn(1, 2, 7, 8)
    positions, indices = torch.arange(7), torch.zeros(1, 7, 3)
    varlen_forward(torch.nn.Linear(1, 1), q, q, q, None, position_ids=positions, use_cache=False)
    with pytest.raises(UserError, match="Linear also attends by indices; accepted: sdpa or eager"):
        varlen_forward(torch.nn.Linear(1, 1), q, q, q, None, indices=indices)


def test_new_lengths_compile_nothing(task: CausalLM, monkeypatch) -> None:
    """One program for full and one for sliding layers, whatever the documents."""
    monkeypatch.setattr(blocks, "BACKEND", "eager")
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]
    model = made("window, two rotaries").train()
    model.set_attn_implementation(VARLEN)
    wrapped = blocks.Blocks(model, torch.device("cpu"), compiled=True)
    before, seen = compiled["unique_graphs"], []
    for lengths in ((9, 13, 7), (30, 31), (3, 4, 5, 6, 7, 8, 9, 10)):
        wrapped.keep(len(seen) % 2)  # recomputed or not
        loss, _ = task.loss(model, task.collate([examples(lengths)]))
        loss.backward()
        seen.append(compiled["unique_graphs"] - before)
    assert seen == [2, 2, 2]
    torch._dynamo.reset()


class Calculating(torch.nn.Module):
    """A layer that adds to its mask, as Doge's do."""

    def forward(self, scores: Tensor, attention_mask: Tensor | None) -> Tensor:
        return scores if attention_mask is None else scores + attention_mask


def test_soft_caps_are_not_left_out() -> None:
    """transformers 5.17's scaled_dot_product_attention ignores them."""
    model = made("window and soft cap")
    model.config._attn_implementation = "sdpa"
    cpu = torch.device("cpu")
    for packing in (False, True):
        chosen = choose_attention(model, "auto", packing=packing, device=cpu, dtype=torch.float32)
        assert chosen.name == "eager"


@pytest.fixture(autouse=True)
def registered() -> None:
    register_attention()


def on_gpu(monkeypatch, capability: tuple[int, int] = (9, 0), hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_gpus_without_its_kernel_keep_the_dense_mask(monkeypatch) -> None:
    model = made("rotary, sdpa")
    for capability, hip, reason in (
        ((7, 5), None, "has compute capability 7.5, and its kernels need 8.0"),
        ((9, 4), "6.4", "on ROCm there is no kernel"),
    ):
        on_gpu(monkeypatch, capability, hip)
        chosen = choose_attention(model, "auto", packing=True, device=CUDA, dtype=HALF)
        assert chosen.name is None and "dense mask" in chosen.reason and reason in chosen.reason
    on_gpu(monkeypatch, (8, 0))
    assert choose_attention(model, "auto", packing=True, device=CUDA, dtype=HALF).name == VARLEN


def test_a_layer_whose_source_nobody_has(monkeypatch) -> None:
    on_gpu(monkeypatch)
    model = made("rotary, sdpa")
    model.model.layers[0].gate = type("Generated", (torch.nn.Module,), {"__module__": "nowhere"})()
    chosen = choose_attention(model, "auto", packing=True, device=CUDA, dtype=HALF)
    assert chosen.name is None and "Generated calculates with the mask, or hides" in chosen.reason


def test_choice(monkeypatch) -> None:
    on_gpu(monkeypatch)
    llama, capped, calculating = (
        made("rotary, sdpa"),
        made("window and soft cap"),
        made("rotary, sdpa"),
    )
    calculating.model.layers[0].gate = Calculating()

    def choose(model, asked="auto", packing=True, device=CUDA, dtype=HALF):
        return choose_attention(model, asked, packing=packing, device=device, dtype=dtype)

    assert choose(llama).name == VARLEN
    assert choose(made("sinks and window")).name == VARLEN
    assert choose(capped).name is None
    assert "dense mask of documents: scores have a soft cap" in choose(capped).reason
    assert choose(llama, packing=False) == replace(choose(llama, packing=False), name=None)
    assert choose(llama, packing=False).reason == "transformers' sdpa"
    assert choose(llama, "sdpa").name is None
    for model, device, dtype, reason in (
        (llama, torch.device("cpu"), HALF, "on cpu there is no kernel"),
        (llama, CUDA, torch.float32, "for 16 bits, not float32"),
        (made("chunks"), CUDA, HALF, "layers of kind chunked_attention"),
        (calculating, CUDA, HALF, "Calculating calculates with the mask"),
        (made("ALiBi, BLOOM"), CUDA, HALF, "BloomForCausalLM has an attention of its own"),
    ):
        chosen = choose(model, device=device, dtype=dtype)
        assert chosen.name is None and "with a dense mask of documents" in chosen.reason
        assert reason in chosen.reason
        with pytest.raises(UserError, match=r"model\.attention: varlen given, but .*: auto"):
            choose(model, "varlen", device=device, dtype=dtype)
    assert choose(llama, "varlen", packing=False).name == VARLEN
