"""Matrices that several modules share, as Zamba's blocks do; models that cannot be trained."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config
from tests.tiny_models import CLASSIFICATION, save_tiny, tiny_model
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.merge import refuse_tied_targets
from trainer.model.added_tokens import vocabulary
from trainer.model.matrices import install_adapted_layers, shared_matrices
from trainer.run.run import run
from trainer.session import open_session

FIRST, SECOND = (f"model.layers.{i}.shared_transf.self_attn.q_proj" for i in (1, 3))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_they_are_packed_once_and_have_an_adapter_each(tmp_path, quantization):
    folder = save_tiny(tmp_path / "model", "zamba")
    session = open_session(
        quick_config(
            tmp_path, f"model.id={folder}", "method.targets=all-linear", "model.dtype=float32",
            f"model.quantization={quantization}",
        ),
        World(),
    )  # fmt: skip
    first, second = (session.model.get_submodule(path) for path in (FIRST, SECOND))
    assert first.weight is second.weight
    assert first.adapter is not second.adapter and {FIRST, SECOND} <= set(session.method.adapters)
    W = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_parameter(
        f"{SECOND}.weight"
    )
    error = (second.dequantised(torch.float32) - W).norm() / W.norm()
    assert error == 0 if quantization == "none" else 0 < error < 0.2
    with pytest.raises(UserError, match=rf"{FIRST} shares its matrix with {SECOND}, so its"):
        refuse_tied_targets(session.backbone, session.method.adapters)
    refuse_tied_targets(session.backbone, {"model.layers.3.linear": first.adapter})


def test_half_quantised_ones_are_refused():
    """The table shares its matrix with a layer that would be packed."""
    model = nn.Module()
    model.table, model.layers = nn.Embedding(8, 8), nn.ModuleList([nn.Linear(8, 8, bias=False)])
    model.layers[0].weight = model.table.weight
    assert shared_matrices(model) == {"table": "layers.0", "layers.0": "table"}
    install_adapted_layers(model, "none", ["layers.0"], [])
    model.layers[0] = nn.Linear(8, 8, bias=False)
    model.layers[0].weight = model.table.weight
    with pytest.raises(UserError, match=r"'nf4' given, but layers\.0 shares its matrix with table"):
        install_adapted_layers(model, "nf4", ["layers.0"], [])


def test_layers_outside_of_autograd_are_refused(tmp_path):
    """Reformer runs its reversible layers in a function of its own; embeddings are frozen."""
    folder = save_tiny(tmp_path / "model", "reformer")
    config = quick_config(
        tmp_path, f"model.id={folder}", "method.targets=all-linear", "run.verify=off"
    )
    with pytest.raises(UserError, match="ReformerModelWithLMHead has no gradient"):
        run(config, World())


@pytest.mark.parametrize(("name", "tokens"), [("perceiver", 576), ("canine", None), ("bert", 576)])
def test_size_of_the_vocabulary(name, tokens):
    """Perceiver's input embedding is no table of tokens; Canine hashes characters."""
    with torch.device("meta"):
        assert vocabulary(tiny_model(name, CLASSIFICATION)) == tokens
