"""Classified texts of encoders end to end in a row, against each alone in transformers' own model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainer.model.attention import VARLEN, choose_attention, register_attention
from trainer.tasks.base import Example
from trainer.tasks.options import SequenceClassificationOptions
from trainer.tasks.sequence_classification import SequenceClassification
from trainer.tasks.text_rows import ENCODERS

register_attention()
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 1,
    "initializer_range": 0.3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
OF_KEYS = "key.bias"
LENGTHS = (7, 3, 12, 1, 30)


def encoder(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | changes)
    model = AutoModelForSequenceClassification.from_config(config).train()
    for name, parameter in model.named_parameters():  # of the head too, and no bias is 0
        torch.nn.init.normal_(parameter, 1.0 if "LayerNorm.weight" in name else 0.0, 0.3)
    return model


def examples(kind: str) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(2, 99, (length,), generator=generator).tolist()
        types = [int(place > length // 2) for place in range(length)] if kind == "bert" else ()
        found.append(Example(ids, token_type_ids=types, label=float(number % 3)))
    return found


def task() -> SequenceClassification:
    made = SequenceClassification.__new__(SequenceClassification)
    made.options, made.labels, made.pad_token_id = (
        SequenceClassificationOptions(), ["a", "b", "c"], 1
    )  # fmt: skip
    return made


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("width", [0, 64])
@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_each_text_as_alone(kind: str, attention: str, width: int) -> None:
    """Logits, loss and all gradients; by a dense mask and by spans, with and without padding."""
    model, given = encoder(kind, attn_implementation="sdpa"), examples(kind)
    assert SequenceClassification.reads_documents(model)
    alone = []
    for example in given:
        types = {"token_type_ids": torch.tensor([example.token_type_ids])}
        ids = {"input_ids": torch.tensor([example.input_ids])}
        alone.append(model(**ids, **(types if example.token_type_ids else {})).logits[0])
    labels = torch.tensor([int(example.label) for example in given])
    expected = F.cross_entropy(torch.stack(alone), labels, reduction="sum")
    theirs = gradients(model, expected)
    model.config._attn_implementation = attention
    batch = task().collate([given], width=width)
    assert batch.inputs["input_ids"].shape == (1, max(width, sum(LENGTHS)))
    assert batch.inputs["position_ids"].max() + 1 == max(LENGTHS)
    logits: list[Tensor] = []
    with model.register_forward_hook(lambda *args: logits.append(args[2].logits)):
        loss, predicted = task().loss(model, batch)
    torch.testing.assert_close(logits[0], torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert predicted.tolist() == torch.stack(alone).argmax(-1).tolist()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(model, loss)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        if name.endswith(OF_KEYS):  # 0 but for rounding
            assert max(scale, float(gradient.abs().max())) < 1e-5 * largest, name
        else:
            torch.testing.assert_close(gradient / scale, theirs[name] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("albert", {"embedding_size": 16}), ("deberta-v2", {"relative_attention": True}),
        ("mobilebert", {}), ("distilbert", {}),
    ],
)  # fmt: skip
def test_other_encoders_have_a_row_for_each_text(kind: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **SMALL | changes)
    model = AutoModelForSequenceClassification.from_config(config)
    assert not SequenceClassification.reads_documents(model)


def test_attention_by_document_on_a_gpu() -> None:
    """With their usual dropout too."""
    cuda, half = torch.device("cuda"), torch.bfloat16
    for kind in sorted(ENCODERS):
        model = encoder(kind, attention_probs_dropout_prob=0.1)
        chosen = choose_attention(model, "auto", packing=True, device=cuda, dtype=half)
        assert chosen.name == VARLEN, chosen.reason
