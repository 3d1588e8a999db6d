"""Evaluation against a sum written here: every held-out record once, weighted by its tokens."""

import pytest
import torch

from tests.helpers import quick_config
from trainer.distributed.world import World
from trainer.session import open_session
from trainer.training.evaluation import evaluate


@pytest.mark.parametrize("size", [1, 3])
def test_the_loss_is_the_mean_over_the_tokens_of_all_records(tmp_path, size):
    session = open_session(quick_config(tmp_path, f"data.micro_batch_size={size}"), World())
    data, records = session.held_out()
    assert list(records) == list(range(16))
    session.model.eval()
    total, weight = 0.0, 0
    with torch.no_grad():
        for record in range(16):
            batch = session.task.collate([[data[record]]])
            loss, _ = session.task.loss(session.model, batch)
            total, weight = total + float(loss), weight + int((batch.targets != -100).sum())
    assert evaluate(session)["eval_loss"] == pytest.approx(total / weight, rel=1e-6)
