"""The estimate of memory: against measured jobs, and by what it has to follow."""

import pytest
import torch

from launch import estimate as command
from tests.helpers import python, quick_config, sample, save_mixture, save_random_model
from trainer.config.config import load_config, with_overrides
from trainer.device_memory import GIB
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.memory.estimate import predict, table
from trainer.memory.fake_probe import Probe, probe
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.session import open_data
from trainer.tasks.registry import TASKS

H200, H100 = int(139.8 * GIB), int(79.19 * GIB)
LLAMA, MIXTRAL = "configs/llama70b_random.yaml", "configs/mixtral_random.yaml"
LLAMA_8B = "configs/llama8b_random.yaml"
LONG_FP8 = ["model.quantization=fp8", "data.max_length=8192"]
ON_HOST = [*LONG_FP8, "engine.activation_offload=80", "engine.memory_fraction=0.95"]
PARTLY_ON_HOST = [*LONG_FP8, "engine.activation_offload=60", "engine.memory_fraction=0.95"]
PEER = ["engine.kind=peer", "engine.unsharded_blocks=0"]
FSDP2 = ["engine.kind=fsdp2", "engine.unsharded_blocks=0", "engine.copy_engines=false"]
TWELVE = ["model.quantization=none", "model.overrides.num_hidden_layers=12"]
TWENTY_FOUR = ["model.quantization=none", "model.overrides.num_hidden_layers=24"]

MEASURED = [  # configuration, GPUs, overrides, their kind, blocks that kept activations, GiB
    (LLAMA, 1, [], H200, 80, 101.1),
    (MIXTRAL, 1, [], H200, 32, 52.5),
    (LLAMA, 2, [*FSDP2, *TWELVE], H200, 12, 28.8),
    (LLAMA, 2, [*FSDP2, *TWENTY_FOUR], H200, 24, 47.2),
    (LLAMA, 2, [*FSDP2, *LONG_FP8], H200, 55, 125.8),
    (LLAMA, 1, ON_HOST, H200, 39, 129.3),
    (LLAMA, 2, [*PEER, *PARTLY_ON_HOST], H100, 19, 73.2),
    (LLAMA, 2, ["engine.kind=peer", *PARTLY_ON_HOST], H200, 61, 130.8),
    (LLAMA, 2, [*PEER, *TWELVE], H100, 12, 27.5),
    (LLAMA, 2, [*PEER, *TWENTY_FOUR], H100, 24, 45.9),
    (LLAMA, 2, [*PEER, "model.overrides.num_hidden_layers=12"], H100, 12, 18.3),
    (LLAMA, 2, ["engine.kind=deepspeed", *TWELVE], H100, 12, 27.9),
    (LLAMA, 2, ["engine.kind=deepspeed", *TWENTY_FOUR], H100, 24, 46.9),
    (LLAMA, 4, ["engine.kind=fsdp2", "model.quantization=none"], H200, 80, 124.5),
    (LLAMA, 4, ["engine.kind=peer", "model.quantization=none"], H200, 80, 125.8),
    (LLAMA, 4, ["engine.kind=deepspeed", "model.quantization=none"], H200, 80, 100.3),
    (LLAMA, 4, ["engine.kind=peer", *PARTLY_ON_HOST], H200, 73, 130.9),
    (LLAMA, 1, ["model.overrides.num_hidden_layers=8", "data.max_length=8192"], H100, 8, 21.8),
    (LLAMA_8B, 1, [], H100, 32, 19.5),
    (LLAMA_8B, 1, ["data.max_length=512"], H100, 32, 8.2),
]  # fmt: skip
"""Peak of tensors over training steps; torch 2.11, 2026-11-23 to 26."""


USUAL = [MEASURED[number] for number in (0, 1, 2, 4, 5, 6, 9, 11, 13, 17, 18, 19)]
"""Every engine, kind of GPU and way to keep activations, and both sizes of what is left out."""


@pytest.mark.parametrize("job", sample(MEASURED, *USUAL))
def test_measured_jobs_are_met_within_a_twentieth(job):
    path, gpus, changes, memory, saved, gib = job
    found = predict(load_config(path, changes), gpus, memory)
    assert found.peak / GIB == pytest.approx(gib, rel=0.05)
    assert abs(found.saved - saved) <= 2  # of the plan too
    assert sum(found.parts().values()) == found.peak and found.fits


ROW = ["data.packing=false", "data.micro_batch_size=null", "data.micro_batch_tokens=7808"]
GRAPHED = [  # configuration, overrides, GiB that the allocator held with CUDA graphs of all rows
    ("configs/llama135m_random.yaml", ["data.max_length=2720", *ROW], 4.17),
    ("configs/llama1b_random.yaml", ["data.max_length=2720", *ROW], 10.63),
    (LLAMA_8B, [], 20.67),
    (LLAMA_8B, ["data.max_length=2720", *ROW], 32.07),
]  # fmt: skip
"""GSM8K, padding-free or packed, one H100; torch 2.11, 2026-11-28."""


@pytest.mark.parametrize(("path", "changes", "gib"), GRAPHED)
def test_rows_of_real_records_are_met_within_a_tenth(path, changes, gib):
    found = predict(load_config(path, changes), 1, H100)
    assert found.graphed / GIB == pytest.approx(gib, rel=0.1)
    assert "steps in them hold" in table(found)


def small(tmp_path, *changes, gpus=1, memory=H200):
    settings = ["data.max_length=512", "engine.kind=auto", "model.dtype=bfloat16", *changes]
    return predict(quick_config(tmp_path, *settings), gpus, memory)


def test_copy_engines_take_a_communicator_more(tmp_path):
    config = quick_config(tmp_path, "engine.kind=fsdp2", "data.max_length=512")
    local_ranks, far = (predict(config, 4, H200, hosts=hosts).allowance for hosts in (1, 2))
    without = small(tmp_path, "engine.kind=fsdp2", "engine.copy_engines=false", gpus=4).allowance
    assert local_ranks > far == without == small(tmp_path, "engine.kind=peer", gpus=4).allowance


def test_more_gpus_take_less_of_each_under_fsdp2_and_the_same_under_ddp(tmp_path):
    peaks = {
        kind: [small(tmp_path, f"engine.kind={kind}", gpus=n).states.backbone for n in (2, 4, 8)]
        for kind in ("fsdp2", "deepspeed", "ddp")
    }
    assert peaks["fsdp2"][0] == 2 * peaks["fsdp2"][1] == 4 * peaks["fsdp2"][2]
    assert peaks["deepspeed"] == peaks["fsdp2"]
    assert len(set(peaks["ddp"])) == 1


def test_auto_chooses_the_engine_that_a_run_would(tmp_path):
    assert small(tmp_path).engine == "single"
    assert small(tmp_path, gpus=2).engine == "ddp"
    deep = ["model.weights=random", "model.overrides.num_hidden_layers=20", "engine.kind=auto"]
    memory = int(small(tmp_path, *deep).states.total / 0.61)
    found = small(tmp_path, *deep, gpus=2, memory=memory)
    assert found.engine == "peer" and "more than 60%" in found.reason
    found = predict(quick_config(tmp_path, *deep), 2, memory, hosts=2)
    assert found.engine == "fsdp2" and "each host has one GPU" in found.reason
    with pytest.raises(UserError, match=r"engine.kind: single given with 2 processes"):
        small(tmp_path, "engine.kind=single", gpus=2)


def test_checkpointing_follows_the_configuration_and_the_room():
    layers = "model.overrides.num_hidden_layers=8"
    saved = {
        (choice, memory): predict(
            load_config(LLAMA, [layers, f"engine.activation_checkpointing={choice}"]),
            1,
            memory * GIB,
        ).saved
        for choice in ("auto", "true", "false")
        for memory in (8, 17, 140)
    }
    assert [saved["auto", memory] for memory in (8, 140)] == [0, 8]
    assert 0 < saved["auto", 17] < 8
    assert {saved["true", m] for m in (8, 17, 140)} == {0}
    assert {saved["false", m] for m in (8, 17, 140)} == {8}


def test_a_plan_is_the_planners():
    found = Probe(inputs=10, forward=40, backward=60, added=(7, 7, 7, 7))
    assert [found.plan(budget) for budget in (50, 60, 67, 68, 1000)] == [
        (saved, 0) for saved in (0, 1, 2, 2, 4)
    ]
    assert found.peaks(0) == (40, 60) and found.peaks(3) == (61, 74)
    # A block of 2 bytes of input and 7 more: two places on the host.
    assert found.peaks(2, 2) == (40 + 14 + 7 - 2, 60 + 7 + 7 - 2)
    assert found.plan(72, 18) == (2, 2) and found.plan(71, 18) == (1, 2)
    assert found.plan(60, 18) == (1, 0) and found.plan(1000, 18) == (4, 0)


@pytest.mark.parametrize("kind", sample(["fsdp2", "peer"], "fsdp2"))
def test_what_is_left_lets_blocks_stay_whole(kind):
    bf16 = [f"engine.kind={kind}", "model.quantization=none"]
    found = predict(load_config(LLAMA, bf16), 4, H200)
    assert found.saved == 80 and 10 < found.unsharded < 30
    room = int(0.92 * H200) - found.allowance
    block = 2 * (8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192)  # bytes
    assert found.states.block == pytest.approx(block, rel=1e-4)
    assert found.peak <= room < found.peak + 1.05 * block
    assert sum(found.parts().values()) == found.peak
    assert f"; {found.unsharded} stay unsharded" in table(found)
    less = predict(load_config(LLAMA, [*bf16, "engine.unsharded_blocks=0"]), 4, H200)
    assert found.peak - less.peak == found.unsharded * found.states.block
    # Asked for, they come first.
    more = predict(load_config(LLAMA, [*bf16, "engine.unsharded_blocks=40"]), 4, H200)
    assert more.unsharded == 40 and more.saved < 80 and more.fits
    all_ = predict(load_config(LLAMA, [*bf16, "engine.unsharded_blocks=80"]), 4, H200)
    assert "with engine.unsharded_blocks=auto it would" in table(all_)
    with pytest.raises(UserError, match=r"engine.unsharded_blocks: 81 given; accepted: at most 80"):
        predict(load_config(LLAMA, [*bf16, "engine.unsharded_blocks=81"]), 4, H200)
    # Short sequences and large adapters: then the update takes most.
    large = [*bf16, "data.max_length=256", "method.rank=128"]
    updating = predict(load_config(LLAMA, large), 4, H200)
    assert updating.unsharded > 10 and updating.fits
    assert updating.peak == updating.phases["update"] <= room
    none = predict(load_config(LLAMA, bf16), 2, H200)
    assert none.unsharded == 0 and none.saved < 80


def test_advice_where_it_does_not_fit():
    config = load_config(LLAMA, ["engine.activation_checkpointing=false"])
    assert "activation_checkpointing=auto" in table(predict(config, 1, 80 * GIB))
    config = load_config(LLAMA)
    assert "engine.kind=fsdp2 on 8 GPUs it would" in table(predict(config, 1, 24 * GIB))
    assert "lower data.micro_batch_size" in table(predict(config, 1, 4 * GIB))


@pytest.mark.parametrize("compiled", [True, False])
def test_activations_grow_with_the_tokens_and_nothing_else_does(tmp_path, compiled):
    compile_ = f"engine.compile={'auto' if compiled else 'false'}"
    padded = "data.padding_free=false"  # else the second record is as long as the data has one
    one = small(tmp_path, compile_, padded, "data.micro_batch_size=1")
    two = small(tmp_path, compile_, padded, "data.micro_batch_size=2")
    assert two.probe.inputs == 2 * one.probe.inputs
    assert two.probe.added[0] == pytest.approx(2 * one.probe.added[0], rel=0.02)
    assert two.states == one.states


def test_a_compiled_block_keeps_less(tmp_path):
    assert small(tmp_path).probe.added[0] < small(tmp_path, "engine.compile=false").probe.added[0]


def test_what_is_kept_uncompiled_is_what_autograd_keeps(tmp_path):
    """The same block on real tensors, float32 on the CPU, micro-batch 2."""
    config = quick_config(
        tmp_path, "data.max_length=64", "model.dtype=float32", "model.quantization=nf4"
    )
    task = TASKS["causal_lm"](config.task, load_tokenizer(config.model))
    expected = probe(build(config, task, torch.device("cpu")), config, task, compiled=False)
    from trainer.distributed.world import World
    from trainer.session import open_session

    session = open_session(config, World())
    weights = {t.untyped_storage().data_ptr() for t in session.model.parameters()}
    block = session.model.model.layers[0]
    x = torch.randn(2, 64, session.model.config.hidden_size, requires_grad=True)
    positions = session.model.model.rotary_emb(x, torch.arange(64)[None])
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool).tril()  # as packed sequences have one
    shared = weights | {t.untyped_storage().data_ptr() for t in (x, mask, *positions)}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x, position_embeddings=positions, attention_mask=mask)
    assert output.requires_grad
    held = sum(size for pointer, size in saved.items() if pointer not in shared)
    assert expected.added[0] == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "bert", "mixtral", "qwen3_moe"])
def test_other_architectures(tmp_path, kind):
    changes = []
    if kind in ("mixtral", "qwen3_moe"):
        folder = save_mixture(tmp_path / kind, kind)
        changes = ["method.train_router=true"]
    else:
        folder = save_random_model(tmp_path / kind, kind, max_position_embeddings=512)
    if kind == "bert":
        changes = ["task.kind=sequence_classification", "data.packing=false"]
    found = small(
        tmp_path, f"model.id={folder}", "method.targets=all-linear", "method.dropout=0.1",
        "method.dropout_on=input", "model.quantization=nf4", *changes,
    )  # fmt: skip
    tokens = 2 * 512 * 64 * 2  # bytes of the hidden states
    assert found.probe.inputs == 2 * tokens
    assert all(5 * tokens < added < 100 * tokens for added in found.probe.added)
    assert found.fits


def test_blocks_below_the_first_adapter_keep_nothing(tmp_path):
    folder = save_random_model(tmp_path / "model", "llama")
    found = small(
        tmp_path, f"model.id={folder}", r"method.targets='model\.layers\.1\.mlp\.\w+'"
    ).probe  # fmt: skip
    assert found.added[0] == 0 < found.added[1]


def test_the_command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["estimate.py", *arguments])
        return command.main()

    small_job = [LLAMA, "model.overrides.num_hidden_layers=4"]
    assert run(*small_job, "--gpus", "2", "engine.kind=fsdp2") == 0
    out = capsys.readouterr().out
    for part in ("fsdp2, 2 GPU(s)", "4 of 4 blocks", "backbone", "gathered layers", "139.80 GiB"):
        assert part in out
    assert out.splitlines()[-1] == "fits"
    assert run(*small_job, "--memory", "8") == 1
    assert "does not fit: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3", "--hosts", "2"], "--hosts: 2 given with --gpus 3"),
        (["--memory", "nan"], "--memory: nan given"),
        (["engine.kind=zero9"], "engine.kind: 'zero9' given"),
        (["engine.device=cpu"], "engine.device: cpu given"),
        (["model.nothing=1"], "model.nothing"),
        (["--gpus", "2", "engine.config=/nowhere.json"], "engine.config: /nowhere.json: No such"),
    ],
)
def test_the_command_refuses_nonsense(monkeypatch, arguments, message):
    monkeypatch.setattr("sys.argv", ["estimate.py", LLAMA, *arguments])
    with pytest.raises(UserError, match=message):
        command.main()


def test_a_mistake_is_one_line():
    code, _, err = python("launch/estimate.py", LLAMA, "--gpus", "0")
    assert code == 2 and err.splitlines() == ["error: --gpus: 0 given; accepted: 1 or more"]


def test_graphs_take_the_activations_again(tmp_path):
    without, maybe, graphs = (
        small(tmp_path, f"engine.cuda_graphs={value}") for value in ("false", "auto", "true")
    )
    assert without.peak == maybe.peak and not without.possible_graphs
    assert maybe.possible_graphs == graphs.graphs > graphs.probe.saved(graphs.saved) > 0
    assert graphs.peak == without.peak + graphs.graphs == sum(graphs.parts().values())
    assert "CUDA graphs" in table(graphs) and "more" in table(maybe).splitlines()[-2]
    for change in ("engine.activation_checkpointing=true", "engine.kind=fsdp2"):
        assert not small(tmp_path, change, gpus=1 + ("fsdp2" in change)).possible_graphs
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: true given with engine\.kind=fsdp2"):
        quick_config(tmp_path, "engine.cuda_graphs=true", "engine.kind=fsdp2")


@pytest.mark.parametrize("size", [1, 3])
def test_records_tell_what_the_longest_micro_batch_needs(tmp_path, size):
    """As sequences of the length of the longest records, however long `data.max_length` is."""
    changes = [f"data.micro_batch_size={size}", "data.batch_size=6", "engine.device=auto"]
    config = quick_config(tmp_path, "data.max_length=512", "engine.kind=auto", *changes)
    _, _, records, _ = open_data(config, World())
    longest = sorted(records.lengths)[-size:]
    assert max(longest) < 512
    known = predict(config, 1, H200, records=records)
    if size == 1:
        by_hand = predict(with_overrides(config, [f"data.max_length={longest[0]}"]), 1, H200)
        assert known.probe == by_hand.probe
    assert known.peak < predict(config, 1, H200).peak
