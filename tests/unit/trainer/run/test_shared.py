"""Hosts that do not see the same files."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helpers import TINY, quick_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run import shared
from trainer.run.shared import refuse_unshared
from trainer.session import open_data


@dataclass(frozen=True)
class TwoHosts(World):
    """Rank 0 of two; what rank 1 gathers is made by `theirs`."""

    size: int = 2
    theirs: Any = field(default=None)

    def gather(self, value, group=None):
        return [value, self.theirs(value)]

    def broadcast(self, value):
        return value

    def _gather_messages(self, value):
        return [value, [None, []]]


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_folder_that_hosts_do_not_share_is_refused(exists, tmp_path, monkeypatch):
    """The other host has the same path: a folder of its own."""
    monkeypatch.setattr(shared, "_PATIENCE", 0.0)
    folder = tmp_path / "runs/one"
    if exists:
        folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def on_the_other_host(mine):
        sees, _ = mine
        assert sees
        name = next(path.name for path in tmp_path.rglob(".rankcast-*"))
        return shared._sees(tmp_path / "elsewhere", name), "other"

    with pytest.raises(UserError, match=r"run\.dir: .*/runs/one is another folder for rank 1 on o"):
        refuse_unshared(folder, TwoHosts(theirs=on_the_other_host))
    assert sorted(tmp_path.rglob("*")) == before
    refuse_unshared(folder, TwoHosts(theirs=lambda mine: mine))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_relative_path_is_looked_for_from_where_each_rank_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_PATIENCE", 0.0)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    honest = os.getcwd

    def theirs(_):
        name = next(path.name for path in (tmp_path / "here").glob(".rankcast-*"))
        return shared._sees(tmp_path / "there", name), "other"

    assert honest() == str(tmp_path / "here")
    with pytest.raises(UserError, match="is another folder for rank 1"):
        refuse_unshared(shared.Path("runs/one"), TwoHosts(theirs=theirs))


def test_data_that_differ_between_hosts_are_refused(tmp_path):
    config = quick_config(tmp_path, f"model.id={TINY}")
    with pytest.raises(UserError, match=r"is not the same for rank 1 as for rank 0"):
        open_data(config, TwoHosts(theirs=lambda keys: ["other", *keys[1:]]))
    open_data(config, TwoHosts(theirs=lambda keys: keys))
