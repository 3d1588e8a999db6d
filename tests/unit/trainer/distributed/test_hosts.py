"""What each of several hosts says where something fails on another one (hosts are simulated)."""

import datetime
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch.distributed import HashStore

from trainer.distributed import failures
from trainer.distributed.failures import FailedElsewhere, report
from trainer.distributed.object_exchange import encoded
from trainer.distributed.world import World
from trainer.errors import EXIT_FAILED, EXIT_USAGE, UserError
from trainer.run import versions
from trainer.run.versions import refuse_other_versions


@dataclass(frozen=True)
class Hosts(World):
    """One rank of two hosts with two ranks each; the others' messages are given."""

    size: int = 4
    nodes: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3))
    messages: dict[int, Any] = field(default_factory=dict)
    theirs: Any = None

    def _gather_messages(self, value):
        return [self.messages.get(rank, value) for rank in range(self.size)]

    def _broadcast_message(self, value):
        return self.messages[0]

    def gather(self, value, group=None):
        return [value, None, self.theirs(value), None]


@pytest.mark.parametrize(("rank", "speaks"), [(0, False), (2, True), (3, False)])
def test_one_rank_of_every_other_host_says_why_the_run_ends(rank, speaks, capsys, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    message = [[EXIT_USAGE, "data.train: no such file"], []]
    for world, stage in (
        (Hosts(rank=rank, messages={1: message}), "all"),
        (Hosts(rank=rank, messages={0: [None, message[0]]}), "main"),
    ):
        if rank == 0 and stage == "main":
            continue  # the failing one itself
        with pytest.raises(FailedElsewhere) as found:
            if stage == "all":
                with world.all_or_none():
                    pass
            else:
                world.on_rank0(lambda: None)
        assert found.value.exit_code == EXIT_USAGE
        report(found.value)
        said, who = capsys.readouterr().err, 1 if stage == "all" else 0
        line = f"error: [rank {rank}] rank {who}, on another host: data.train: no such file\n"
        assert said == (line if speaks else "")


def test_a_failure_is_told_with_its_kind():
    sent = []

    class Sends(Hosts):
        def _gather_messages(self, value):
            sent.append(value)
            return [value] * self.size

    named = UserError("run.dir: \udcff")  # a byte that is no text
    for error in (UserError("run.dir: x"), ZeroDivisionError("by zero\nand more"), named):
        with pytest.raises(type(error)), Sends(rank=0).all_or_none():
            raise error
    assert sent[0][0] == (EXIT_USAGE, "run.dir: x")
    assert sent[1][0] == (EXIT_FAILED, "ZeroDivisionError: by zero")
    assert encoded(sent[2])  # or this rank would never arrive in the collective
    assert sent[2][0] == (EXIT_USAGE, r"run.dir: \udcff")


@pytest.mark.parametrize(
    ("rank", "local_rank", "lost", "speaks"),
    [
        (0, 0, [3], True),  # first of its host
        (1, 1, [3], False),
        (2, 0, [3], True),  # first of the other host
        (3, 1, [2], True),  # the first one of its host is lost
        (1, 1, [0, 2], True),
    ],
)
def test_every_host_names_the_lost_ranks_once(rank, local_rank, lost, speaks, monkeypatch, capsys):
    store = HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    monkeypatch.setattr(failures, "_GRACE", 0.3)
    monkeypatch.setattr(failures, "_POLL", 0.01)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    for other in {0, 1, 2, 3} - {rank, *lost}:
        store.set(f"noticed/{other}", "")
    failures.report_lost("timed out")
    names = ", ".join(map(str, lost))
    who = f" [rank {rank}]" if rank else ""
    assert capsys.readouterr().err == (
        f"error:{who} lost rank {names} (timed out)\n" if speaks else ""
    )


def test_a_lost_connection_is_told_without_the_librarys_advice(monkeypatch, capsys):
    monkeypatch.setattr(failures, "_in_process_group", lambda: True)
    monkeypatch.setattr(failures, "report_lost", lambda reason: print(reason))
    advice = "This is typically caused by a remote worker hanging. GLHF!"
    report(RuntimeError(f"[/gloo/pair.cc:56] Read error [10.0.0.1]:7: Connection reset. {advice}"))
    report(RuntimeError("[/gloo/unbound_buffer.cc:81] Timed out waiting 7ms for recv (gloo)"))
    assert capsys.readouterr().out.splitlines() == [
        "Read error [10.0.0.1]:7: Connection reset", "Timed out waiting 7ms for recv (gloo)",
    ]  # fmt: skip


def test_a_host_with_another_version_is_refused(monkeypatch):
    refuse_other_versions(Hosts(theirs=lambda mine: mine))
    for name in ("torch", "trainer/training/loop.py", "launch/train.py"):
        other = lambda mine, name=name: ({**mine[0], name: "another"}, "second")  # noqa: E731
        with pytest.raises(UserError, match=rf"^{name} of rank 2 on second is not that of rank 0"):
            refuse_other_versions(Hosts(theirs=other))
    with pytest.raises(UserError, match=r"^trainer/new\.py of rank 2"):
        refuse_other_versions(Hosts(theirs=lambda mine: ({**mine[0], "trainer/new.py": ""}, "x")))
    monkeypatch.setattr(versions, "_versions", lambda: pytest.fail("ranks of one host share it"))
    refuse_other_versions(World())
