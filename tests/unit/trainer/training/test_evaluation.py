"""Evaluation against a sum written here: every held-out record once, weighted by its tokens."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, PretrainedConfig

from tests.helpers import TINY, quick_config
from trainer.distributed.world import World
from trainer.model.attention import VARLEN
from trainer.model.flops import model_flops
from trainer.session import open_session
from trainer.tasks.base import Batch
from trainer.tasks.options import SequenceClassificationOptions
from trainer.tasks.sequence_classification import SequenceClassification
from trainer.training.evaluation import _forward, _together, evaluate, full_evaluation


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


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_each_record_is_that_of_it_alone(tmp_path, packing):
    config = quick_config(tmp_path, "data.micro_batch_size=3", f"data.packing={packing}")
    session = open_session(config, World())
    data, records = session.held_out()
    found = full_evaluation(session).losses
    assert [one["id"] for one in found] == list(range(16))
    session.model.eval()
    for one, record in zip(found, records, strict=True):
        batch = session.task.collate([[data[record]]])
        with torch.no_grad():
            logits = session.model(**batch.inputs).logits[0, :-1].log_softmax(-1)
        targets = batch.targets[0, 1:]
        learned = targets != -100
        expected = -logits[learned].gather(1, targets[learned, None]).sum()
        assert one["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert one["weight"] == int(learned.sum())


@pytest.mark.parametrize("micro_batch", ["data.micro_batch_size=3", "data.micro_batch_tokens=100"])
def test_micro_batches_run_as_one_give_the_same_loss_of_each_record(tmp_path, micro_batch):
    changes = (
        ["data.micro_batch_size=null", "data.max_length=64"] if "tokens" in micro_batch else []
    )
    session = open_session(quick_config(tmp_path, *changes, micro_batch), World())
    data, records = session.held_out()
    apart, together = (
        _forward(session, data, records, together=lambda _, count=count: count) for count in (1, 4)
    )
    assert len(together) == -(-len(apart) // 4) > 1
    by_record = [
        sorted(zip(part.examples, part.losses, part.weights, strict=True))
        for part in (_joined(apart), _joined(together))
    ]
    for one, other in zip(*by_record, strict=True):
        assert one[0] == other[0] and one[2] == other[2]
        assert one[1] == pytest.approx(other[1], rel=1e-5)


def _joined(parts):
    whole = SimpleNamespace(examples=[], losses=[], weights=[])
    for part in parts:
        whole.examples += part.examples
        whole.losses += part.losses
        whole.weights += part.weights
    return whole


def test_only_a_gpu_that_waits_for_launches_runs_micro_batches_as_one(tmp_path):
    session = open_session(quick_config(tmp_path), World())
    assert _together(session)(1.0) == 1  # a CPU launches nothing
    on_gpu = replace(session, world=World(device=torch.device("cuda")))
    session.backbone.blocks.keep(len(session.backbone.blocks))
    blocks, entries = len(session.backbone.blocks), model_flops(session.model).matrices
    assert _together(on_gpu)(1.0) == blocks // 2 > 1
    assert _together(on_gpu)(9e11 / entries) == 2  # 1.8e12 FLOPs each
    assert _together(on_gpu)(1e13 / entries) == 1  # it computes for long
    session.backbone.blocks.keep(0)
    assert _together(on_gpu)(1.0) == 1  # there is no room


FLASH = "model.attention=flash_attention_2"


@pytest.mark.parametrize(
    ("changes", "at_once"),
    [
        ([], True),
        (["data.packing=true"], True),
        (["data.padding_free=true"], False),  # a mask of all pairs of positions
        (["method.include_head=true"], False),  # all logits
        (["data.packing=true", "data.padding_free=false", "data.micro_batch_size=1", FLASH], False),
        (["data.padding_free=false", FLASH], True),
    ],
)
def test_micro_batches_are_not_one_where_that_needs_more_memory_or_is_refused(
    changes, at_once, tmp_path
):
    config = quick_config(tmp_path, *changes)
    plain = config.model_copy(
        update={"model": config.model.model_copy(update={"attention": "auto"})}
    )
    session = replace(open_session(plain, World()), config=config)
    session.backbone.blocks.keep(len(session.backbone.blocks))
    session = replace(session, world=World(device=torch.device("cuda")))
    assert (_together(session)(1.0) > 1) == at_once
    if session.backbone.rows.end_to_end:
        session.backbone.model.config._attn_implementation = VARLEN
        assert _together(session)(1.0) > 1


@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_the_loss_of_each_text_is_that_of_it_alone(problem):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    task = SequenceClassification(SequenceClassificationOptions(problem=problem), tokenizer)
    logits = torch.randn(3, 1 if problem == "regression" else 3)
    batch = Batch({}, torch.tensor([2, 0, 1] if len(logits[0]) > 1 else [0.5, -1.0, 2.0]), 3, 9)

    class Model:
        config = PretrainedConfig()

        def forward(self):
            return SimpleNamespace(logits=logits)

        __call__ = forward

    _, predictions, each = task.scored(Model(), batch)
    for row, (guess, loss) in enumerate(zip(predictions, each, strict=True)):
        if problem == "regression":
            expected = (logits[row, 0] - batch.targets[row]) ** 2
            assert guess == logits[row, 0]
        else:
            chosen = logits[row].softmax(0)[batch.targets[row]]
            expected = -chosen.log()
            assert guess == logits[row].argmax()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
