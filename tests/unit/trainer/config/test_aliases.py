"""Old names of keys: accepted for one release, with a note, also in what earlier runs recorded."""

import json

import pytest
import yaml

from tests.helpers import losses, quick_config
from trainer.checkpoint import store
from trainer.checkpoint.saved import read_saved
from trainer.config import aliases
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run, saved_config
from trainer.report.report import read_run
from trainer.run.run import run
from trainer.training.evaluation import evaluate_saved

TEXT = "model: {id: some/model}\ndata: {train: t.jsonl}\nengine: {kind: fsdp2%s}\n"
NOTE = (
    "note: engine.whole_blocks is now engine.unsharded_blocks; the old name is removed in the next"
)


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(aliases, "_noted", set())


def file(tmp_path, more):
    path = tmp_path / "c.yaml"
    path.write_text(TEXT % more)
    return path


@pytest.mark.parametrize(
    ("more", "overrides", "expected"),
    [
        (", whole_blocks: 3", [], 3),
        ("", ["engine.whole_blocks=3"], 3),
        (", whole_blocks: 3", ["engine.unsharded_blocks=4"], 4),
        (", unsharded_blocks: 4", ["engine.whole_blocks=3"], 3),
        (", whole_blocks: 1", ["engine.whole_blocks=2"], 2),
    ],
)
def test_an_old_name_sets_the_key_and_is_told_once(tmp_path, capsys, more, overrides, expected):
    for _ in range(2):
        config = load_config(file(tmp_path, more), overrides)
        assert config.engine.unsharded_blocks == expected
        assert "whole_blocks:" not in config.to_yaml().replace("unsharded_blocks:", "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(NOTE)


def test_other_ranks_are_silent_and_new_names_too(tmp_path, capsys, monkeypatch):
    load_config(file(tmp_path, ", unsharded_blocks: 3"), ["engine.unsharded_blocks=4"])
    monkeypatch.setenv("RANK", "1")
    load_config(file(tmp_path, ", whole_blocks: 3"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "overrides"),
    [
        (", whole_blocks: 3, unsharded_blocks: 3", []),
        ("", ["engine.whole_blocks=3", "engine.unsharded_blocks=3"]),
    ],
)
def test_both_names_are_refused(tmp_path, more, overrides):
    with pytest.raises(UserError, match=r"^engine.unsharded_blocks: given together with its old "):
        load_config(file(tmp_path, more), overrides)


def test_a_wrong_value_is_told_by_the_new_name(tmp_path):
    with pytest.raises(UserError, match=r"^engine.unsharded_blocks: -1 given"):
        load_config(file(tmp_path, ", whole_blocks: -1"))


def test_what_earlier_runs_recorded_is_read(tmp_path, capsys):
    """Resumed, evaluated, exported, reported: a run folder as version 0.1.0 left it."""
    overrides = ["run.name=old", "data.eval=left_out", "data.leave_out=8"]
    config = quick_config(tmp_path, *overrides)
    run(config, World())
    folder = config.run_folder
    checkpoint = store.newest(folder / "checkpoints")
    record = yaml.safe_load((folder / "config.yaml").read_text())
    record["engine"]["whole_blocks"] = record["engine"].pop("unsharded_blocks")
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["engine"]["whole_blocks"] = state["config"]["engine"].pop("unsharded_blocks")
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    store.write_manifest(checkpoint)

    assert "whole_blocks" not in read_run(folder).config["engine"]
    saved = read_saved(folder)
    assert "eval_loss" in evaluate_saved(saved_config(saved.state), World(), saved)
    export_run(folder, tmp_path / "out", World())
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().err == ""  # nobody need do anything about them
    run(load_config(folder / "config.yaml", ["run.steps=6"]), World())
    assert NOTE in capsys.readouterr().err
    assert len(losses(folder)) == 6
