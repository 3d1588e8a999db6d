"""What `engine.kind: auto` chooses, and why."""

import pytest

from tests.helpers import quick_config
from trainer.distributed.world import World
from trainer.engine import copy_engine_gather, fsdp2
from trainer.engine.peer import PeerEngine
from trainer.engine.select import choose, engine_class, make_engine
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.footprint import estimate
from trainer.model.hub import load_tokenizer
from trainer.run.remarks import describe_engine
from trainer.tasks.registry import TASKS

GPU = 140 * 2**30
DEEP = ["model.weights=random", "model.overrides.num_hidden_layers=20"]


def chosen(tmp_path, gpu, launcher="torchrun", size=2, *changes, nodes=None, peers=True):
    config = quick_config(tmp_path, "engine.kind=auto", *changes)
    task = TASKS["causal_lm"](config.task, load_tokenizer(config.model))
    nodes = nodes or (tuple(range(size)),)
    world = World(size=size, launcher=launcher, gpu_bytes=gpu, nodes=nodes, peers=peers)
    return choose(config, world, task)


def needed(tmp_path, spread, local_ranks=2):
    config = quick_config(tmp_path, *DEEP)
    task = TASKS["causal_lm"](config.task, load_tokenizer(config.model))
    backbone = build(config, task, World().device)
    return estimate(backbone, config, 2, spread, local_ranks=local_ranks).total


def test_ddp_where_the_backbone_fits_and_peer_where_it_fits_on_a_hosts_gpus(tmp_path):
    whole, part = needed(tmp_path, "whole"), needed(tmp_path, "blocks")
    kind, reason = chosen(tmp_path, int(whole / 0.59), "torchrun", 2, *DEEP)
    assert kind == "ddp" and "at most 60%" in reason
    for gpu in (int(whole / 0.61), int(part / 0.59)):
        kind, reason = chosen(tmp_path, gpu, "torchrun", 2, *DEEP)
        assert kind == "peer" and "more than 60%" in reason
    kind, reason = chosen(tmp_path, int(part / 0.61), "torchrun", 2, *DEEP)
    assert kind == "fsdp2" and "it still takes" in reason


def test_fsdp2_where_gpus_cannot_be_peers(tmp_path):
    gpu = int(needed(tmp_path, "whole") / 0.61)
    kind, reason = chosen(tmp_path, gpu, "torchrun", 2, *DEEP, peers=False)
    assert kind == "fsdp2" and "have no peer access" in reason
    kind, reason = chosen(tmp_path, gpu, "torchrun", 2, *DEEP, nodes=((0,), (1,)))
    assert kind == "fsdp2" and "each host has one GPU" in reason
    four = chosen(tmp_path, gpu, "torchrun", 4, *DEEP, nodes=((0, 1), (2, 3)))
    assert four[0] == "peer"


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("asked", ["auto", "peer"])
def test_auto_falls_back_where_windows_cannot_be_opened(tmp_path, monkeypatch, asked, opens):
    class Recorded:
        def __init__(self, config, world):
            self.reason, self.met = None, False

        obstacle = PeerEngine.obstacle

        def meet(self):
            self.met = True

    made = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("trainer.engine.select.choose", lambda *_: ("peer", "it fits on the host"))
    monkeypatch.setattr("trainer.engine.peer.possible", lambda world: opens)
    monkeypatch.setattr(
        "trainer.engine.select.engine_class", lambda kind, *_: made.append(kind) or Recorded
    )  # fmt: skip
    config = quick_config(tmp_path, f"engine.kind={asked}")
    engine = make_engine(config, World(), TASKS["causal_lm"])
    # What was asked for by name is never replaced.
    assert made[-1] == ("peer" if opens or asked == "peer" else "fsdp2")
    assert engine.met
    assert engine.reason.endswith("cannot share memory" if made[-1] == "fsdp2" else "the host")


@pytest.mark.parametrize(
    ("gpu", "launcher", "size", "changes", "expected"),
    [
        (0, "torchrun", 2, [], ("fsdp2", "no GPU")),
        (GPU, "deepspeed", 2, [], ("deepspeed", "its launcher")),
        (GPU, "torchrun", 2, ["engine.config=configs/deepspeed/zero3.json"], ("deepspeed", "given")),
        (GPU, "none", 1, [], ("single", "one process")),
        (0, "torchrun", 2, ["engine.kind=ddp"], ("ddp", "")),
    ],
)  # fmt: skip
def test_other_reasons(tmp_path, gpu, launcher, size, changes, expected):
    kind, reason = chosen(tmp_path, gpu, launcher, size, *changes)
    assert kind == expected[0] and expected[1] in reason


def test_a_json_without_a_launcher_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"engine.config: given without a launcher"):
        chosen(tmp_path, GPU, "none", 1, "engine.config=configs/deepspeed/zero3.json")


def test_copy_engines_are_refused_where_there_are_none(tmp_path):
    config = quick_config(tmp_path, "engine.kind=fsdp2", "engine.copy_engines=true")
    with pytest.raises(
        UserError, match=r"engine.copy_engines: true given, .* accepted: auto or false"
    ):
        engine_class("fsdp2")(config, World(size=2))


@pytest.mark.parametrize("wanted", ["auto", "true"])
def test_copy_engines_that_cannot_gather_are_left_or_refused(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(copy_engine_gather, "possible", lambda world: True)
    monkeypatch.setattr(copy_engine_gather, "gathering", lambda world, timeout: "not permitted")
    monkeypatch.setattr(fsdp2, "init_device_mesh", lambda *given: "NCCL's kernels")
    config = quick_config(tmp_path, "engine.kind=fsdp2", f"engine.copy_engines={wanted}")
    engine = engine_class("fsdp2")(config, World())
    if wanted == "true":
        with pytest.raises(UserError, match=r"copy_engines: true given, .*\(not permitted\); acc"):
            engine.meet()
    else:
        engine.meet()
        assert describe_engine(engine) == "fsdp2 (copy engines cannot gather: not permitted)"
        assert (engine._mesh, engine._gather) == ("NCCL's kernels", None)
