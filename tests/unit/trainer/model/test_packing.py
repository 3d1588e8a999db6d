"""Which models may pack records, by their structure."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import losses, quick_config, save_random_model
from tests.tiny_models import CAUSAL, tiny_model
from tests.unit.trainer.tasks.test_documents import LLAMA, made
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model.packing import check_packing
from trainer.run.run import run

HALF = {"layer_types": ["linear_attention", "full_attention"]}
CARRYING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("linear_attention", HALF),
    "lfm2": ("conv", {"layer_types": ["conv", "full_attention"]}),
    "minimax": ("linear_attention", HALF),
    "mamba": ("linear_attention", {}),
    "rwkv": ("a recurrent state", {"attention_hidden_size": 32}),
    "recurrent_gemma": ("linear_attention|Conv1d", {"lru_width": 32}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CARRYING)
def test_layers_that_carry_state_are_named(model_type: str) -> None:
    kind, own = CARRYING[model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **LLAMA, **own))
    name = type(model).__name__
    with pytest.raises(UserError, match=rf"data\.packing: true .*{name}.*\({kind}\); .*: false"):
        check_packing(model)


def test_a_convolution_that_no_configuration_lists() -> None:
    model = made("rotary, sdpa")
    model.model.layers[1].mixer = torch.nn.Conv1d(32, 32, 3)
    with pytest.raises(UserError, match=r"\(Conv1d\); accepted: false"):
        check_packing(model)


@pytest.mark.parametrize("kind", ["window", "learned positions, GPT-2", "ALiBi, BLOOM"])
def test_attention_alone_may_pack(kind: str) -> None:
    check_packing(made(kind))


COUNTING = {
    "bart": "model.decoder.embed_positions", "marian": "model.decoder.embed_positions",
    "whisper": "model.decoder.embed_positions", "trocr": "model.decoder.embed_positions",
    "roformer": None, "mpt": None, "opt": None, "biogpt": None, "roberta": None, "ctrl": None,
}  # fmt: skip


@pytest.mark.parametrize("model_type", COUNTING)
def test_positions_that_nobody_can_restart(model_type: str) -> None:
    """Absolute positions counted inside; not RoFormer's and MPT's, where only distances count."""
    with torch.device("meta"):
        model = tiny_model(model_type, CAUSAL)
    if COUNTING[model_type] is None:
        check_packing(model)
        return
    with pytest.raises(UserError, match=rf"counts the positions of {COUNTING[model_type]} by itse"):
        check_packing(model)


def test_refused_at_start_and_trained_unpacked(tmp_path) -> None:
    changes = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    model = save_random_model(tmp_path / "model", "lfm2", AutoModelForCausalLM, **changes)
    given = [f"model.id={model}", "run.steps=2", "run.name=conv", "data.max_length=128"]
    with pytest.raises(UserError, match=r"Lfm2ForCausalLM has layers .*\(conv\)"):
        run(quick_config(tmp_path, *given, "data.packing=true"), World())
    run(quick_config(tmp_path, *given), World())
    assert len(losses(tmp_path / "runs/conv")) == 2
