"""Layers whose weight is read by a module above them, found in the source of its class."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trainer.model.weight_reads import layers_read


class Base(nn.Module):
    def __init__(self, pieces: int = 1):
        super().__init__()
        self.pieces = pieces
        for name in ("called", "metadata", "read", "aliased", "helped", "sliced", "optional"):
            setattr(self, name, nn.Linear(4, 4))
        self.listed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.numbered, self.paired, self.backwards = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(3)
        )
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        self.metadata.weight = nn.Parameter(self.called.weight * 0)  # when it is made

    def helper(self, x):
        return F.linear(x, self.helped.weight)

    def unused_branch(self, x):
        return x @ self.called.weight


class Reads(Base):
    """Each layer is named for how its weight is used."""

    def forward(self, x, mask=None, query=None, *, early=False):
        x = self.called(x).to(self.metadata.weight.dtype)
        assert isinstance(self.metadata.weight, torch.Tensor) and self.metadata.weight is not None
        layer = self.aliased
        x = x @ self.read.weight.T + F.linear(x, layer.weight)
        x = self.helper(x) + self.metadata(x)
        for one in self.listed:
            x = x @ one.weight
        for index, scaled in enumerate(self.numbered):
            scaled.weight.div_(2**index)
        for first, second in zip(self.paired[1:], self.listed, strict=False):
            x = second(first.weight)
        x = sum(last.weight for last in reversed(self.backwards)) + x
        x = x @ self.inner.deep.weight if mask is not None else x
        piecewise = self.pieces > 1 and mask is None
        if piecewise:
            x = x @ self.sliced.weight[:, :2]
        if query is not None or early:
            x = self.unused_branch(x) @ self.optional.weight
        else:
            x = self.optional(x)
        return self.inner.other(x)


class Inherits(Reads):
    def helper(self, x):
        return self.helped(x)


def test_how_a_weight_is_used_decides():
    lists = ("listed", "numbered", "paired", "backwards")
    found = {"read", "aliased", "helped", "inner.deep"}
    found |= {f"{name}.{index}" for name in lists for index in range(2)}
    assert layers_read(Reads()) == found
    assert layers_read(nn.Sequential(Reads(), nn.Linear(4, 4))) == {f"0.{path}" for path in found}
    assert layers_read(Reads(pieces=2)) == found | {"sliced"}
    assert layers_read(Inherits()) == found - {"helped"}


def test_attention_of_torch_reads_its_output_projection():
    assert layers_read(nn.ModuleList([nn.MultiheadAttention(8, 2)])) == {"0.out_proj"}


CASES = {
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "jamba": {"dt_proj"},
    "gemma3n_text": {"correction_coefs", "prediction_coefs"},
    "rwkv": {"output", "value"},  # scaled in place before evaluation
    "bloom": set(),  # in a branch for the slow, exact product alone
    "deberta": set(),  # where queries are given
    "reformer": set(),  # with a cache
    "llama": set(),
    "gpt2": set(),
}


@pytest.mark.parametrize("model_type", CASES)
def test_architectures(model_type):
    config = AutoConfig.for_model(model_type)
    classifies = model_type in ("deberta", "reformer")
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert {path.rpartition(".")[2] for path in layers_read(model)} == CASES[model_type]


def test_bloom_with_slow_exact_products():
    config = AutoConfig.for_model("bloom", n_layer=1, pretraining_tp=2, slow_but_exact=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {path.rpartition(".")[2] for path in layers_read(model)}
    assert found == {"dense", "dense_4h_to_h"}
