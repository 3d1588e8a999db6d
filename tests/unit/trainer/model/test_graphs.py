"""Blocks replayed as one: the same gradients as block by block; on a CPU, replayed by running them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from adapters.units import transformer_blocks
from tests.helpers import losses, quick_config, save_random_model
from tests.unit.trainer.tasks.test_questions_end_to_end import asked
from trainer.data.micro_batches import assign_micro_batches
from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError
from trainer.memory.graphs import _Trial, _trial, _with_room, capture_graphs, row_batches
from trainer.model.attention import VARLEN, register_attention
from trainer.model.graphs import BlocksGraph, Buffers, NoGraph, _Replay
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.base import Batch, Example
from trainer.tasks.documents import kept_apart
from trainer.training.loop import make_loader

WIDTH = 96


@pytest.fixture
def session(tmp_path):
    opened = open_session(quick_config(tmp_path, "run.verify=off", "data.eval=null"), World())
    register_attention()
    opened.model.set_attn_implementation(VARLEN)
    for adapter in opened.method.adapters.values():  # else A has no gradient
        torch.nn.init.normal_(adapter.B, std=0.1)
    return opened


def batch_of(session, lengths: list[int], seed: int) -> Batch:
    """One row of documents of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    examples = [
        Example(torch.randint(3, 500, (n,), generator=draw).tolist(), [0] + [1] * (n - 1), weight=n - 1)
        for n in lengths
    ]  # fmt: skip
    return session.task.collate([examples], width=WIDTH)


def record(
    session, batch: Batch, buffers: Buffers | None = None, like: BlocksGraph | None = None
) -> BlocksGraph:
    graphs = session.backbone.blocks.graphs
    with graphs.recording(like) as calls:
        session.task.loss(session.model, batch)
    graph = BlocksGraph(calls, buffers or Buffers(calls))
    graphs.add(graph)
    return graph


def gradients(session, batch: Batch, *, replayed: bool) -> tuple[float, torch.Tensor]:
    session.optimizer.zero_grad()
    graphs = session.backbone.blocks.graphs
    if replayed:
        before = graphs.passes
        with graphs.replaying():
            loss, _ = session.task.loss(session.model, batch)
        assert graphs.passes == before + 1
    else:
        loss, _ = session.task.loss(session.model, batch)
    loss.backward()
    return float(loss.detach()), session.optimizer.gradients.clone()


def check(session, batch: Batch) -> None:
    loss, expected = gradients(session, batch, replayed=False)
    found, grads = gradients(session, batch, replayed=True)
    assert found == loss and expected.abs().max() > 0
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_other_values_of_the_recorded_shapes(session):
    wide = batch_of(session, [30, 30, 30], 0)
    wide.documents = _with_room(wide.documents, 8, 64)
    record(session, wide)
    for seed, lengths in enumerate([[60, 20], [5, 7, 9, 11, 20], [40, 40, 16]]):
        check(session, batch_of(session, lengths, seed))


def test_it_holds_while_adapters_gates_and_masks_change_in_place(session):
    record(session, batch_of(session, [30, 30, 36], 0))
    batch = batch_of(session, [30, 30, 36], 1)
    _, before = gradients(session, batch, replayed=True)
    for adapter in session.method.adapters.values():
        adapter.g.data[1] = 0.0
        adapter.mask[2] = False
        adapter.A.data.mul_(1.1)
    check(session, batch)
    assert not torch.equal(session.optimizer.gradients, before)


@pytest.mark.parametrize("lengths", [[WIDTH], [10] * 9 + [6], [90, 6]])
def test_a_pass_of_another_form_runs_as_it_is(session, lengths):
    """Without documents, with more of them, or longer ones, than the recorded pass had room for."""
    record(session, batch_of(session, [30, 30, 36], 0))
    batch = batch_of(session, lengths, 1)
    _, expected = gradients(session, batch, replayed=False)
    session.optimizer.zero_grad()
    graphs = session.backbone.blocks.graphs
    with graphs.replaying():
        session.task.loss(session.model, batch)[0].backward()
    assert graphs.passes == 0
    assert torch.equal(session.optimizer.gradients, expected)


def test_a_pass_that_differs_in_a_later_block_runs_as_it_is(session):
    graph = record(session, batch_of(session, [30, 30, 36], 0))
    batch = batch_of(session, [30, 30, 36], 1)
    _, expected = gradients(session, batch, replayed=False)
    graph.steps[1] = replace(graph.steps[1], index=7)
    session.optimizer.zero_grad()
    with session.backbone.blocks.graphs.replaying():
        session.task.loss(session.model, batch)[0].backward()
    assert torch.equal(session.optimizer.gradients, expected)


def test_graphs_of_several_lengths_share_buffers(session):
    wide, short = batch_of(session, [30, 30, 36], 0), batch_of(session, [10, 20], 0)
    short.inputs = {name: tensor[:, :32] for name, tensor in short.inputs.items()}
    short.targets = short.targets[:, :32]
    short.documents = type(short.documents).of(short.inputs["position_ids"])
    with session.backbone.blocks.graphs.recording() as calls:
        session.task.loss(session.model, wide)
    buffers = Buffers(calls)
    first = record(session, wide, buffers)
    runs = []
    for _, block in transformer_blocks(session.model):
        block.self_attn.register_forward_hook(lambda *_: runs.append(1))
    record(session, short, buffers, like=first)  # without running the blocks
    assert runs == []
    for batch in (short, wide, short):
        check(session, batch)


def test_a_backward_pass_of_an_earlier_forward_pass_is_refused(session):
    graphs, graph = session.backbone.blocks.graphs, record(session, batch_of(session, [96], 0))
    x = torch.randn_like(graph.x, requires_grad=True)
    first, second = (_Replay.apply(x, graph, graphs) for _ in range(2))
    second.sum().backward()
    with pytest.raises(RunFailed, match="other than the last forward pass"):
        first.sum().backward()


def test_blocks_that_are_left_out_are_noticed(session, monkeypatch):
    record(session, batch_of(session, [30, 30, 36], 0))
    (_, last) = transformer_blocks(session.model)[-1]
    monkeypatch.setattr(last, "forward", lambda hidden, **_: hidden)
    with (
        pytest.raises(RunFailed, match="left out blocks"),
        session.backbone.blocks.graphs.replaying(),
    ):
        session.task.loss(session.model, batch_of(session, [30, 30, 36], 1))


def test_what_stands_between_blocks_is_noticed(session):
    (_, second) = transformer_blocks(session.model)[1]
    second.register_forward_pre_hook(lambda _, args: (args[0] * 2.0, *args[1:]))
    with pytest.raises(NoGraph, match="between its blocks"):
        record(session, batch_of(session, [30, 30, 36], 0))


def test_a_cache_of_keys_is_noticed(session):
    """Every run of the blocks would append to it."""
    graphs, batch = session.backbone.blocks.graphs, batch_of(session, [30, 30, 36], 0)
    with graphs.recording() as calls, kept_apart(batch.documents):
        session.model(**batch.inputs, use_cache=True)
    with pytest.raises(NoGraph, match="append to a cache"):
        BlocksGraph(calls, Buffers(calls))


def test_questions_of_decoders_run_again(tmp_path):
    """The trial of a graph runs the recorded blocks once more."""
    model = save_random_model(tmp_path / "llama", "llama", AutoModelForQuestionAnswering)
    changes = ["run.verify=off", "data.padding_free=true", "data.row_lengths=3", "run.name=rows"]
    config = asked(tmp_path, "rows", f"model.id={model}", *changes)
    session = open_session(config, World())
    session.model.set_attn_implementation(VARLEN)
    batch = row_batches(session, make_loader(session, World()))[0]
    graph = record(session, batch)
    graph.x.normal_(), graph.dy.normal_()
    found = []
    for _ in range(2):
        graph.run_forward()
        found.append(graph.y.clone())
        graph.run_backward()
    assert torch.equal(*found)
    loss, expected = gradients(session, batch, replayed=False)
    again, grads = gradients(session, batch, replayed=True)
    assert again == loss and torch.allclose(grads, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_every_frequent_row_length(tmp_path):
    config = quick_config(
        tmp_path, "run.verify=off", "data.eval=null", "data.row_lengths=3", "data.padding_free=true",
        "data.max_length=64", "data.on_bad_record=skip",
    )  # fmt: skip
    session = open_session(config, World())
    loader = make_loader(session, World())
    made = row_batches(session, loader)
    assert [batch.targets.shape[1] for batch in made] == sorted(loader.rows.frequent, reverse=True)
    loader.rows = replace(loader.rows, frequent=loader.rows.lengths)
    made = row_batches(session, loader)
    for _ in range(20):
        for _, batch in loader.next_step().micro_batches:
            like = next(b for b in made if b.targets.shape == batch.targets.shape)
            assert batch.inputs.keys() == like.inputs.keys()
            assert len(batch.documents.boundaries) <= len(like.documents.boundaries)
            assert batch.documents.longest <= like.documents.longest


@pytest.mark.parametrize("most", ["several", "one"])
def test_rows_of_one_document_are_as_most_rows_are(tmp_path, most):
    """A rare one is marked as such, and then the loss is the same; many keep their kernel."""
    changes = {
        "several": ["data.max_length=96", "data.packing=true"],
        "one": ["data.micro_batch_size=1"],
    }
    config = quick_config(
        tmp_path, "run.verify=off", "data.eval=null", "data.row_lengths=3", "data.padding_free=true",
        "data.on_bad_record=skip", *changes[most],
    )  # fmt: skip
    session = open_session(config, World())
    loader = make_loader(session, World())
    assert loader.rows.apart == (most == "several")
    record = min(range(len(session.train_data)), key=lambda r: session.train_data.lengths[r])
    loader.micro_batch_size = 1
    parts = [[np.array([record])]]
    rows = replace(loader.rows, apart=True)
    (_, marked), (_, plain) = (
        next(assign_micro_batches(parts, session.train_data, session.task, form, 0, 1))
        for form in (rows, replace(rows, apart=False))
    )
    assert plain.documents is None and marked.documents.boundaries[1] == plain.tokens
    losses_of = [session.task.loss(session.model, batch)[0] for batch in (marked, plain)]
    torch.testing.assert_close(*losses_of)


def test_on_a_cpu_there_are_none(tmp_path):
    config = quick_config(tmp_path, "run.verify=off", "data.eval=null")
    session = open_session(config, World())
    assert capture_graphs(session, []) is None
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: true given, but on cpu"):
        run(quick_config(tmp_path, "engine.cuda_graphs=true"), World())
    config = quick_config(tmp_path, "engine.cuda_graphs=false", "run.name=no")
    run(config, World())
    assert losses(config.run_folder)


def test_a_process_tries_a_pass_once(session, monkeypatch):
    """And again one that kept the GPU busy, of other shapes, or of other adapters."""
    tried = []

    def trial(graph, stream, *, first):
        tried.append(graph.shapes[0][1])
        return _Trial(0.9 if graph.shapes[0][1] < WIDTH else 0.1, 0, 0)

    monkeypatch.setattr("trainer.memory.graphs._try", trial)
    monkeypatch.setattr("trainer.memory.graphs._tried", {})
    wide = record(session, batch_of(session, [96], 0))
    short = batch_of(session, [32], 0)
    short.inputs = {name: tensor[:, :32] for name, tensor in short.inputs.items()}
    short.targets = short.targets[:, :32]
    graph = record(session, short)
    for one in (wide, graph, wide, graph):
        _trial(session, one, None, first=False)
    assert tried == [96, 32, 96]
    adapter = next(iter(session.method.adapters.values()))
    adapter.g.requires_grad_(not adapter.g.requires_grad)
    _trial(session, graph, None, first=False)
    assert tried == [96, 32, 96, 32]


@pytest.mark.parametrize("refused", [True, False])
def test_only_a_capture_that_failed_is_tried_again(refused, session, monkeypatch):
    """And trials of before are forgotten then; a refusal needs no trial."""
    attempts, tried = [], {"before": _Trial(0.9, 0, 0)}

    def failed(*_):
        attempts.append(dict(tried))
        raise NoGraph("it failed")

    monkeypatch.setattr("trainer.memory.graphs._tried", tried)
    monkeypatch.setattr("trainer.memory.graphs._capture", failed)
    if not refused:  # as it would be on a CPU
        monkeypatch.setattr("trainer.memory.graphs._refusal", lambda *_: None)
    engine = session.config.engine.model_copy(update={"cuda_graphs": True})
    asked = replace(session, config=session.config.model_copy(update={"engine": engine}))
    with pytest.raises(UserError, match="on cpu" if refused else "it failed"):
        capture_graphs(asked, [])
    assert [len(known) for known in attempts] == ([] if refused else [1, 0])
    assert len(tried) == refused


def test_a_trial_without_memory_means_no_graphs(session, monkeypatch):
    graphs = "trainer.memory.graphs"

    def without_memory(*_):
        raise torch.OutOfMemoryError

    for name in ("Stream", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(f"{graphs}._refusal", lambda *_: None)
    monkeypatch.setattr(f"{graphs}.peak_bytes", lambda _: 0)
    monkeypatch.setattr(f"{graphs}.allowance", lambda *_: 1)
    monkeypatch.setattr(f"{graphs}._record", without_memory)
    engine = session.config.engine.model_copy(update={"cuda_graphs": True})
    asked = replace(session, config=session.config.model_copy(update={"engine": engine}))
    with pytest.raises(UserError, match="true given, but the memory does not suffice"):
        capture_graphs(asked, [batch_of(session, [96], 0)])
