"""What is said where the processes of a run cannot meet, or one of them is gone."""

import datetime
import socket

import pytest

from trainer.distributed import failures, process_group
from trainer.errors import UserError


def test_a_port_in_use_is_named_with_the_remedy(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for name, value in (
            ("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        with pytest.raises(
            UserError, match=rf"127\.0\.0\.1:{port}: .*in use.*; accepted: .*--master_port"
        ):
            process_group._rendezvous(datetime.timedelta(seconds=1))


def test_a_port_in_use_that_torch_finds_is_named_too(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("The server socket has failed to listen: EADDRINUSE, address in use")

    monkeypatch.setattr(process_group.dist, "init_process_group", refuse)
    monkeypatch.setattr(process_group, "_rendezvous", lambda _: {})
    monkeypatch.setattr(process_group, "configure_rank", lambda: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"in use.*; accepted: .*--master_port"):
        process_group.start("cpu", 1.0)


@pytest.mark.parametrize("kills", [0, 1])
def test_a_rank_that_the_system_killed_for_want_of_memory(kills, monkeypatch, capsys):
    """The kernel counts them; the rank itself says nothing."""
    monkeypatch.setattr(failures, "_KILLS", failures._kills() - kills)
    monkeypatch.setattr(failures, "_missing", lambda: ([1], True))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    failures.report_lost("Connection closed by peer")
    said = capsys.readouterr().err
    assert said.startswith("error: lost rank 1 (Connection closed by peer")
    assert ("for want of memory" in said) == bool(kills)
    assert len(said.splitlines()) == 1
