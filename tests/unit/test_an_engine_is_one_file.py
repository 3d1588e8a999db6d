"""CONTRIBUTING's engine: its file and its line in the registry are all that it takes to train."""

import socket

import pytest

from tests.helpers import losses, quick_config
from tests.unit.one_file import example, registered, write_module
from trainer.config.engines import ENGINES, EngineEntry
from trainer.distributed import process_group
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.run import run


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> str:
    """The engine of CONTRIBUTING.md, registered; its name."""
    file, line = example("An engine")
    write_module(tmp_path, "toy_engines", "sharded", file)
    monkeypatch.syspath_prepend(tmp_path)
    kind, entry = registered(line, "trainer.engine", "toy_engines", EngineEntry=EngineEntry)
    monkeypatch.setitem(ENGINES, kind, entry)
    return kind


@pytest.fixture
def world(monkeypatch):
    """One rank in a process group, as torchrun would start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    yield process_group.start("cpu")
    process_group.stop()


def test_it_trains(tmp_path, sharded, world):
    ours = quick_config(tmp_path, f"engine.kind={sharded}", "run.name=ours")
    assert ours.engine.kind == sharded
    run(ours, world)
    single = quick_config(tmp_path, "run.name=single")
    run(single, World())
    assert losses(ours.run_folder) == losses(single.run_folder)
    assert (ours.run_folder / "adapter" / "adapter_model.safetensors").is_file()


def test_what_its_line_says_is_checked(tmp_path, sharded, monkeypatch):
    with pytest.raises(UserError, match=r"engine.unsharded_blocks: 2 given with engine.kind=shard"):
        quick_config(tmp_path, f"engine.kind={sharded}", "engine.unsharded_blocks=2")
    with pytest.raises(UserError, match=r"engine.kind: 'x' given; accepted: .*deepspeed, sharded"):
        quick_config(tmp_path, "engine.kind=x")
    with pytest.raises(UserError, match=r"engine.kind: sharded given without a launcher"):
        monkeypatch.delenv("RANK", raising=False)
        run(quick_config(tmp_path, f"engine.kind={sharded}"), World())
