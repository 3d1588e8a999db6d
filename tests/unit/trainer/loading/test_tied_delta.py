"""A head that shares the embedding takes LeLoRA's directions, as W stays whole."""

import torch
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config, save_random_model
from trainer.distributed.world import World
from trainer.session import open_model


def test_a_tied_head_takes_delta_coordinates(tmp_path):
    save_random_model(
        tmp_path / "model", "llama", AutoModelForCausalLM, tie_word_embeddings=True
    )  # fmt: skip
    config = quick_config(
        tmp_path, f"model.id={tmp_path}/model", "method.kind=lelora", "method.coordinates=delta",
        "method.include_head=true", "model.dtype=float32",
    )  # fmt: skip
    opened = open_model(config, World())
    pretrained = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    embedding = pretrained.get_input_embeddings().weight
    head = opened.model.get_submodule("lm_head").weight
    assert head is opened.model.get_input_embeddings().weight and torch.equal(head, embedding)
    V = torch.linalg.svd(embedding.double())[2][:8]  # the primary bank comes first
    A = opened.method.adapters["lm_head"].A[:8].detach().double()
    torch.testing.assert_close((A @ V.T).diagonal().abs() * 3**0.5, torch.ones(8).double())
