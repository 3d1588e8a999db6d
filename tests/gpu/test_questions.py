"""Windows of questions end to end in rows on a GPU: decoders and encoders, against padded rows."""

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from tests.gpu.without_waiting import loss_without_waiting
from tests.helpers import losses, save_random_model
from tests.unit.trainer.tasks.test_questions_end_to_end import (
    alone,
    answering,
    asked,
    task,
    windows,
)
from trainer.distributed import process_group
from trainer.model.attention import register_attention
from trainer.run.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CHANGES = ["engine.device=cuda", "model.dtype=bfloat16", "log.progress=plain", "run.steps=12"]


@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_losses_of_padded_rows(tmp_path, kind: str, graphs: str, capsys) -> None:
    """With `run.verify=full`; graphs are captured for rows end to end alone."""
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = save_random_model(
        tmp_path / kind, kind, AutoModelForQuestionAnswering, **(without if kind == "bert" else {})
    )
    found = []
    for free in ("true", "false"):
        captured = free == graphs == "true"
        changes = [f"engine.cuda_graphs={str(captured).lower()}", f"data.padding_free={free}"]
        if captured:
            changes += ["engine.compile=true", "engine.activation_checkpointing=false"]
        config = asked(tmp_path, f"free-{free}", f"model.id={model}", *CHANGES, *changes)
        run(config, process_group.start("cuda"))
        found.append(losses(config.run_folder))
    said = capsys.readouterr().out
    assert said.count("end to end in one row") == 1 and "varlen" in said
    assert said.count("CUDA graphs of") == (graphs == "true")
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-2)
    assert found[0] == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "llama"])
def test_each_window_as_alone(kind: str) -> None:
    """bfloat16 end to end by varlen against float32 alone; nothing synchronises."""
    register_attention()
    model, given = answering(kind, attn_implementation="sdpa"), windows(kind)
    expected, _ = alone(model, given)
    loss = loss_without_waiting(task(), model, given)
    assert loss == pytest.approx(float(expected.detach()), rel=5e-2)
