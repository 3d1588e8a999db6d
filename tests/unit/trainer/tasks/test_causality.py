"""Which models are refused as encoders: those whose tokens see later ones, as measured."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import losses, quick_config, save_random_model, thorough
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.causality import attends_ahead

COMMON = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
    "intermediate_size": 48, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
XLM = {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "init_std": 0.2, "embed_init_std": 0.2}
CASES = [
    ("bert", {}, True),
    ("bert", {"is_decoder": True}, False),
    ("roberta", {}, True),
    ("roformer", {}, True),
    ("gpt_neox", {}, False),
    ("bart", {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2}, False),
    ("xglm", {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 48}, False),
    ("llama", {}, False),
    ("xlm", XLM, True),
    ("xlm", {**XLM, "causal": True}, False),
    ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}, True),
]


def sees_later_tokens(model):
    ids = torch.arange(4, 20).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = 77
    with torch.no_grad():
        one, two = (model(input_ids=row, use_cache=False).logits[:, :-1] for row in (ids, other))
    return (one - two).abs().max().item() > 1e-4


@pytest.mark.parametrize("model_type, settings, ahead", CASES)
def test_the_flags_say_what_is_measured(model_type, settings, ahead):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert attends_ahead(model) == sees_later_tokens(model) == ahead


@thorough
def test_every_causal_architecture():
    from tests.tiny_models import CAUSAL, architectures, not_buildable, tiny_config, tiny_model

    wrong = []
    for name in architectures(CAUSAL):
        if not_buildable(name, CAUSAL) or name == "cpmant":  # sees all, and carries no flag
            continue
        models = [tiny_model(name, CAUSAL)]
        config = tiny_config(name)
        if hasattr(config, "is_decoder") and name != "reformer":  # which refuses by itself
            config.is_decoder = False
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        wrong += [name for model in models if attends_ahead(model) != sees_later_tokens(model)]
    assert not wrong


def test_gpt_neox_trains_and_bert_does_not(tmp_path):
    folder = save_random_model(tmp_path / "neox", "gpt_neox", AutoModelForCausalLM)
    config = quick_config(tmp_path, f"model.id={folder}", "model.weights=random", "run.steps=2")
    run(config, World())
    assert len(losses(config.run_folder)) == 2
    bert = save_random_model(tmp_path / "bert", "bert", AutoModelForCausalLM)
    with pytest.raises(
        UserError, match=r"BertLMHeadModel is built as an encoder, .* accepted: a d"
    ):
        open_session(quick_config(tmp_path, f"model.id={bert}"), World())
