"""Attention by document on a GPU, against the same documents alone by transformers in float32."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TINY, losses, quick_config, save_random_model
from tests.unit.trainer.model.test_attention import reference
from tests.unit.trainer.tasks.test_documents import LLAMA, alone, gradients
from trainer.distributed import process_group
from trainer.model.attention import VARLEN, choose_attention, dense_mask, register_attention
from trainer.model.blocks import Blocks
from trainer.model.varlen import BOTH_WAYS, varlen_attention
from trainer.model.varlen_dropout import varlen_attention_with_dropout
from trainer.run.run import run
from trainer.tasks.base import Example
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.documents import Documents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CUDA = torch.device("cuda")
register_attention()
TOLERANCE = 2e-2
"""Relative, in the Frobenius norm, of bfloat16 against float32."""
LENGTHS = (200, 37, 129, 1, 300, 64)


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert error <= tolerance, f"{error:.3g}"


def documents(lengths: tuple[int, ...] = LENGTHS) -> Documents:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Documents.of(positions.unsqueeze(0)).to(CUDA)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 2, 64, BOTH_WAYS])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
def test_operator(heads: int, kv_heads: int, size: int, window: int, with_sinks: bool) -> None:
    """Output and all gradients, against all scores in float32."""
    at, total = documents(), sum(LENGTHS)
    shapes = ((total, heads, size), (total, kv_heads, size), (total, kv_heads, size))
    query, key, value = (
        torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    )
    sinks = torch.randn(heads, device=CUDA, requires_grad=True) if with_sinks else None
    given = [t for t in (query, key, value, sinks) if t is not None]
    dout = torch.randn(total, heads, size, device=CUDA, dtype=torch.bfloat16)
    out, _ = varlen_attention(
        query, key, value, sinks, at.boundaries, at.longest, window, size**-0.5
    )
    n = len(at.boundaries)
    sizes = (2, 1) if window == BOTH_WAYS else (1, window + 1)
    mask = dense_mask(at.boundaries.expand(*sizes, at.longest, n), 1, total)[0, 0]
    wide = [t.detach().float().requires_grad_() for t in given]
    extra = wide[3] if with_sinks else None
    expected = reference(wide[0], wide[1], wide[2], extra, mask, size**-0.5)
    close(out, expected)
    ours = torch.autograd.grad(out, given, dout)
    theirs = torch.autograd.grad(expected, wide, dout.float())
    for gradient, other in zip(ours, theirs, strict=True):
        close(gradient, other)


@pytest.mark.parametrize("window", [0, BOTH_WAYS])
def test_operator_with_dropout(window: int) -> None:
    """With V = 1 the output is P ∘ M, which tells what was dropped; backward drops the same."""
    lengths, heads, size, p = (50, 1, 30, 47), 4, 128, 0.3
    at, total = documents(lengths), sum(lengths)
    assert total == size
    query, key = (
        torch.randn(total, heads, size, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    eye = torch.eye(size, device=CUDA, dtype=torch.bfloat16).unsqueeze(1).expand(-1, heads, -1)
    value = eye.clone().requires_grad_()
    torch.manual_seed(1)
    given = (at.boundaries, at.longest, window, size**-0.5, p)
    out, *_ = varlen_attention_with_dropout(query, key, value, *given)
    sizes = (2, 1) if window == BOTH_WAYS else (1, 1)
    seen = dense_mask(at.boundaries.expand(*sizes, at.longest, len(at.boundaries)), 1, total)[0, 0]
    q, k, v = (t.detach().float().requires_grad_() for t in (query, key, value))
    scores = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(2)
    kept = (out.detach().float().permute(1, 0, 2) > 0) / (1 - p)  # V is 1: (heads, queries, keys)
    large = seen & (probabilities > 1e-3)
    assert float((kept == 0)[large].float().mean()) == pytest.approx(p, abs=0.05)
    expected = torch.einsum("hqk,khd->qhd", probabilities * kept, v)
    close(out, expected)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), dout)
    theirs = torch.autograd.grad(expected, (q, k, v), dout.float())
    for gradient, other in zip(ours, theirs, strict=True):
        close(gradient, other)
    torch.manual_seed(1)
    again, *_ = varlen_attention_with_dropout(query, key, value, *given)
    another, *_ = varlen_attention_with_dropout(query, key, value, *given)
    assert torch.equal(again, out) and not torch.equal(another, out)


HEADS = {
    **LLAMA, "hidden_size": 256, "intermediate_size": 384, "head_dim": 64,
    "max_position_embeddings": 1024, "initializer_range": 0.05,
}  # fmt: skip
ALTERNATING = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", HEADS),
    "window": ("mistral", HEADS | {"sliding_window": 48}),
    "two rotaries": ("gemma3_text", HEADS | ALTERNATING),
    "soft cap": (
        "gemma2",
        HEADS | ALTERNATING | {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 1.0},
    ),
    "sinks": (
        "gpt_oss",
        HEADS | ALTERNATING | {
            "num_local_experts": 2, "num_experts_per_tok": 2, "rope_scaling": None,
        },
    ),
    "latent": (
        "deepseek_v3",
        LLAMA | {
            "hidden_size": 256, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4,
            "first_k_dense_replace": 2, "max_position_embeddings": 1024,
            "initializer_range": 0.05,
        },
    ),
}  # fmt: skip


def built(kind: str, dtype: torch.dtype) -> Any:
    model_type, settings = MODELS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    model = model.to(CUDA, dtype).train()
    model.get_output_embeddings().requires_grad_(False)
    return model


def records(lengths: tuple[int, ...]) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [
        Example(torch.randint(3, 99, (n,), generator=generator).tolist(), [0, *[1] * (n - 1)])
        for n in lengths
    ]


@pytest.fixture(scope="module")
def task() -> CausalLM:
    return CausalLM(CausalLMOptions(), AutoTokenizer.from_pretrained(TINY))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_models_by_document(kind: str, compiled: bool, task: CausalLM) -> None:
    """Loss and gradients of two packed rows, blocks kept and recomputed, against each record alone
    in float32; the attention is the one that `auto` picks."""
    torch._dynamo.reset()
    examples = records((200, 37, 129, 64))
    wide = built(kind, torch.float32)
    with torch.device(CUDA):
        expected = alone(wide, examples)
    wanted = gradients(wide, expected)
    model = built(kind, torch.bfloat16)
    chosen = choose_attention(model, "auto", packing=True, device=CUDA, dtype=torch.bfloat16)
    assert chosen.name == (None if kind == "soft cap" else VARLEN)
    if chosen.name is not None:
        model.set_attn_implementation(chosen.name)
    blocks = Blocks(model, CUDA, compiled=compiled)
    batch = task.collate([examples[:3], examples[3:]]).to(CUDA)
    for saved in (len(blocks), 0):
        blocks.keep(saved)
        packed, _ = task.loss(model, batch)
        assert float(packed.detach()) == pytest.approx(float(expected.detach()), rel=5e-3)
        # bfloat16 throughout, the norms and projections around attention included
        close(gradients(model, packed), wanted, 5e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_as_good_as_a_dense_mask(kind: str, task: CausalLM) -> None:
    """In bfloat16 both ways, so that only attention differs."""
    examples = records((200, 37, 129, 64))
    batch = task.collate([examples[:3], examples[3:]]).to(CUDA)
    model = built(kind, torch.bfloat16)
    dense, _ = task.loss(model, batch)
    wanted = gradients(model, dense)
    chosen = choose_attention(model, "auto", packing=True, device=CUDA, dtype=torch.bfloat16)
    if chosen.name is not None:
        model.set_attn_implementation(chosen.name)
    packed, _ = task.loss(model, batch)
    assert float(packed.detach()) == pytest.approx(float(dense.detach()), rel=2e-3)
    close(gradients(model, packed), wanted, 3e-2)


@pytest.mark.parametrize("kind", MODELS)
def test_new_lengths_compile_nothing(kind: str, task: CausalLM) -> None:
    """After the second batch; rows of other lengths with other numbers of documents."""
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    model = built(kind, torch.bfloat16)
    chosen = choose_attention(model, "auto", packing=True, device=CUDA, dtype=torch.bfloat16)
    if chosen.name is not None:
        model.set_attn_implementation(chosen.name)
    blocks = Blocks(model, CUDA, compiled=True)
    blocks.keep(len(blocks))
    seen = []
    for lengths in ((200, 37, 129), (300, 310), (30, 40, 50, 60, 70, 80, 90), (99, 7, 301, 400)):
        loss, _ = task.loss(model, task.collate([records(lengths)]).to(CUDA))
        loss.backward()
        seen.append(counter["unique_graphs"])
    assert seen[1:] == [seen[1]] * 3, seen


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_run_picks_and_prints_it(tmp_path, capfd, model_type: str) -> None:
    """Losses of a packed run by document equal those with dense masks."""
    settings = {"layer_types": ["full_attention"] * 2} if model_type == "gemma2" else {}
    model = save_random_model(
        tmp_path / "model", model_type, AutoModelForCausalLM, max_position_embeddings=1024,
        head_dim=32, **settings,
    )  # fmt: skip
    changes = [
        f"model.id={model}", "data.packing=true", "data.max_length=512", "data.train_records=256",
        "engine.device=cuda", "model.dtype=bfloat16", "log.progress=plain",
    ]  # fmt: skip
    found = {}
    for name, attention in (("auto", "auto"), ("dense", "eager")):
        config = quick_config(
            tmp_path, *changes, f"run.name={name}", f"model.attention={attention}"
        )
        run(config, process_group.start("cuda"))
        found[name] = losses(tmp_path / "runs" / name)
    assert found["auto"] == pytest.approx(found["dense"], rel=5e-3)
    printed = capfd.readouterr()
    expected = "varlen" if model_type == "llama" else "scores have a soft cap"
    assert expected in printed.out + printed.err
