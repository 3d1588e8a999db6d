"""What is shown of a run from its folder."""

import io
import json
import shutil
import time

import pytest
from rich.console import Console

from tests.helpers import ROOT, python, quick_config
from trainer.distributed.world import World
from trainer.records.heartbeat import Heartbeat
from trainer.report import watch
from trainer.run.run import run

METHODS = {
    "lora": ([], []),
    "lelora": (["method.kind=lelora"], ["locations", "primary: 28", "ranks", "by layer"]),
    "lalora": (["method.kind=lalora", "method.every=1"], ["ranks", "by layer", "before step 3"]),
    "weightlora": (["method.kind=weightlora", "method.warmup_steps=2"], ["survivors", "14 units"]),
}


def shown(folder) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(watch.view(folder))
    return console.file.getvalue()


@pytest.mark.parametrize("name", list(METHODS))
def test_a_run_is_shown_with_its_allocation(tmp_path, name):
    overrides, expected = METHODS[name]
    config = quick_config(tmp_path, f"run.name={name}", "run.eval_every=4", *overrides)
    run(config, World())
    text = shown(config.run_folder)
    for part in (f"{name}: done", "step 4 of 4", "loss", "tokens/s", "GiB", "eval_loss", *expected):
        assert part in text, part
    assert watch.exit_code(config.run_folder) == 0


@pytest.mark.parametrize(
    ("state", "code"), [("done", 0), ("interrupted", 75), ("failed", 1), (None, 3)]
)
def test_the_exit_code_says_how_a_run_stands(tmp_path, state, code):
    beat = Heartbeat(tmp_path)
    beat.beat(steps=10, step=3, loss=1.0, step_seconds=2.0, tokens_per_second=5.0, peak_memory_gib=1.0,
              active_parameters=1, trainable_parameters=2)  # fmt: skip
    if state is not None:
        beat.end(state, "why")
    assert python(ROOT / "launch/watch.py", str(tmp_path), "--once")[0] == code
    text = shown(tmp_path)
    assert "14 s to go" in text if state is None else f"{state} " in text and "(why)" in text


def test_a_run_that_was_killed_shows_no_sign_of_life(tmp_path):
    Heartbeat(tmp_path).beat(steps=10, step=3)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    (tmp_path / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time() - 7200}))
    assert "no heartbeat for 2.0 h" in shown(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    code, _, err = python(ROOT / "launch/watch.py", str(tmp_path))
    assert code == 2 and f"error: {tmp_path}: no heartbeat.json of a run" in err


def test_a_decision_that_is_being_written_is_left_out(tmp_path):
    config = quick_config(tmp_path, "method.kind=lelora")
    run(config, World())
    folder = tmp_path / "copy"
    shutil.copytree(config.run_folder, folder)
    with (folder / "allocation.jsonl").open("a") as stream:
        stream.write('{"step": 99, "ranks": {"mod')
    assert watch.allocation(folder) == watch.allocation(config.run_folder) != []


def test_a_sparkline_goes_from_the_least_to_the_largest():
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert watch.sparkline([5, 5]) == "▁▁"
    assert len(watch.sparkline(list(range(1000)), 60)) == 60
