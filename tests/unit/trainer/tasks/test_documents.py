"""Documents of a packed row against the same documents alone in transformers' own model."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from trainer.errors import UserError
from trainer.model.blocks import Blocks
from trainer.tasks.base import Example
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.documents import Documents, kept_apart

LLAMA = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {**LLAMA, "head_dim": 8}
ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary, sdpa": ("llama", LLAMA | {"attn_implementation": "sdpa"}),
    "rotary, eager": ("llama", LLAMA | {"attn_implementation": "eager"}),
    "window": ("mistral", HEADS | {"sliding_window": 4}),
    "window and soft cap": (
        "gemma2",
        HEADS | {
            "sliding_window": 4, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.0, "attn_implementation": "eager",
        },
    ),
    "window, two rotaries": ("gemma3_text", HEADS | {"sliding_window": 4, "layer_types": ALTERNATING}),
    "chunks": (
        "llama4_text",
        HEADS | {
            "attention_chunk_size": 5, "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0],
        },
    ),
    "sinks and window": (
        "gpt_oss",
        HEADS | {
            "sliding_window": 4, "layer_types": ALTERNATING, "num_local_experts": 4,
            "num_experts_per_tok": 2, "rope_scaling": None,
        },
    ),
    "positions from the mask": ("opt", LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "sinusoidal": ("xglm", LLAMA | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "learned positions": ("biogpt", LLAMA),
    "learned positions, GPT-2": ("gpt2", LLAMA | {"attn_pdrop": 0.0}),
    "ALiBi, BLOOM": ("bloom", LLAMA),
    "ALiBi, MPT": ("mpt", LLAMA | {"max_seq_len": 128}),
    "ALiBi, Falcon": ("falcon", LLAMA | {"alibi": True}),
    "rotary, Falcon": ("falcon", LLAMA | {"alibi": False}),
}  # fmt: skip
LENGTHS = (9, 13, 7, 11)


def made(kind: str) -> torch.nn.Module:
    """A random model without dropout; all of it is trained but the output head."""
    model_type, settings = MODELS[kind]
    attention = settings.get("attn_implementation")
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in settings.items() if k != "attn_implementation"}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    model.get_output_embeddings().requires_grad_(False)
    return model.eval()


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [
        Example(torch.randint(3, 99, (n,), generator=generator).tolist(), [0, *[1] * (n - 1)])
        for n in lengths
    ]


@pytest.fixture(scope="module")
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


def alone(model: torch.nn.Module, records: list[Example]) -> Tensor:
    """Summed loss of each record in a forward pass of its own, by transformers alone."""
    losses = []
    for record in records:
        ids = torch.tensor([record.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return torch.stack(losses).sum()


def gradients(model: torch.nn.Module, loss: Tensor) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("kind", MODELS)
def test_packed_records_are_as_if_alone(kind: str, task: CausalLM) -> None:
    """Loss and gradients; three documents in a row, and one with padding behind it."""
    model, records = made(kind), examples()
    batch = task.collate([records[:3], records[3:]])
    assert batch.inputs["input_ids"].shape == (2, sum(LENGTHS[:3]))
    packed, expected = task.loss(model, batch)[0], alone(model, records)
    assert float(packed.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(
        gradients(model, packed), gradients(model, expected), rtol=1e-4, atol=2e-4
    )


@pytest.mark.parametrize("kind", ["sinks and window", "chunks"])
def test_recomputed_blocks_get_the_same_masks(kind: str, task: CausalLM) -> None:
    model, records = made(kind), examples()
    blocks = Blocks(model, torch.device("cpu"), compiled=False)
    batch = task.collate([records])
    blocks.keep(len(blocks))
    saved = gradients(model, task.loss(model, batch)[0])
    blocks.keep(0)
    torch.testing.assert_close(gradients(model, task.loss(model, batch)[0]), saved)


def test_a_mask_by_hand(llama_config) -> None:
    """Two documents of 3 and 2 tokens, causal; eager masks are 0 or the least value."""
    config = llama_config("eager")
    documents = Documents.of(torch.tensor([[0, 1, 2, 0, 1]]))
    assert documents.index.tolist() == [[0, 0, 0, 1, 1]]
    with kept_apart(documents):
        mask = create_causal_mask(config, torch.zeros(1, 5, 32), None, None)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_nothing_is_left_behind(llama_config) -> None:
    """Nor seen by another thread meanwhile; also after an error, and in nested contexts."""
    config, hidden = llama_config(), torch.zeros(1, 4, 32)
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS), masking_utils.find_packed_sequence_indices
    documents = Documents.of(torch.tensor([[0, 1, 0, 1]]))
    positions = torch.tensor([[0, 0, 1, 2]])
    own = create_causal_mask(config, hidden, None, None, position_ids=positions)
    seen: list[Tensor | None] = []

    def elsewhere() -> None:
        seen.append(create_causal_mask(config, hidden, None, None))
        seen.append(create_causal_mask(config, hidden, None, None, position_ids=positions))

    with pytest.raises(RuntimeError, match="planted"), kept_apart(documents):
        with kept_apart(documents):
            assert create_causal_mask(config, hidden, None, None) is not None
        assert create_causal_mask(config, hidden, None, None) is not None
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise RuntimeError("planted")
    assert seen[0] is None  # one causal document, without a mask
    assert torch.equal(seen[1], own)
    after = dict(ALL_MASK_ATTENTION_FUNCTIONS), masking_utils.find_packed_sequence_indices
    assert after == before


def test_masks_of_other_lengths_are_refused(llama_config) -> None:
    documents = Documents.of(torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(UserError, match=r"data\.packing: true .*1, 6, 6.* accepted: false"):
        with kept_apart(documents):
            create_causal_mask(llama_config(), torch.zeros(1, 6, 32), None, None)


def test_flash_attention_separates_one_row_only(llama_config) -> None:
    config = llama_config()
    config._attn_implementation = "flash_attention_2"
    row = torch.tensor([[0, 1, 0, 1]])
    with kept_apart(Documents.of(row)):
        assert create_causal_mask(config, torch.zeros(1, 4, 32), None, None) is None
    with pytest.raises(UserError, match=r"flash_attention_2 given with data\.packing=true"):
        with kept_apart(Documents.of(row.expand(2, -1))):
            create_causal_mask(config, torch.zeros(2, 4, 32), None, None)


def test_a_model_that_asks_for_no_mask_is_refused(task: CausalLM) -> None:
    """OpenAI GPT has a triangle of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=1, n_head=4, vocab_size=99)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"data\.packing: true .* masks by itself.*accepted: false"):
        task.loss(model, task.collate([examples()]))
    assert task.loss(model, task.collate([[record] for record in examples()]))[0] > 0
