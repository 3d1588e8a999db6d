"""How blocks run: which compute again, which need no gradients, what follows lack of memory."""

import itertools
from dataclasses import replace

import pytest
import torch

from adapters.units import transformer_blocks
from tests.helpers import ALL, losses, quick_config
from trainer.config.data_options import DataOptions
from trainer.data.rows import Rows
from trainer.distributed.world import World
from trainer.errors import RunFailed
from trainer.memory import planner
from trainer.model.attention import VARLEN
from trainer.model.blocks import have_same_floats
from trainer.model.footprint import blocks_that_fit
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.base import Batch
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.training.loop import make_loader
from trainer.training.step import Training, train_step
from trainer.training.validation import make_validate


def test_no_more_blocks_are_kept_than_fit_and_no_fewer():
    for forward, backward, added, budget in [
        (50, 60, 7, 100), (60, 50, 7, 100), (50, 57, 7, 100), (50, 90, 7, 100), (10, 20, 1, 15),
    ]:  # fmt: skip
        needs = planner.Needs(forward, backward, added)
        blocks_that_fit = [n for n in range(81)
                   if max(forward + n * added, backward + max(0, n - 1) * added) <= budget]  # fmt: skip
        assert needs.offloaded(80, budget) == 0
        assert needs.saved(80, 0, budget) == max(blocks_that_fit, default=-1)


def test_as_many_blocks_stay_whole_as_find_room():
    cases = [(80, 10, 105), (80, 10, 9), (80, 10, -5), (3, 10, 1000), (5, 0, 100)]
    assert [blocks_that_fit(*case) for case in cases] == [10, 0, 0, 3, 0]


@pytest.mark.parametrize(
    ("choice", "held", "expected"),
    [("auto", 30, 3), ("auto", 140, 1), ("auto", 200, 0), (0, 30, 0)],
)
def test_what_the_plan_leaves_is_for_whole_blocks(tmp_path, monkeypatch, choice, held, expected):
    """In units of which the update needs 20 beside what is held, and forward and backward 81."""
    session = opened(tmp_path)
    unit = 12 * session.optimizer.numel // 20
    counts = []

    class Sharding:
        supports_unsharded_blocks, largest_block, unsharded_blocks = True, 30 * unit, 0

        def keep_unsharded(self, count):
            counts.append(count)
            self.unsharded_blocks = count

    class Probed:
        def to(self, device):
            return self

    needs = planner.Needs(50 * unit, 60 * unit, 7 * unit)
    session = replace(session, engine=Sharding(), world=World(device=torch.device("cuda")))
    session.config.engine.__dict__["unsharded_blocks"] = choice
    monkeypatch.setattr(planner, "_measure", lambda *_: (needs, 0))
    monkeypatch.setattr(planner, "allowance", lambda *_: 200 * unit)
    monkeypatch.setattr(planner, "held_bytes", lambda _: held * unit)
    monkeypatch.setattr(planner, "release", lambda _: None)
    plan = planner.make_plan(session, batch=Probed())
    assert (plan.saved, plan.unsharded, plan.peak) == (4, expected, (81 + 30 * expected) * unit)
    assert counts == ([0, expected] if choice == "auto" else [])


@pytest.mark.parametrize(
    ("budget", "peak", "probes", "whole"),
    [(40, 3, 1, True), (40, 20, 1, True), (40, 21, 1, False), (0.01, 3, 0, False)],
    ids=["little", "half", "more", "expected-to-be-more"],
)
def test_where_all_activations_are_few_one_probe_is_enough(
    tmp_path, monkeypatch, budget, peak, probes, whole
):
    session, made = opened(tmp_path), []
    session = replace(session, world=World(device=torch.device("cuda")))
    batch = Batch({"input_ids": torch.ones(2, 64, dtype=torch.long)}, torch.ones(2, 64), 128, 128)
    unit = 2**20

    def probe(session, batch):
        made.append(session.backbone.blocks.saved)
        return planner._Probe(0, (peak - 1) * unit, peak * unit, 0, 0.1)

    monkeypatch.setattr(planner, "_probe", probe)
    monkeypatch.setattr(planner, "_measure", lambda *_: (planner.Needs(unit, unit, 1), 0))
    monkeypatch.setattr(planner, "allowance", lambda *_: int(budget * unit))
    monkeypatch.setattr(planner, "release", lambda _: None)
    monkeypatch.setattr(type(batch), "to", lambda self, device: self)
    plan = planner.make_plan(session, batch=batch)
    assert made == [4] * probes
    if whole:
        assert (plan.saved, plan.offloaded, plan.peak) == (4, 0, peak * unit)
        assert session.backbone.blocks.saved == 4 and plan.budget == budget * unit
    else:
        assert plan.peak == planner.Needs(unit, unit, 1).peak(plan.saved)


@pytest.mark.parametrize("saved", [0, 1, 3, 4])
def test_the_last_blocks_keep_their_activations_and_nothing_else_changes(tmp_path, saved):
    session = opened(tmp_path)
    blocks = session.backbone.blocks
    assert len(blocks) == blocks.saved == 4  # on a CPU all keep them
    expected = gradients(session)
    blocks.keep(saved)
    assert blocks.saved == saved
    runs = [0] * 4
    for index, (_, block) in enumerate(transformer_blocks(session.model)):
        block.self_attn.register_forward_hook(lambda *_, i=index: runs.__setitem__(i, runs[i] + 1))
    torch.testing.assert_close(gradients(session), expected)
    assert runs == [2] * (4 - saved) + [1] * saved


def test_a_decoder_that_classifies_computes_its_blocks_again(tmp_path):
    rows = [f"the {'good' if i % 3 else 'bad'} apple number {i},{i % 3 > 0}" for i in range(40)]
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    found = []
    for setting in ("true", "false"):
        config = quick_config(
            tmp_path, "task.kind=sequence_classification", f"data.train={tmp_path}/labels.csv",
            "data.eval=null", f"run.name=checkpointing-{setting}", f"engine.activation_checkpointing={setting}",
        )  # fmt: skip
        run(config, World())
        found.append(losses(config.run_folder))
    assert found[0] == found[1]


def test_blocks_below_the_first_adapter_need_no_gradients(tmp_path):
    session = opened(tmp_path, "method.targets=model.layers.[23].*proj")
    needed = []
    for _, block in transformer_blocks(session.model):
        block.register_forward_hook(lambda _, __, out: needed.append(out.requires_grad))
    assert gradients(session).abs().sum() > 0
    assert needed == [False, False, True, True]


def test_the_largest_batch_has_the_shapes_of_a_real_one(tmp_path):
    session = opened(tmp_path)
    batch = planner.largest_batch(
        session.task, session.config.data, session.backbone.rows, [61] * 3, 3
    )
    assert batch.inputs["input_ids"].shape == (3, 61) and batch.weight == 3 * 60
    real = session.task.collate([[session.train_data[i]] for i in range(3)])
    assert batch.inputs.keys() == real.inputs.keys()
    packed = opened(tmp_path, "data.max_length=256", "data.packing=true")
    batch = planner.largest_batch(
        packed.task, packed.config.data, packed.backbone.rows, [256] * 2, 2
    )
    assert batch.inputs["input_ids"].shape == (2, 256)
    # Two documents: packed rows run with a mask, and that takes more.
    assert batch.inputs["position_ids"][0].tolist() == [*range(128), *range(128)]


LARGEST = {  # (keys of `data`, rows): lengths of the documents of every row
    "padded": ({"micro_batch_size": 3}, Rows(), [[40]] * 3),
    "end to end": ({"micro_batch_size": 3}, Rows(end_to_end=True), [[40, 30, 20]]),
    "more than there are": ({"micro_batch_size": 5}, Rows(end_to_end=True), [[40, 30, 20, 40, 40]]),
    "tokens, padded": ({"micro_batch_tokens": 128}, Rows(), [[32]] * 4),
    "tokens": ({"micro_batch_tokens": 128}, Rows(end_to_end=True), [[40, 40, 40, 8]]),
    "packed": (
        {"packing": True, "micro_batch_size": 2}, Rows(end_to_end=True), [[50, 50, 50, 50]],
    ),
    "packed, tokens": (
        {"packing": True, "micro_batch_tokens": 250}, Rows(end_to_end=True), [[50] * 5],
    ),
    "packed, tokens, padded": ({"packing": True, "micro_batch_tokens": 250}, Rows(), [[50, 33]] * 3),
    "few lengths": ({"micro_batch_size": 3}, Rows(end_to_end=True, few=4), [[40, 30, 20, 6]]),
}  # fmt: skip


@pytest.mark.parametrize("form", LARGEST)
def test_the_largest_batch_of_each_form(form, tokenizer):
    keys, rows, expected = LARGEST[form]
    data = DataOptions(train="-", max_length=100, **keys)
    task = CausalLM(CausalLMOptions(), tokenizer)
    batch = planner.largest_batch(task, data, rows, [40, 30, 20], data.micro_batch_size)
    found = [torch.arange(batch.targets.shape[1])] * len(batch.targets)
    positions = batch.inputs.get("position_ids", found)
    lengths = []
    for row in positions:
        starts = [i for i, position in enumerate(row.tolist()) if position == 0]
        lengths.append([b - a for a, b in itertools.pairwise([*starts, len(row)])])
    assert lengths == expected


def test_a_step_that_runs_out_of_memory_is_made_again_with_fewer_activations(
    tmp_path, monkeypatch, capsys
):
    expected = quick_config(tmp_path, "run.name=undisturbed", *FOUR_BLOCKS)
    run(expected, World())
    inner, calls = CausalLM.loss, []

    def loss(self, model, batch):
        calls.append(1)
        if len(calls) in (6, 7):  # in the middle of the second step, and again when it is retried
            inner(self, model, batch)[0].backward()  # what is there already must not count twice
            raise torch.OutOfMemoryError("no memory left")
        return inner(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", loss)
    config = quick_config(tmp_path, "run.name=disturbed", "log.progress=plain", *FOUR_BLOCKS)
    run(config, World())
    assert losses(config.run_folder) == losses(expected.run_folder)
    said = capsys.readouterr().out
    for saved in (3, 2):
        assert f"step 2: out of memory: {saved} of 4 blocks keep their activations" in said


def test_where_nothing_helps_it_says_so(tmp_path, monkeypatch):
    def loss(self, model, batch):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(CausalLM, "loss", loss)
    with pytest.raises(RunFailed, match=r"data.micro_batch_size: 2 sequences .* do not fit"):
        run(quick_config(tmp_path, *FOUR_BLOCKS), World())


def test_blocks_stop_staying_whole_before_activations_are_given_up(tmp_path, monkeypatch):
    session = opened(tmp_path)
    counts = []
    monkeypatch.setattr(session.engine, "keep_unsharded", counts.append)
    session.engine.unsharded_blocks = 3
    assert planner.reduce_plan(session) == "out of memory: no block stays unsharded from here"
    assert counts == [0] and session.backbone.blocks.saved == 4
    object.__setattr__(session.config.engine, "unsharded_blocks", 3)  # as under peer
    with pytest.raises(RunFailed, match=r"engine.unsharded_blocks: 3 given, but .* fewer, or 0"):
        raise planner.oom_error(session)


def test_what_was_asked_for_is_not_overridden(tmp_path):
    session = opened(tmp_path, "engine.activation_checkpointing=false")
    with pytest.raises(RunFailed, match=r"engine.activation_checkpointing: false given, but"):
        planner.reduce_plan(session)


def test_every_way_to_run_a_block_is_compiled(tmp_path, monkeypatch):
    """With and without gradients, a mask, a second sequence, training: none runs uncompiled."""
    monkeypatch.setattr("trainer.model.blocks.BACKEND", "aot_eager")
    torch._dynamo.reset()
    session = opened(tmp_path, "engine.compile=true")
    single = session.task.collate([[session.train_data[0]]])
    several = session.task.collate([[session.train_data[i]] for i in range(3)])
    packed = [session.train_data[0], session.train_data[1]]
    batches = [several, session.task.collate([packed])]
    if ALL:
        batches += [single, session.task.collate([packed] * 2)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for training in (True, False):
            session.model.train(training)
            for gradients in (True, False):
                for batch in batches:
                    with torch.set_grad_enabled(gradients):
                        loss, _ = session.task.loss(session.model, batch)
                    if gradients:
                        loss.backward()


@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
def test_no_trace_is_thrown_away(tmp_path, monkeypatch, attention):
    """Neither handles nor the numbers of a block are traced as inputs that turn out to be none."""
    monkeypatch.setattr("trainer.model.blocks.BACKEND", "aot_eager")
    torch._dynamo.reset()
    session = opened(tmp_path, "engine.compile=true")
    session.model.config._attn_implementation = attention
    torch._dynamo.utils.clear_compilation_metrics()
    packed = session.task.collate([[session.train_data[0], session.train_data[1]]])
    loss, _ = session.task.loss(session.model, packed)
    loss.backward()
    (program,) = torch._dynamo.utils.get_compilation_metrics()
    assert program.co_name in ("forward_with_checkpointing", "forward")  # by transformers' version
    assert not program.restart_reasons


def test_numbers_that_differ_between_blocks_are_no_constants():
    """Else each block would be a program of its own."""
    blocks = [torch.nn.Sequential(torch.nn.LayerNorm(4)) for _ in range(3)]
    assert have_same_floats(blocks)
    blocks[2][0].eps = 1e-3
    assert not have_same_floats(blocks)
    assert have_same_floats([*blocks[:2], blocks[2][0]])  # a block of another class


def test_sharded_ranks_do_not_go_on_alone(tmp_path, monkeypatch):
    """In the middle of a block there is nothing that they could agree on: it ends there."""

    def loss(self, model, batch):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(CausalLM, "loss", loss)
    session = opened(tmp_path)
    session.engine.collective_gather = True
    training = Training(session, make_loader(session, World()), 4, make_validate(session))
    met = []
    monkeypatch.setattr(World, "any", lambda self, flag: met.append(flag))
    with pytest.raises(RunFailed, match=r"engine.memory_fraction: 0.92 .* accepted: a lower"):
        train_step(training, 0)
    assert not met


FOUR_BLOCKS = ["model.weights=random", "model.overrides.num_hidden_layers=4"]


def opened(tmp_path, *changes):
    return open_session(quick_config(tmp_path, *FOUR_BLOCKS, *changes), World())


def gradients(session) -> torch.Tensor:
    """Of all adapters, for one batch."""
    for adapter in session.method.adapters.values():
        adapter.B.data.fill_(0.01)
    session.optimizer.zero_grad()
    batch = planner.largest_batch(
        session.task, session.config.data, session.backbone.rows, [64] * 2, 2
    )
    loss, _ = session.task.loss(session.model, batch)
    loss.backward()
    return session.optimizer.gradients.clone()
