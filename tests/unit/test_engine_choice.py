"""What `engine.kind: auto` chooses, and why."""

import pytest

from tests.helpers import quick_config
from trainer import architecture
from trainer.distributed import World
from trainer.engine import choose
from trainer.errors import UserError
from trainer.memory import estimate
from trainer.tasks import TASKS

GPU = 140 * 2**30


def chosen(tmp_path, gpu, launcher="torchrun", size=2, *changes):
    config = quick_config(tmp_path, "engine.kind=auto", *changes)
    task = TASKS["causal_lm"](config.task, architecture.load_tokenizer(config.model))
    return choose(config, World(size=size, launcher=launcher, gpu_bytes=gpu), task)


def test_ddp_where_the_backbone_fits_and_fsdp2_where_it_does_not(tmp_path):
    config = quick_config(tmp_path)
    task = TASKS["causal_lm"](config.task, architecture.load_tokenizer(config.model))
    world = World(size=2)
    needed = estimate(
        architecture.build(config, task, world.device), config, 2, shards=False
    ).total  # fmt: skip
    kind, reason = chosen(tmp_path, int(needed / 0.59))
    assert kind == "ddp" and "at most 60%" in reason
    kind, reason = chosen(tmp_path, int(needed / 0.61))
    assert kind == "fsdp2" and "more than 60%" in reason


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
