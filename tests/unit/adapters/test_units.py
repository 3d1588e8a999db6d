"""Which matrices host adapters, and what they are called."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

from adapters.units import (
    is_linear,
    linear_names,
    make_units,
    select_targets,
    transformer_blocks,
)  # fmt: skip
from tests.helpers import TINY


@pytest.fixture(scope="module")
def llama():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))


def test_all_linear_leaves_the_head_out(llama):
    names = linear_names(llama, ["lm_head"])
    assert len(names) == 28 and "lm_head" not in names
    assert linear_names(llama) == [*names, "lm_head"]
    assert select_targets(names, "all-linear") == names


def test_suffixes_match_whole_components(llama):
    names = linear_names(llama, ["lm_head"])
    assert len(select_targets(names, ["q_proj", "mlp.up_proj"])) == 8
    with pytest.raises(
        ValueError, match=r"'proj' matches no linear layer.*accepted: all-linear, down_proj"
    ):
        select_targets(names, ["proj"])
    with pytest.raises(ValueError, match="did you mean 'v_proj'"):
        select_targets(names, ["q_proj", "v_porj"])


def test_regular_expressions_match_the_whole_path(llama):
    names = linear_names(llama, ["lm_head"])
    assert select_targets(names, r"model\.layers\.[01]\..*\.(q|v)_proj") == [
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"
    ]
    with pytest.raises(ValueError, match="matches no linear layer"):
        select_targets(names, "q_proj")
    with pytest.raises(ValueError, match="is not a regular expression"):
        select_targets(names, "(")


def test_identity(llama):
    units = make_units(llama, linear_names(llama, ["lm_head"]))
    assert [unit.index for unit in units] == list(range(28))
    down = next(unit for unit in units if unit.name == "model.layers.2.mlp.down_proj")
    assert (down.layer, down.kind) == (2, "mlp.down_proj")
    assert (down.out_features, down.in_features) == (128, 320)
    (head,) = make_units(llama, ["lm_head"])
    assert (head.layer, head.kind) == (None, "lm_head")


def test_encoder_blocks_are_numbered_before_decoder_blocks():
    config = AutoConfig.for_model(
        "t5",
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    paths = [path for path, _ in transformer_blocks(model)]
    assert paths == [f"encoder.block.{i}" for i in range(2)] + [
        f"decoder.block.{i}" for i in range(3)
    ]


def test_lists_inside_a_block_are_part_of_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    model = nn.Sequential(nn.ModuleList(Block() for _ in range(2)))
    assert [path for path, _ in transformer_blocks(model)] == ["0.0", "0.1"]


class Scaled(nn.Linear):
    """A linear layer that does more, in training only."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Renamed(nn.Linear):
    """A linear layer that does nothing more."""


def test_subclasses_of_linear_layers_count_only_where_they_compute_the_product():
    router = AutoConfig.for_model("llama4_text", hidden_size=8, num_local_experts=4)
    with torch.device("meta"):
        same = [nn.Linear(8, 6), FalconLinear(8, 6), FalconLinear(8, 6, bias=False), Renamed(8, 6),
                IdeficsDecoupledLinear(8, 6), nn.MultiheadAttention(8, 2).out_proj]  # fmt: skip
        other = [Scaled(8, 6), IdeficsDecoupledLinear(8, 6, 2),
                 Llama4Router(router), nn.Bilinear(8, 8, 6), nn.Embedding(8, 6),
                 nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))]  # fmt: skip
    assert [is_linear(layer) for layer in same] == [True] * len(same)
    assert [is_linear(layer) for layer in other] == [False] * len(other)
    assert same[1].training and same[1].weight.is_meta  # tried on a copy


def test_blocks_in_lists_of_lists():
    """As Funnel has them: only their elements have a forward, by which sharders gather them."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(count)) for count in (2, 1)
    )
    paths = ["layers.0.0", "layers.0.1", "layers.1.0"]
    assert [path for path, _ in transformer_blocks(model)] == paths
    units = make_units(model, ["layers.0.1.0", "layers.1.0.0"])
    assert [(unit.layer, unit.kind) for unit in units] == [(1, "0"), (2, "0")]
