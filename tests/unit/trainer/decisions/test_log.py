"""The record of decisions: closed parts, going on in the middle of one, reading them back."""

import json
import random
from unittest.mock import patch

import numpy as np
import pytest

from adapters.decision import Decision
from adapters.methods.registry import METHODS
from tests.helpers import losses, quick_config
from trainer.decisions import log as allocation
from trainer.decisions.log import AllocationLog
from trainer.decisions.replay import Replay
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.records.jsonl import DECISIONS, decision_files, open_decisions
from trainer.report.allocation_history import read_allocation
from trainer.run.run import run


def decision(step: int) -> Decision:
    return Decision(ranks={f"unit.{index}": (step * index) % 9 for index in range(20)})


def lelora():
    return METHODS["lelora"](METHODS["lelora"].Options(), 0)


def write(folder, steps, limit=2000, start=0):
    log = AllocationLog(folder, lelora(), start, limit)
    for step in steps:
        log.on_decision(step, decision(step))
    log.close()


def recorded(folder) -> list[dict]:
    found = []
    for file in decision_files(folder):
        with open_decisions(file) as stream:
            found += [json.loads(line) for line in stream]
    return found


def check(folder, steps):
    assert [line["step"] for line in recorded(folder)] == list(steps)
    assert all(line["ranks"] == decision(line["step"]).ranks for line in recorded(folder))


def test_parts_hold_every_decision_once_and_in_order(tmp_path):
    write(tmp_path, range(50))
    assert len(decision_files(tmp_path)) > 5
    assert (tmp_path / DECISIONS).stat().st_size <= 2000
    check(tmp_path, range(50))


@pytest.mark.parametrize("start", [0, 1, 7, 23, 49, 50])
def test_a_resumed_run_goes_on_wherever_it_is(tmp_path, start):
    write(tmp_path, range(50))
    write(tmp_path, range(start, 60), start=start)
    check(tmp_path, range(60))


@pytest.mark.parametrize("seed", range(5))
def test_a_crash_while_a_part_is_closed_loses_and_doubles_nothing(tmp_path, seed):
    """Before the part has its name, and before the file that it was made of is gone."""
    chance, start = random.Random(seed), 0
    for what, victim in (("replace", "allocation-0"), ("unlink", DECISIONS)):
        honest = getattr(allocation.Path, what)

        def crash(self, *arguments, honest=honest, victim=victim, **options):
            if self.name.lstrip(".").startswith(victim):
                raise KeyboardInterrupt
            return honest(self, *arguments, **options)

        log = AllocationLog(tmp_path, lelora(), start, 2000)
        with patch.object(allocation.Path, what, crash), pytest.raises(KeyboardInterrupt):
            for step in range(start, 99):
                log.on_decision(step, decision(step))
        log.close()
        reached = recorded(tmp_path)[-1]["step"] + 1
        start = chance.randrange(max(0, reached - 12), reached + 1)
    write(tmp_path, range(start, 99), start=start)
    check(tmp_path, range(99))


def test_only_the_newest_parts_stay(tmp_path):
    with patch.object(allocation, "_KEPT_PARTS", 3):
        write(tmp_path, range(100))
    assert len(decision_files(tmp_path)) == 4
    steps = [line["step"] for line in recorded(tmp_path)]
    assert steps == list(range(steps[0], 100)) and steps[0] > 50


def test_a_run_in_parts_is_replayed_and_drawn_like_one_in_a_piece(tmp_path):
    whole = quick_config(tmp_path, "run.name=whole", "run.steps=12", "method.kind=lelora")
    parts = quick_config(
        tmp_path, "run.name=parts", "run.steps=12", "method.kind=lelora", "log.decisions_mib=0.01"
    )
    again = quick_config(
        tmp_path, "run.name=again", "run.steps=12", "method.kind=lelora",
        f"method.replay={parts.run_folder}",
    )  # fmt: skip
    for config in (whole, parts, again):
        run(config, World())
    assert len(decision_files(parts.run_folder)) > 2
    assert recorded(parts.run_folder) == recorded(whole.run_folder) == recorded(again.run_folder)
    assert losses(again.run_folder) == losses(whole.run_folder)
    drawn = [read_allocation(config.run_folder, 8, 12) for config in (whole, parts)]
    assert np.array_equal(drawn[0].ranks.steps, drawn[1].ranks.steps)
    decision_files(parts.run_folder)[0].unlink()
    method = METHODS["lelora"](whole.method, 0)
    with patch.object(Replay, "_check"), pytest.raises(UserError, match="were not kept"):
        Replay(parts.run_folder, method, 0, 12)
    with patch.object(Replay, "_check"):
        Replay(parts.run_folder, method, recorded(parts.run_folder)[0]["step"], 12)


def test_a_damaged_part_is_named(tmp_path):
    write(tmp_path, range(50))
    part = decision_files(tmp_path)[1]
    part.write_bytes(part.read_bytes()[:-30])
    unit = {"layer": 0, "kind": "x", "out_features": 8, "in_features": 8}
    units = [{"name": f"unit.{index}", **unit} for index in range(20)]
    (tmp_path / "units.json").write_text(json.dumps(units))
    with pytest.raises(UserError, match=f"{part}: not readable"):
        read_allocation(tmp_path, 8, 50)
    method = METHODS["lelora"](quick_config(tmp_path, "method.kind=lelora").method, 0)
    with pytest.raises(UserError, match=r"method\.replay"):
        Replay(tmp_path, method, 0, 9)
